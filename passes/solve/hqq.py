"""Scales of blocks for an error that forgives outliers: half-quadratic quantization.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Weights have
heavy tails, so of the errors W − Ŵ the ℓp norm is made small, p < 1, which gives up few weights for
the good of many. Errors W_e of the weights that are given up are split off,

    min Σ |W_e|ᵖ + β/2 Σ (W − Ŵ − W_e)²,        Ŵ = s (c − z),

and each half is solved in turn while β grows by κ. For W_e that is the generalized soft threshold

    W_e = sign(x) max(|x| − |x|^(p−1) / β, 0),  x = W − Ŵ,

for codes rounding. The paper then moves the zero point, z = mean(c − (W − W_e) / s). Kernels that
multiply integers want z to be one as well, and a rounded mean of rounding errors, none of which
exceeds 1/2, leaves it where it was. So the scale takes this step in its stead:

    s = Σ (W − W_e) (c − z) / Σ (c − z)².

x is measured in units of s, which makes β a number for all blocks. The objective can rise; of each
block the iterate of least Σ |W − Ŵ|ᵖ is kept, and the start is one of them. No samples are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from onnxq.passes.solve.blocks import (
    Stored,
    Tile,
    Where,
    centered,
    for_each_tile,
    round_blocks,
)

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.pipeline import Context, Pass
from onnxq.qtype import Floats, QTensor, QType, as_codes, stored_scale
from onnxq.super_blocks import on_steps

NORM = 0.7  # p
BETA = 10.0
KAPPA = 1.01
SMALLEST = 1e-6  # |x| whose power is still finite


@dataclass(frozen=True)
class HQQ(Pass):
    """Better scales for weights in blocks, symmetric or not, from those they have."""

    iterations: int = 20
    name: ClassVar[str] = "hqq"
    analysis: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        done = 0
        for node, plan in ctx.plan.quantized(g.walk(graph)):
            for view in g.weight_views(node):
                qtype, name = plan.weight, view.tensor.name
                if qtype is None or not qtype.blocked or qtype.power_of_two:
                    continue
                if (self.name, name) in ctx.solved:
                    continue
                ctx.solved.add((self.name, name))
                ctx.weights[name] = hqq(
                    view.matrix(),
                    qtype,
                    start=ctx.weights.get(name),
                    iterations=self.iterations,
                    threads=ctx.threads,
                )
                done += 1
        return done


def hqq(
    weight: Floats,
    qtype: QType,
    *,
    start: QTensor | None = None,
    iterations: int = 20,
    threads: int | None = None,
) -> QTensor:
    """Codes of a weight (out, in) in a format with blocks.

    Starts from the scales and zero points of `start`, or of the blocks' ranges. The result does not
    depend on the number of threads.
    """
    begin = start or round_blocks(weight, qtype, clip=False, threads=threads)
    with np.errstate(over="ignore"):
        half = np.array_equal(begin.scale, stored_scale(begin.scale, True))
    codes, scale = np.empty(weight.shape, qtype.byte), np.empty_like(begin.scale)

    def stored(rows: slice) -> Stored:
        if begin.step is None:
            return partial(stored_scale, half=half)
        return partial(on_steps, step=begin.step[rows])

    def solve(place: Where) -> None:
        x, z = place.read(weight), place.read_blocks(begin.zero)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # never best
            s = place.read_blocks(begin.scale)
            s = best_scale(x, s, z, qtype, stored(place.rows), iterations)
        place.write(codes, centered(x, s, z, qtype) + z)
        place.write_blocks(scale, s)

    for_each_tile(solve, weight.shape, qtype, threads)
    return replace(begin, codes=as_codes(codes, qtype), scale=scale)


def best_scale(
    weight: Tile, start: Tile, zero: Tile, qtype: QType, stored: Stored, iterations: int
) -> Tile:
    """Scales (blocks, 1, rows) of the least Σ |W − Ŵ|ᵖ on the way from `start`."""
    scale, beta = start, BETA
    best, least = start, np.full_like(start, np.inf)
    for _ in range(iterations + 1):
        codes = centered(weight, scale, zero, qtype)
        x = weight / scale - codes
        size = np.maximum(np.abs(x), np.float32(SMALLEST))
        power = size ** np.float32(NORM - 1)
        error = np.abs(scale) ** np.float32(NORM) * (size * power).sum(axis=1, keepdims=True)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
        kept = np.copysign(np.minimum(size, power / np.float32(beta)), x)  # x − W_e
        norm = (codes * codes).sum(axis=1, keepdims=True)
        step = ((codes + kept) * codes).sum(axis=1, keepdims=True) / norm
        scale = stored(np.where(norm > 0, scale * step, scale))
        beta *= KAPPA
    return best
