"""Fold per-channel affine maps into the weights before them.

Batch normalisation at inference is y = γ (x − μ) / √(σ² + ε) + β, an affine map of each channel
(Ioffe & Szegedy 2015, Algorithm 2). A linear operator followed by y = a·x + c is the same operator
with W ← a·W and b ← a·b + c. A scale before it goes into the columns: W(a·x) = (W·a)x.

What BatchNormalization said of its output, mean β and deviation |γ|, is kept in the Context: it
makes calibration without data possible (Nagel et al. 2019, "Data-Free Quantization", §4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.prepare import affine
from onnxq.passes.prepare.affine import Vector

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Pass


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """BatchNormalization, Mul, Div, Add and Sub by a constant per channel, into the weights."""

    name: ClassVar[str] = "fold-batchnorm"

    def apply(self, graph: Graph, ctx: Context) -> int:
        namer = g.Namer(graph)
        changes = 0
        for body in g.subgraphs(graph):
            for node in list(body.nodes):
                if g.weight_view(node) is None or node.op not in affine.LINEAR:
                    continue
                while _fold_next(body, node, namer, ctx):
                    changes += 1
                changes += _fold_scale_before(body, node, namer)
        g.tidy(graph)
        return changes


def _fold_next(graph: Graph, node: Node, namer: g.Namer, ctx: Context) -> bool:
    """Fold the affine map that is the only reader of this node's output, if there is one."""
    follower = g.sole_consumer(graph, node.outputs[0])
    if follower is None or not g.owns(graph, follower) or not g.is_standard(follower):
        return False
    channels = affine.out_channels(node)
    found = _affine(follower, node.outputs[0], affine.channel_axis_from_end(node), channels)
    if found is None:
        return False
    a, c = found
    if node.op == "MatMul" and np.any(c):
        return False  # MatMul has no bias; an Add is the cheapest place for one
    bias = affine.bias(node, channels)
    if bias is None:
        return False
    if follower.op == "BatchNormalization" and node.op == "Conv":
        gamma, beta = (g.values(follower.inputs[i]).astype(np.float64) for i in (1, 2))
        ctx.batch_statistics[follower.outputs[0].name] = (beta, np.abs(gamma))
    affine.scale_rows(node, a, namer)
    if node.op != "MatMul":
        affine.set_bias(node, a * bias + c, namer)
    out = follower.outputs[0]
    follower.inputs.clear()
    follower.outputs.clear()
    node.outputs[0] = out
    graph.nodes.remove(follower)
    return True


def _affine(node: Node, x: gs.Tensor, axis: int, channels: int) -> tuple[Vector, Vector] | None:
    """(a, c) of y = a·x + c per channel, or None if the node is no such map of x."""
    if node.op == "BatchNormalization":
        if node.attrs.get("training_mode", 0) or len(node.outputs) > 1:
            return None
        if not all(g.is_constant(t) for t in node.inputs[1:5]):
            return None
        gamma, beta, mean, var = (g.values(t).astype(np.float64) for t in node.inputs[1:5])
        a = gamma / np.sqrt(var + node.attrs.get("epsilon", 1e-5))
        return (a, beta - a * mean) if len(a) == channels else None
    if node.op not in ("Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
        return None
    left = node.inputs[0] is x
    other = node.inputs[1 if left else 0]
    if not g.is_constant(other) or (node.op in ("Div", "Sub") and not left):
        return None
    value = affine.per_channel(g.values(other), axis, channels)
    if value is None:
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    match node.op:
        case "Mul":
            return value, zeros
        case "Div":
            return (1 / value, zeros) if np.all(value) else None
        case "Add":
            return ones, value
    return ones, -value


def _fold_scale_before(graph: Graph, node: Node, namer: g.Namer) -> bool:
    """Mul or Div by a constant per input channel, into the columns of W."""
    view = g.weight_view(node)
    assert view is not None
    scale = g.producer(node.inputs[0])
    if scale is None or not g.owns(graph, scale) or scale.op not in ("Mul", "Div"):
        return False
    if node.op == "ConvTranspose" or view.batches > 1:
        return False
    alone = g.sole_consumer(graph, node.inputs[0]) is node
    if not alone or node.attrs.get("transA", 0):
        return False
    if view.groups != 1:
        return False
    channels = affine.in_channels(node)
    x = next((t for t in scale.inputs if not g.is_constant(t)), None)
    if x is None:
        return False
    found = _affine(scale, x, affine.channel_axis_from_end(node), channels)
    if found is None:
        return False
    affine.scale_columns(node, found[0], namer)
    node.inputs[0] = x
    scale.inputs.clear()
    scale.outputs.clear()
    graph.nodes.remove(scale)
    return True
