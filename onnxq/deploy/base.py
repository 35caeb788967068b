"""What every kind of folder is made of."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import onnx

from onnxq import ops
from onnxq.deploy.options import SessionOptions
from onnxq.deploy.smoke import Smoke
from onnxq.devices import Place
from onnxq.feeds import InputSpec, input_specs, output_specs
from onnxq.storage import data_paths, load_proto, save_proto
from onnxq.tensors import initializers, is_external


@dataclass(frozen=True)
class Source:
    """The model that is deployed, and what the user said of it."""

    path: Path
    model: onnx.ModelProto
    name: str
    threads: int
    config: Mapping[str, str]
    options: Mapping[str, str]
    custom_ops: Sequence[Path]
    runtime: Path | None
    place: Place | None

    @property
    def inputs(self) -> list[InputSpec]:
        return input_specs(self.model)

    @property
    def outputs(self) -> list[InputSpec]:
        return output_specs(self.model)


@dataclass(frozen=True)
class Made:
    """A folder but for its README. `test` runs the smoke test; empty where nothing here can,
    for the reason `why_not`."""

    model: str
    session: SessionOptions
    smoke: Smoke
    use: str
    test: tuple[str, ...]
    why_not: str = ""
    notes: tuple[str, ...] = ()


def session_options(source: Source, folder: Path, provider: str) -> SessionOptions:
    """With copies of the libraries in the folder."""
    for library in source.custom_ops:
        shutil.copyfile(library, folder / library.name)
    libraries = tuple(library.name for library in source.custom_ops)
    return SessionOptions(provider, source.options, source.threads, source.config, libraries)


def copy_model(source: Source, folder: Path) -> str:
    """The model as `model.onnx`, byte for byte where its weights are in it."""
    if data_paths(source.path):
        model = load_proto(source.path, ops.WITH_KERNELS)
        for tensor in filter(is_external, initializers(model)):
            where = next(entry for entry in tensor.external_data if entry.key == "location")
            where.value = str((source.path.parent / where.value).absolute())
        save_proto(model, folder / "model.onnx")
    else:
        shutil.copyfile(source.path, folder / "model.onnx")
    return "model.onnx"


def text_of(template: str, **values: str) -> str:
    """A template, filled in where there are values; a line whose value is empty goes.

    `.in` behind a name marks Python that is none before it is filled in.
    """
    folder = resources.files("onnxq") / "deploy" / "templates"
    file = folder / f"{template}.in"
    text = (file if file.is_file() else folder / template).read_text("utf-8")
    for name in (name for name, value in values.items() if not value):
        text = text.replace(f"${name}\n", "")
    return Template(text).substitute(values) if values else text


def fill(folder: Path, template: str, **values: str) -> None:
    """Write a template to the folder; the first folder of its path is that of its kind."""
    place = folder / template.split("/", 1)[-1]
    place.parent.mkdir(exist_ok=True)
    place.write_text(text_of(template, **values), "utf-8")
