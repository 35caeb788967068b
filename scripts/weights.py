"""Figures of weight-only quantization: each beside its target, and onnxruntime's tool in one run.

    scripts/benchmark weights FIGURE... --shared DIR

    layers          tr(ΔHΔᵀ) after GPTQ ÷ after rounding, on the layers of real models
    models          every weight preset and block size on real models: size, quality, seconds;
                    --markdown FILE writes the page and, beside it, the plot; --results FILE keeps
                    rows as they come and takes over those that are in it; --preset NAME
                    (again for more) measures no others of ours
    gptq-speed      seconds for one layer of 4096 × 4096, given H
    rounding-speed  MB of float weights per second ÷ onnxruntime's
    memory          peak memory on a model of --gigabytes (3) made from a config
    decode          latency of layers of 4096 × 4096, one row, one thread
    nf4             the same in NF4 ÷ onnxruntime's MatMulBnb4
    self-text       KL after calibrating on text that the model writes ÷ after real text

or all. DIR holds models/, data/ and score/score.py. Times are medians of runs in turns.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import weights_memory
import weights_models
from accuracy import CALIBRATION, Bench, load_score
from numpy.typing import NDArray
from onnx import helper
from onnx.numpy_helper import from_array
from onnxq.passes.solve.gptq import gptq
from onnxq.passes.solve.hessian import output_error
from onnxq.passes.solve.round_to_nearest import round_to_nearest
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from rich.console import Console
from rich.table import Table
from weights_models import Line, by_onnxruntime, rtn

import onnxq
from onnxq import cache
from onnxq.calibrate import observe
from onnxq.observe_channels import Hessian
from onnxq.qtype import QType
from onnxq.recipe import preset_names
from onnxq.runtime import Session
from onnxq.samples import input_specs, open_samples
from onnxq.solver import Layer, jobs
from onnxq.storage import load_proto
from onnxq.verify import latency

BLOCKS = (32, 128)
WIDTH = 4096
LAYERS = 4  # that together are too large for a cache
ROWS_OF_INPUTS = 1 << 20  # of one sample that H is made of: all
ROUNDS = 3
console = Console()


@dataclass(frozen=True)
class Settings:
    bench: Bench
    page: Path | None
    results: Path | None
    presets: list[str]
    gigabytes: float

    @property
    def scratch(self) -> Path:
        return self.bench.scratch


def measured(
    what: str, target: str, value: float, bound: float, form: str = "{:.3f}", note: str = ""
) -> Line:
    """A line of a figure of which less is better."""
    text = form.format(value) + (f" ({note})" if note else "")
    return Line(what, target, text, "yes" if value <= bound else "no")


def present(*names: str) -> list[str]:
    """Those presets of these that ship."""
    return [name for name in names if name in preset_names()]


# ── layers ───────────────────────────────────────────────────────────────────────────────────────


def layers(settings: Settings) -> Iterator[Line]:
    """H is of samples that calibrated nothing. The mean is geometric, of the layers' ratios.

    Not of `int4`: reconstruction has each layer make up for those before it, and so leave W.
    """
    for name in weights_models.MODELS:
        rounded = output_errors(settings.bench, name, "int4-rtn")
        for preset in present("int4-gptq"):
            solved = output_errors(settings.bench, name, preset)
            ratios = np.array([solved[layer] / rounded[layer] for layer in rounded])
            whole = sum(solved.values()) / sum(rounded.values())
            yield measured(
                f"tr(ΔHΔᵀ), {preset} ÷ int4-rtn, {name}, {len(ratios)} layers, block 128",
                "≤ 0.6", float(np.exp(np.log(ratios).mean())), 0.6,
                note=f"of the sums {whole:.3f}, worst layer {ratios.max():.3f}",
            )  # fmt: skip


def output_errors(bench: Bench, name: str, preset: str) -> dict[str, float]:
    """tr(ΔHΔᵀ) of every layer of the model as the preset leaves it."""
    result = onnxq.quantize(
        bench.float_model(name), preset, samples=bench.feeds(name), limit=CALIBRATION,
        block_size=128, check=False, write=False,
    )  # fmt: skip
    graph, context = result.prepared, result.context
    todo = jobs(graph, context)
    keys = {job.name: f"{job.inputs[0][0]}#unseen{k}" for k, job in enumerate(todo)}
    specs = input_specs(load_proto(bench.float_model(name)))
    unseen = open_samples(weights_models.scored_feeds(bench, name)[:CALIBRATION], specs)
    watching = {keys[job.name]: Hessian(job.inputs[0][1], ROWS_OF_INPUTS) for job in todo}
    seen = observe(graph, watching, unseen)
    found = {}
    for job in todo:
        stored = context.weights.get(job.name) or context.codebooks[job.name]
        hessian = seen[keys[job.name]].product
        lost = job.view.matrix() - stored.dequantize()
        rows = lost.reshape(len(hessian), -1, lost.shape[1])
        found[job.name] = float(output_error(rows, hessian).sum())
    return found


# ── speed ────────────────────────────────────────────────────────────────────────────────────────


def gptq_speed(settings: Settings) -> Iterator[Line]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((WIDTH, WIDTH), np.float32)
    causes = rng.standard_normal((256, WIDTH), np.float32) / 16  # that inputs have in common
    inputs = rng.standard_normal((2 * WIDTH, 256), np.float32) @ causes
    inputs += rng.standard_normal(inputs.shape, np.float32)
    hessian = (inputs.T @ inputs / len(inputs))[None]
    qtype = QType.parse("u4a:128")
    layer = Layer(weight, qtype, hessian, None, round_to_nearest(weight, qtype))
    seconds = [timed(lambda: gptq(layer)) for _ in range(ROUNDS)]
    yield measured(
        f"GPTQ of one {WIDTH}×{WIDTH} layer, given H, s", "≤ 8", float(np.median(seconds)), 8,
        "{:.2f}", f"least {min(seconds):.2f}",
    )  # fmt: skip


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rounding_speed(settings: Settings) -> Iterator[Line]:
    """From the file to the finished model in memory, both tools in turns."""
    path = settings.scratch / "stack.onnx"
    widths = [2048, 2048, 2048, 2048, 2048, 4096, 4096, 4096]
    onnx.save(stack(widths), path)
    megabytes = path.stat().st_size / 1e6

    for block in BLOCKS:
        mine, theirs, passes = [], [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            made = onnxq.quantize(path, "int4-rtn", block_size=block, check=False, write=False)
            mine.append(time.perf_counter() - started)
            passes.append(sum(step.seconds for step in made.report.passes))
            theirs.append(timed(lambda block=block: by_onnxruntime(path, rtn(block))))
        whole, peer, alone = (float(np.median(seconds)) for seconds in (mine, theirs, passes))
        yield Line(
            f"rounding to INT4, block {block}: MB/s ÷ onnxruntime's", "≥ 3",
            f"{peer / whole:.2f} ({megabytes / whole:.0f} ÷ {megabytes / peer:.0f} MB/s; "
            f"the passes alone {megabytes / alone:.0f})", "yes" if peer / whole >= 3 else "no",
        )  # fmt: skip


def stack(widths: list[int], seed: int = 0) -> onnx.ModelProto:
    """MatMul after MatMul from widths[0] to widths[-1], with nothing between."""
    rng, nodes, weights = np.random.default_rng(seed), [], []
    for k, (a, b) in enumerate(pairwise(widths)):
        weights.append(from_array(rng.standard_normal((a, b), np.float32) * a**-0.5, f"w{k}"))
        nodes.append(helper.make_node("MatMul", [f"x{k}", f"w{k}"], [f"x{k + 1}"], f"matmul{k}"))
    value, last = helper.make_tensor_value_info, len(widths) - 1
    ends = [value("x0", 1, ["n", widths[0]]), value(f"x{last}", 1, ["n", widths[-1]])]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# ── latency ──────────────────────────────────────────────────────────────────────────────────────


def square_layers(settings: Settings) -> Path:
    path = settings.scratch / "layers.onnx"
    onnx.save(stack([WIDTH] * (LAYERS + 1)), path)
    return path


def one_row() -> dict[str, NDArray[np.float32]]:
    return {"x0": np.random.default_rng(1).standard_normal((1, WIDTH), np.float32)}


def one_thread(paths: list[Path]) -> list[float]:
    """Median latencies, ms."""
    sessions = [Session(path, threads=1) for path in paths]
    return [t.median_ms for t in latency(sessions, one_row(), seconds=8, most=400)]


def decode(settings: Settings) -> Iterator[Line]:
    """Both tools' weights have zero points, unless it says symmetric; 3 % more is no slower."""
    float_model = square_layers(settings)
    for block in BLOCKS:
        ours = settings.scratch / f"int4.{block}.onnx"
        onnxq.quantize(float_model, "int4-rtn", block_size=block, output=ours, check=False)
        theirs = [settings.scratch / f"peer.{block}.{form}.onnx" for form in range(2)]
        for form, path in enumerate(theirs):
            onnx.save(by_onnxruntime(float_model, rtn(block, symmetric=bool(form))), path)
        alone, mine = one_thread([float_model, ours])
        what = f"decode, {WIDTH}×{WIDTH} layers, one thread, int4-rtn, block {block}"
        yield measured(f"{what} ÷ float32", "≤ 0.25", mine / alone, 0.25)
        mine, *others = one_thread([ours, *theirs])  # float would empty the caches of the next
        alike, symmetric = (mine / theirs for theirs in others)
        note = f"÷ its symmetric {symmetric:.3f}"
        yield measured(f"{what} ÷ onnxruntime's", "≤ 1", alike, 1.03, note=note)


