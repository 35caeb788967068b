"""What `low-rank` found, beside the layers: y = Ŵx + A(Bx), A (out, r) and B (r, in).

A and B are float16 in the file, behind a Cast that ONNX Runtime computes when it loads the model.
The layer itself is left to the lowering that comes after, and its output keeps its name for the
sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Factors, Pass


@dataclass(frozen=True)
class AddLowRank(Pass):
    """Two thin products beside each layer that has factors; before the pass that writes codes."""

    name: ClassVar[str] = "add-low-rank"
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        maker, changes = g.Maker(graph), 0
        for body in g.subgraphs(graph):
            for node, plan in ctx.plan.quantized(list(body.nodes)):
                view, key = g.weight_view(node), (self.name, node.name)
                if view is None or not plan.weights_alone or key in ctx.solved:
                    continue
                if node.op not in ("MatMul", "Gemm") or view.tensor.name not in ctx.corrections:
                    continue
                add(body, node, view.tensor, ctx.corrections[view.tensor.name], maker)
                ctx.solved.add(key)
                changes += 1
        g.sort(graph)
        return changes


def add(body: Graph, node: Node, weight: gs.Constant, factors: Factors, maker: g.Maker) -> None:
    """A(Bx) added to the output of a MatMul or Gemm."""
    dtype, matrices = np.dtype(weight.dtype), []
    for part, matrix in (("b", factors.b), ("a", factors.a)):
        name = f"{weight.name}_{part}"
        stored: gs.Tensor = maker.shared(name, np.ascontiguousarray(matrix.T))
        if dtype != np.float16:
            to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
            stored = maker.emit(body, "Cast", [stored], name, to=to)
        matrices.append(stored)
    add_product(body, node, matrices, f"{node.name}_low_rank", maker)


def add_product(
    body: Graph, node: Node, matrices: list[gs.Tensor], base: str, maker: g.Maker
) -> None:
    """The input of a MatMul or Gemm times matrices, one after the other, added to its output."""
    x, y = node.inputs[0], node.outputs[0]
    if node.attrs.get("transA", 0):
        x = maker.emit(body, "Transpose", [x], base, perm=[1, 0])
    for matrix in matrices:
        x = maker.emit(body, "MatMul", [x, matrix], base)
    if (alpha := float(node.attrs.get("alpha", 1.0))) != 1:
        dtype = g.dtype(y) or np.dtype(np.float32)
        x = maker.emit(
            body, "Mul", [x, maker.constant(f"{base}_alpha", np.asarray(alpha, dtype))], base
        )
    node.outputs[0] = gs.Variable(maker.name(f"{y.name}_rounded"), dtype=y.dtype, shape=y.shape)
    body.nodes.append(gs.Node("Add", maker.name(f"{base}_Add"), {}, [node.outputs[0], x], [y]))
