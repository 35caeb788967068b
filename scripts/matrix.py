"""The matrix models × presets × providers: one JSON line for each, as `verdicts --json` writes it.

A line says whether the model runs there, what check had said, and how near its answer is to the
float model on the CPU and to the same model on the CPU. Lines that are there are not made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.devices import Answer, Job, Place, ask
from onnxq.devices.happened import compare
from onnxq.devices.judge import judge
from onnxq.devices.verdicts import CheckReport
from onnxq.errors import OnnxqError
from onnxq.synthesize import synthesize
from onnxq.target import Target

Feed = Mapping[str, NDArray[Any]]
AT_ONCE = 10  # models per question
PATIENCE = 300.0  # seconds: an emulated CPU and a simulated NPU take their time


@dataclass
class Line:
    """Of one model on one provider. `elsewhere` counts nodes on the CPU (None: not to be known);
    the differences are relative to the largest value of an output (None: no outputs)."""

    model: str
    preset: str
    place: str
    target: str
    ran_on: str
    said: str
    happened: str
    error: str
    nodes: int
    elsewhere: int | None
    agree: tuple[int, int]
    reasons: list[str]
    cosine_to_float: float | None = None
    cosine_to_cpu: float | None = None
    difference_to_float: float | None = None
    difference_to_cpu: float | None = None


def matrix(
    paths: Sequence[Path],
    places: Mapping[str, tuple[Place, Target]],
    samples: Path | None,
    out: Path,
    n: int = 1,
) -> Iterator[Line]:
    """Every line that is missing in `out`, written as soon as it is known.

    `paths` are `MODEL.onnx`, the float models, and `MODEL.PRESET.onnx`; `samples` has `MODEL.npz`
    of real samples, of which `n` are run, or made-up ones where it has none.
    """
    text = out.read_text("utf-8") if out.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    known = {(line["model"], line["preset"], line["place"]) for line in lines}
    for name in dict.fromkeys(_split(path)[0] for path in paths):
        own = [path for path in paths if _split(path)[0] == name]
        missing = {
            label: [path for path in own if (*_split(path), label) not in known] for label in places
        }
        if not any(missing.values()):
            continue
        original = next(path for path in own if _split(path) == (name, "float"))
        feeds = _feeds(original, samples, n)
        here = Place.parse("cpu")
        expected = _answers(here, [original], feeds)[0]
        at_home = dict(zip(own, _answers(here, own, feeds), strict=True))
        for label, (place, target) in places.items():
            for start in range(0, len(missing[label]), AT_ONCE):
                part = missing[label][start : start + AT_ONCE]
                same = place == here and target.name == "cpu"
                answers = [at_home[p] for p in part] if same else _answers(place, part, feeds)
                for path, answer in zip(part, answers, strict=True):
                    line = _line(path, label, place, target, answer)
                    line.cosine_to_float, line.difference_to_float = distance(expected, answer)
                    line.cosine_to_cpu, line.difference_to_cpu = distance(at_home[path], answer)
                    with out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(line)) + "\n")
                    yield line


def _split(path: Path) -> tuple[str, str]:
    """Model and preset."""
    from onnxq.recipe import preset_names

    name, _, preset = path.stem.rpartition(".")
    return (name, preset) if preset in preset_names() else (path.stem, "float")


def _feeds(original: Path, samples: Path | None, n: int) -> Sequence[Feed]:
    path = samples / f"{original.stem}.npz" if samples else None
    if path is None or not path.exists():
        return list(synthesize(onnx.load(original), n=n, path=original)[0])[:n]
    shapes = {tensor.name: tensor.shape for tensor in g.load(original).inputs}
    with np.load(path) as arrays:  # samples follow each other along the first axis
        return [
            {key: np.array_split(array, len(array) // shapes[key][0])[k]
             for key, array in arrays.items()}
            for k in range(n)
        ]  # fmt: skip


def _answers(place: Place, paths: Sequence[Path], feeds: Sequence[Feed]) -> list[Answer]:
    jobs = [
        Job(g.to_proto(g.load(path)), feeds, threads=1, optimized=place.name == "cpu")
        for path in paths
    ]
    try:
        return ask(place, jobs, patience=PATIENCE)
    except OnnxqError as error:
        raise SystemExit(f"{place.name}: {error}") from error


def _line(path: Path, label: str, place: Place, target: Target, answer: Answer) -> Line:
    graph = g.load(path)
    report = CheckReport(str(path), target.name, place.provider, judge(graph, target))
    compare(report, graph, place, answer)
    whys = [v for v in report.verdicts if v.kind in ("falls back", "will not run")]
    elsewhere = report.elsewhere if answer.placement else None
    return Line(
        *_split(path), label, target.name, report.ran_on, foretells(report), happened(report),
        report.error, len(report.verdicts), elsewhere, report.agreement,
        list(dict.fromkeys(f"{v.op}: {v.reason}" for v in whys))[:8],
    )  # fmt: skip


def foretells(report: CheckReport) -> str:
    return "does not run" if not report.runs else "whole" if report.whole else "in part"


def happened(report: CheckReport) -> str:
    if report.error:
        return "does not run"
    return "in part" if report.elsewhere else "whole"


def distance(expected: Answer, answer: Answer) -> tuple[float | None, float | None]:
    """The lowest cosine of an output, and the largest difference ÷ its largest value."""
    cosines, differences = [], []
    for said, got in zip(expected.outputs, answer.outputs, strict=False):
        for name, value in said.items():
            a, b = (np.asarray(x, np.float64).ravel() for x in (value, got[name]))
            norms = np.linalg.norm(a) * np.linalg.norm(b)
            if a.size and np.abs(a).max() > 0:
                cosines.append(float(a @ b / norms) if norms > 0 else 0.0)
                differences.append(float(np.abs(a - b).max() / np.abs(a).max()))
    return min(cosines, default=None), max(differences, default=None)
