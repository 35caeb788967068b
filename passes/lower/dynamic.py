"""Integer weights, activations quantized as they come by DynamicQuantizeLinear.

DynamicQuantizeLinear has one scale for the whole tensor, so that one token with a large activation
makes all others coarse. With `per_row` each row is first divided by its largest magnitude,
r_i = max_k |x_ik|, and the product multiplied by it again: a scale per row, as in ZeroQuant (Yao et
al. 2022, §4.2), from standard operators, and the fused kernels stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnxq.passes.lower.codes import eight_bit_codes, eight_bit_zero
from onnxq.passes.lower.embedding import lower_embedding
from onnxq.passes.lower.recurrent import lower_recurrent
from onnxq.passes.lower.stored import lower_stored

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QTensor


@dataclass(frozen=True)
class Dynamic(Pass):
    """MatMul, Gemm and Conv on codes, with ranges of activations taken as they come.

    `per_row` gives each row of a MatMul's input a scale of its own (each token its own).
    """

    per_row: bool = True
    name: ClassVar[str] = "dynamic"
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        maker, changes = g.Maker(graph), 0
        for body in list(g.subgraphs(graph)):
            writer = _Writer(body, maker, self.per_row)
            for node, plan in ctx.plan.quantized(list(body.nodes)):
                view = g.weight_view(node)
                if view is None or plan.weight is None or view.tensor.name not in ctx.weights:
                    continue
                q = ctx.weights[view.tensor.name]
                if node.op == "Gather":
                    changes += lower_embedding(body, node, q, maker)
                elif plan.weights_alone:
                    changes += lower_stored(body, node, ctx.weights, maker)
                elif node.op in g.RECURRENT:
                    changes += lower_recurrent(node, ctx.weights, maker)
                else:
                    changes += writer.lower(node, view, q)
        g.tidy(graph)
        return changes


class _Writer:
    """Writes one graph or body; what is quantized in one is not to be seen in another."""

    def __init__(self, body: Graph, maker: g.Maker, per_row: bool) -> None:
        self.body, self.maker, self.per_row = body, maker, per_row
        self.quantized: dict[str, list[gs.Variable]] = {}
        self.normalized: dict[str, tuple[gs.Variable, gs.Variable]] = {}

    def lower(self, node: Node, view: g.WeightView, q: QTensor) -> int:
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        conv = node.op == "Conv"
        codes, scale = view.from_matrix(q.codes), q.scale
        attrs = dict(node.attrs) if conv else {}
        if conv:
            scale = scale.reshape(-1, *(1,) * (view.rank - 2)) if scale.ndim else scale
        elif node.op == "Gemm" and node.attrs.get("transB", 0):
            codes = np.ascontiguousarray(codes.T)  # MatMulInteger wants (in, out)
        elif view.batches > 1 and scale.ndim:
            scale = scale.reshape(*view.tensor.shape[:-2], 1, -1)
        x = node.inputs[0]
        if node.op == "Gemm" and node.attrs.get("transA", 0):
            x = self._emit(node, "Transpose", [x], perm=[1, 0])
        rows: gs.Variable | None = None
        if self.per_row and node.op == "MatMul":
            x, rows = self._normalize_rows(node, x)
        x_codes, x_scale, x_zero = self._quantize(x)
        name = view.tensor.name
        stored = eight_bit_codes(self.body, name, codes, q.qtype, self.maker)
        inputs = [x_codes, stored, x_zero]
        if q.zero.any():
            zero = eight_bit_zero(q.zero, q.qtype)
            inputs.append(self.maker.constant(f"{name}_zero_point", zero))
        product = self._emit(node, "ConvInteger" if conv else "MatMulInteger", inputs, **attrs)
        real = self._emit(node, "Cast", [product], to=int(onnx.TensorProto.FLOAT))
        alpha = np.float32(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else np.float32(1)
        unit = self.maker.constant(f"{name}_scale", scale * alpha)
        result = self._emit(node, "Mul", [real, self._emit(node, "Mul", [x_scale, unit])])
        if rows is not None:
            result = self._emit(node, "Mul", [result, rows])
        if bias is not None:
            result = self._emit(node, "Add", [result, self._addend(node, view, bias)])
        g.replace_node(self.body, node, result)
        return 1

    def _addend(self, node: Node, view: g.WeightView, bias: gs.Tensor) -> gs.Tensor:
        """The bias in the form that broadcasts: beta · C of a Gemm, (out, 1, …) of a Conv."""
        beta = np.float32(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else np.float32(1)
        tail = (1,) * (view.rank - 2) if node.op == "Conv" else ()
        if beta == 1 and not tail:
            return bias
        if g.is_constant(bias):
            values = g.values(bias) * beta
            return self.maker.constant(
                f"{bias.name}_{node.name}", values.reshape(-1, *tail) if tail else values
            )
        if tail:
            shape = self.maker.constant(f"{node.name}_bias_shape", np.array([-1, *tail]))
            bias = self._emit(node, "Reshape", [bias, shape])
        factor = self.maker.constant(f"{node.name}_beta", np.asarray(beta))
        return bias if beta == 1 else self._emit(node, "Mul", [bias, factor])

    def _normalize_rows(self, node: Node, x: gs.Tensor) -> tuple[gs.Variable, gs.Variable]:
        """x divided by the largest magnitude of each row, and those magnitudes (…, 1)."""
        if x.name not in self.normalized:
            magnitude = self._emit(node, "Abs", [x])
            if self.body.opset < 18:  # where the axes became an input
                largest = self._emit(node, "ReduceMax", [magnitude], axes=[-1])
            else:
                axes = self.maker.constant("last_axis", np.array([-1]))
                largest = self._emit(node, "ReduceMax", [magnitude, axes])
            floor = self.maker.constant("smallest_row", np.array(1e-30, np.float32))
            rows = self._emit(node, "Max", [largest, floor])
            self.normalized[x.name] = (self._emit(node, "Div", [x, rows]), rows)
        return self.normalized[x.name]

    def _quantize(self, x: gs.Tensor) -> list[gs.Variable]:
        if x.name not in self.quantized:
            parts = ("codes", "scale", "zero")
            outputs = [gs.Variable(self.maker.name(f"{x.name}_{part}")) for part in parts]
            name = self.maker.name(f"{x.name}_DynamicQuantizeLinear")
            self.body.nodes.append(gs.Node("DynamicQuantizeLinear", name, {}, [x], outputs))
            self.quantized[x.name] = outputs
        return self.quantized[x.name]

    def _emit(self, node: Node, op: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        return self.maker.emit(self.body, op, inputs, node.name, **attrs)
