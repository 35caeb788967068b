"""What `onnxq probe` takes and what its target is worth.

    scripts/benchmark probe FIGURE... --shared DIR [--model NAME]... [--target FILE]

    time     seconds of a probe of this CPU, all operators; of a second one, from its cache
    latency  models quantized with the probed target ÷ with the shipped `cpu` target

or all. --target takes a target that was probed before. DIR holds models/, data/ and score/score.py.
Both models run in turns, every other round the other way round; a ratio is the median of the ratios
of all rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from accuracy import CALIBRATION, TASKS, Bench, load_score
from integer import RESTING, in_turns
from rich.console import Console
from rich.table import Table
from weights_models import Line

import onnxq
from onnxq.devices import Place
from onnxq.errors import OnnxqError
from onnxq.probing import probe
from onnxq.runtime import Session

PRESETS = ("int8-static", "int8-dynamic", "int4")
SAME = 0.01  # of a ratio: what the same kernels differ by from one run to the next
CPU = Place("CPUExecutionProvider")
console = Console()


def seconds(bench: Bench, given: argparse.Namespace) -> Iterator[Line]:
    for what, bound in (("first", 300.0), ("second, from the cache", 2.0)):
        begun = time.perf_counter()
        probe(CPU)
        value = time.perf_counter() - begun
        met = "yes" if value <= bound else "no"
        yield Line(f"probe of this CPU, {what}: seconds", f"≤ {bound:g}", f"{value:.1f}", met)


def latency(bench: Bench, given: argparse.Namespace) -> Iterator[Line]:
    target = given.target or bench.scratch / "probed.toml"
    if given.target is None:
        target.write_text(probe(CPU).target, "utf-8")
    ratios = []
    for name in given.models or TASKS:
        for preset in PRESETS:
            ratio = _ratio(bench, name, preset, target)
            if ratio is not None:
                ratios.append(ratio)
                yield _line(f"{name}, {preset}: latency, probed ÷ cpu", ratio)
    if ratios:
        yield _line("geometric mean", float(np.exp(np.mean(np.log(ratios)))))


def _ratio(bench: Bench, name: str, preset: str, target: Path) -> float | None:
    """None where neither target quantizes a model."""
    feeds = bench.feeds(name)
    paths = [bench.scratch / f"{name}.{preset}.{kind}.onnx" for kind in ("cpu", "probed")]
    for path, device in zip(paths, ("cpu", str(target)), strict=True):
        try:
            onnxq.quantize(
                bench.float_model(name), preset, samples=feeds, limit=CALIBRATION, output=path,
                target=device,
            )  # fmt: skip
        except OnnxqError as error:
            console.print(f"{name}, {preset}, {device}: {error}", markup=False)
            return None
    shipped, probed = (Session(path, config=RESTING) for path in paths)
    times = in_turns([shipped, probed], feeds[-1])
    return float(np.median(times[1] / times[0]))


def _line(what: str, ratio: float) -> Line:
    return Line(what, "≤ 1.0", f"{ratio:.3f}", "yes" if ratio <= 1 + SAME else "no")


FIGURES: dict[str, Callable[[Bench, argparse.Namespace], Iterator[Line]]] = {
    "time": seconds,
    "latency": latency,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark probe", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("figures", nargs="+", choices=[*FIGURES, "all"], metavar="FIGURE")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--model", action="append", default=[], dest="models")
    parser.add_argument("--target", type=Path)
    given = parser.parse_args(arguments)
    table = Table("what", "target", "measured", "met", title="probe", title_justify="left")
    score = load_score(given.shared)
    with tempfile.TemporaryDirectory(prefix="onnxq-probe-") as scratch:
        os.environ["ONNXQ_CACHE"] = str(Path(scratch) / "cache")  # a first run is one
        bench = Bench(given.shared, Path(scratch), score)
        for name in FIGURES if "all" in given.figures else given.figures:
            for row in FIGURES[name](bench, given):
                console.print(*row, sep=" | ", soft_wrap=True, highlight=False, markup=False)
                table.add_row(*row)
    console.print(table)
