"""Write the plan down as QuantizeLinear and DequantizeLinear around float operators (QDQ form).

Every provider of ONNX Runtime reads this form and fuses it into its own integer kernels. A weight
becomes integer codes behind a DequantizeLinear; an activation passes a QuantizeLinear and a
DequantizeLinear. Where a kernel hands on codes, all readers of its output go through the pair.

Activations of fewer than 8 bits are 8-bit codes, clipped between the two to those few that they
may take: no kernel of onnxruntime takes less than 8 bits, and with a packed type it refuses the
model, while a Clip of codes leaves the operators around it fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.lower.codes import eight_bit_codes, eight_bit_zero
from onnxq.passes.lower.embedding import lower_embedding
from onnxq.passes.lower.recurrent import dequantized_matrix, lower_recurrent
from onnxq.passes.lower.stored import lower_stored
from onnxq.passes.solve.assign import MOVERS
from onnxq.passes.solve.quantize_bias import bias_key

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, NodePlan, Pass
from onnxq.qtype import QParams, QTensor, quantize

_BEYOND = 2**31  # steps from zero, more than 16-bit codes reach


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """QDQ form, with int32 biases and weights stored as integer codes."""

    name: ClassVar[str] = "insert-qdq"
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        maker, changes = g.Maker(graph), 0
        source: dict[str, str] = {}
        for body in list(g.subgraphs(graph)):  # outermost first
            writer, nodes = _Writer(graph, body, ctx, maker, source), list(body.nodes)
            kept_float = [node for node in nodes if _is_fused_unasked(node, ctx)]
            changes += sum(writer.node(*planned) for planned in ctx.plan.quantized(nodes))
            changes += writer.activations()
            changes += sum(writer.shield(node, 0) for node in kept_float)
            # onnxruntime 1.31 moves a DequantizeLinear behind a Reshape and its like, and dies
            # where a body reads what that makes.
            made = {id(tensor) for node in body.nodes for tensor in node.outputs}
            changes += sum(
                writer.shield(reader, slot)
                for node in body.nodes
                for inner in g.bodies(node)
                for reader in g.walk(inner)
                if reader.op != "QuantizeLinear"
                for slot, tensor in enumerate(reader.inputs)
                if id(tensor) in made and slot not in ctx.plan.get(reader.name, NodePlan()).inputs
            )
        g.tidy(graph)
        return changes


class _Writer:
    """Writes one graph or body: a kernel fuses only with what stands in the same one.

    `source` is what each pair's output stands for, those of enclosing graphs included.
    """

    def __init__(
        self, graph: Graph, body: Graph, ctx: Context, maker: g.Maker, source: dict[str, str]
    ) -> None:
        self.graph, self.body, self.ctx, self.maker = graph, body, ctx, maker
        self.source = source
        self.dequantized: dict[str, gs.Variable] = {}  # weight or activation → its DQ output

    def node(self, node: Node, plan: NodePlan) -> int:
        view = g.weight_view(node)
        if view is None or plan.weight is None or view.tensor.name not in self.ctx.weights:
            return 0
        codes = self.ctx.weights[view.tensor.name]
        if node.op == "Gather":
            return lower_embedding(self.body, node, codes, self.maker)
        if plan.weights_alone and codes.scale.ndim < 2:
            return lower_stored(self.body, node, self.ctx.weights, self.maker)
        if node.op in g.RECURRENT:
            return lower_recurrent(node, self.ctx.weights, self.maker)
        alone = plan.activation is None
        known = f"{view.tensor.name} alone" if alone else view.tensor.name
        if known not in self.dequantized:
            self.dequantized[known] = self._weight(view, codes, alone)
        key = bias_key(node)
        node.inputs[view.slot] = self.dequantized[known]
        if key is not None and key in self.ctx.weights:
            node.inputs[2] = self._bias(key, self.ctx.weights[key])
        return 1

    def activations(self) -> int:
        """Pairs on every planned activation: for all its readers, or for the planned ones alone."""
        planned = self.ctx.plan.quantized(self.body.nodes)
        changes = 0
        for node, plan in planned:
            if plan.output:
                for tensor in list(node.outputs):
                    changes += self._everywhere(tensor)
        for node, plan in planned:
            for slot in plan.inputs:
                tensor = node.inputs[slot]
                if self._name(tensor) in self.ctx.activations and not self._is_dequantized(tensor):
                    node.inputs[slot] = self._pair(tensor)
                    changes += 1
        return changes

    def shield(self, node: Node, slot: int) -> int:
        """A Clip far beyond all codes, which changes nothing, between them and a node that is to
        work on floats.

        Its ends count in scales: OpenVINO clips codes instead, at an end ÷ scale in 64 bits, and
        those of float32 overflow there.
        """
        maker = g.producer(node.inputs[slot])
        while maker is not None and maker.op in MOVERS:
            maker = g.producer(maker.inputs[0])
        if maker is None or maker.op != "DequantizeLinear" or not g.is_constant(maker.inputs[1]):
            return 0
        if _is_stored(maker.inputs[0]):
            return 0
        scale = maker.inputs[1]
        steps = np.asarray(g.values(scale)).max()
        end = np.minimum(np.float64(steps) * _BEYOND, np.finfo(steps.dtype).max)
        bounds = [
            self.maker.constant(f"{scale.name}_{name}", np.asarray(value, steps.dtype))
            for name, value in (("lowest", -end), ("largest", end))
        ]
        x = node.inputs[slot]
        node.inputs[slot] = self.maker.emit(self.body, "Clip", [x, *bounds], node.name)
        node.inputs[slot].dtype = x.dtype
        return 1

    def _everywhere(self, tensor: gs.Variable) -> int:
        if tensor.name not in self.ctx.activations or tensor.name in self.dequantized:
            return 0
        params = self.ctx.activations[tensor.name]
        readers = [r for r in tensor.outputs if r.op != "QuantizeLinear"]
        maker = tensor.inputs[0]
        if not readers and not g.is_output(self.body, tensor):
            return 0  # written down already
        own_kernel = maker.name in self.ctx.plan and self.ctx.plan[maker.name].inputs
        if not own_kernel and saturation_does(maker, params):
            raw = maker.inputs[0]
            maker.inputs.clear()
            maker.outputs.clear()
            self.body.nodes.remove(maker)
            self._quantize_dequantize(raw, params, tensor, tensor.name)
            self.dequantized[tensor.name] = tensor
            return 1
        if g.is_output(self.body, tensor):
            # The model's output keeps its name and is what comes out of the pair.
            raw = gs.Variable(self.maker.name(f"{tensor.name}_raw"), dtype=tensor.dtype)
            maker.outputs[maker.outputs.index(tensor)] = raw
            self._quantize_dequantize(raw, params, tensor, tensor.name)
            self.dequantized[tensor.name] = tensor
            return 1
        for reader in readers:
            g.replace_input(reader, tensor, self._pair(tensor))
        return 1

    def _name(self, tensor: gs.Tensor) -> str:
        return self.source.get(tensor.name, tensor.name)

    def _pair(self, tensor: gs.Variable) -> gs.Variable:
        name = self._name(tensor)
        if name not in self.dequantized:
            out = gs.Variable(self.maker.name(f"{name}_dequantized"), dtype=tensor.dtype)
            maker = g.producer(tensor)
            origin = tensor
            if maker is not None and maker.op == "Identity":  # a copy for another format
                origin = maker.inputs[0]
            self._quantize_dequantize(origin, self.ctx.activations[name], out, name)
            self.dequantized[name], self.source[out.name] = out, name
        return self.dequantized[name]

    def _quantize_dequantize(
        self, x: gs.Tensor, params: QParams, out: gs.Variable, name: str
    ) -> None:
        qtype = params.qtype
        if qtype.float8:
            self._keep_bounds(x)
        scale = self.maker.constant(f"{name}_scale", params.scale)
        zero = self.maker.constant(f"{name}_zero_point", eight_bit_zero(params.zero, qtype))
        if isinstance(x, gs.Constant):
            held = quantize(g.values(x), params.scale, params.zero, qtype)
            codes = self.maker.constant(f"{name}_quantized", held.astype(zero.dtype))
        else:
            codes = self.maker.emit(self.body, "QuantizeLinear", [x, scale, zero], name)
        if qtype.bits < 8 and not isinstance(x, gs.Constant):
            ends = [np.asarray(end, zero.dtype) for end in (qtype.qmin, qtype.qmax)]
            bounds = [self.maker.constant(f"code_{end}_{end.dtype}", end) for end in ends]
            codes = self.maker.emit(self.body, "Clip", [codes, *bounds], name)
            codes.dtype = zero.dtype
        real = self.maker.emit(self.body, "DequantizeLinear", [codes, scale, zero], name)
        real.inputs[0].outputs[0] = out

    def _keep_bounds(self, x: gs.Variable) -> None:
        """A Relu or Clip before an FP8 QuantizeLinear as Max and Min.

        onnxruntime 1.31 drops such a Relu, as if no code were below zero, and fails on such a Clip.
        """
        node = g.producer(x)
        while node is not None and node.op in MOVERS:
            node = g.producer(node.inputs[0])
        bounds = None if node is None else g.clip_bounds(node)
        if node is None or bounds is None or not g.owns(self.body, node):
            return
        real, dtype = node.inputs[0], g.dtype(node.inputs[0]) or np.dtype(np.float32)
        finite = np.clip(bounds, np.finfo(np.float32).min, np.finfo(np.float32).max)
        low, high = (
            self.maker.constant(f"{node.name}_{end}", np.asarray(value, dtype))
            for end, value in zip(("low", "high"), finite, strict=True)
        )
        node.op, node.attrs = "Max", {}
        if bounds[1] < np.inf:
            real = self.maker.emit(self.body, "Max", [real, low], node.name)
            node.op, low = "Min", high
        node.inputs.clear()
        node.inputs.extend([real, low])

    def _weight(self, view: g.WeightView, q: QTensor, alone: bool) -> gs.Variable:
        """The weight dequantized. `alone`, with float activations, not inside a body: there
        onnxruntime 1.31 fuses it with a MatMul and then does not find its codes. 2-bit codes as
        MatMul has them it fuses and misreads; behind a Transpose it leaves them.
        """
        body = self.graph if alone else self.body
        blocks = q.scale.ndim == 2
        misread = q.qtype.bits == 2 and view.node.op == "MatMul"
        if (view.batches > 1 and q.scale.ndim) or (blocks and (misread or view.rank > 2)):
            return dequantized_matrix(body, view, q, self.maker)
        attrs: dict[str, int] = {}
        scale, zero = q.scale, q.zero
        if q.scale.ndim == 1:
            attrs = {"axis": view.axis}
        elif q.scale.ndim == 2:
            attrs = {"axis": view.block_axis, "block_size": q.qtype.group or 0}
            if view.block_axis < view.axis:
                scale, zero = scale.T, zero.T
        name, codes = view.tensor.name, view.from_matrix(q.codes)
        if q.qtype.bits < 8 and (alone or q.scale.ndim == 2):  # kernels for those take packed codes
            stored = self.maker.constant(f"{name}_quantized", codes)
            return self._dequantize(body, f"{name}_packed", stored, scale, zero, attrs)
        wide = eight_bit_codes(body, name, codes, q.qtype, self.maker)
        return self._dequantize(body, name, wide, scale, eight_bit_zero(zero, q.qtype), attrs)

    def _bias(self, name: str, q: QTensor) -> gs.Variable:
        codes = self.maker.constant(f"{name}_quantized", np.ascontiguousarray(q.codes[:, 0]))
        attrs = {"axis": 0} if q.scale.ndim else {}
        return self._dequantize(self.body, name, codes, q.scale, q.zero, attrs)

    def _dequantize(
        self,
        body: Graph,
        name: str,
        codes: gs.Tensor,
        scale: g.Array,
        zero: g.Array,
        attrs: dict[str, int],
    ) -> gs.Variable:
        parts = {"scale": scale, "zero_point": zero}
        grid = [
            self.maker.constant(f"{name}_{part}", np.ascontiguousarray(a).reshape(a.shape))
            for part, a in parts.items()
        ]
        return self.maker.emit(body, "DequantizeLinear", [codes, *grid], name, **attrs)

    def _is_dequantized(self, tensor: gs.Tensor) -> bool:
        maker = g.producer(tensor)
        return maker is not None and maker.op == "DequantizeLinear" and g.owns(self.body, maker)


def _is_stored(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant, or computed of constants alone."""
    maker = g.producer(tensor)
    return g.is_constant(tensor) or (maker is not None and all(map(_is_stored, maker.inputs)))


def _is_fused_unasked(node: Node, ctx: Context) -> bool:
    """Whether the runtime could make a node integer that is to have float weights or activations.

    Behind a DequantizeLinear onnxruntime 1.31 rounds a float weight of its own accord, per tensor
    and regardless of saturation; and it takes a weight stored as codes into an integer kernel.
    """
    if node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or g.weight_view(node) is None:
        return False
    plan = ctx.plan.get(node.name, NodePlan())
    return not (plan.weight and plan.inputs) and (node.op != "MatMul" or plan.weight is not None)


def saturation_does(node: Node, params: QParams) -> bool:
    """Whether clipping to the range of the codes does what this Relu or Clip does."""
    bounds = g.clip_bounds(node)
    if bounds is None:
        return False
    low, high = (np.rint(bound / float(params.scale)) + int(params.zero) for bound in bounds)
    return bool(low <= params.qtype.qmin and high >= params.qtype.qmax)
