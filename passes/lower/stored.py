"""Weights that are codes in the file and floats in memory, for layers computed in float.

    codes ─ Cast ─▶ − zero ─▶ · scale ─▶ float weight

All of it is constant: ONNX Runtime folds it when it loads the model, before it looks for kernels,
so that the layer runs as it did before. A DequantizeLinear it would run every time.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.qtype import QTensor
from onnxq.spool import Weights


def lower_stored(body: Graph, node: Node, weights: Weights[QTensor], maker: g.Maker) -> int:
    """Every weight of the node as codes that are expanded when the model is loaded."""
    for view in g.weight_views(node):
        node.inputs[view.slot] = _expanded(body, view, weights[view.tensor.name], maker)
    return 1


def _expanded(body: Graph, view: g.WeightView, q: QTensor, maker: g.Maker) -> gs.Variable:
    name = view.tensor.name
    codes = maker.constant(f"{name}_quantized", view.from_matrix(q.codes))
    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(view.tensor.dtype))
    real = maker.emit(body, "Cast", [codes], name, to=int(to))
    for op, values in (("Sub", q.zero), ("Mul", q.scale)):
        if op == "Sub" and not values.any():
            continue
        factor = _beside(view, values.astype(view.tensor.dtype))
        real = maker.emit(body, op, [real, maker.constant(f"{name}_{op}", factor)], name)
    return real


def _beside(view: g.WeightView, values: g.Array) -> g.Array:
    """A scale or zero point, () or (out,), in a shape that broadcasts over the stored weight."""
    shape = [1] * view.rank
    if values.ndim:
        shape[view.axis] = -1
    if values.ndim and view.batches > 1:  # (batch · out,)
        shape[: view.rank - 2] = view.tensor.shape[:-2]
    return values.reshape(shape)
