"""Weights of 4 and 3 bits, each the place of its level in a table: MatMulCodebook and MatMul3.

    W[n, k] = scales[n, b] · (codebook[n, b, codes[n, k]] − zero_points[n, b]),    b = ⌊k / block⌋

A table is that of the whole weight, of a row or of a block, of integers (which kernels multiply as
such) or of floats. Evenly spaced levels make it plain INT4 and INT3, with zero points or without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.defs import OpSchema

from onnxq.ops.accelerated.operator import OPTIONAL, Operator, schema
from onnxq.ops.accelerated.weights import (
    ACCURACY_LEVEL,
    EIGHT_BITS,
    FLOAT,
    MATMUL_BLOCKS,
    UNPACK,
    product,
    rounded,
    shape_of_product,
)
from onnxq.ops.function import function

Array = NDArray[Any]

_TYPES = """
    x, y, bias: float32 or float16; scales: float32 or float16 (N, blocks); codebook: int8 or
    float32 ({levels}), broadcast over N and blocks; zero_points: int8 or the scales' type
    (N, blocks) or (1, 1), default 0; bias: (N,) or (1,), default 0. block: a multiple of 16 from
    16 to 256. Codes past K are ignored.
    accuracy_level: 4 lets a kernel round x to 8 bits in each block; 0 does not.
    """

_MATMUL_LEVELS = function(
    """
    y = x Wᵀ + bias, W[n, b, i] = scales[n, b] (codebook[n, b, codes[n, b, i]] - zero_points[n, b]).
    codes: int32 (N, blocks, block); the others as of MatMulCodebook.
    """,
    f"""
    MatMulLevels (x, codes, scales, codebook, zero_points, bias) => (y) {{
        last = Constant <value_ints = [-1]> ()
        rows_and_blocks = Shape <end = 2> (codes)
        count = Shape <start = -1> (codebook)
        shape = Concat <axis = 0> (rows_and_blocks, count)
        table = Cast <to = {FLOAT}> (codebook)
        tables = Expand (table, shape)
        levels = GatherElements <axis = 2> (tables, codes)
        zero = Cast <to = {FLOAT}> (zero_points)
        zeros = Unsqueeze (zero, last)
        centered = Sub (levels, zeros)
        scale = Cast <to = {FLOAT}> (scales)
        factors = Unsqueeze (scale, last)
        blocks = Mul (centered, factors)
        y = ai.onnxq.MatMulBlocks (x, blocks, bias)
    }}
    """,
)

_MATMUL_CODEBOOK = function(
    """
    y = x Wᵀ + bias, W[n, k] = scales[n, b] (codebook[n, b, codes[n, k]] - zero_points[n, b]),
    b = ⌊k / block⌋, for x (…, K) and codes of 4 bits.
    codes: uint8 (N, blocks, block / 2), two to a byte, the first in the low bits.
    """
    + _TYPES.format(levels="1 or N, 1 or blocks, 16"),
    """
    MatMulCodebook <accuracy_level: int = 0> (x, codes, scales, codebook, zero_points, bias)
    => (y) {
        shifts = Constant <value = uint8[2] {0, 4}> ()
        mask = Constant <value = uint8 {15}> ()
        places = ai.onnxq.UnpackCodes (codes, shifts, mask)
        y = ai.onnxq.MatMulLevels (x, places, scales, codebook, zero_points, bias)
    }
    """,
)

_MATMUL_3 = function(
    """
    y = x Wᵀ + bias, W[n, k] = scales[n, b] (codebook[n, b, codes[n, k]] - zero_points[n, b]),
    b = ⌊k / block⌋, for x (…, K) and codes of 3 bits.
    codes: uint8 (N, blocks, 3 block / 8); of each block first the low two bits of the codes, four
    to a byte, then the high bits, eight to a byte, the first in the low bits.
    """
    + _TYPES.format(levels="1 or N, 1 or blocks, 8"),
    """
    MatMul3 <accuracy_level: int = 0> (x, codes, scales, codebook, zero_points, bias) => (y) {
        first = Constant <value_ints = [0]> ()
        last = Constant <value_ints = [-1]> ()
        two = Constant <value_ints = [2]> ()
        three = Constant <value_ints = [3]> ()
        pairs = Constant <value = uint8[4] {0, 2, 4, 6}> ()
        pair = Constant <value = uint8 {3}> ()
        bits = Constant <value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
        bit = Constant <value = uint8 {1}> ()
        four = Constant <value = int32 {4}> ()
        bytes = Shape <start = -1> (codes)
        twice = Mul (bytes, two)
        border = Div (twice, three)
        low_bytes = Slice (codes, first, border, last)
        high_bytes = Slice (codes, border, bytes, last)
        low = ai.onnxq.UnpackCodes (low_bytes, pairs, pair)
        high = ai.onnxq.UnpackCodes (high_bytes, bits, bit)
        fours = Mul (high, four)
        places = Add (low, fours)
        y = ai.onnxq.MatMulLevels (x, places, scales, codebook, zero_points, bias)
    }
    """,
)


def matmul_codebook(
    x: Array,
    codes: Array,
    scales: Array,
    codebook: Array,
    zero_points: Array | None = None,
    bias: Array | None = None,
    accuracy_level: int = 0,
) -> Array:
    """MatMulCodebook in float64."""
    places = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    return _matmul_levels(x, places, scales, codebook, zero_points, bias, accuracy_level)


def matmul_3(
    x: Array,
    codes: Array,
    scales: Array,
    codebook: Array,
    zero_points: Array | None = None,
    bias: Array | None = None,
    accuracy_level: int = 0,
) -> Array:
    """MatMul3 in float64."""
    low, high = np.split(codes, [codes.shape[2] * 2 // 3], axis=2)
    low = (low[..., None] >> np.arange(0, 8, 2) & 3).reshape(*codes.shape[:2], -1)
    high = (high[..., None] >> np.arange(8) & 1).reshape(*codes.shape[:2], -1)
    return _matmul_levels(x, low + 4 * high, scales, codebook, zero_points, bias, accuracy_level)


def _matmul_levels(
    x: Array,
    places: Array,
    scales: Array,
    codebook: Array,
    zero_points: Array | None,
    bias: Array | None,
    accuracy_level: int,
) -> Array:
    rows, _, block = places.shape
    tables = np.broadcast_to(codebook, (*places.shape[:2], codebook.shape[2]))
    levels = np.take_along_axis(tables.astype(np.float64), places.astype(np.int64), axis=2)
    if zero_points is not None:
        levels = levels - zero_points.astype(np.float64)[:, :, None]
    weight = (levels * scales.astype(np.float64)[:, :, None]).reshape(rows, -1)
    if accuracy_level == EIGHT_BITS and codebook.dtype == np.int8:
        return product(rounded(x, block), weight, bias).astype(x.dtype)
    return product(x, weight, bias)


def _inputs(levels: int) -> list[OpSchema.FormalParameter]:
    of = OpSchema.FormalParameter
    return [
        of("x", "T", "(…, K)"),
        of("codes", "C", f"of {levels} levels, packed"),
        of("scales", "S", "(N, blocks)"),
        of("codebook", "L", f"(1 or N, 1 or blocks, {levels})"),
        of("zero_points", "Z", "(N, blocks) or (1, 1)", param_option=OPTIONAL),
        of("bias", "T", "(N,) or (1,)", param_option=OPTIONAL),
    ]


_CONSTRAINTS = {
    "T": ("float", "float16"),
    "C": ("uint8",),
    "S": ("float", "float16"),
    "L": ("int8", "float"),
    "Z": ("int8", "float", "float16"),
}
_CALLS = (UNPACK, MATMUL_BLOCKS, _MATMUL_LEVELS)

MATMUL_CODEBOOK, MATMUL_3 = (
    Operator(
        schema(body, _inputs(levels), _CONSTRAINTS, shape_of_product, [ACCURACY_LEVEL]),
        body,
        reference,
        _CALLS,
    )
    for body, levels, reference in (
        (_MATMUL_CODEBOOK, 16, matmul_codebook),
        (_MATMUL_3, 8, matmul_3),
    )
)
