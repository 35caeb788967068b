"""Quantizes an exported folder: every ONNX file in it, all other files as they are.

Names are kept, so that what loads the folder (`optimum.onnxruntime`) loads the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxq.api import quantize
from onnxq.api.inputs import Source
from onnxq.api.quantization import SYNTHETIC_SAMPLES
from onnxq.errors import OnnxqError, one_line
from onnxq.feeds import input_specs
from onnxq.pipeline import Progress
from onnxq.proof import VERIFICATION_SAMPLES
from onnxq.recipe import Recipe, load_recipe
from onnxq.report import Report
from onnxq.samples import Samples, open_samples
from onnxq.sampling import Sampling
from onnxq.scratch import scratch
from onnxq.seq2seq import CUTS, decoder_feeds, encoder_of
from onnxq.storage import data_paths, load_proto
from onnxq.text import MAX_TOKENS, is_text, takes_tokens


@dataclass
class FolderResult:
    """`reports` by the path of each ONNX file within the folder; `copied` are the other files."""

    folder: str
    output: str
    reports: dict[str, Report] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        return [f"{name}: {text}" for name, made in self.reports.items() for text in made.warnings]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def quantize_folder(
    folder: str | Path,
    preset: str = "int8-static",
    *,
    samples: Source = None,
    output: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Sequence[str] = (),
    progress: Progress = lambda what, done, total: None,
    **options: Any,
) -> FolderResult:
    """Quantize every ONNX file of a folder that Hugging Face Optimum exported, in a new folder.

    `samples` is best a text file, which goes through the folder's tokenizer; without it each model
    gets samples made up for it. A decoder that listens to encoder_model.onnx is fed what that says
    of its samples, and text that the float decoder writes itself. `output` defaults to
    `<folder>.<preset>` beside the folder, and must not exist. `options` are those of `quantize`.

    Raises OnnxqError, with nothing written, where `quantize` does for one of the files.
    """
    source = Path(folder)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe or preset), settings)
    models = _models(source)
    place = Path(output) if output else source.absolute().with_name(_named(source, chosen))
    _check_output(source, place)
    result = FolderResult(str(source), str(place))
    ours = {path.resolve() for model in models for path in (model, *data_paths(model))}
    with scratch(place.absolute().parent) as room:
        staged = room / "folder"
        staged.mkdir()
        for number, model in enumerate(models):
            inside = model.relative_to(source)
            (staged / inside).parent.mkdir(parents=True, exist_ok=True)

            def told(what: str, done: int, total: int, name: str = str(inside)) -> None:
                progress(f"{name}: {what}", done, total)

            progress(str(inside), number, len(models))
            try:
                made = quantize(
                    model, recipe=chosen, output=staged / inside, progress=told,
                    **_samples(model, samples, options),
                )  # fmt: skip
            except OnnxqError as error:
                raise OnnxqError(f"{inside}: {error}") from None
            made.report.output = str(place / inside)
            result.reports[str(inside)] = made.report
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            if file.resolve() not in ours:
                copy = staged / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
                result.copied.append(str(file.relative_to(source)))
        os.rename(staged, place)
    return result


def _models(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise OnnxqError(f"there is no folder {str(folder)!r}")
    models = sorted(folder.rglob("*.onnx"))
    if not models:
        raise OnnxqError(
            f"the folder {str(folder)!r} holds no ONNX file; make one with `onnxq export`"
        )
    config = folder / "config.json"
    try:
        known = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    except (OSError, ValueError) as error:
        raise OnnxqError(f"{str(config)!r} cannot be read: {one_line(error)}") from None
    if not isinstance(known, dict):
        raise OnnxqError(f"{str(config)!r} holds no settings but a {type(known).__name__}")
    return models


def _named(folder: Path, recipe: Recipe) -> str:
    return f"{folder.absolute().name}.{recipe.name}"


def _check_output(folder: Path, place: Path) -> None:
    if place.exists() or place.is_symlink():
        raise OnnxqError(f"the output {str(place)!r} exists; remove it, or choose another --output")
    parent = place.absolute().parent
    if not parent.is_dir():
        raise OnnxqError(f"there is no folder {str(parent)!r} to write to; make it first")
    if not os.access(parent, os.W_OK):
        raise OnnxqError(f"the folder {str(parent)!r} cannot be written to")
    if parent.resolve().is_relative_to(folder.resolve()):
        raise OnnxqError(f"the output {str(place)!r} is within the input; choose another --output")


def _samples(model: Path, source: Source, options: dict[str, Any]) -> dict[str, Any]:
    """What `quantize` is told of one file: the options, changed where its samples need it."""
    specs = input_specs(load_proto(model))
    encoder = encoder_of(model, specs)
    if encoder is not None:
        kept = {k: v for k, v in options.items() if k not in ("tokenizer", "max_tokens", "states")}
        return kept | {"samples": _decoder_samples(model, encoder, source, options)}
    if is_text(source) and not takes_tokens(specs):
        kept = {k: v for k, v in options.items() if k != "tokenizer"}
        return kept | {"samples": None}
    return options | {"samples": source}


def _decoder_samples(
    model: Path, encoder: Path, source: Source, options: dict[str, Any]
) -> Samples:
    seed, threads = options.get("seed", 0), options.get("threads")
    sampling = Sampling(
        encoder, load_proto(encoder), options.get("preprocess"), None, 1, seed, threads,
        options.get("tokenizer"), options.get("max_tokens", MAX_TOKENS),
    )  # fmt: skip
    count = -(-(options.get("limit", 128) + VERIFICATION_SAMPLES) // len(CUTS))
    tokens = takes_tokens(input_specs(load_proto(encoder)))
    if source is None or (is_text(source) and not tokens):
        heard, _ = sampling.made_up(min(count, SYNTHETIC_SAMPLES))
    else:
        heard = sampling.given(source, count)
    feeds = decoder_feeds(model, encoder, heard, seed, threads)
    name = f"{heard.name} through {encoder.name}, with text that the decoder wrote"
    return open_samples(feeds, input_specs(load_proto(model)), name=name, synthesised=True)
