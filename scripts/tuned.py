"""What tuning costs and gives: `onnxq sensitivity` and `onnxq tune` on real models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accuracy

import onnxq
from onnxq import cache
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

IMAGES = ("imagenet", "cifar", "kws", "mnist", "faces")
COLUMNS = ["model", "taken", "drop", "÷ float", "uniform INT8 that holds ÷ float"]


def sensitivity(bench: accuracy.Bench, name: str) -> list[Any]:
    """Wall time of all of it ÷ as many runs of the float model over the same samples."""
    with cache.disabled():
        said = onnxq.sensitivity(bench.float_model(name), samples=bench.feeds(name))
    return [name, len(said.layers), said.evaluations, said.ratio]


def samples(bench: accuracy.Bench, name: str, most: int = 400) -> list[accuracy.Feed]:
    """As many as the calibration split has of images, up to `most`."""
    task = accuracy.TASKS[name]
    if task not in IMAGES[:-1]:
        return bench.feeds(name)
    arguments = SimpleNamespace(data=bench.shared / "data", n=most)
    x, _ = bench.score_module.classification(arguments, task, "calib")
    key = Session(bench.float_model(name)).inputs[0]
    return [{key: x[k : k + 1]} for k in range(len(x))]


def tune(bench: accuracy.Bench, chosen: list[str]) -> Iterator[list[Any]]:
    """`--max-drop 1%` on each model: what is taken, beside the fastest preset that holds as it is.

    Drops are of held-out samples.
    """
    for name in accuracy.TASKS:
        model: Path = bench.float_model(name)
        if not model.exists() or (chosen and name not in chosen):
            continue
        try:
            found = onnxq.tune(
                model, samples=samples(bench, name), max_drop="1%",
                output=bench.scratch / f"{name}.tuned.onnx",
                presets=("int8-static", "int8-dynamic", "int8-weights"),
            )  # fmt: skip
        except OnnxqError as error:
            yield [name, f"refused: {error}", "", "", ""]
            continue
        integer = ("int8-static", "int8-dynamic")
        uniform = [c for c in found.candidates if c.name in integer and found.holds(c) and c.ratio]
        fastest = min(uniform, key=lambda c: c.ratio or 0.0, default=None)
        said = f"{fastest.name} {fastest.ratio:.3f}" if fastest else "none holds"
        yield [name, found.chosen.name, f"{found.chosen.drop:.2%}", found.chosen.ratio, said]