def nf4(settings: Settings) -> Iterator[Line]:
    float_model = square_layers(settings)
    ours, theirs = settings.scratch / "nf4.onnx", settings.scratch / "bnb4.onnx"
    onnxq.quantize(float_model, "nf4", output=ours, check=False)
    quantizer = MatMulBnb4Quantizer(onnx.load(float_model), MatMulBnb4Quantizer.NF4, 64)
    quantizer.process()
    quantizer.model.save_model_to_file(str(theirs), False)
    alone, mine, others = one_thread([float_model, ours, theirs])
    note = f"÷ float32 {mine / alone:.3f} and {others / alone:.3f}"
    what = f"NF4, {WIDTH}×{WIDTH} layers, one thread ÷ MatMulBnb4"
    yield measured(what, "≤ 0.2", mine / others, 0.2, note=note)


# ── calibration text ─────────────────────────────────────────────────────────────────────────────


def self_text(settings: Settings) -> Iterator[Line]:
    bench, name = settings.bench, "stories260K"
    judge = weights_models.Judge(bench, name)
    for preset in present("int4-gptq", "int4"):
        for block in BLOCKS:
            kl = []
            for samples in (None, bench.feeds(name)):
                made = settings.scratch / f"{preset}.{block}.{samples is None}.onnx"
                onnxq.quantize(
                    bench.float_model(name), preset, samples=samples, limit=CALIBRATION,
                    block_size=block, output=made, check=False,
                )  # fmt: skip
                kl.append(judge(made)[0])
            what = f"KL, {preset}, block {block}: text of its own ÷ real text"
            note = "{:.4f} ÷ {:.4f}".format(*kl)
            yield measured(what, "≤ 1.1", kl[0] / kl[1], 1.1, note=note)


