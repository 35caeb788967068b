"""A place where models run: an execution provider and the Python that has it.

Every job runs in a process apart: a provider may live in another environment than onnxq's, as
OpenVINO's wheel does, on another kind of CPU, and may take its process down with it.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, suggest
from onnxq.ops.library import find_library
from onnxq.runtime import CPU, Ends, default_threads, names_operators
from onnxq.scratch import scratch
from onnxq.storage import save_proto

Array = NDArray[Any]
Feed = Mapping[str, Array]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "dml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
}
_WORKER = Path(__file__).with_name("worker.py")
_PATIENCE = 600.0  # seconds that one job may take
_SHOWN = 300  # characters of what a process that died had said


@dataclass(frozen=True)
class Place:
    """An execution provider, the command that runs its Python, and the provider's own options.

    >>> Place.parse("openvino@/opt/openvino/bin/python").command
    ('/opt/openvino/bin/python',)
    """

    provider: str
    command: tuple[str, ...] = (sys.executable,)
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, options: Mapping[str, str] | None = None) -> Place:
        """`NAME`, or `NAME@COMMAND` for another Python: of a virtual environment, say.

        Raises OnnxqError for a provider that onnxruntime does not know.
        """
        name, _, command = text.partition("@")
        provider = PROVIDERS.get(name.lower(), name)
        if provider not in PROVIDERS.values():
            raise OnnxqError(f"there is no execution provider {name!r}{suggest(name, PROVIDERS)}")
        return cls(provider, tuple(shlex.split(command)) or (sys.executable,), options or {})

    @property
    def name(self) -> str:
        return next(short for short, long in PROVIDERS.items() if long == self.provider)


@dataclass(frozen=True)
class Job:
    """A model to run, and what to bring back of it.

    `feeds` hold an array per input. `seconds` is how long to time the last of them, in turns with
    `rivals`: other models, each with a feed of its own. `profile` asks
    for the kernels that ran, `optimized` for the graph that the runtime made of the model, which
    providers that compile do not give.
    """

    model: str | Path | onnx.ModelProto
    feeds: Sequence[Feed] = ()
    optimize: bool = True
    threads: int | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    custom_ops: Sequence[str | Path] = ()
    seconds: float = 0.0
    rivals: Sequence[tuple[onnx.ModelProto, Feed]] = ()
    profile: bool = False
    optimized: bool = False


@dataclass(frozen=True)
class Kernel:
    """One operator that ran: its node's name, its type, who ran it, and for how long."""

    name: str
    op: str
    provider: str
    microseconds: float


@dataclass
class Answer:
    """What came of a job. `error` is empty where all went well; `stage` says how far it came.

    `placement` is the provider that took each node, by the node's name: nodes that the runtime
    folded away or fused before it asked are missing. `outputs` has an entry per feed, `rivals_ms`
    per rival, a time per round as in `latencies_ms`. `machine` is as `uname -m` names it.
    """

    error: str = ""
    stage: str = ""
    version: str = ""
    machine: str = ""
    providers: tuple[str, ...] = ()
    placement: dict[str, str] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    outputs: list[dict[str, Array]] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    rivals_ms: list[list[float]] = field(default_factory=list)
    load_ms: float = 0.0
    optimized: onnx.ModelProto | None = None

    @property
    def loaded(self) -> bool:
        return self.stage not in ("start", "load")


def is_emulated(place: Place, answer: Answer) -> bool:
    """Whether what answered only plays the device: its times are not the device's.

    So does a CPU of another kind than this one, and Qualcomm's NPU on x86-64, where none is.
    """
    foreign = bool(answer.machine) and answer.machine != platform.machine()
    return foreign or (place.provider == PROVIDERS["qnn"] and platform.machine() == "x86_64")


