"""An embedding table stored as codes: rows are looked up first, then scaled.

    Gather(W, ids) = (Gather(codes, ids) − zero) · Gather(scale, ids)

so that the whole table is never dequantized. Standard operators only.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.qtype import QTensor


def lower_embedding(graph: g.Graph, node: g.Node, q: QTensor, namer: g.Namer) -> int:
    """Replace Gather over a float table by Gather over codes and over the scale of each row."""
    table, ids = node.inputs
    out = node.outputs[0]
    dtype = np.dtype(table.dtype)

    def emit(op: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        result = gs.Variable(namer(f"{node.name}_{op}_out"))
        graph.nodes.append(gs.Node(op, namer(f"{node.name}_{op}"), attrs, inputs, [result]))
        return result

    codes = g.constant(namer(f"{table.name}_quantized"), q.codes.reshape(table.shape))
    real = emit("Cast", [emit("Gather", [codes, ids], axis=0)],
                to=int(onnx.helper.np_dtype_to_tensor_dtype(dtype)))  # fmt: skip
    tail = (1,) * (len(table.shape) - 1)
    scale = g.constant(
        namer(f"{table.name}_scale"), q.scale.astype(dtype).reshape(-1, *tail)
        if q.scale.ndim else q.scale.astype(dtype)
    )  # fmt: skip
    zero = q.zero.astype(np.float32)
    if zero.any():
        values = zero.astype(dtype).reshape(-1, *tail) if zero.ndim else zero.astype(dtype)
        offset: gs.Tensor = g.constant(namer(f"{table.name}_zero"), values)
        real = emit("Sub", [real, emit("Gather", [offset, ids], axis=0) if zero.ndim else offset])
    factor = emit("Gather", [scale, ids], axis=0) if q.scale.ndim else scale
    node.inputs.clear()
    node.outputs.clear()
    graph.nodes.remove(node)
    graph.nodes.append(gs.Node("Mul", namer(f"{node.name}_Mul"), {}, [real, factor], [out]))
    return 1
