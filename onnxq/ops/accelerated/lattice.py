"""Weights of 2 bits, by eights a point of E8P: MatMulLattice. See `onnxq.lattice`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.defs import OpSchema

from onnxq.lattice import patterns, points
from onnxq.ops.accelerated.operator import OPTIONAL, Operator, schema
from onnxq.ops.accelerated.weights import (
    ACCURACY_LEVEL,
    EIGHT_BITS,
    FLOAT,
    INT32,
    MATMUL_BLOCKS,
    product,
    rounded,
    shape_of_product,
)
from onnxq.ops.function import function

Array = NDArray[Any]

BLOCK = 64  # inputs that are rounded to 8 bits with one scale

_SIZES = ", ".join(str(int(2 * size)) for size in patterns().ravel())

_MATMUL_LATTICE = function(
    """
    y = x Wᵀ + bias, W[n, 8 c … 8 c + 7] = scales[n] points[codes[n, c]], for x (…, K).
    A code is 256 pattern + 2 signs + quarter: its point has the absolute values of the pattern,
    minus signs where the seven bits of `signs`, the lowest for the first coordinate, and an eighth
    that makes the sum even have ones; then ¼ is added to all where `quarter` is 0, else -¼.
    x, bias, y: float32 or float16; codes: uint16 (N, ⌈K / 8⌉); scales: float32 or float16 (N,);
    bias: (N,) or (1,), default 0. Coordinates past K are ignored.
    accuracy_level: 4 lets a kernel round x to 8 bits in blocks of 64; 0 does not.
    """,
    f"""
    MatMulLattice <accuracy_level: int = 0> (x, codes, scales, bias) => (y) {{
        twice_patterns = Constant <value = int32[256, 8] {{{_SIZES}}}> ()
        last = Constant <value_ints = [-1]> ()
        behind = Constant <value_ints = [1, 2]> ()
        two = Constant <value = int32 {{2}}> ()
        signs_and_quarter = Constant <value = int32 {{256}}> ()
        all_signs = Constant <value = int32 {{128}}> ()
        places = Constant <value = int32[7] {{1, 2, 4, 8, 16, 32, 64}}> ()
        minus_two = Constant <value_float = -2.0> ()
        one = Constant <value_float = 1.0> ()
        half = Constant <value_float = 0.5> ()
        minus_half = Constant <value_float = -0.5> ()
        quarter = Constant <value_float = 0.25> ()
        code = Cast <to = {INT32}> (codes)
        pattern = Div (code, signs_and_quarter)
        sizes = Gather (twice_patterns, pattern)
        rest = Div (code, two)
        signs = Mod (rest, all_signs)
        signs_each = Unsqueeze (signs, last)
        moved = Div (signs_each, places)
        seven = Mod (moved, two)
        minus_signs = ReduceSum <keepdims = 1> (seven, last)
        twice_length = ReduceSum <keepdims = 1> (sizes, last)
        length = Div (twice_length, two)
        parity = Add (minus_signs, length)
        eighth = Mod (parity, two)
        eight = Concat <axis = -1> (seven, eighth)
        minus = Cast <to = {FLOAT}> (eight)
        two_minus = Mul (minus, minus_two)
        sign = Add (two_minus, one)
        twice = Cast <to = {FLOAT}> (sizes)
        twice_signed = Mul (twice, sign)
        signed = Mul (twice_signed, half)
        below = Mod (code, two)
        is_below = Cast <to = {FLOAT}> (below)
        down = Mul (is_below, minus_half)
        shift = Add (down, quarter)
        shifts = Unsqueeze (shift, last)
        points = Add (signed, shifts)
        scale = Cast <to = {FLOAT}> (scales)
        factors = Unsqueeze (scale, behind)
        blocks = Mul (points, factors)
        y = ai.onnxq.MatMulBlocks (x, blocks, bias)
    }}
    """,
)


def matmul_lattice(
    x: Array, codes: Array, scales: Array, bias: Array | None = None, accuracy_level: int = 0
) -> Array:
    """MatMulLattice in float64."""
    coordinates = points()[codes].reshape(len(codes), -1)
    weight = coordinates.astype(np.float64) * scales.astype(np.float64)[:, None]
    if accuracy_level == EIGHT_BITS:
        return product(rounded(x, BLOCK), weight, bias).astype(x.dtype)
    return product(x, weight, bias)


MATMUL_LATTICE = Operator(
    schema(
        _MATMUL_LATTICE,
        [
            OpSchema.FormalParameter("x", "T", "(…, K)"),
            OpSchema.FormalParameter("codes", "C", "(N, ⌈K / 8⌉)"),
            OpSchema.FormalParameter("scales", "S", "(N,)"),
            OpSchema.FormalParameter("bias", "T", "(N,) or (1,)", param_option=OPTIONAL),
        ],
        {"T": ("float", "float16"), "C": ("uint16",), "S": ("float", "float16")},
        shape_of_product,
        [ACCURACY_LEVEL],
    ),
    _MATMUL_LATTICE,
    matmul_lattice,
    (MATMUL_BLOCKS,),
)
