"""Rotation by a Hadamard matrix, orthonormal: HadamardTransform.

    y = H x / √size,    H = H_n ⊗ H_2^m,    H Hᵀ = size · I,    size = n · 2^m

H_2^m has Sylvester's order, H[i, j] = (-1)^popcount(i & j). H_n, n = 12, 20 or 28, is Paley's first
construction (Paley 1933, "On Orthogonal Matrices"): with χ the quadratic character of the field of
q = n - 1 elements, 1 for squares and -1 for others, q ≡ 3 mod 4,

    H_n = I + S,    S = (  0   1ᵀ )      Q[i, j] = χ(e_i - e_j).
                        ( -1   Q  )

For q = 27 the field is GF(3)[t] / (t³ + 2t + 1), e_i = i mod 3 + (⌊i / 3⌋ mod 3) t + ⌊i / 9⌋ t².
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.defs import OpSchema
from onnx.helper import make_attribute

from onnxq.errors import OnnxqError
from onnxq.ops.accelerated.operator import Operator, Shape, schema
from onnxq.ops.accelerated.weights import FLOAT
from onnxq.ops.function import INT64, UINT64, function

Array = NDArray[Any]

PALEY = (12, 20, 28)  # n: 4 times 3, 5 and 7


def paley(n: int) -> NDArray[np.int64]:
    """H_n, (n, n) of ±1, for n of `PALEY`."""
    q = n - 1
    degree = 3 if q == 27 else 1
    prime = 3 if q == 27 else q
    elements = [e[::-1] for e in product(range(prime), repeat=degree)]  # low coefficient first
    squares = {_square(e, prime) for e in elements} - {(0,) * degree}

    def character(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        difference = tuple((i - j) % prime for i, j in zip(a, b, strict=True))
        return 0 if not any(difference) else 1 if difference in squares else -1

    matrix = np.eye(n, dtype=np.int64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += [[character(a, b) for b in elements] for a in elements]
    return matrix


def _square(e: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """e² in GF(prime), or in GF(27) where e has three coefficients."""
    if len(e) == 1:
        return (e[0] * e[0] % prime,)
    powers = np.convolve(e, e)  # of t: t³ = t + 2, t⁴ = t² + 2t
    low = powers[:3] + powers[3] * np.array([2, 1, 0]) + powers[4] * np.array([0, 2, 1])
    return tuple(int(c) for c in low % prime)


def hadamard(size: int) -> NDArray[np.int64]:
    """H, (size, size) of ±1. Raises OnnxqError for a size that is no n · 2^m."""
    odd = size // (size & -size) if size > 0 else 0
    n = 4 * odd if odd > 1 else 1
    if size < 1 or n not in (1, *PALEY) or size % n:
        raise OnnxqError(
            f"no Hadamard matrix of size {size} is known here: take 2^m, or 12, 20 or 28 times 2^m"
        )
    small = np.ones((1, 1), np.int64) if n == 1 else paley(n)
    large = np.ones((1, 1), np.int64)
    while len(large) < size // n:
        large = np.kron([[1, 1], [1, -1]], large)
    return np.kron(small, large)


_SYLVESTER = function(
    """
    The Hadamard matrix of Sylvester's order, H[i, j] = (-1)^popcount(i & j).
    size: int64, a power of two up to 2^32; H: float32 (size, size).
    """,
    f"""
    Sylvester (size) => (H) {{
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        last = Constant <value_ints = [1]> ()
        first = Constant <value_ints = [0]> ()
        sixteen = Constant <value = uint64 {{16}}> ()
        eight = Constant <value = uint64 {{8}}> ()
        four = Constant <value = uint64 {{4}}> ()
        two = Constant <value = uint64 {{2}}> ()
        single = Constant <value = uint64 {{1}}> ()
        minus_two = Constant <value_float = -2.0> ()
        unit = Constant <value_float = 1.0> ()
        counted = Range (zero, size, one)
        index = Cast <to = {UINT64}> (counted)
        i = Unsqueeze (index, last)
        j = Unsqueeze (index, first)
        both = BitwiseAnd (i, j)
        moved_16 = BitShift <direction = "RIGHT"> (both, sixteen)
        of_16 = BitwiseXor (both, moved_16)
        moved_8 = BitShift <direction = "RIGHT"> (of_16, eight)
        of_8 = BitwiseXor (of_16, moved_8)
        moved_4 = BitShift <direction = "RIGHT"> (of_8, four)
        of_4 = BitwiseXor (of_8, moved_4)
        moved_2 = BitShift <direction = "RIGHT"> (of_4, two)
        of_2 = BitwiseXor (of_4, moved_2)
        moved_1 = BitShift <direction = "RIGHT"> (of_2, single)
        of_1 = BitwiseXor (of_2, moved_1)
        parity = BitwiseAnd (of_1, single)
        odd = Cast <to = {FLOAT}> (parity)
        minus = Mul (odd, minus_two)
        H = Add (minus, unit)
    }}
    """,
)


_TURN_LAST = function(
    """
    x of blocks · a · b · c numbers, its last axis turned and brought to the front of each block:
    y[t, k, i, j] = Σ_l x[t, i, j, l] matrix[l, k].
    x: float32 of any shape; matrix: float32 (c, c); blocks, a, b: int64 (1,); y: (blocks, c, a, b).
    """,
    """
    TurnLast (x, matrix, blocks, a, b) => (y) {
        c = Shape <start = 1> (matrix)
        count = Size (x)
        rows = Div (count, c)
        flat = Concat <axis = 0> (rows, c)
        parts = Concat <axis = 0> (blocks, a, b, c)
        lines = Reshape <allowzero = 1> (x, flat)
        product = MatMul (lines, matrix)
        turned = Reshape <allowzero = 1> (product, parts)
        y = Transpose <perm = [0, 3, 1, 2]> (turned)
    }
    """,
)


def _table() -> str:
    """H_1, H_12, H_20 and H_28, one after the other."""
    matrices = (np.ones(1, int), *(paley(n).ravel() for n in PALEY))
    return ", ".join(str(int(value)) for value in np.concatenate(matrices))


_HADAMARD = function(
    """
    y = H x / √size along the last axis, or along each block_size of it; H H^T = size I.
    x, y: float32 or float16 (…, L), L a multiple of block_size; 0 is L. size = n 2^m with n in
    {1, 12, 20, 28} and H = H_n ⊗ H_2^m: H_2^m in Sylvester's order, H_n by Paley's first
    construction, I + S with S[0, j] = 1, S[i, 0] = -1 and else the quadratic character of e_i - e_j
    in the field of n - 1 elements; that of 27 is GF(3)[t] / (t^3 + 2t + 1), coefficients of e_i the
    digits of i to base 3.
    """,
    f"""
    HadamardTransform <block_size: int = 0> (x) => (y) {{
        matrices = Constant <value = int32[{1 + sum(n * n for n in PALEY)}] {{{_table()}}}> ()
        starts = Constant <value_ints = [0, 0, 0, 1, 1, {1 + 12**2}, 1, {1 + 12**2 + 20**2}]> ()
        orders = Constant <value_ints = [1, 1, 1, 12, 1, 20, 1, 28]> ()
        zero = Constant <value_ints = [0]> ()
        one = Constant <value_ints = [1]> ()
        log_2 = Constant <value_float = {float(np.log(2))!r}> ()
        two = Constant <value_ints = [2]> ()
        single = Constant <value = uint64[1] {{1}}> ()
        scalar = Constant <value = int64[0] {{}}> ()
        block = Constant <value_int: int = @block_size> ()
        given = Reshape (block, one)
        length = Shape <start = -1> (x)
        none_given = Equal (given, zero)
        size = Where (none_given, length, given)
        opposite = Neg (size)
        two_power = BitwiseAnd (size, opposite)
        odd = Div (size, two_power)
        start = Gather (starts, odd)
        n = Gather (orders, odd)
        n_squared = Mul (n, n)
        end = Add (start, n_squared)
        n_by_n = Concat <axis = 0> (n, n)
        flat = Slice (matrices, start, end)
        whole = Reshape (flat, n_by_n)
        small = Cast <to = {FLOAT}> (whole)
        rest = Div (size, n)
        real_rest = Cast <to = {FLOAT}> (rest)
        log_rest = Log (real_rest)
        exact_m = Div (log_rest, log_2)
        round_m = Round (exact_m)
        m = Cast <to = {INT64}> (round_m)
        half_m = Div (m, two)
        places = Cast <to = {UINT64}> (half_m)
        shifted = BitShift <direction = "LEFT"> (single, places)
        rows = Cast <to = {INT64}> (shifted)
        columns = Div (rest, rows)
        rows_scalar = Reshape (rows, scalar)
        columns_scalar = Reshape (columns, scalar)
        left = ai.onnxq.Sylvester (rows_scalar)
        right = ai.onnxq.Sylvester (columns_scalar)
        shape = Shape (x)
        count = Size (x)
        blocks = Div (count, size)
        real = Cast <to = {FLOAT}> (x)
        columns_first = ai.onnxq.TurnLast (real, right, blocks, n, rows)
        rows_first = ai.onnxq.TurnLast (columns_first, left, blocks, columns, n)
        transposed = Transpose <perm = [1, 0]> (small)
        turned = ai.onnxq.TurnLast (rows_first, transposed, blocks, rows, columns)
        together = Reshape <allowzero = 1> (turned, shape)
        real_size = Cast <to = {FLOAT}> (size)
        root = Sqrt (real_size)
        scaled = Div (together, root)
        y = CastLike (scaled, x)
    }}
    """,
)


def hadamard_transform(x: Array, block_size: int = 0) -> Array:
    """HadamardTransform in float64. Raises OnnxqError for a block that is no n · 2^m or does not
    divide the last axis."""
    size = block_size or x.shape[-1]
    matrix = hadamard(size)
    if x.shape[-1] % size:
        raise OnnxqError(f"blocks of {size} do not divide an axis of {x.shape[-1]}")
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return (blocks @ matrix.T / np.sqrt(size)).reshape(x.shape).astype(x.dtype)


def _shape(shapes: list[Shape | None]) -> Shape | None:
    return shapes[0]


HADAMARD_TRANSFORM = Operator(
    schema(
        _HADAMARD,
        [OpSchema.FormalParameter("x", "T", "(…, L)")],
        {"T": ("float", "float16")},
        _shape,
        [OpSchema.Attribute("block_size", make_attribute("block_size", 0), "size of H; 0: L")],
    ),
    _HADAMARD,
    hadamard_transform,
    (_SYLVESTER, _TURN_LAST),
)
