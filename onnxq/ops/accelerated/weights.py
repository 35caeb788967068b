"""Products with weights that are codes: in a table of levels, or points of a lattice.

    y = x Wᵀ + bias,    x (…, K), W (N, K), y (…, N)

The functions here are what the operators' bodies share. They make W in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.defs import OpSchema

from onnxq.ops.accelerated.operator import Shape
from onnxq.ops.function import function

Array = NDArray[Any]

FLOAT, INT32 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.INT32)
EIGHT_BITS = 4  # the accuracy level that lets a kernel round x to 8 bits
ACCURACY_LEVEL = OpSchema.Attribute(
    "accuracy_level",
    onnx.helper.make_attribute("accuracy_level", 0),
    "0: float. 4: a kernel may round x to 8 bits in blocks, one scale absmax / 127 for each.",
)

UNPACK = function(
    """
    Codes of few bits from bytes: bytes >> shifts & mask, those of a byte one after the other.
    bytes: uint8 (N, blocks, bytes of a block); shifts, mask: uint8 (codes in a byte,) and ();
    codes: int32 (N, blocks, codes of a block).
    """,
    f"""
    UnpackCodes (bytes, shifts, mask) => (codes) {{
        last = Constant <value_ints = [-1]> ()
        shape = Constant <value_ints = [0, 0, -1]> ()
        each = Unsqueeze (bytes, last)
        moved = BitShift <direction = "RIGHT"> (each, shifts)
        masked = BitwiseAnd (moved, mask)
        flat = Reshape (masked, shape)
        codes = Cast <to = {INT32}> (flat)
    }}
    """,
)

MATMUL_BLOCKS = function(
    """
    y = x Wᵀ + bias, W (N, K) given as blocks (N, blocks, block) float32: where they go past K,
    x goes on with zeros.
    x (…, K), bias (N,) or (1,), y: one type.
    """,
    f"""
    MatMulBlocks (x, blocks, bias) => (y) {{
        row = Constant <value_ints = [0, -1]> ()
        weight = Reshape (blocks, row)
        transposed = Transpose <perm = [1, 0]> (weight)
        columns = Shape <start = 1> (weight)
        given = Shape <start = -1> (x)
        lacking = Sub (columns, given)
        batch = Shape <end = -1> (x)
        shape = Concat <axis = 0> (batch, lacking)
        zeros = ConstantOfShape (shape)
        real = Cast <to = {FLOAT}> (x)
        whole = Concat <axis = -1> (real, zeros)
        product = MatMul (whole, transposed)
        wide_bias = Cast <to = {FLOAT}> (bias)
        sum = Add (product, wide_bias)
        y = CastLike (sum, x)
    }}
    """,
)


def shape_of_product(shapes: list[Shape | None]) -> Shape | None:
    """(…, N) from those of x (…, K) and codes (N, …)."""
    x, codes = shapes[:2]
    return None if x is None else (*x[:-1], codes[0] if codes else None)


def product(x: Array, weight: Array, bias: Array | None) -> Array:
    """x Wᵀ + bias in float64, in the type of x; columns of W past those of x are ignored."""
    y = x.astype(np.float64) @ weight[:, : x.shape[-1]].T
    if bias is not None:
        y = y + bias.astype(np.float64)
    return y.astype(x.dtype)


def rounded(x: Array, block: int) -> Array:
    """x (…, K) in 8 bits: s · rint(x / s), s = max |x| / 127 of a block in float32."""
    real = x.astype(np.float32)
    columns, count = real.shape[-1], -(-real.shape[-1] // block)
    ends = [(0, 0)] * (real.ndim - 1) + [(0, -columns % block)]
    blocks = np.pad(real, ends).reshape(*real.shape[:-1], count, block)
    scale = np.abs(blocks).max(axis=-1, keepdims=True, initial=0) / np.float32(127)
    codes = np.rint(blocks / np.where(scale > 0, scale, 1).astype(np.float64))
    return (codes * scale).reshape(*real.shape[:-1], count * block)[..., :columns]
