"""Activations quantized at run time: DynamicQuantizeLinear, then an integer product.

    y = (Σ (x_q − z_x) w_q) · s_x s_w + b

ONNX Runtime fuses these standard operators into DynamicQuantizeMatMul and MatMulIntegerToFloat.
Readers of one tensor share its DynamicQuantizeLinear.

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
from onnxq.passes.lower.embedding import lower_embedding

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

    def apply(self, graph: Graph, ctx: Context) -> int:
        writer = _Writer(graph, self.per_row)
        changes = 0
        for node, _ in ctx.plan.quantized(graph):
            view = g.weight_view(node)
            if view is None or view.tensor.name not in ctx.weights:
                continue
            changes += writer.lower(node, view, ctx.weights[view.tensor.name])
        g.tidy(graph)
        return changes


class _Writer:
    def __init__(self, graph: Graph, per_row: bool) -> None:
        self.graph, self.namer, self.per_row = graph, g.Namer(graph), per_row
        self.quantized: dict[str, list[gs.Variable]] = {}
        self.normalized: dict[str, tuple[gs.Variable, gs.Variable]] = {}

    def lower(self, node: Node, view: g.WeightView, q: QTensor) -> int:
        if node.op == "Gather":
            return lower_embedding(self.graph, node, q, self.namer)
        out = node.outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        alpha = 1.0
        if node.op == "Conv":
            weight = view.from_matrix(q.codes)
            tail = (1,) * (weight.ndim - 2)
            attrs = dict(node.attrs)
        else:  # MatMulInteger wants (in, out)
            weight, tail, attrs = np.ascontiguousarray(q.codes.T), (), {}
            alpha = float(node.attrs.get("alpha", 1.0))
        x = node.inputs[0]
        if node.op == "Gemm" and node.attrs.get("transA", 0):
            x = self._emit(node, "Transpose", [x], perm=[1, 0])
        rows: gs.Variable | None = None
        if self.per_row and node.op == "MatMul":
            x, rows = self._normalize_rows(node, x)
        codes, scale, zero = self._quantize(x)
        w = g.constant(self.namer(f"{view.tensor.name}_quantized"), weight)
        inputs: list[gs.Tensor] = [codes, w, zero]
        if q.zero.any():
            inputs.append(g.constant(self.namer(f"{view.tensor.name}_zero_point"), q.zero))
        product = self._emit(
            node, "ConvInteger" if node.op == "Conv" else "MatMulInteger", inputs, **attrs
        )
        real = self._emit(node, "Cast", [product], to=int(onnx.TensorProto.FLOAT))
        unit_values = q.scale * np.float32(alpha)
        unit_values = unit_values.reshape(-1, *tail) if unit_values.ndim else unit_values
        unit = g.constant(self.namer(f"{view.tensor.name}_scale"), unit_values)
        result = self._emit(node, "Mul", [real, self._emit(node, "Mul", [scale, unit])])
        if rows is not None:
            result = self._emit(node, "Mul", [result, rows])
        if bias is not None:
            if node.op == "Conv" or node.attrs.get("beta", 1.0) != 1.0:
                beta = np.float32(node.attrs.get("beta", 1.0))
                values = bias.values * beta
                values = values.reshape(-1, *tail) if node.op == "Conv" else values
                bias = g.constant(self.namer(f"{bias.name}_scaled"), values)
            result = self._emit(node, "Add", [result, bias])
        maker = result.inputs[0]
        node.inputs.clear()
        node.outputs.clear()
        self.graph.nodes.remove(node)
        maker.outputs[0] = out
        return 1

    def _normalize_rows(self, node: Node, x: gs.Tensor) -> tuple[gs.Variable, gs.Variable]:
        """x divided by the largest magnitude of each row, and those magnitudes (…, 1)."""
        if x.name not in self.normalized:
            magnitude = self._emit(node, "Abs", [x])
            if self.graph.opset < 18:  # where the axes became an input
                largest = self._emit(node, "ReduceMax", [magnitude], axes=[-1])
            else:
                axes = g.constant(self.namer(f"{x.name}_axes"), np.array([-1]))
                largest = self._emit(node, "ReduceMax", [magnitude, axes])
            floor = g.constant(self.namer(f"{x.name}_floor"), np.array(1e-30, np.float32))
            rows = self._emit(node, "Max", [largest, floor])
            self.normalized[x.name] = (self._emit(node, "Div", [x, rows]), rows)
        return self.normalized[x.name]

    def _quantize(self, x: gs.Tensor) -> list[gs.Variable]:
        if x.name not in self.quantized:
            self.quantized[x.name] = [
                gs.Variable(self.namer(f"{x.name}_{part}")) for part in ("codes", "scale", "zero")
            ]
            self.graph.nodes.append(
                gs.Node(
                    "DynamicQuantizeLinear",
                    self.namer(f"{x.name}_DynamicQuantizeLinear"),
                    {},
                    [x],
                    self.quantized[x.name],
                )
            )
        return self.quantized[x.name]

    def _emit(self, node: Node, op: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        out = gs.Variable(self.namer(f"{node.name}_{op}_out"))
        self.graph.nodes.append(gs.Node(op, self.namer(f"{node.name}_{op}"), attrs, inputs, [out]))
        return out
