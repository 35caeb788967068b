"""Biases to int32 at the scale of the accumulator, s_b = s_x · s_w, zero point 0.

The integer kernels add a bias to Σ x_q w_q, whose unit is s_x · s_w (Jacob et al. 2018, eq. 11).

A channel whose weights are all near zero has a tiny s_w, and its bias may not fit into 32 bits at
that unit. There the channel's scale is widened until it does: its products are then below 2⁻¹⁵ of
the bias, so that the coarser weights change nothing one could measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QTensor, QType, next_power_of_two, spread

_INT32 = QType(bits=32, signed=True, symmetric=True, group=-1)
LIMIT = 2.0**30  # leaves the accumulator as much room again for the products


@dataclass(frozen=True)
class QuantizeBias(Pass):
    """int32 codes for the bias of every statically quantized Conv and Gemm that takes them."""

    name: ClassVar[str] = "quantize-bias"
    analysis: ClassVar[bool] = True
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        biased = [
            (node, key)
            for node, plan in ctx.plan.quantized(g.walk(graph))
            if plan.inputs and plan.weight and (key := bias_key(node)) and key not in ctx.weights
            if plan.rule is None or plan.rule.bias == "int32"
            if node.inputs[1].name in ctx.weights and node.attrs.get("beta", 1)
            if ctx.weights[node.inputs[1].name].scale.ndim < 2
        ]
        for node, _ in biased:  # every reader of a shared weight has its say first
            weight = ctx.weights[node.inputs[1].name]
            widening = np.abs(_real(node, weight)) / np.abs(_unit(node, weight, ctx)) / LIMIT
            if widening.max(initial=1) > 1:
                ctx.weights[node.inputs[1].name] = widen(weight, np.maximum(widening, 1))
        for node, key in biased:
            weight = ctx.weights[node.inputs[1].name]
            bias = _real(node, weight)
            unit = _unit(node, weight, ctx)  # one for all where the weight has one scale
            codes = np.rint(bias / unit).astype(np.int32)[:, None]
            unit = unit.astype(np.float32)
            ctx.weights[key] = QTensor(codes, unit, np.zeros(unit.shape, np.int32), _INT32)
        return len(biased)


def _real(node: g.Node, weight: QTensor) -> NDArray[np.float64]:
    """b (out,); a Gemm's may be one value for all."""
    bias = np.asarray(g.values(node.inputs[2]), np.float64).reshape(-1)
    return np.broadcast_to(bias, len(weight.codes))


def _unit(node: g.Node, weight: QTensor, ctx: Context) -> NDArray[np.float64]:
    """s_x · s_w, () or (out,), in the unit of what the kernel adds the bias to."""
    unit = float(ctx.activations[node.inputs[0].name].scale) * weight.scale.astype(np.float64)
    if node.op == "Gemm":
        unit = unit * node.attrs.get("alpha", 1.0) / node.attrs.get("beta", 1.0)
    return np.asarray(unit)


def widen(weight: QTensor, factors: NDArray[np.float64]) -> QTensor:
    """The same weight with each channel's scale (out,) times its factor, codes rounded again."""
    if not weight.scale.ndim:
        factors = factors.max()
    if weight.qtype.power_of_two:
        factors = next_power_of_two(factors).astype(np.float64)
    zero = spread(weight.zero, weight.codes.shape).astype(np.float64)
    codes = np.rint((weight.codes.astype(np.float64) - zero) / spread(factors, weight.codes.shape))
    return replace(
        weight,
        codes=(codes + zero).astype(weight.codes.dtype),
        scale=(weight.scale * factors).astype(np.float32),
    )


def bias_key(node: g.Node) -> str | None:
    """Where a node's bias codes are kept. Two nodes may share a bias and not its scale."""
    if node.op not in ("Conv", "Gemm") or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    if not g.is_constant(node.inputs[2]) or math.prod(node.inputs[2].shape[:-1]) != 1:
        return None
    return f"{node.name}#bias"
