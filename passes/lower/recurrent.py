"""Integer LSTM, where no provider has a static integer recurrence.

`com.microsoft.DynamicQuantizeLSTM` multiplies in integers and quantizes activations as they come.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.qtype import QTensor


def lower_recurrent(node: g.Node, weights: Mapping[str, QTensor], maker: g.Maker) -> int:
    """Put codes in the place of W and R. Returns the number of rewrites."""
    views = g.weight_views(node)
    return _dynamic_lstm(node, views, [weights[view.tensor.name] for view in views], maker)


def dequantized_matrix(
    body: g.Graph, view: g.WeightView, q: QTensor, maker: g.Maker
) -> gs.Variable:
    """DequantizeLinear of W (out, in) by row or block, and a Reshape to the stored layout."""
    name = view.tensor.name
    inputs: list[gs.Tensor] = [
        maker.constant(f"{name}_quantized", q.codes),
        maker.constant(f"{name}_scale", q.scale),
        maker.constant(f"{name}_zero_point", q.zero),
    ]
    blocks = {"axis": 1, "block_size": q.qtype.group} if q.scale.ndim == 2 else {"axis": 0}
    real = maker.emit(body, "DequantizeLinear", inputs, name, **blocks)
    shape = list(view.tensor.shape)
    if view.node.op == "MatMul":  # (*batch, in, out)
        shape[-1], shape[-2] = shape[-2], shape[-1]
    stored = maker.constant(f"{name}_shape", np.array(shape, np.int64))
    real = maker.emit(body, "Reshape", [real, stored], name)
    if view.node.op == "MatMul":
        order = [*range(view.rank - 2), view.rank - 1, view.rank - 2]
        real = maker.emit(body, "Transpose", [real], name, perm=order)
    return real


def _dynamic_lstm(
    node: g.Node, views: list[g.WeightView], weights: list[QTensor], maker: g.Maker
) -> int:
    """Inputs X, W, R, B, lengths, h, c, P and then scale and zero point of W and of R.

    Its W and R are (directions, in, gates · hidden); scales (directions, gates · hidden).
    """
    inputs = [*node.inputs, *(gs.Variable.empty() for _ in range(8 - len(node.inputs)))]
    for view, q in zip(views, weights, strict=True):
        name = view.tensor.name
        codes = np.ascontiguousarray(np.swapaxes(view.from_matrix(q.codes), 1, 2))
        inputs[view.slot] = maker.constant(f"{name}_quantized", codes)
        rows = (view.batches, -1) if q.scale.ndim else (1,)
        scale, zero = (np.broadcast_to(a, q.scale.shape).reshape(rows) for a in (q.scale, q.zero))
        if not q.scale.ndim:
            scale, zero = (np.repeat(a, view.batches) for a in (scale, zero))
        inputs += [
            maker.constant(f"{name}_scale", scale),
            maker.constant(f"{name}_zero_point", zero),
        ]
    node.op, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
    node.inputs.clear()
    node.inputs.extend(inputs)
    node.attrs = {k: v for k, v in node.attrs.items() if k != "layout"}
    return 1
