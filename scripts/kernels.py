"""The kernels of onnxq's operators beside those of onnxruntime, in one run.

    scripts/benchmark kernels [FIGURE]... [--threads N]... [--json FILE]

    decode   one row of x: against MatMulBnb4, and MatMulNBits of 4 bits at accuracy level 4
    prefill  128 rows of x: against float32 MatMul
    memory   codes and scales read per second, against a plain read of as many bytes
    error    against the definition in float64; in integers, beside the error of MatMulNBits

or all. Layers are 4096 x 4096, block 64, NF4, and 16384 x 8192 where they must not fit the cache.
The two sides run in turns, every other round the other way round; a ratio is the median of the
ratios of all rounds, and their quartiles say how busy the machine was.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from integer import RESTING
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from onnxq.ops import DOMAIN, library_path
from onnxq.ops.library import build

Array = NDArray[Any]
Run = Callable[[], object]

SIZE, BLOCK, PREFILL_ROWS = 4096, 64, 128
LARGE = (16384, 8192)  # channels and columns of a layer that no cache holds: 72 MiB
SECONDS, LEAST_ROUNDS = 4.0, 9
NF4 = np.array([-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127], np.int8)
UNIFORM = np.arange(-8, 8, dtype=np.int8)
SAME = 1e-3  # of a ratio of errors: sums in another order
console = Console()


@dataclass(frozen=True)
class Line:
    """One row of the table: a ratio or an error, and the most (or least) that it may be."""

    what: str
    threads: int
    value: float
    low: float = float("nan")
    high: float = float("nan")
    most: float = float("nan")
    least: float = float("nan")
    milliseconds: tuple[float, ...] = ()

    @property
    def target(self) -> str:
        if np.isfinite(self.most):
            return f"≤ {self.most:g}"
        return f"≥ {self.least:g}" if np.isfinite(self.least) else ""

    @property
    def met(self) -> str:
        if not self.target:
            return ""
        return "no" if self.value > self.most or self.value < self.least else "yes"

    def cells(self) -> list[str]:
        spread = f"{self.low:.3g} to {self.high:.3g}" if np.isfinite(self.low) else ""
        times = " ÷ ".join(f"{ms:.3g}" for ms in self.milliseconds)
        return [self.what, str(self.threads), f"{self.value:.3g}", spread, times, self.target,
                self.met]  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Random codes and scales of one layer, and x."""

    x: Array
    codes: Array
    scales: Array

    @classmethod
    def random(cls, rows: int, channels: int = SIZE, columns: int = SIZE) -> Layer:
        rng = np.random.default_rng(0)
        blocks = columns // BLOCK
        return cls(
            rng.standard_normal((rows, columns), np.float32),
            rng.integers(0, 256, (channels, blocks, BLOCK // 2), np.uint8),
            rng.uniform(0.001, 0.01, (channels, blocks)).astype(np.float32),
        )

    @property
    def bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def weight(self, levels: Array) -> Array:
        """(channels, columns), float64."""
        codes = np.stack([self.codes & 15, self.codes >> 4], -1).reshape(*self.scales.shape, BLOCK)
        weight = levels.astype(np.float64)[codes] * self.scales[..., None]
        return weight.reshape(len(codes), -1)


def session(
    threads: int, op: str, x: Array, weights: list[Array], domain: str = "", **attributes: int
) -> Run:
    """A model of one node, ready to run on `x`; `weights` are its other inputs."""
    names = [f"w{k}" for k in range(len(weights))]
    node = helper.make_node(op, ["x", *names], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node], op,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, name) for w, name in zip(weights, names, strict=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain or "ai.onnx.ml", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in RESTING.items():
        options.add_session_config_entry(key, value)
    options.register_custom_ops_library(library_path())
    made = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: made.run(None, {"x": x})[0]


def codebook(threads: int, layer: Layer, levels: Array, accuracy_level: int) -> Run:
    weights = [layer.codes, layer.scales, levels.reshape(1, 1, 16)]
    return session(
        threads, "MatMulCodebook", layer.x, weights, DOMAIN, accuracy_level=accuracy_level
    )


def nbits(threads: int, layer: Layer, accuracy_level: int = 4) -> Run:
    channels, blocks, _ = layer.codes.shape
    return session(
        threads, "MatMulNBits", layer.x, [layer.codes, layer.scales], "com.microsoft",
        K=blocks * BLOCK, N=channels, bits=4, block_size=BLOCK, accuracy_level=accuracy_level,
    )  # fmt: skip


def bnb4(threads: int, layer: Layer) -> Run:
    channels, blocks, _ = layer.codes.shape
    return session(
        threads, "MatMulBnb4", layer.x, [layer.codes.ravel(), layer.scales.ravel()],
        "com.microsoft", K=blocks * BLOCK, N=channels, block_size=BLOCK, quant_type=1,
    )  # fmt: skip


def float_matmul(threads: int, layer: Layer) -> Run:
    weight = np.ascontiguousarray(layer.weight(NF4).T, np.float32)
    return session(threads, "MatMul", layer.x, [weight])


def plain_read(threads: int, count: int) -> Run:
    """Reads `count` bytes: the C library's search for a byte that is not there."""
    search = ctypes.CDLL(None).memchr
    search.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    search.restype = ctypes.c_void_p
    memory = np.ones(count, np.uint8)
    parts = np.array_split(memory, threads)
    pool = ThreadPoolExecutor(threads)

    def read(part: Array) -> None:
        search(part.ctypes.data, 2, part.nbytes)

    return lambda: list(pool.map(read, parts))


def in_turns(ours: Run, other: Run) -> tuple[Array, Array]:
    """Seconds of every round of both."""
    ours(), other()
    rounds: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() - started < SECONDS:
        seconds = dict.fromkeys((ours, other), 0.0)
        for run in (ours, other) if len(rounds) % 2 else (other, ours):
            begun = time.perf_counter()
            run()
            seconds[run] = time.perf_counter() - begun
        rounds.append((seconds[ours], seconds[other]))
    first, second = np.array(rounds).T
    return first, second


def compared(what: str, threads: int, ours: Run, other: Run, **bound: float) -> Line:
    """Our time ÷ the other's."""
    first, second = in_turns(ours, other)
    low, ratio, high = np.percentile(first / second, [25, 50, 75])
    times = tuple(1e3 * float(np.median(t)) for t in (first, second))
    return Line(what, threads, float(ratio), float(low), float(high), milliseconds=times, **bound)


def decode(threads: int) -> Iterator[Line]:
    layer = Layer.random(1)
    what = f"NF4, M = 1, {SIZE} x {SIZE}"
    for accuracy_level, name in ((4, "integers"), (0, "floats")):
        ours = codebook(threads, layer, NF4, accuracy_level)
        yield compared(f"{what}, {name} ÷ MatMulBnb4", threads, ours, bnb4(threads, layer),
                       most=0.06)  # fmt: skip
        peer = nbits(threads, layer, accuracy_level)
        bound = {"most": 1.1} if accuracy_level == 4 else {}
        yield compared(f"{what}, {name} ÷ MatMulNBits, level {accuracy_level}", threads, ours, peer,
                       **bound)  # fmt: skip


def prefill(threads: int) -> Iterator[Line]:
    layer = Layer.random(PREFILL_ROWS)
    peer = float_matmul(threads, layer)
    for accuracy_level, name in ((4, "integers"), (0, "floats")):
        ours = codebook(threads, layer, NF4, accuracy_level)
        bound = {"most": 1.0} if accuracy_level == 4 else {}
        what = f"NF4, M = {PREFILL_ROWS}, {SIZE} x {SIZE}, {name} ÷ float32 MatMul"
        yield compared(what, threads, ours, peer, **bound)


def memory(threads: int) -> Iterator[Line]:
    layer = Layer.random(1, *LARGE)
    # Bytes per second ÷ bytes per second, of as many bytes: the plain read's time ÷ ours.
    yield compared(
        f"NF4, M = 1, {LARGE[0]} x {LARGE[1]}: weights per second ÷ a plain read's", threads,
        plain_read(threads, layer.bytes), codebook(threads, layer, NF4, 4), least=0.8,
    )  # fmt: skip


def error(threads: int) -> Iterator[Line]:
    layer = Layer.random(8)
    exact = {name: layer.x @ layer.weight(levels).T for name, levels in
             (("NF4", NF4), ("INT4", UNIFORM))}  # fmt: skip

    def off(run: Run, name: str) -> float:
        return float(np.abs(run() - exact[name]).max() / np.abs(exact[name]).max())

    for levels, kind in ((NF4, "int8 levels"), (NF4.astype(np.float32), "float levels")):
        ours = off(codebook(threads, layer, levels, 0), "NF4")
        yield Line(f"NF4, {kind}, floats: largest error ÷ largest y", threads, ours, most=1e-5)
    ours = off(codebook(threads, layer, UNIFORM, 4), "INT4")
    peer = off(nbits(threads, layer), "INT4")
    what = "INT4, integers: error ÷ that of MatMulNBits, level 4"
    yield Line(what, threads, ours / peer, most=1 + SAME)


FIGURES: dict[str, Callable[[int], Iterator[Line]]] = {
    "decode": decode,
    "prefill": prefill,
    "memory": memory,
    "error": error,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark kernels", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, "all"], default="all",
                        metavar="FIGURE")  # fmt: skip
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    used = build()
    title = f"kernels: {used.used}, {used.compiler}, onnxruntime {ort.__version__}"
    columns = ("what", "threads", "value", "quartiles", "median ms", "target", "met")
    table = Table(*columns, title=f"{title}, {os.cpu_count()} cores", title_justify="left")
    lines = []
    for figure in FIGURES if "all" in given.figures else given.figures:
        for threads in given.threads or (1, 2):
            for line in FIGURES[figure](threads):
                lines.append(line)
                console.print(*line.cells(), sep=" | ", soft_wrap=True, highlight=False)
                table.add_row(*line.cells())
    console.print(table)
    if given.json:
        finite = [{k: v for k, v in asdict(line).items() if v == v} for line in lines]
        given.json.write_text(json.dumps(finite, indent=1), "utf-8")
