"""Write the plan down as QuantizeLinear and DequantizeLinear around float operators (QDQ form).

Every provider of ONNX Runtime reads this form and fuses it into its own integer kernels. A weight
becomes integer codes behind a DequantizeLinear; an activation passes a QuantizeLinear and a
DequantizeLinear. Where a kernel hands on codes, all readers of its output go through the pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.lower.embedding import lower_embedding
from onnxq.passes.solve.quantize_bias import bias_key

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Pass
from onnxq.qtype import Codes, Floats, QParams, QTensor


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """QDQ form, with int32 biases and weights stored as integer codes."""

    name: ClassVar[str] = "insert-qdq"

    def apply(self, graph: Graph, ctx: Context) -> int:
        writer = _Writer(graph, ctx)
        changes = sum(writer.node(node) for node, _ in ctx.plan.quantized(graph))
        changes += writer.activations()
        g.tidy(graph)
        return changes


class _Writer:
    def __init__(self, graph: Graph, ctx: Context) -> None:
        self.graph, self.ctx = graph, ctx
        self.namer = g.Namer(graph)
        self.dequantized: dict[str, gs.Variable] = {}  # weight or activation → its DQ output

    def node(self, node: Node) -> int:
        view = g.weight_view(node)
        if view is None or view.tensor.name not in self.ctx.weights:
            return 0
        codes = self.ctx.weights[view.tensor.name]
        if node.op == "Gather":
            return lower_embedding(self.graph, node, codes, self.namer)
        if view.tensor.name not in self.dequantized:
            self.dequantized[view.tensor.name] = self._weight(view, codes)
        key = bias_key(node)
        node.inputs[view.slot] = self.dequantized[view.tensor.name]
        if key is not None and key in self.ctx.weights:
            node.inputs[2] = self._bias(node.inputs[2].name, self.ctx.weights[key])
        return 1

    def activations(self) -> int:
        """Pairs on every planned activation: for all its readers, or for the planned ones alone."""
        changes = 0
        for node, plan in self.ctx.plan.quantized(self.graph):
            if plan.output:
                for tensor in list(node.outputs):
                    changes += self._everywhere(tensor)
        for node, plan in self.ctx.plan.quantized(self.graph):
            for slot in plan.inputs:
                tensor = node.inputs[slot]
                if tensor.name in self.ctx.activations and not _is_dequantized(tensor):
                    node.inputs[slot] = self._pair(tensor)
                    changes += 1
        return changes

    def _everywhere(self, tensor: gs.Variable) -> int:
        if tensor.name not in self.ctx.activations or tensor.name in self.dequantized:
            return 0
        params = self.ctx.activations[tensor.name]
        readers = [reader for reader in tensor.outputs if reader.op != "QuantizeLinear"]
        maker = tensor.inputs[0]
        if not readers and not g.is_output(self.graph, tensor):
            return 0  # written down already
        if saturation_does(maker, params):
            raw = maker.inputs[0]
            maker.inputs.clear()
            maker.outputs.clear()
            self.graph.nodes.remove(maker)
            self._quantize_dequantize(raw, params, tensor)
            self.dequantized[tensor.name] = tensor
            return 1
        if g.is_output(self.graph, tensor):
            # The model's output keeps its name and is what comes out of the pair.
            raw = gs.Variable(self.namer(f"{tensor.name}_raw"), dtype=tensor.dtype)
            maker.outputs[maker.outputs.index(tensor)] = raw
            self._quantize_dequantize(raw, params, tensor)
            self.dequantized[tensor.name] = tensor
            return 1
        for reader in readers:
            g.replace_input(reader, tensor, self._pair(tensor))
        return 1

    def _pair(self, tensor: gs.Variable) -> gs.Variable:
        if tensor.name not in self.dequantized:
            out = gs.Variable(self.namer(f"{tensor.name}_dequantized"), dtype=tensor.dtype)
            self._quantize_dequantize(tensor, self.ctx.activations[tensor.name], out)
            self.dequantized[tensor.name] = out
        return self.dequantized[tensor.name]

    def _quantize_dequantize(self, x: gs.Variable, params: QParams, out: gs.Variable) -> None:
        name = x.name
        scale = g.constant(self.namer(f"{name}_scale"), params.scale)
        zero = g.constant(self.namer(f"{name}_zero_point"), params.zero)
        codes = gs.Variable(self.namer(f"{name}_quantized"), dtype=params.qtype.dtype)
        self._append("QuantizeLinear", name, [x, scale, zero], codes, {})
        self._append("DequantizeLinear", name, [codes, scale, zero], out, {})

    def _weight(self, view: g.WeightView, q: QTensor) -> gs.Variable:
        name = view.tensor.name
        attrs: dict[str, int] = {}
        scale, zero = q.scale, q.zero
        if q.scale.ndim == 1:
            attrs = {"axis": view.axis}
        elif q.scale.ndim == 2:
            attrs = {"axis": view.block_axis, "block_size": q.qtype.group or 0}
            if view.axis == 1:
                scale, zero = scale.T, zero.T
        stored = g.constant(self.namer(f"{name}_quantized"), view.from_matrix(q.codes))
        return self._dequantize(name, stored, scale, zero, attrs)

    def _bias(self, name: str, q: QTensor) -> gs.Variable:
        stored = g.constant(self.namer(f"{name}_quantized"), q.codes[:, 0])
        return self._dequantize(name, stored, q.scale, q.zero, {"axis": 0})

    def _dequantize(
        self, name: str, codes: gs.Constant, scale: Floats, zero: Codes, attrs: dict[str, int]
    ) -> gs.Variable:
        inputs = [
            codes,
            g.constant(self.namer(f"{name}_scale"), scale),
            g.constant(self.namer(f"{name}_zero_point"), zero),
        ]
        out = gs.Variable(self.namer(f"{name}_dequantized"), dtype=np.dtype(np.float32))
        self._append("DequantizeLinear", name, inputs, out, attrs)
        return out

    def _append(
        self, op: str, name: str, inputs: list[object], out: gs.Variable, attrs: dict[str, int]
    ) -> None:
        self.graph.nodes.append(gs.Node(op, self.namer(f"{name}_{op}"), attrs, inputs, [out]))


def _is_dequantized(tensor: gs.Tensor) -> bool:
    maker = g.producer(tensor)
    return maker is not None and maker.op == "DequantizeLinear"


def saturation_does(node: Node, params: QParams) -> bool:
    """Whether clipping to the range of the codes does what this Relu or Clip does."""
    bounds = g.clip_bounds(node)
    if bounds is None:
        return False
    low, high = (np.rint(bound / float(params.scale)) + int(params.zero) for bound in bounds)
    return bool(low <= params.qtype.qmin and high >= params.qtype.qmax)
