"""Figures of the integer forms: each beside its target.

    scripts/benchmark integer FIGURE... --shared DIR

    floats      operators of models made of integers alone that compute with floats
    bits        what the runtime says, optimizations off and on, one and two threads, against
                integers of any size
    agreement   top-1 of the integers against the same plan with floats between quantizers
    embeddings  cosine of MiniLM's embeddings to float
    bounds      errors of the polynomials for GELU and exp, and of the square root
    fuse    latency of the form that `fuse-integer` writes ÷ that of the QDQ form it was made from,
            and ÷ float; and how far their answers are apart. One thread, and one on each core

or all. DIR holds models/, data/ and score/score.py. All three models run in turns; a ratio is the
median of the ratios of all rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import integer_only
import numpy as np
from accuracy import CALIBRATION, Bench, load_score
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from weights_models import Line

import onnxq
from onnxq import cache
from onnxq.feeds import Feed
from onnxq.recipe import preset_text
from onnxq.runtime import Session

SECONDS, ROUNDS = 20.0, 400
RESTING = {"session.intra_op.allow_spinning": "0"}  # or idle sessions hold the cores of the others
FUSED = (
    ("mobilenet_v1_0.75_224", "int8-static"),
    ("mobilenet_v1_0.25_224", "int8-static"),
    ("cifar10_resnet20", "int8-static"),
    ("all-MiniLM-L6-v2", "int8-static"),
    ("all-MiniLM-L6-v2", "int8-smooth"),
)
console = Console()


# ── the fast form ────────────────────────────────────────────────────────────────────────────────


def fuse(bench: Bench) -> Iterator[Line]:
    for name, preset in FUSED:
        paths = [bench.float_model(name), *both_forms(bench, name, preset)]
        for what, feed in inputs(bench, name):
            for threads in sorted({1, os.cpu_count() or 1}):
                sessions = [Session(path, threads=threads, config=RESTING) for path in paths]
                alone, qdq, fused = in_turns(sessions, feed)
                label = f"{name}, {preset}{what}, {threads} threads: latency ÷"
                yield line(f"{label} QDQ", 1.0, float(np.median(fused / qdq)))
                yield line(f"{label} float", 0.7, float(np.median(fused / alone)))
            yield Line(
                f"{name}, {preset}{what}: largest difference of answers to QDQ", "a rounding step",
                f"{farthest(*sessions[1:], feed):.2g}", "",
            )  # fmt: skip


def both_forms(bench: Bench, name: str, preset: str) -> list[Path]:
    """The preset with every layer quantized, and the same with `fuse-integer` after it."""
    recipe = bench.scratch / f"{preset}-fused.toml"
    recipe.write_text(f'{preset_text(preset)}\n[[pass]]\nname = "fuse-integer"\n')
    paths = [bench.scratch / f"{name}.{preset}.{form}.onnx" for form in ("qdq", "fused")]
    for path, form in zip(paths, ({"preset": preset}, {"recipe": recipe}), strict=True):
        onnxq.quantize(
            bench.float_model(name), samples=bench.feeds(name), limit=CALIBRATION, output=path,
            check=False, latency_check=False, **form,
        )  # fmt: skip
    return paths


def inputs(bench: Bench, name: str) -> Iterator[tuple[str, Feed]]:
    sample = bench.feeds(name)[-1]
    if "input_ids" not in sample:
        yield "", sample
        return
    yield ", 128 tokens", tokens(128)
    yield f", a sentence of {sample['input_ids'].size} tokens", sample


def tokens(length: int) -> Feed:
    ids = np.random.default_rng(0).integers(1000, 20000, (1, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}


def in_turns(sessions: list[Session], feed: Feed) -> NDArray[np.float64]:
    """Seconds of each session, (sessions, rounds); every other round the other way round."""
    for session in sessions:
        session.run(feed)
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < ROUNDS and time.perf_counter() - started < SECONDS:
        row = [0.0] * len(sessions)
        order = range(len(sessions))
        for k in order if len(rounds) % 2 else reversed(order):
            began = time.perf_counter()
            sessions[k].run(feed)
            row[k] = time.perf_counter() - began
        rounds.append(row)
    return np.array(rounds).T


def farthest(one: Session, other: Session, feed: Feed) -> float:
    """The largest difference of any number in the answers, relative to the largest number."""
    left, right = one.run(feed), other.run(feed)
    return max(
        float(np.abs(left[key] - right[key]).max() / np.abs(left[key]).max()) for key in left
    )


def line(what: str, bound: float, value: float) -> Line:
    return Line(what, f"≤ {bound}", f"{value:.3f}", integer_only.yes(value <= bound))


# ── all ──────────────────────────────────────────────────────────────────────────────────────────

FIGURES: dict[str, Callable[[Bench], Iterator[Line]]] = {
    **integer_only.FIGURES,
    "fuse": fuse,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark integer", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("figures", nargs="+", choices=[*FIGURES, "all"], metavar="FIGURE")
    parser.add_argument("--shared", type=Path, required=True)
    given = parser.parse_args(arguments)
    table = Table("what", "target", "measured", "met", title="integer", title_justify="left")
    score = load_score(given.shared)
    with tempfile.TemporaryDirectory(prefix="onnxq-integer-") as scratch, cache.disabled():
        bench = Bench(given.shared, Path(scratch), score)
        for name in FIGURES if "all" in given.figures else given.figures:
            for row in FIGURES[name](bench):
                console.print(*row, sep=" | ", soft_wrap=True, highlight=False, markup=False)
                table.add_row(*row)
    console.print(table)
