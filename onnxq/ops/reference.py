"""What each function of `ai.onnxq` must give, in exact arithmetic.

Written from the equations, not from the functions' nodes: floor division and shifts of integers
without bounds. Arguments and results are arrays, in the functions' order and types, `out` being
y_zero, low and high; attributes are keywords.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.ops.fixed_point import UNIT_BITS
from onnxq.ops.integers import Integers
from onnxq.ops.normalization import L2_BITS, ROOT_BITS
from onnxq.ops.transcendental import (
    ERF_A,
    ERF_B,
    EXP_A,
    EXP_B,
    EXP_BITS,
    EXP_C,
    EXP_DROP,
    EXP_FRACTION,
)

Array = NDArray[Any]
_INT64 = np.dtype(np.int64)


# ── exact arithmetic ─────────────────────────────────────────────────────────────────────────────


def _shifted(x: Integers, shift: Array) -> Integers:
    """⌊x / 2^shift + 1/2⌋"""
    n = Integers(shift)
    return (x + ((Integers(1) << n) >> 1)) >> n


def _divided(x: Integers, divisor: Integers) -> Integers:
    """⌊x / divisor + 1/2⌋"""
    return (2 * x + divisor) // (2 * divisor)


def _centered(x: Array, zero: Array) -> Integers:
    return Integers(x) - Integers(zero)


def _codes(x: Integers, y_zero: Array, low: Array, high: Array) -> Array:
    """clip(y_zero + x, low, high)"""
    code = (x + Integers(y_zero)).at_least(low).at_most(high)
    return code.as_type(np.asarray(y_zero).dtype)


def _exp(x: Integers, multiplier: Array, shift: Array) -> Integers:
    p = _shifted(-x * multiplier, shift).at_most((EXP_BITS + 2) * 2**EXP_FRACTION - 1)
    z, f = p // 2**EXP_FRACTION, p % 2**EXP_FRACTION
    return ((EXP_A * (EXP_B - f) * (EXP_B - f)) // 2**EXP_DROP + EXP_C) >> z


def _sign(x: Integers) -> Integers:
    return Integers(x > 0) - Integers(x < 0)


def _root(x: Integers) -> Integers:
    roots = np.frompyfunc(math.isqrt, 1, 1)(x.values.astype(object))
    return Integers(np.asarray(roots, object))


def _over_root(d: Integers, v: Integers) -> Integers:
    """⌊d / √v + 1/2⌋ in Q15"""
    k = Integers(ROOT_BITS * (v < 2 ** (62 - 2 * ROOT_BITS)))
    return _divided(d << (k + UNIT_BITS), _root(v << (2 * k)))


def _axes(axes: Array) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.asarray(axes))


# ── the functions ────────────────────────────────────────────────────────────────────────────────


def rounding_right_shift(x: Array, shift: Array) -> Array:
    return _shifted(Integers(x), shift).as_type(_INT64)


def rounding_divide(x: Array, divisor: Array) -> Array:
    return _divided(Integers(x), Integers(divisor)).as_type(_INT64)


def center(x: Array, x_zero: Array) -> Array:
    return _centered(x, x_zero).as_type(_INT64)


def saturate(x: Array, *out: Array) -> Array:
    return _codes(Integers(x), *out)


def requantize(x: Array, x_zero: Array, multiplier: Array, shift: Array, *out: Array) -> Array:
    return _codes(_shifted(_centered(x, x_zero) * multiplier, shift), *out)


def shift_requantize(x: Array, x_zero: Array, shift: Array, *out: Array) -> Array:
    return _codes(_shifted(_centered(x, x_zero), shift), *out)


def integer_affine(
    x: Array, x_zero: Array, multiplier: Array, offset: Array, shift: Array, *out: Array
) -> Array:
    affine = _centered(x, x_zero) * multiplier + Integers(offset)
    return _codes(_shifted(affine, shift), *out)


def integer_add(
    a: Array,
    a_zero: Array,
    a_multiplier: Array,
    b: Array,
    b_zero: Array,
    b_multiplier: Array,
    shift: Array,
    *out: Array,
) -> Array:
    total = _centered(a, a_zero) * a_multiplier + _centered(b, b_zero) * b_multiplier
    return _codes(_shifted(total, shift), *out)


def integer_mul(
    a: Array, a_zero: Array, b: Array, b_zero: Array, multiplier: Array, shift: Array, *out: Array
) -> Array:
    product = _centered(a, a_zero) * _centered(b, b_zero) * multiplier
    return _codes(_shifted(product, shift), *out)


def integer_div(
    a: Array, a_zero: Array, b: Array, b_zero: Array, multiplier: Array, shift: Array, *out: Array
) -> Array:
    divisor = _centered(b, b_zero)
    divisor = divisor.where(divisor != 0, 1) << Integers(shift)
    numerator = _centered(a, a_zero) * multiplier
    size = _divided(abs(numerator), abs(divisor))
    return _codes(_sign(numerator) * _sign(divisor) * size, *out)


def integer_mean(
    x: Array,
    x_zero: Array,
    axes: Array,
    multiplier: Array,
    shift: Array,
    *out: Array,
    keepdims: int = 1,
) -> Array:
    total = _centered(x, x_zero).sum(_axes(axes), bool(keepdims))
    count = math.prod(np.asarray(x).shape[axis] for axis in _axes(axes))
    mean = _divided(total * multiplier, count << Integers(shift))
    return _codes(mean, *out)


def look_up(x: Array, first: Array, table: Array) -> Array:
    return np.asarray(table)[_centered(x, first).as_type(_INT64)]


def integer_exp(x: Array, multiplier: Array, shift: Array) -> Array:
    return _exp(Integers(x), multiplier, shift).as_type(_INT64)


def integer_softmax(
    x: Array, multiplier: Array, shift: Array, levels: Array, *out: Array, axis: int = -1
) -> Array:
    codes = Integers(x)
    e = _exp(codes - codes.max((axis,), True), multiplier, shift)
    return _codes(_divided(e * levels, e.sum((axis,), True)), *out)


def integer_gelu(
    x: Array,
    x_zero: Array,
    in_multiplier: Array,
    in_shift: Array,
    multiplier: Array,
    shift: Array,
    *out: Array,
) -> Array:
    centered = _centered(x, x_zero)
    u = _shifted(abs(centered) * in_multiplier, in_shift).at_most(ERF_B)
    size = 2**UNIT_BITS - _shifted(ERF_A * (u - ERF_B) * (u - ERF_B), np.array(2 * UNIT_BITS))
    gated = centered * (2**UNIT_BITS + _sign(centered) * size)
    return _codes(_shifted(gated * multiplier, shift), *out)


def integer_silu(
    x: Array,
    x_zero: Array,
    in_multiplier: Array,
    in_shift: Array,
    multiplier: Array,
    shift: Array,
    *out: Array,
) -> Array:
    centered = _centered(x, x_zero)
    e = _exp(-abs(centered), in_multiplier, in_shift)
    upper = _divided(Integers(2 ** (UNIT_BITS + EXP_BITS)), 2**EXP_BITS + e)
    sigmoid = upper.where(centered >= 0, 2**UNIT_BITS - upper)
    return _codes(_shifted(centered * sigmoid * multiplier, shift), *out)


def sqrt_step(x: Array, s: Array) -> Array:
    return ((Integers(s) + Integers(x) // Integers(s)) // 2).as_type(_INT64)


def integer_sqrt(x: Array) -> Array:
    return _root(Integers(x)).as_type(_INT64)


def divide_by_root(d: Array, v: Array) -> Array:
    return _over_root(Integers(d), Integers(v)).as_type(_INT64)


def integer_layer_normalization(
    x: Array, epsilon: Array, multiplier: Array, offset: Array, shift: Array, *out: Array
) -> Array:
    codes, length = Integers(x), np.asarray(x).shape[-1]
    total = codes.sum((-1,), True)
    v = length * (codes * codes).sum((-1,), True) - total * total + epsilon
    n = _over_root(length * codes - total, v)
    return _codes(_shifted(n * multiplier + Integers(offset), shift), *out)


def integer_rms_normalization(
    x: Array, x_zero: Array, epsilon: Array, multiplier: Array, shift: Array, *out: Array
) -> Array:
    centered, length = _centered(x, x_zero), np.asarray(x).shape[-1]
    v = length * (centered * centered).sum((-1,), True) + epsilon
    n = _over_root(length * centered, v)
    return _codes(_shifted(n * multiplier, shift), *out)


def integer_l2_norm(
    x: Array,
    x_zero: Array,
    axes: Array,
    multiplier: Array,
    shift: Array,
    *out: Array,
    keepdims: int = 1,
) -> Array:
    centered = _centered(x, x_zero)
    root = _root((centered * centered).sum(_axes(axes), bool(keepdims)) << (2 * L2_BITS))
    return _codes(_shifted(root * multiplier, shift), *out)


REFERENCES: dict[str, Callable[..., Array]] = {
    "RoundingRightShift": rounding_right_shift,
    "RoundingDivide": rounding_divide,
    "Center": center,
    "Saturate": saturate,
    "Requantize": requantize,
    "ShiftRequantize": shift_requantize,
    "IntegerAffine": integer_affine,
    "IntegerAdd": integer_add,
    "IntegerMul": integer_mul,
    "IntegerDiv": integer_div,
    "IntegerMean": integer_mean,
    "LookUp": look_up,
    "IntegerExp": integer_exp,
    "IntegerSoftmax": integer_softmax,
    "IntegerGelu": integer_gelu,
    "IntegerSilu": integer_silu,
    "SqrtStep": sqrt_step,
    "IntegerSqrt": integer_sqrt,
    "DivideByRoot": divide_by_root,
    "IntegerLayerNormalization": integer_layer_normalization,
    "IntegerRMSNormalization": integer_rms_normalization,
    "IntegerL2Norm": integer_l2_norm,
}
