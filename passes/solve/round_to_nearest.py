"""Weights to integer codes by rounding, under the bound that makes fast kernels exact.

Symmetric: s = max|w| / (2ᵇ⁻¹ − 1). Asymmetric: s = (max w − min w) / (2ᵇ − 1). One scale per
tensor, output channel, or block of input columns.

Pair-safe rounding. The AVX2 instruction VPMADDUBSW multiplies u8 by s8 and adds products two by two
in 16 bits, which saturate at 2¹⁵ − 1. With activations up to 255 a sum of two products is exact as
long as |c_k + c_k+1| ≤ 128 for neighbours of one sign. Where rounding breaks that, there are two
ways out: take the excess off the pair, which costs those two weights much, or widen the channel's
scale until no pair breaks it, which costs every weight a little. Between the two lies the best
scale, found per channel by the error that the layer's output will see,

    E = Σ_k m_k (w_k − ŵ_k)²,   m_k = E[x_k²] of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.observe import Observer, SecondMoment
from onnxq.passes.solve.trained import trained_draws
from onnxq.pipeline import Context, Pass
from onnxq.qtype import (
    Codes,
    Floats,
    QTensor,
    QType,
    quantize_weight,
    spread,
    weight_scale,
)

WIDENINGS = 1 + np.arange(17) / 16  # of a channel's scale: 2 is one bit less, where all pairs hold


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Codes for every weight in the plan, in the plan's format."""

    name: ClassVar[str] = "round-to-nearest"
    analysis: ClassVar[bool] = True

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        if ctx.samples is None:
            return {}
        return {
            f"{node.inputs[0].name}#square{axis}": SecondMoment(axis)
            for node, plan in ctx.plan.quantized(graph)
            if plan.weight and plan.rule and plan.rule.pair_limit
            for axis in (g.input_channel_axis(node),)
        }

    def apply(self, graph: Graph, ctx: Context) -> int:
        made = 0
        for node, plan in ctx.plan.quantized(graph):
            view = g.weight_view(node)
            if view is None or plan.weight is None or view.tensor.name in ctx.weights:
                continue
            weight = view.matrix()
            limit = plan.rule.pair_limit if plan.rule else None
            key = f"{node.inputs[0].name}#square{g.input_channel_axis(node)}"
            importance = None
            if limit and key in ctx.stats:
                draws = trained_draws(graph, ctx, node.inputs[0].name)
                square = ctx.stats[key] if draws is None else np.mean(draws.astype(float) ** 2, 0)
                importance = view.column_statistic(square)
            ctx.weights[view.tensor.name] = round_to_nearest(
                weight, plan.weight, pair_limit=limit, importance=importance
            )
            made += 1
        return made


def round_to_nearest(
    weight: Floats,
    qtype: QType,
    *,
    pair_limit: int | None = None,
    importance: NDArray[Any] | None = None,
) -> QTensor:
    """Codes of a weight (out, in).

    `pair_limit` bounds |c_2i + c_2i+1|; it needs a symmetric signed format with one scale per tensor
    or channel. `importance` is m above, broadcastable to (out, in); without it all inputs count
    alike. Raises ValueError where the bound cannot be kept.
    """
    if pair_limit is None:
        return quantize_weight(weight, *weight_scale(weight, qtype), qtype)
    if not (qtype.signed and qtype.symmetric) or (qtype.group or -1) > 0:
        raise ValueError(f"no pair-safe rounding for {qtype}: it needs one symmetric signed scale")
    m = np.ones((1, weight.shape[1])) if importance is None else np.asarray(importance, np.float64)
    m = m + 1e-6 * m.mean() + np.finfo(np.float32).tiny  # a dead input still prefers small errors
    base, zero = weight_scale(weight, qtype)
    best_error: NDArray[np.float64] | None = None
    for widening in WIDENINGS:
        scale = (base * np.float32(widening)).astype(np.float32)
        codes = quantize_weight(weight, scale, zero, qtype).codes
        codes = hold_pairs(codes, weight / spread(scale, weight.shape), m, pair_limit)
        gap = weight - codes * spread(scale, weight.shape)
        error = np.sum(m * gap**2, axis=None if qtype.group is None else 1)
        if best_error is None:
            best_error, best_scale, best_codes = error, scale, codes
            continue
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_codes = np.where(spread(better, weight.shape), codes, best_codes)
    return QTensor(best_codes, best_scale, zero, qtype)


def hold_pairs(codes: Codes, real: Floats, m: NDArray[Any], limit: int) -> Codes:
    """The nearest codes (out, in) under |c_2i + c_2i+1| ≤ limit.

    `real` are the weights in units of the scale. Of a broken pair the excess is shared so that
    m₀d₀² + m₁d₁² is least: the input that matters less gives way more.
    """
    out, columns = codes.shape
    odd = columns % 2
    c = np.pad(codes.astype(np.int32), ((0, 0), (0, odd))).reshape(out, -1, 2)
    w = np.pad(np.asarray(real, np.float64), ((0, 0), (0, odd))).reshape(out, -1, 2)
    m = np.pad(np.broadcast_to(m, codes.shape), ((0, 0), (0, odd))).reshape(out, -1, 2)
    sign = np.sign(c.sum(axis=2))
    broken = np.abs(c.sum(axis=2)) > limit
    excess = (np.abs(w.sum(axis=2)) - limit)[broken]
    weights = m[broken]
    share = weights[:, 1] / np.maximum(weights.sum(axis=1), np.finfo(np.float64).tiny)
    magnitude = np.abs(w[broken])
    first = np.clip(np.rint(magnitude[:, 0] - excess * share), limit - 127, 127)
    pair = np.stack([first, limit - first], axis=1)
    c[broken] = (sign[broken][:, None] * pair).astype(np.int32)
    return c.reshape(out, -1)[:, :columns].astype(codes.dtype)


def worst_pair(tensor: QTensor) -> int:
    """max |c_2i + c_2i+1| over a quantized weight: what a pair of activations can be asked to add."""
    codes = np.pad(tensor.codes.astype(np.int32), ((0, 0), (0, tensor.codes.shape[1] % 2)))
    return int(np.abs(codes.reshape(len(codes), -1, 2).sum(axis=2)).max(initial=0))
