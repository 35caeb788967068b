"""Biases to int32 at the scale of the accumulator, s_b = s_x · s_w, zero point 0.

The integer kernels add a bias to Σ x_q w_q, whose unit is s_x · s_w (Jacob et al. 2018, eq. 11).

A channel whose weights are all near zero has a tiny s_w, and its bias may not fit into 32 bits at
that unit. There the channel's scale is widened until it does: its products are then below 2⁻¹⁵ of
the bias, so that the coarser weights change nothing one could measure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QTensor, QType, spread

_INT32 = QType(bits=32, signed=True, symmetric=True, group=-1)
LIMIT = 2.0**30  # leaves the accumulator as much room again for the products


@dataclass(frozen=True)
class QuantizeBias(Pass):
    """int32 codes for the bias of every statically quantized Conv and Gemm."""

    name: ClassVar[str] = "quantize-bias"
    analysis: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        made = 0
        for node, plan in ctx.plan.quantized(graph):
            key = bias_key(node)
            if (
                not plan.inputs
                or key is None
                or key in ctx.weights
                or not node.attrs.get("beta", 1)
            ):
                continue
            weight = ctx.weights.get(node.inputs[1].name)
            if weight is None or weight.scale.ndim > 1:
                continue
            bias = np.asarray(node.inputs[2].values, np.float64)
            bias = np.broadcast_to(bias, len(weight.codes))  # Gemm's may be one value for all
            unit = float(ctx.activations[node.inputs[0].name].scale) * weight.scale.astype(float)
            if node.op == "Gemm":
                unit = unit * node.attrs.get("alpha", 1.0) / node.attrs.get("beta", 1.0)
            widening = np.maximum(np.abs(bias) / unit / LIMIT, 1)
            if widening.max(initial=1) > 1:
                ctx.weights[node.inputs[1].name] = widen(weight, widening)
                unit = unit * (widening if weight.scale.ndim else widening.max())
            codes = np.rint(bias / unit)
            unit32 = np.broadcast_to(np.asarray(unit, np.float32), bias.shape)
            zero = np.zeros(bias.shape, np.int32)
            ctx.weights[key] = QTensor(codes.astype(np.int32)[:, None], unit32, zero, _INT32)
            made += 1
        return made


def widen(weight: QTensor, factors: NDArray[np.float64]) -> QTensor:
    """The same weight with each channel's scale (out,) times its factor, codes rounded again."""
    if not weight.scale.ndim:
        factors = factors.max()
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
    if not g.is_constant(node.inputs[2]) or np.asarray(node.inputs[2].values).ndim > 1:
        return None
    return f"{node.name}#bias"
