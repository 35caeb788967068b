"""Real factors as dyadic numbers M ≈ m · 2⁻ⁿ: an integer product and a right shift.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", §2.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onnxq.errors import OnnxqError
from onnxq.ops.fixed_point import MOST_SHIFT


def dyadic(
    real: ArrayLike, bits: int = 31, common: bool = False, most_shift: int = MOST_SHIFT
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """m and n of the nearest m · 2⁻ⁿ with |m| < 2^bits and 0 <= n <= `most_shift`, of the shape
    of `real`.

    m is odd or n is 0: powers of two give m = 1. With `common`, n is one scalar for all elements,
    and the largest of them has all its bits. What is too small to be told from 0 gives 0.

    Raises OnnxqError for a number that is not finite, or not below 2^bits.
    """
    numbers = np.asarray(real, np.float64)
    if not np.isfinite(numbers).all():
        raise OnnxqError("a scale is not finite, so no integer stands for it; calibrate again")
    _, exponent = np.frexp(numbers)
    exponent = np.where(numbers == 0, bits - MOST_SHIFT, exponent)
    if common:
        exponent = np.asarray(exponent.max(initial=bits - MOST_SHIFT))
    n = np.clip(bits - exponent, 0, most_shift)
    m = _rounded(numbers, n)
    overflows = np.abs(m) >= 2**bits  # rounded up to the next power of two
    n = np.where(overflows.any() if common else overflows, np.maximum(n - 1, 0), n)
    m = _rounded(numbers, n)
    if (np.abs(m) >= 2**bits).any():
        worst = np.abs(numbers).max()
        raise OnnxqError(
            f"the factor {worst:.4g} does not fit an integer of {bits} bits; the scales of its "
            "input and output lie too far apart, so calibrate with more samples"
        )
    zeros = np.where(m == 0, n, _trailing_zeros(m))
    drop = np.minimum(n, zeros.min(initial=MOST_SHIFT) if common else zeros)
    return np.asarray(m >> drop), np.asarray((n - drop).astype(np.uint64))


def _rounded(numbers: NDArray[np.float64], n: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.rint(np.ldexp(numbers, n)).astype(np.int64)


def _trailing_zeros(m: NDArray[np.int64]) -> NDArray[np.int64]:
    _, exponent = np.frexp((m & -m).astype(np.float64))
    return exponent.astype(np.int64) - 1
