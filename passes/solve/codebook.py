"""Weights to places in a table of levels: NF, FP, powers of two, or k-means.

    ŵ = s_block · levels[code]

Levels are integers of 8 bits (see `CodebookTensor`); k = 2^bits of them.

- `nf`: normal float, Dettmers et al. 2023 ("QLoRA"), eq. 4 and appendix E: quantiles of a normal
  distribution, k/2 on the negative side, 0, k/2 − 1 … on the other, all under the largest: each
  level is about as often used where weights are normal. Rounded to 127ths.
- `fp`: floating point numbers of sign, exponent and one mantissa bit where there is room for one:
  E2M1 is 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives, E2M0 0, 1, 2, 4. Exact in integers.
- `log`: 0 and powers of two, the largest of which has one sign alone: -2^j … -1, 0, 1 … 2^(j−1).
- `kmeans`: the levels of least error for this layer's own weights, see `kmeans`, found in turn
  with the scales.

A scale makes the farthest weight of its block the outermost level, or is searched for around that,
of either sign, where it lessens Σ_k E[x_k²] (w_k − ŵ_k)².
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from onnxq.passes.solve.kmeans import best_levels

from onnxq import graph as g
from onnxq.codebook import CodebookTensor, ScaleCodes, nearest
from onnxq.graph import Graph
from onnxq.observe import Moments, Observer
from onnxq.pipeline import Context, Pass
from onnxq.qtype import Floats, QType, in_blocks, in_float16, spread

Levels = NDArray[np.int8]

SHARES = np.linspace(0.4, 1.1, 15)  # of the farthest weight, that the outermost level may stand for
ROUNDS = 3  # of k-means: levels for the scales, scales for the levels
SAMPLE = 1 << 18  # weights, of rows evenly spaced, that levels are found for
GRIDS = {8: (-127, 127), 4: (-8, 7)}  # of the levels of k-means, by their bits
WEIGHTS_AT_ONCE = 1 << 17  # of a search: they stay in the cache


def normal_float(bits: int) -> Levels:
    """Quantiles of the normal distribution, as bitsandbytes has them for 4 bits."""
    k = 1 << bits
    outermost = 1 - (1 / (k - 1) + 1 / k) / 4  # its quantile becomes 1
    quantile = np.vectorize(NormalDist().inv_cdf)
    positive = quantile(np.linspace(outermost, 0.5, k // 2 + 1)[:-1])
    negative = -quantile(np.linspace(outermost, 0.5, k // 2)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    return np.rint(127 * levels / levels.max()).astype(np.int8)


def floating_point(bits: int) -> Levels:
    """Minifloats: 2 bits of exponent where there are any, the rest mantissa; in halves for E2M1."""
    positive = {2: [1], 3: [1, 2, 4], 4: [1, 2, 3, 4, 6, 8, 12]}[bits]
    return np.array([*(-p for p in reversed(positive)), 0, *positive], np.int8)


def logarithmic(bits: int) -> Levels:
    """Zero and powers of two of both signs; the farthest is negative."""
    powers = 2 ** np.arange(1 << (bits - 1))
    return np.concatenate([-powers[::-1], [0], powers[:-1]]).astype(np.int8)


TABLES: dict[str, Callable[[int], Levels]] = {
    "nf": normal_float, "fp": floating_point, "log": logarithmic, "kmeans": normal_float,
}  # fmt: skip


@dataclass(frozen=True)
class Codebook(Pass):
    """Places in a table for weights of MatMul and Gemm that the plan gives blocks of 2 to 4 bits.

    With `search` scales are chosen for least error, without so that nothing is cut off.
    `double_quantization` stores them in 8 bits. `level_bits` are those of the levels of `kmeans`:
    8, or 4, which a kernel multiplies with twice as fast.
    """

    kind: Literal["nf", "fp", "log", "kmeans"] = "nf"
    search: bool = True
    double_quantization: bool = False
    level_bits: Literal[4, 8] = 8
    name: ClassVar[str] = "codebook"
    analysis: ClassVar[bool] = True

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        if ctx.samples is None:
            return {}
        return {_key(v): Moments(g.input_channel_axis(v.node)) for v, _ in _views(graph, ctx)}

    def apply(self, graph: Graph, ctx: Context) -> int:
        made = 0
        for view, qtype in _views(graph, ctx):
            if view.tensor.name in ctx.codebooks:
                continue
            seen = ctx.stats.get(_key(view))
            square = None
            if seen is not None and seen.mean.size:
                square = view.column_statistic(seen.mean**2 + seen.variance)[0]
            ctx.codebooks[view.tensor.name] = self.solve(view.matrix(), qtype, square)
            ctx.weights.pop(view.tensor.name, None)
            made += 1
        return made

    def solve(self, weight: Floats, qtype: QType, square: Floats | None = None) -> CodebookTensor:
        """Codes of a weight (out, in), as many bits each and in such blocks as `qtype` says.

        `square` is E[x²] (in,) of its inputs; all count alike where it is None.
        """
        bits, group = qtype.bits, qtype.group or 0
        square = np.ones(weight.shape[1]) if square is None else square
        square = (square + 1e-6 * square.mean() + np.finfo(np.float32).tiny).astype(np.float32)
        levels = TABLES[self.kind](bits)
        shares = SHARES if self.search else np.ones(1)
        signs = (1,) if self.double_quantization else (1, -1)
        some = weight[:: (weight.size // SAMPLE) | 1]  # odd: heads have even sizes
        for _ in range(ROUNDS if self.kind == "kmeans" else 0):
            scale = best_scale(some, square, levels, group, shares, signs)
            unit = spread(_divisor(scale), some.shape, group)
            levels = best_levels(some / unit, square * unit**2, 1 << bits, GRIDS[self.level_bits])
        scale = best_scale(weight, square, levels, group, shares, signs)
        kept = ScaleCodes.of(scale) if self.double_quantization else in_float16(scale)
        found = kept.dequantize() if isinstance(kept, ScaleCodes) else kept
        codes = nearest(weight / spread(_divisor(found), weight.shape, group), levels)
        return CodebookTensor(codes, levels, kept, bits, group, self.kind)


def best_scale(
    weight: Floats,
    square: Floats,
    levels: Levels,
    group: int,
    shares: NDArray[np.floating[Any]],
    signs: tuple[int, ...],
) -> Floats:
    """For each block of a weight (out, in) the scale of least Σ E[x²] (w − ŵ)², (out, blocks).

    Tried is each share of the scale under which no weight lies beyond the levels, for each sign.
    """
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    squares = in_blocks(square[None], group)
    return np.concatenate([
        _best_scale(in_blocks(weight[i : i + rows], group), squares, levels, shares, signs)
        for i in range(0, len(weight), rows)
    ])  # fmt: skip


def _best_scale(
    blocks: Floats,
    square: Floats,
    levels: Levels,
    shares: NDArray[np.floating[Any]],
    signs: tuple[int, ...],
) -> Floats:
    best, least = np.zeros(blocks.shape[:2], np.float32), np.full(blocks.shape[:2], np.inf)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    ends = levels.astype(np.float32)[[0, -1]]
    for sign in signs:
        bottom, top = (low, high) if sign > 0 else (-high, -low)
        whole = sign * np.maximum(bottom / ends[0], top / ends[1])
        for share in shares:
            scale = (whole * np.float32(share)).astype(np.float32)
            unit = _divisor(scale)[:, :, None]
            codes = nearest((blocks / unit).reshape(len(blocks), -1), levels)
            real = levels.astype(np.float32)[codes].reshape(blocks.shape) * unit
            error = np.sum(square * (blocks - real) ** 2, axis=2)
            better = error < least
            best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def _divisor(scale: Floats) -> Floats:
    """The scale, or 1 where it is 0: of a block that is 0 whatever its codes."""
    return np.where(np.abs(scale) < np.finfo(np.float32).tiny, np.float32(1), scale)


def _views(graph: Graph, ctx: Context) -> list[tuple[g.WeightView, QType]]:
    """A view of each weight that is to have a table, and its format."""
    found: dict[str, tuple[g.WeightView, QType]] = {}
    for node, plan in ctx.plan.quantized(g.walk(graph)):
        view, qtype = g.weight_view(node), plan.weight
        if node.op not in ("MatMul", "Gemm") or view is None or view.batched:
            continue
        if view.tensor.name in ctx.tied:  # with a table of rows to look up
            continue
        if plan.weights_alone and qtype is not None and qtype.blocked and qtype.bits <= 4:
            found.setdefault(view.tensor.name, (view, qtype))
    return list(found.values())


def _key(view: g.WeightView) -> str:
    """Where the moments of a layer's inputs are kept."""
    return f"{view.node.inputs[0].name}#moments{g.input_channel_axis(view.node)}"
