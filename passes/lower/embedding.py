"""An embedding table stored as codes: rows are looked up first, then scaled.

    Gather(W, ids) = (Gather(codes, ids) − zero) · Gather(scale, ids)

so that the whole table is never dequantized. Standard operators only: where blocks of a row have
scales, DequantizeLinear takes the rows that were looked up.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnxq.passes.lower.codes import eight_bit_codes, eight_bit_zero

from onnxq import graph as g
from onnxq.qtype import QTensor


def lower_embedding(body: g.Graph, node: g.Node, q: QTensor, maker: g.Maker) -> int:
    """Replace Gather over a float table by Gather over codes and over the scale of each row."""
    table, ids = node.inputs
    dtype = g.dtype(table) or np.dtype(np.float32)
    tail = (1,) * (len(table.shape) - 1)

    def look_up(part: str, values: g.Array) -> gs.Tensor:
        """A value per row of the table: that of each id. One for all rows is itself."""
        stored = maker.constant(f"{table.name}_{part}", values.reshape(-1, *tail)
                                if values.ndim else values)  # fmt: skip
        return (
            maker.emit(body, "Gather", [stored, ids], node.name, axis=0) if values.ndim else stored
        )

    codes = eight_bit_codes(body, table.name, q.codes.reshape(table.shape), q.qtype, maker)
    if q.scale.ndim == 2:
        return _look_up_blocks(body, node, codes, q, maker)
    real = maker.emit(
        body, "Cast", [maker.emit(body, "Gather", [codes, ids], node.name, axis=0)], node.name,
        to=int(onnx.helper.np_dtype_to_tensor_dtype(dtype)),
    )  # fmt: skip
    if q.zero.any():
        real = maker.emit(
            body, "Sub", [real, look_up("zero", q.zero.astype(np.float32).astype(dtype))], node.name
        )
    factor = look_up("scale", q.scale.astype(dtype))
    g.replace_node(body, node, maker.emit(body, "Mul", [real, factor], node.name))
    return 1


def _look_up_blocks(
    body: g.Graph, node: g.Node, codes: gs.Tensor, q: QTensor, maker: g.Maker
) -> int:
    """Rows of codes, scales and zero points looked up, then dequantized in blocks."""
    table, ids = node.inputs
    lone = ids.shape is not None and not len(ids.shape)  # DequantizeLinear wants an axis before
    if lone:
        first = maker.shared(f"{node.name}_axis", np.zeros(1, np.int64))
        ids = maker.emit(body, "Unsqueeze", [ids, first], node.name)
    parts = (
        codes,
        maker.constant(f"{table.name}_scale", q.scale.astype(g.dtype(table) or np.float32)),
        maker.constant(f"{table.name}_zero", eight_bit_zero(q.zero, q.qtype)),
    )
    rows = [maker.emit(body, "Gather", [part, ids], node.name, axis=0) for part in parts]
    block = q.qtype.group
    real = maker.emit(body, "DequantizeLinear", list(rows), node.name, axis=-1, block_size=block)
    if lone:
        real = maker.emit(body, "Squeeze", [real, first], node.name)
    g.replace_node(body, node, real)
    return 1
