"""Biases that take back what rounding adds to the mean of a layer's output.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", §4.2,
empirically: rounding errors of a channel's weights and of its inputs do not cancel in the mean,

    b ← b + E[y] − E[ŷ],

y of the float model and ŷ of the quantized one on the same samples, both before the activation
function. A layer sees inputs that all layers before it have shifted: it is measured when those are
corrected. Layers of one depth do not see each other and share a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.graph import Graph
from onnxq.observe import Moments
from onnxq.pipeline import Context, Pass
from onnxq.samples import Samples

Array = NDArray[np.float64]
CHANNELS = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}  # their axis in the output


@dataclass(frozen=True)
class BiasCorrect(Pass):
    """New biases for every quantized Conv and Gemm, and for a MatMul with an Add behind it.

    `samples` bounds how many are run for each depth of the model.
    """

    samples: int = 32
    name: ClassVar[str] = "bias-correct"
    needs_samples: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        if ctx.samples is None:
            raise OnnxqError("the pass 'bias-correct' needs samples, and there are none")
        layers = self._layers(graph, ctx)
        if not layers:
            return 0
        some = ctx.samples.slice(0, self.samples)
        wanted = _means(graph, list(layers), ctx, some)
        quantized, namer = ctx.quantized(graph, qdq=True), g.Namer(graph)
        done = 0
        for depth in by_depth(quantized, set(layers)):
            now = _means(quantized, depth, ctx, some)
            for name in depth:
                ctx.progress(self.name, done, len(layers))
                done += 1
                ctx.solved.add((self.name, name))
                shift = wanted[name] - now[name]
                if not shift.any():  # as in a branch that never ran
                    continue
                node, body = layers[name]
                convolved = node.op in ("Conv", "ConvTranspose")
                places = len(node.inputs[1].shape) - 2 if convolved else 0
                add_to_output(quantized, name, shift.reshape(-1, *[1] * places))
                add_to_bias(node, body, shift, namer)
        return done

    def _layers(self, graph: Graph, ctx: Context) -> dict[str, tuple[g.Node, Graph]]:
        """Nodes to correct by name, each with the graph it stands in."""
        hidden = {id(body) for body in g.hidden(graph)}
        layers: dict[str, tuple[g.Node, Graph]] = {}
        without: list[str] = []
        for body in g.subgraphs(graph):
            for node, plan in ctx.plan.quantized(body.nodes):
                if plan.weight is None or node.op not in CHANNELS or id(body) in hidden:
                    continue
                if node.inputs[1].name not in ctx.weights or (self.name, node.name) in ctx.solved:
                    continue
                if takes_bias(node, body):
                    layers[node.name] = node, body
                else:
                    without.append(node.name)
        if without:
            others = f" and {len(without) - 1} more" if len(without) > 1 else ""
            ctx.report.warn(f"{without[0]!r}{others}: no bias to correct, and no Add to take one")
        return layers


def _means(graph: Graph, names: list[str], ctx: Context, samples: Samples) -> dict[str, Array]:
    """E[y] of nodes by name, (channels,); of those that never ran, 0."""
    nodes = {node.name: node for node in g.walk(graph) if node.name in names}
    keys = {name: f"{node.outputs[0].name}#mean" for name, node in nodes.items()}
    observers = {keys[name]: Moments(CHANNELS[nodes[name].op]) for name in nodes}
    seen = observe(graph, observers, samples, threads=ctx.threads)
    return {name: seen[key].mean for name, key in keys.items()}


# ── in the float graph ───────────────────────────────────────────────────────────────────────────


def takes_bias(node: g.Node, body: Graph) -> bool:
    """Whether a node has a bias that can be changed, or room for one."""
    reader, slot = _bias_slot(node, body)
    if reader is None or reader.attrs.get("beta", 1.0) == 0:
        return False
    if len(reader.inputs) <= slot or not reader.inputs[slot].name:
        return True
    bias = reader.inputs[slot]
    return g.is_constant(bias) and g.is_float(bias) and math.prod(bias.shape[:-1]) == 1


def add_to_bias(node: g.Node, body: Graph, shift: Array, namer: g.Namer) -> None:
    """Add `shift` (channels,) to the mean of a node's output by its bias, a new initializer."""
    reader, slot = _bias_slot(node, body)
    assert reader is not None
    fresh = len(reader.inputs) <= slot or not reader.inputs[slot].name
    name = f"{node.name}_bias" if fresh else reader.inputs[slot].name
    old = np.zeros(1, g.dtype(node.inputs[1])) if fresh else g.values(reader.inputs[slot])
    moved = np.broadcast_to(old, (*old.shape[:-1], len(shift)))
    moved = moved + shift / float(reader.attrs.get("beta", 1.0))
    bias = g.constant(namer(f"{name}_corrected"), moved.astype(old.dtype))
    if len(reader.inputs) <= slot:
        reader.inputs.append(bias)
    else:
        reader.inputs[slot] = bias


def _bias_slot(node: g.Node, body: Graph) -> tuple[g.Node | None, int]:
    """The node that adds the bias, and where: a MatMul has an Add of a constant behind it."""
    if node.op != "MatMul":
        return node, 2
    reader = g.sole_consumer(body, node.outputs[0])
    if reader is None or reader.op != "Add" or not g.is_standard(reader):
        return None, 0
    slot = 1 if reader.inputs[0] is node.outputs[0] else 0
    return (reader if g.is_constant(reader.inputs[slot]) else None), slot


# ── in the quantized one ─────────────────────────────────────────────────────────────────────────


def add_to_output(graph: Graph, name: str, shift: Array) -> None:
    """Put an Add of a constant between a node and all that reads its output."""
    maker = g.Maker(graph)
    for body in g.subgraphs(graph):
        for node in [node for node in body.nodes if node.name == name]:
            out = node.outputs[0]
            raw = gs.Variable(maker.name(f"{out.name}_shifted"), dtype=out.dtype)
            kind = np.dtype(g.dtype(out) or np.float32)
            values = maker.constant(f"{out.name}_shift", shift.astype(kind))
            node.outputs[0] = raw
            body.nodes.append(gs.Node("Add", maker.name(f"{name}_shift"), {}, [raw, values], [out]))
    g.sort(graph)


def by_depth(graph: Graph, names: set[str]) -> list[list[str]]:
    """Nodes by how many of them lie before each on the longest path, the first first."""
    depths: dict[str, int] = {}
    _depths_inside(graph, names, {}, 0, depths)
    return [
        [name for name in depths if depths[name] == depth] for depth in sorted(set(depths.values()))
    ]


def _depths_inside(
    graph: Graph, names: set[str], known: dict[str, int], base: int, depths: dict[str, int]
) -> int:
    """Fill `depths`, and return the greatest below this graph; `known` holds tensors' depths."""
    known = known | {tensor.name: base for tensor in graph.inputs}
    deepest = base
    for node in graph.nodes:
        depth = max((known.get(t.name, base) for t in node.inputs), default=base)
        inside = [_depths_inside(body, names, known, depth, depths) for body in g.bodies(node)]
        depth = max([depth, *inside])
        if node.name in names:
            depths[node.name] = depth
            depth += 1
        known |= {tensor.name: depth for tensor in node.outputs}
        deepest = max(deepest, depth)
    return deepest
