"""Weights to integer codes by rounding, under the bound that makes fast kernels exact.

Symmetric: s = max|w| / (2ᵇ⁻¹ − 1). Asymmetric: s = (max w − min w) / (2ᵇ − 1). One scale per
tensor, output channel, or block of input columns.

Pair-safe rounding. The AVX2 instruction VPMADDUBSW multiplies u8 by s8 and adds products two by two
in 16 bits, which saturate at 2¹⁵ − 1. With activations up to 255 a sum of two products is exact as
long as |c_k + c_k+1| ≤ 128 for neighbours of one sign. Where rounding breaks that, there are two
ways out: take the excess off the pair, which costs those two weights much, or widen the channel's
scale until no pair breaks it, which costs every weight a little.

Scale. A symmetric scale, per tensor or channel, is searched for around the range's own, with and
without the bound, where the inputs' means μ and variances σ² are known: the best is the one whose
error the layer's output sees least, dᵀHd for d = w − ŵ, with H = E[xxᵀ] taken as diag(σ²) + μμᵀ
(inputs vary independently around their means),

    E = Σ_k σ_k² d_k² + (Σ_k μ_k d_k)².

Formats with blocks have a file of their own, `blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from onnxq.passes.solve.blocks import round_blocks
from onnxq.passes.solve.trained import trained_moments

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.observe import ChannelMoments, Moments, Observer
from onnxq.pipeline import Context, Pass
from onnxq.qtype import (
    Codes,
    Floats,
    QTensor,
    QType,
    nearest,
    quantize_weight,
    spread,
    weight_scale,
)

BLOCK = 1 << 15  # weights searched at a time
WIDENINGS = (*np.arange(29, 63) / 32, 127 / 64)  # of a channel's scale; at the last all pairs hold
POWERS = (0.5, 1, 2)  # the same, where scales are powers of two


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Codes for every weight in the plan, in the plan's format.

    `clip` has the range of each block shrunk where the rest gains more than its largest weights
    lose.
    """

    clip: bool = True
    name: ClassVar[str] = "round-to-nearest"
    analysis: ClassVar[bool] = True

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        if ctx.samples is None:
            return {}
        return {
            key: Moments(g.input_channel_axis(node))
            for node, plan in ctx.plan.quantized(g.walk(graph))
            if plan.weight and (self.clip or not plan.weight.blocked)
            for view in g.weight_views(node)
            if (key := _moments_key(view)) is not None
        }

    def apply(self, graph: Graph, ctx: Context) -> int:
        made = 0
        for node, plan in ctx.plan.quantized(g.walk(graph)):
            for view in g.weight_views(node):
                if plan.weight is None or view.tensor.name in ctx.weights:
                    continue
                if view.tensor.name in ctx.codebooks:
                    continue
                limit = plan.rule.pair_limit if plan.rule else None
                key, moments = _moments_key(view), None
                seen = key is not None and view.tensor.name not in ctx.tied
                if seen and key in ctx.stats and ctx.stats[key].mean.size:
                    moments = trained_moments(graph, ctx, node.inputs[0].name) or ctx.stats[key]
                    moments = ChannelMoments(*(view.column_statistic(a) for a in moments))
                ctx.weights[view.tensor.name] = round_to_nearest(
                    view.matrix(),
                    plan.weight,
                    pair_limit=limit,
                    moments=moments,
                    clip=self.clip,
                    threads=ctx.threads,
                )
                made += 1
        return made


def _moments_key(view: g.WeightView) -> str | None:
    """Where the moments of what a weight's columns are multiplied with are kept."""
    if view.input_slot is None:
        return None
    x = view.node.inputs[view.input_slot]
    return f"{x.name}#moments{g.input_channel_axis(view.node)}"


