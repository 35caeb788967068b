"""Writes a folder that is ready to ship: a model, how to run it, and a test that it does."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from onnxq.deploy.base import Source
from onnxq.deploy.edge_linux import edge_linux
from onnxq.deploy.mobile import mobile
from onnxq.deploy.qnn import qnn
from onnxq.deploy.readme import readme
from onnxq.deploy.smoke import make_smoke
from onnxq.deploy.web import web
from onnxq.devices import Place
from onnxq.errors import OnnxqError, suggest
from onnxq.ops.library import find_library
from onnxq.pipeline import Progress
from onnxq.runtime import custom_ops as registered
from onnxq.runtime import names_operators, without_kernels
from onnxq.samples import Preprocessing
from onnxq.sampling import Sampling
from onnxq.scratch import scratch
from onnxq.storage import load_proto
from onnxq.target import load_target, target_names
from onnxq.text import MAX_TOKENS

KINDS = {"mobile": mobile, "web": web, "edge-linux": edge_linux, "qnn": qnn}
WITH_KERNELS = ("edge-linux",)  # of the operators of `ai.onnxq`; others run their functions
_SAID = re.compile(r"^PASS$|: the largest difference is ")
_PATIENCE = 900  # seconds that a smoke test may take
_SAMPLES = 2  # a source must have one; a second one tells rows of a batch from a batch


@dataclass(frozen=True)
class Deployment:
    """`files` are sizes in bytes by path; `smoke` is what the smoke test said, or why it did not
    run (`tested`: whether it did)."""

    folder: str
    kind: str
    files: Mapping[str, int]
    tested: bool
    smoke: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def deploy(
    model: str | Path,
    kind: str,
    output: str | Path | None = None,
    *,
    samples: Any = None,
    preprocess: Preprocessing = None,
    states: Mapping[str, str] | None = None,
    tokenizer: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    threads: int = 0,
    custom_ops: Sequence[str | Path] = (),
    place: Place | None = None,
    options: Mapping[str, str] | None = None,
    runtime: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Deployment:
    """Write the folder `output` for `kind`: mobile, web, edge-linux or qnn; default `MODEL-KIND`
    beside the model.

    The smoke test's sample is the first of `samples`, anything `open_samples` takes, or made up
    from the model. `threads` is how many the session options allow, 0 leaves it to the runtime.
    `place` is where a qnn model is compiled, `options` its provider's own options; `runtime` the
    folder of onnxruntime-web's files, which a web page then carries. `custom_ops` are libraries of
    operators that the model uses; the folder gets copies. For edge-linux that of onnxq's own is
    among them where the model has such operators; other kinds compute them by their functions.

    Nothing is there before the smoke test passed, where its provider is at hand. Raises OnnxqError
    for bad input, a folder that holds something, and a smoke test that fails.
    """
    if kind not in KINDS:
        raise OnnxqError(f"there is no kind {kind!r} of deployment{suggest(kind, KINDS)}")
    path = Path(model)
    if not path.exists():
        raise OnnxqError(f"there is no model {str(path)!r}")
    destination = Path(output) if output else path.with_name(f"{path.stem}-{kind}")
    _check_output(destination)
    libraries = [Path(library).absolute() for library in custom_ops]
    kernels = nullcontext() if kind in WITH_KERNELS else without_kernels()
    if kind in WITH_KERNELS and names_operators(path):
        libraries.append(_kernels_of(path))
    with registered(libraries), kernels, scratch(destination.absolute().parent) as room:
        progress("read the model", 0, 4)
        proto = load_proto(path)
        given = Source(
            path, proto, path.stem, threads, _session_config(proto), options or {}, libraries,
            Path(runtime) if runtime else None, place,
        )  # fmt: skip
        progress("run the sample", 1, 4)
        sampling = Sampling(path, proto, preprocess, states, 1, seed, None, tokenizer, max_tokens)
        drawn = sampling.made_up(1)[0] if samples is None else sampling.given(samples, _SAMPLES)
        sample = next(iter(sampling.carry(drawn)))
        smoke = make_smoke(proto, path, sample, None)
        folder = room / "folder"
        folder.mkdir()
        progress(f"write for {kind}", 2, 4)
        made = KINDS[kind](given, smoke, folder)
        made.smoke.write(folder / "smoke")
        (folder / "session.json").write_text(made.session.to_json(), "utf-8")
        progress("smoke test", 3, 4)
        said = _test(folder, made.test) if made.test else ""
        (folder / "README.md").write_text(readme(kind, given, made, said, folder), "utf-8")
        if destination.exists():
            destination.rmdir()
        os.rename(folder, destination)
    files = {
        str(file.relative_to(destination)): file.stat().st_size
        for file in sorted(destination.rglob("*"))
        if file.is_file()
    }
    return Deployment(str(destination), kind, files, bool(said), said or made.why_not, made.notes)


def _kernels_of(model: Path) -> Path:
    """The library that a model with operators of `ai.onnxq` is shipped with."""
    library = find_library()
    if library is None:
        raise OnnxqError(
            f"{str(model)!r} has operators of onnxq, and no library of them was built here to ship "
            "with it: install onnxq again where there is a C++ compiler, or quantize without --ops"
        )
    return library


def _check_output(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OnnxqError(f"the output {str(folder)!r} exists and is no folder; choose another")
    if folder.is_dir() and any(folder.iterdir()):
        raise OnnxqError(f"the folder {str(folder)!r} holds something; empty it or choose another")
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise OnnxqError(f"there is no folder {str(parent)!r} to write to; make it first")
    if not os.access(parent, os.W_OK):
        raise OnnxqError(f"the folder {str(parent)!r} cannot be written to")


def _session_config(model: onnx.ModelProto) -> Mapping[str, str]:
    """What the target that the model was made for asks of a session."""
    known = {entry.key: entry.value for entry in model.metadata_props}
    name = known.get("onnxq.target", "")
    return load_target(name).session if name in target_names() else {}


def _test(folder: Path, command: Sequence[str]) -> str:
    """What the smoke test says, without what a provider prints of its own.

    Raises OnnxqError when it does not pass.
    """
    run = partial(subprocess.run, cwd=folder, capture_output=True, text=True, errors="replace")
    without_bytecode = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = run([*command, "smoke_test.py"], env=without_bytecode, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        late = f"the smoke test took longer than {_PATIENCE} s; nothing written"
        raise OnnxqError(late) from None
    except OSError as error:
        raise OnnxqError(f"{command[0]}: {error.strerror or error}; nothing written") from None
    if done.returncode:
        words = " ".join((done.stdout + done.stderr).split())[-300:]
        raise OnnxqError(f"the smoke test fails here: {words}; nothing written")
    return "\n".join(filter(_SAID.search, done.stdout.splitlines()))