def ask(
    place: Place,
    jobs: Sequence[Job],
    *,
    patience: float = _PATIENCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Run each job at a place; one answer each, in order.

    A job that takes the process down, or longer than `patience` seconds, gets an answer that says
    so, and the next one a new process. Raises OnnxqError where the place itself does not work.
    """
    with scratch() as folder:
        names = [f"job-{number}" for number in range(len(jobs))]
        ends = [_prepare(folder / n, place, job) for n, job in zip(names, jobs, strict=True)]
        lost: dict[str, str] = {}
        while waiting := [n for n in names if n not in lost and not _done(folder / n)]:
            (folder / "jobs.json").write_text(json.dumps(waiting), "utf-8")
            (folder / "ready.json").unlink(missing_ok=True)
            end = _work(
                place, folder, waiting, patience, lambda n: progress(len(names) - n, len(names))
            )
            left = [n for n in waiting if not _done(folder / n)]
            if left and not (folder / "ready.json").exists():
                raise OnnxqError(f"{shlex.join(place.command)} does not run onnxruntime: {end}")
            if left:
                lost[left[0]] = end
        progress(len(names), len(names))
        return [
            Answer(error=lost[n], stage="crash") if n in lost else _read(folder / n, e)
            for n, e in zip(names, ends, strict=True)
        ]


def _done(folder: Path) -> bool:
    return (folder / "answer.json").exists()


def _prepare(folder: Path, place: Place, job: Job) -> Ends:
    folder.mkdir()
    proto = job.model if isinstance(job.model, onnx.ModelProto) else None
    if proto is None:
        path = Path(job.model)
        proto = onnx.load(path, load_external_data=False)
        where = str(path.absolute())
    else:
        where = "model.onnx"
        save_proto(proto, folder / where)
    ends = Ends.of_model(proto)
    for number, feed in enumerate(job.feeds):
        np.savez(folder / f"sample-{number}.npz", **ends.codes(feed))  # type: ignore[arg-type]
    for number, (rival, feed) in enumerate(job.rivals):
        save_proto(rival, folder / f"rival-{number}.onnx")
        codes = Ends.of_model(rival).codes(feed)
        np.savez(folder / f"rival-{number}.npz", **codes)  # type: ignore[arg-type]
    request = {
        "model": where,
        "rivals": [f"rival-{number}.onnx" for number in range(len(job.rivals))],
        "provider": place.provider,
        "options": dict(place.options),
        "samples": len(job.feeds),
        "optimize": job.optimize,
        "threads": job.threads or default_threads(),
        "config": dict(job.config),
        "custom_ops": [str(Path(library).absolute()) for library in job.custom_ops],
        "kernels": _kernels(place, [proto, *(rival for rival, _ in job.rivals)]),
        "seconds": job.seconds,
        "profile": job.profile,
        "optimized": "optimized.onnx" if job.optimized else "",
    }
    (folder / "job.json").write_text(json.dumps(request), "utf-8")
    return ends


def _kernels(place: Place, models: Sequence[onnx.ModelProto]) -> dict[str, str]:
    """The library of operators that models name, and the kind of machine that it is for.

    Another provider than the CPU's computes them by their functions, on its device.
    """
    library = find_library()
    if library is None or place.provider != CPU or not any(map(names_operators, models)):
        return {}
    return {
        "library": str(library), "system": platform.system(), "machine": platform.machine(),
    }  # fmt: skip


def _work(
    place: Place,
    folder: Path,
    names: Sequence[str],
    patience: float,
    progress: Callable[[int], None],
) -> str:
    """Let a process work until it ends or a job takes too long; how it ended, for people."""
    said = folder / "said.txt"
    command = [*place.command, str(_WORKER), str(folder)]
    with said.open("wb") as stream:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )
        except OSError as error:
            return f"{error.strerror or error}"
        with process:
            left, since = len(names), time.monotonic()
            while process.poll() is None:
                time.sleep(0.01)
                now = sum(not _done(folder / n) for n in names[len(names) - left :])
                if now != left:
                    left, since = now, time.monotonic()
                    progress(left)
                elif time.monotonic() - since > patience:
                    process.kill()
                    process.wait()
                    return f"took longer than {patience:g} s"
    words = " ".join(said.read_text("utf-8", errors="replace").split())[-_SHOWN:]
    ended = (
        f"signal {-process.returncode}"
        if process.returncode < 0
        else f"exit code {process.returncode}"
    )
    return f"the process ended with {ended}" + (f": {words}" if words else "")


def _read(folder: Path, ends: Ends) -> Answer:
    row = json.loads((folder / "answer.json").read_text("utf-8"))
    answer = Answer(
        error=row.get("error", ""),
        stage=row["stage"],
        version=row["version"],
        machine=row.get("machine", ""),
        providers=tuple(row.get("providers", ())),
        placement=row.get("placement", {}),
        kernels=[Kernel(*kernel) for kernel in row.get("kernels", ())],
        latencies_ms=row.get("latency_ms", []),
        rivals_ms=row.get("rivals_ms", []),
        load_ms=row.get("load_ms", 0.0),
    )
    names = row.get("outputs", [])
    for path in sorted(folder.glob("output-*.npz"), key=lambda p: int(p.stem[7:])):
        with np.load(path) as arrays:
            made = dict(zip(names, (arrays[f"arr_{i}"] for i in range(len(names))), strict=True))
        answer.outputs.append(ends.real(made))
    if (folder / "optimized.onnx").exists():
        answer.optimized = onnx.load(folder / "optimized.onnx")
    return answer