def round_to_nearest(
    weight: Floats,
    qtype: QType,
    *,
    pair_limit: int | None = None,
    moments: ChannelMoments | None = None,
    clip: bool = False,
    threads: int | None = None,
) -> QTensor:
    """Codes of a weight (out, in).

    `pair_limit` bounds |c_2i + c_2i+1|; it needs a symmetric signed format, one scale per tensor or
    channel. `moments` are μ and σ² above, broadcastable to (out, in); without them all inputs
    count alike. `clip` is for blocks. Raises ValueError where the bound cannot be kept.
    """
    if pair_limit is None and qtype.blocked and not qtype.power_of_two:
        square = None if moments is None else moments.mean**2 + moments.variance
        return round_blocks(weight, qtype, square=square, clip=clip, threads=threads)
    if pair_limit is None and (moments is None or qtype.blocked or not qtype.symmetric):
        return quantize_weight(weight, *weight_scale(weight, qtype), qtype)
    if not (qtype.signed and qtype.symmetric) or qtype.blocked:
        raise ValueError(f"no pair-safe rounding for {qtype}: it needs one symmetric signed scale")
    mean, variance = (
        np.broadcast_to(a.astype(np.float32), weight.shape)
        for a in moments or ChannelMoments(np.zeros((1, 1)), np.ones((1, 1)))
    )
    if qtype.group is None:
        return search_scale(weight, qtype, pair_limit, ChannelMoments(mean, variance))
    found = [  # channels are independent; a few at a time stay in the cache
        search_scale(weight[part], qtype, pair_limit, ChannelMoments(mean[part], variance[part]))
        for part in np.array_split(
            np.arange(len(weight)), min(len(weight), -(-weight.size // BLOCK))
        )
    ]
    codes, scale, zero = (
        np.concatenate([getattr(q, a) for q in found]) for a in ("codes", "scale", "zero")
    )
    return QTensor(codes, scale, zero, qtype)


def search_scale(
    weight: Floats, qtype: QType, pair_limit: int | None, moments: ChannelMoments
) -> QTensor:
    """The scale of least E, per tensor or channel, among widenings of the range's own."""
    mean, variance = moments
    square = mean**2 + variance
    square = square + 1e-6 * square.mean() + np.finfo(np.float32).tiny  # dead inputs count a little
    base, zero = weight_scale(weight, qtype)
    axis = None if qtype.group is None else 1
    best_error, best_scale = np.full(base.shape, np.inf), base
    best_codes = np.zeros(weight.shape, np.float32)
    for widening in POWERS if qtype.power_of_two else WIDENINGS:
        scale = (base * np.float32(widening)).astype(np.float32)
        unit = spread(scale, weight.shape)
        real = weight / unit + qtype.middle
        codes = nearest(real, qtype)
        if pair_limit is not None:
            codes = hold_pairs(codes, real, square, pair_limit)
        d = weight - (codes - qtype.middle) * unit
        shift = np.sum(mean * d, axis=1) ** 2
        error = np.sum(variance * d**2, axis=axis) + (shift.sum() if axis is None else shift)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        np.copyto(best_codes, codes, where=spread(better, weight.shape))
    return QTensor(best_codes.astype(qtype.dtype), best_scale, zero, qtype)


def hold_pairs(codes: Floats, real: Floats, square: Floats, limit: int) -> Floats:
    """The nearest codes (out, in) under |c_2i + c_2i+1| ≤ limit.

    `real` are the weights in units of the scale. Of a broken pair the excess is shared so that
    q₀d₀² + q₁d₁² is least, q = E[x²]: the input that matters less gives way more.
    """
    even = codes.shape[1] // 2 * 2  # an odd last column has no partner
    first, second = codes[:, 0:even:2], codes[:, 1:even:2]
    row, pair = np.nonzero(np.abs(first + second) > limit)
    sign = np.sign(first[row, pair])
    left, right = (np.abs(real[row, 2 * pair + k]) for k in (0, 1))
    square = np.broadcast_to(square, codes.shape)
    q0, q1 = (square[row, 2 * pair + k] for k in (0, 1))
    excess = left + right - limit
    kept = np.clip(np.rint(left - excess * q1 / (q0 + q1)), limit - 127, 127)
    held = codes.copy()
    held[row, 2 * pair] = sign * kept
    held[row, 2 * pair + 1] = sign * (limit - kept)
    return held


def pair_sums(codes: Codes) -> NDArray[np.int32]:
    """|c_2i + c_2i+1| (out, ⌈in/2⌉) of codes (out, in)."""
    wide = np.pad(codes.astype(np.int32), ((0, 0), (0, codes.shape[1] % 2)))
    return np.abs(wide[:, 0::2] + wide[:, 1::2])


def worst_pair(tensor: QTensor) -> int:
    """max |c_2i + c_2i+1| of a quantized weight: what a pair of activations can be asked to add."""
    return int(pair_sums(tensor.codes).max(initial=0))
