"""Codes of a weight as an initializer that takes no more room in the file than their bits."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.qtype import QType


def eight_bit_codes(
    body: g.Graph, name: str, values: g.Array, qtype: QType, maker: g.Maker
) -> gs.Tensor:
    """Codes in 8 bits; narrower ones are stored packed, behind a Cast.

    No integer kernel of onnxruntime takes 4 bits. A Cast of an initializer is computed when the
    model is loaded, and what reads the result is fused as for a weight stored in 8 bits.
    """
    stored = maker.constant(f"{name}_quantized", values)
    if qtype.bits >= 8:
        return stored
    wide = np.dtype(np.int8 if qtype.signed else np.uint8)
    to = int(onnx.helper.np_dtype_to_tensor_dtype(wide))
    cast = maker.emit(body, "Cast", [stored], name, to=to)
    cast.dtype, cast.shape = wide, values.shape
    return cast


def eight_bit_zero(q_zero: g.Array, qtype: QType) -> g.Array:
    """The zero point that belongs to such codes."""
    if qtype.bits >= 8:
        return q_zero
    return q_zero.astype(np.int8 if qtype.signed else np.uint8)
