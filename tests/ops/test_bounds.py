"""What the papers claim of the functions, against float64; dyadic numbers; exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.ops import EXP_BITS, EXP_FRACTION, L2_BITS, MOST_SHIFT, UNIT_BITS, dyadic
from onnxq.ops.integers import Integers
from onnxq.ops.reference import REFERENCES

Floats = NDArray[np.float64]
WIDE = np.arange(-(2**15), 2**15, dtype=np.int32)
ZERO, LOW, HIGH = np.int32(0), np.array(-(2**31)), np.array(2**31 - 1)
FINE = 2.0**-24  # the scale of results that are to show no rounding of their own


def exp(x: NDArray[np.int64], scale: float) -> Floats:
    return np.ldexp(
        REFERENCES["IntegerExp"](x, *dyadic(scale / math.log(2) * 2**EXP_FRACTION)), -EXP_BITS
    )


@pytest.mark.parametrize("reach", [math.log(2), 1.0, 10.0, 25.0])
def test_exp_is_within_the_published_bound(reach: float) -> None:
    x = -np.arange(2**16)
    scale = reach / 2**16
    error = np.abs(exp(x, scale) - np.exp(x * scale)).max()
    assert error <= 0.0021
    if reach == math.log(2):
        assert error == pytest.approx(0.00191, abs=1e-5)


def test_exp_is_one_at_zero_and_never_rises_towards_minus_infinity() -> None:
    y = exp(-np.arange(2**17), 25 / 2**17)
    assert y[0] == 1
    assert (np.diff(y) <= 0).all()
    assert exp(np.array([-(2**40)]), 1.0) == 0


@pytest.mark.parametrize("reach", [3.0, 8.0])
def test_gelu_is_within_the_published_bound(reach: float) -> None:
    scale = reach / 2**15
    inner = dyadic(scale / math.sqrt(2) * 2**UNIT_BITS)
    outer = dyadic(scale / 2 / FINE / 2**UNIT_BITS, bits=30)
    y = REFERENCES["IntegerGelu"](WIDE, ZERO, *inner, *outer, ZERO, LOW, HIGH) * FINE
    x = WIDE * scale
    error = np.abs(y - x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).max()
    assert 0.0175 < error <= 0.0182


def test_silu_is_as_good_as_exp() -> None:
    scale = 8 / 2**15
    inner = dyadic(scale / math.log(2) * 2**EXP_FRACTION)
    outer = dyadic(scale / FINE / 2**UNIT_BITS, bits=30)
    y = REFERENCES["IntegerSilu"](WIDE, ZERO, *inner, *outer, ZERO, LOW, HIGH) * FINE
    x = WIDE * scale
    assert np.abs(y - x / (1 + np.exp(-x))).max() < 0.001


def test_softmax_of_wide_codes_is_within_twice_the_bound_of_exp() -> None:
    x = np.random.default_rng(0).normal(0, 6000, (64, 100)).astype(np.int32)
    scale = 8 / 2**15
    inner = dyadic(scale / math.log(2) * 2**EXP_FRACTION)
    levels = np.array(2**24)
    y = REFERENCES["IntegerSoftmax"](x, *inner, levels, ZERO, LOW, HIGH) / levels
    e = np.exp((x - x.max(axis=1, keepdims=True)) * scale)
    assert np.abs(y - e / e.sum(axis=1, keepdims=True)).max() < 2 * 0.0021


ROWS = {
    "normal": np.random.default_rng(0).normal(100, 3000, (8, 384)).astype(np.int32),
    "nearly constant": 7 + np.eye(8, 384, dtype=np.int32),
    "short": np.array([[0, 0, 0, 1], [5, 6, 5, 5], [1, 2, 3, 4]], np.int32),
    "long": np.random.default_rng(1).normal(0, 9000, (2, 2**16)).astype(np.int32),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("epsilon", [1, 1000])
def test_normalizations_are_good_to_four_digits_even_of_rows_that_hardly_vary(
    rows: str, epsilon: int
) -> None:
    x = ROWS[rows]
    n, d = x.shape[1], x - x.mean(axis=1, keepdims=True)
    unit = dyadic(2.0**-UNIT_BITS / FINE)
    args = np.array(epsilon), unit[0], np.array(0), unit[1], ZERO, LOW, HIGH
    y = REFERENCES["IntegerLayerNormalization"](x, *args) * FINE
    expected = d / np.sqrt((d**2).mean(axis=1, keepdims=True) + epsilon / n**2)
    assert (np.abs(y - expected) <= 1e-4 * np.maximum(1, np.abs(expected))).all()
    y = REFERENCES["IntegerRMSNormalization"](x, ZERO, *args[:2], *args[3:]) * FINE
    square = (x.astype(float) ** 2).mean(axis=1, keepdims=True)
    expected = x / np.sqrt(square + epsilon / n**2)
    assert (np.abs(y - expected) <= 1e-4 * np.maximum(1, np.abs(expected))).all()


def test_l2_norm_is_good_to_a_fraction_of_a_step() -> None:
    x = np.random.default_rng(0).integers(-9, 10, (50, 8)).astype(np.int32)
    args = np.array([1]), *dyadic(2.0**-L2_BITS / FINE), ZERO, LOW, HIGH
    y = REFERENCES["IntegerL2Norm"](x, ZERO, *args, keepdims=0) * FINE
    assert np.abs(y - np.linalg.norm(x, axis=1)).max() <= 2.0**-L2_BITS


# ── dyadic numbers ───────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.floats(-1e8, 1e8), min_size=1, max_size=6), st.integers(27, 31), st.booleans())
def test_dyadic_numbers_are_the_nearest(real: list[float], bits: int, common: bool) -> None:
    m, n = dyadic(real, bits, common)
    assert (m.dtype, n.dtype) == (np.int64, np.uint64)
    assert m.shape == (len(real),)
    assert n.shape == (() if common else m.shape)
    assert (np.abs(m) < 2**bits).all()
    assert (n <= MOST_SHIFT).all()
    largest = max(map(abs, real)) if common else np.abs(real)
    error = np.abs(np.ldexp(m.astype(float), -n.astype(int)) - real)
    assert (error <= np.maximum(largest * 2.0**-bits, 2.0 ** -(MOST_SHIFT + 1))).all()
    assert (m % 2 == 1).any() or (n == 0).all() or not common
    assert ((m % 2 == 1) | (n == 0)).all() or common


def test_dyadic_numbers_of_powers_of_two_need_no_multiplication() -> None:
    m, n = dyadic([0.25, 1, 8, -0.5, 0, 1e-30])
    assert m.tolist() == [1, 1, 8, -1, 0, 0]
    assert n.tolist() == [2, 0, 0, 1, 0, 0]
    m, n = dyadic([0.25, 0.5], common=True)
    assert (m.tolist(), n.tolist()) == ([1, 2], 2)
    m, n = dyadic(0.5)
    assert m.shape == n.shape == ()


def test_dyadic_numbers_that_round_up_to_a_power_of_two() -> None:
    m, n = dyadic(1 - 2.0**-40)
    assert (m, n) == (1, 0)
    m, n = dyadic([1 - 2.0**-40, 0.3], common=True)
    assert np.ldexp(m.astype(float), -int(n)) == pytest.approx([1, 0.3], rel=1e-8)


@pytest.mark.parametrize("real", [2.0**31, -(2.0**40), 2.0**31 - 0.1, math.inf, math.nan])
def test_what_is_no_dyadic_number_is_refused(real: float) -> None:
    with pytest.raises(OnnxqError):
        dyadic([1.0, real])


# ── what the reference itself stands on ──────────────────────────────────────────────────────────


@given(st.integers(-(2**61), 2**61), st.integers(0, MOST_SHIFT))
def test_rounding_is_to_the_nearest_and_of_halves_up(x: int, shift: int) -> None:
    nearest = math.floor(Fraction(x, 2**shift) + Fraction(1, 2))
    assert REFERENCES["RoundingRightShift"](np.array(x), np.array(shift, np.uint64)) == nearest
    assert REFERENCES["RoundingDivide"](np.array(x), np.array(2**shift)) == nearest
    nearest = math.floor(Fraction(x, shift + 1) + Fraction(1, 2))
    assert REFERENCES["RoundingDivide"](np.array(x), np.array(shift + 1)) == nearest


# ── integers without bounds ──────────────────────────────────────────────────────────────────────

BIG = st.one_of(st.integers(-(2**64), 2**64), st.integers(-9, 9), st.just(2**62))


@given(st.lists(BIG, min_size=3, max_size=3), st.lists(BIG, min_size=3, max_size=3))
def test_integers_compute_as_those_of_python(a: list[int], b: list[int]) -> None:
    x, y = Integers(np.array(a, object)), Integers(np.array(b, object))
    divisor = Integers(np.array([abs(q) + 1 for q in b], object))
    shift = Integers(np.array([abs(q) % 70 for q in b]))
    pairs = list(zip(a, b, strict=True))
    assert (x + y).values.tolist() == [p + q for p, q in pairs]
    assert (x - y).values.tolist() == [p - q for p, q in pairs]
    assert (x * y).values.tolist() == [p * q for p, q in pairs]
    assert (x // divisor).values.tolist() == [p // (abs(q) + 1) for p, q in pairs]
    assert (x % divisor).values.tolist() == [p % (abs(q) + 1) for p, q in pairs]
    assert (x << shift).values.tolist() == [p << abs(q) % 70 for p, q in pairs]
    assert (x >> shift).values.tolist() == [p >> abs(q) % 70 for p, q in pairs]
    assert x.at_least(y).at_most(7).values.tolist() == [min(max(p, q), 7) for p, q in pairs]
    assert (x < y).tolist() == [p < q for p, q in pairs]
    assert abs(x).values.tolist() == [abs(p) for p in a]
    assert x.sum((0,), False).values == sum(a)
    assert x.max((0,), True).values.tolist() == [max(a)]


def test_integers_refuse_floats_and_types_too_small() -> None:
    with pytest.raises(TypeError):
        Integers(np.array([0.5]))
    with pytest.raises(OverflowError):
        Integers(np.array([256])).as_type(np.dtype(np.uint8))