# ── all ──────────────────────────────────────────────────────────────────────────────────────────


def models(settings: Settings) -> Iterator[Line]:
    return weights_models.figure(settings.bench, settings.results, settings.page, settings.presets)


def memory(settings: Settings) -> Iterator[Line]:
    return weights_memory.figure(settings.scratch, settings.gigabytes)


FIGURES: dict[str, Callable[[Settings], Iterator[Line]]] = {
    "layers": layers,
    "models": models,
    "gptq-speed": gptq_speed,
    "rounding-speed": rounding_speed,
    "memory": memory,
    "decode": decode,
    "nf4": nf4,
    "self-text": self_text,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark weights", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("figures", nargs="+", choices=[*FIGURES, "all"], metavar="FIGURE")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--markdown", type=Path, dest="page")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--preset", action="append", default=[], dest="presets")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    given = parser.parse_args(arguments)
    logging.disable(logging.INFO)  # onnxruntime's tools tell of every node
    table = Table("what", "target", "measured", "met", title="weights", title_justify="left")
    score = load_score(given.shared)
    with tempfile.TemporaryDirectory(prefix="onnxq-weights-") as scratch, cache.disabled():
        bench = Bench(given.shared, Path(scratch), score)
        settings = Settings(bench, given.page, given.results, given.presets, given.gigabytes)
        for name in FIGURES if "all" in given.figures else given.figures:
            for line in FIGURES[name](settings):
                console.print(*line, sep=" | ", soft_wrap=True, highlight=False, markup=False)
                table.add_row(*line)
    console.print(table)
