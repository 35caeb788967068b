"""Each function, in the runtime, bit by bit what its reference gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from running import assert_exact, proto, sessions

from onnxq.ops import DOMAIN, FUNCTIONS, MOST_SHIFT, closure
from onnxq.ops.reference import REFERENCES

Array = NDArray[Any]
Draw = st.DrawFn
SHAPES = [(2, 3, 4), (1, 1, 1), (3, 1, 5)]
UINT8, INT32, INT64, UINT64 = (np.dtype(t) for t in ("uint8", "int32", "int64", "uint64"))
RANGE = {UINT8: (0, 255), INT32: (-(2**15), 2**15 - 1)}


def numbers(draw: Draw, dtype: np.dtype[Any], shape: tuple[int, ...], low: int, high: int) -> Array:
    """Of all magnitudes, the ends of the range among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    even = rng.integers(low, high, shape, np.int64, endpoint=True)
    small = np.clip(even >> rng.integers(0, 62, shape), low, high)
    ends = rng.choice([low, high], shape)
    kind = rng.choice(3, shape, p=draw(st.sampled_from([(0.5, 0.4, 0.1), (1, 0, 0), (0, 0, 1)])))
    return np.asarray(np.choose(kind, [even, small, ends]).astype(dtype))


def shape_of_parameter(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    return draw(st.sampled_from([(), shape[-1:], (shape[1], 1), (1, *shape[1:])]))


class Arguments:
    """Draws what functions take, for codes of one shape."""

    def __init__(self, draw: Draw, most_bits: int = 31) -> None:
        self.draw = draw
        self.most_bits = most_bits
        self.shape = draw(st.sampled_from(SHAPES))

    def codes(self, same_shape: bool = True) -> tuple[Array, Array]:
        """Codes and their zero point, narrow or wide."""
        codes = self.draw(st.sampled_from([UINT8, INT32]))
        shape = self.shape if same_shape else shape_of_parameter(self.draw, self.shape)
        low, high = RANGE[codes]
        zero = numbers(self.draw, codes, (), low, high)
        return numbers(self.draw, codes, shape, low, high), zero

    def multiplier(self, positive: bool = False) -> Array:
        most = 2**self.most_bits - 1
        shape = shape_of_parameter(self.draw, self.shape)
        return numbers(self.draw, INT64, shape, 0 if positive else -most, most)

    def shift(self, most: int = MOST_SHIFT) -> Array:
        return numbers(self.draw, UINT64, shape_of_parameter(self.draw, self.shape), 0, most)

    def out(self) -> tuple[Array, Array, Array]:
        """Zero point, low and high of the result."""
        codes = self.draw(st.sampled_from([UINT8, INT32]))
        low, high = RANGE[codes]
        bounds = sorted(self.draw(st.tuples(st.integers(low, high), st.integers(low, high))))
        if self.draw(st.booleans()):
            bounds = [low, high]
        zero = numbers(self.draw, codes, (), low, high)
        return zero, np.asarray(bounds[0]), np.asarray(bounds[1])


@given(st.data())
def test_rounding_right_shift_up_to_the_ends_of_its_domain(data: st.DataObject) -> None:
    shift = data.draw(st.integers(0, MOST_SHIFT))
    most = 2**62 - (1 << shift >> 1) - 1
    x = numbers(data.draw, INT64, (5,), -(2**62), most)
    assert_exact("RoundingRightShift", np.append(x, [-(2**62), most]), np.uint64(shift))


@given(st.data())
def test_rounding_divide(data: st.DataObject) -> None:
    divisor = numbers(data.draw, INT64, (4,), 1, 2**61)
    x = numbers(data.draw, INT64, (3, 4), -(2**61), 2**61)
    assert_exact("RoundingDivide", x, divisor)
    assert_exact("RoundingDivide", x % 1000 - 500, divisor % 9 + 1)


@given(st.data())
def test_requantize(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    assert_exact("Requantize", *a.codes(), a.multiplier(), a.shift(), *a.out())
    assert_exact("ShiftRequantize", *a.codes(), a.shift(), *a.out())


@given(st.data())
def test_requantize_of_accumulators(data: st.DataObject) -> None:
    a = Arguments(data.draw, most_bits=30)
    x = numbers(data.draw, INT32, a.shape, -(2**31), 2**31 - 1)
    assert_exact("Requantize", x, np.int32(0), a.multiplier(), a.shift(), *a.out())
    assert_exact("ShiftRequantize", x, np.int32(0), a.shift(), *a.out())


@given(st.data())
def test_affine(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    offset = numbers(data.draw, INT64, a.shape[-1:], -(2**60), 2**60)
    assert_exact("IntegerAffine", *a.codes(), a.multiplier(), offset, a.shift(), *a.out())


@given(st.data())
def test_add(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    b = a.codes(same_shape=False)
    assert_exact("IntegerAdd", *a.codes(), a.multiplier(), *b, a.multiplier(), a.shift(), *a.out())


@given(st.data())
def test_mul(data: st.DataObject) -> None:
    a = Arguments(data.draw, most_bits=28)
    b = a.codes(same_shape=False)
    assert_exact("IntegerMul", *a.codes(), *b, a.multiplier(), a.shift(), *a.out())


@given(st.data())
def test_div(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    b = a.codes(same_shape=False)
    assert_exact("IntegerDiv", *a.codes(), *b, a.multiplier(), a.shift(most=43), *a.out())


@given(st.data())
def test_mean(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    axes = np.array(data.draw(st.sampled_from([[0], [-1], [1, 2], [0, -2]])))
    multiplier = np.asarray(data.draw(st.integers(-(2**31), 2**31)))
    shift = np.uint64(data.draw(st.integers(0, 50)))
    keepdims = data.draw(st.integers(0, 1))
    for m, n in ((multiplier, shift), (np.array(1), np.uint64(0))):
        assert_exact("IntegerMean", *a.codes(), axes, m, n, *a.out(), keepdims=keepdims)


@given(st.data())
def test_look_up(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    x, _ = a.codes()
    entry = data.draw(st.sampled_from([UINT8, INT32]))
    first = int(x.min()) - data.draw(st.integers(0, 3))
    table = numbers(data.draw, entry, (int(x.max()) - first + 1,), 0, 255)
    assert_exact("LookUp", x, np.asarray(first), table)


@given(st.data())
def test_exp_and_softmax(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    multiplier = np.asarray(data.draw(st.integers(0, 2**31 - 1)))
    shift = np.uint64(data.draw(st.integers(0, MOST_SHIFT)))
    x, _ = a.codes()
    assert_exact("IntegerExp", -np.abs(x.astype(np.int64)), multiplier, shift)
    levels = np.asarray(data.draw(st.integers(1, 2**31 - 1)))
    axis = data.draw(st.integers(-3, 2))
    assert_exact("IntegerSoftmax", x, multiplier, shift, levels, *a.out(), axis=axis)


@given(st.data())
def test_gelu_and_silu(data: st.DataObject) -> None:
    a, final = Arguments(data.draw), Arguments(data.draw, most_bits=28)
    final.shape = a.shape
    x = a.codes()
    inner = a.multiplier(positive=True), a.shift()
    outer = final.multiplier(), final.shift()
    assert_exact("IntegerGelu", *x, *inner, *outer, *a.out())
    assert_exact("IntegerSilu", *x, *inner, *outer, *a.out())


ROOTS = st.one_of(st.integers(1, 2**31), st.integers(0, 31).map(lambda k: 2**k))


@given(st.lists(ROOTS, min_size=1, max_size=50), st.lists(st.integers(0, 2**62 - 1), min_size=1))
def test_square_root_is_the_exact_floor(roots: list[int], others: list[int]) -> None:
    squares = [root**2 + d for root in roots for d in (-1, 0, 1) if root**2 + d < 2**62]
    assert_exact("IntegerSqrt", np.array([*squares, *others, 0, 2**62 - 1], np.int64))


@given(st.data())
def test_division_by_a_root_at_every_magnitude(data: st.DataObject) -> None:
    v = numbers(data.draw, INT64, (8,), 1, 2**62 - 1)
    v = np.concatenate([v, [2**32 - 1, 2**32, 2**31 + 7, 2**34 + 7, 1, 2, 2**62 - 1]])
    d = numbers(data.draw, INT64, v.shape, -(2**31) + 1, 2**31 - 1)
    assert_exact("DivideByRoot", d, v)
    assert_exact("DivideByRoot", d << np.where(v < 2**32, 0, 15), v)


@given(st.data())
def test_normalizations(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    epsilon = np.asarray(data.draw(st.integers(1, 2**40)))
    offset = numbers(data.draw, INT64, a.shape[-1:], -(2**60), 2**60)
    last = a.multiplier(), a.shift()
    x, zero = a.codes()
    assert_exact("IntegerLayerNormalization", x, epsilon, last[0], offset, last[1], *a.out())
    assert_exact("IntegerRMSNormalization", x, zero, epsilon, *last, *a.out())


@given(st.data())
def test_l2_norm(data: st.DataObject) -> None:
    a = Arguments(data.draw)
    axes = np.array(data.draw(st.sampled_from([[0], [-1], [1, 2]])))
    multiplier = np.asarray(data.draw(st.integers(-(2**31), 2**31)))
    shift = np.uint64(data.draw(st.integers(0, MOST_SHIFT)))
    keepdims = data.draw(st.integers(0, 1))
    assert_exact("IntegerL2Norm", *a.codes(), axes, multiplier, shift, *a.out(), keepdims=keepdims)


def test_normalizations_of_the_longest_and_largest_rows() -> None:
    rng = np.random.default_rng(0)
    x = rng.choice(np.array([-32767, 32767], np.int32), (2, 2**16))
    args = (np.array(2**40), np.array(2**31 - 1), np.array(0), np.uint64(40), np.int32(0))
    limits = (np.array(-(2**15)), np.array(2**15 - 1))
    assert_exact("IntegerLayerNormalization", x, *args, *limits)


# ── what a model holds ───────────────────────────────────────────────────────────────────────────

TYPICAL: dict[str, Array] = {
    "x": np.arange(-6, 6, dtype=np.int32).reshape(3, 4),
    "a": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "b": np.arange(-6, 6, dtype=np.int32).reshape(3, 4),
    "x_zero": np.array(2, np.int32),
    "a_zero": np.array(2, np.uint8),
    "b_zero": np.array(2, np.int32),
    "y_zero": np.array(3, np.uint8),
    "multiplier": np.array([3, -5, 7, 9]),
    "divisor": np.array([3, 5, 7, 9]),
    "s": np.array([3, 5, 7, 9]),
    "d": np.arange(-6, 6).reshape(3, 4),
    "V": np.array([3, 5, 7, 9]),
    "shift": np.array(2, np.uint64),
    "low": np.array(0),
    "high": np.array(255),
    "offset": np.array([1, 2, 3, 4]),
    "axes": np.array([0]),
    "epsilon": np.array(1),
    "levels": np.array(255),
    "first": np.array(-6),
    "table": np.arange(12, dtype=np.uint8),
}
for _of, _for in (("multiplier", "a_ b_ in_"), ("shift", "in_")):
    TYPICAL |= {f"{prefix}{_of}": abs(TYPICAL[_of]) for prefix in _for.split()}
TYPES = {"RoundingRightShift": INT64, "RoundingDivide": INT64, "Saturate": INT64}
NOT_POSITIVE, NOT_NEGATIVE = {"IntegerExp"}, {"IntegerSqrt", "SqrtStep"}


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_parameters_that_the_runtime_folds(name: str, opset: int) -> None:
    feed = {n: TYPICAL[n] for n in FUNCTIONS[name].input}
    if name in NOT_POSITIVE | NOT_NEGATIVE | TYPES.keys():
        x = feed["x"].astype(np.int64)
        feed["x"] = abs(x) if name in NOT_NEGATIVE else -abs(x) if name in NOT_POSITIVE else x
    data = {n: feed.pop(n) for n in ("x", "a", "b", "d") if n in feed}
    arguments = [(data | feed)[n] for n in FUNCTIONS[name].input]
    expected = REFERENCES[name](*arguments)
    kinds = [(a.dtype, a.ndim) for a in arguments]
    model = proto(name, kinds, (expected.dtype, expected.ndim), feed, opset)
    onnx.checker.check_model(model, full_check=True)
    for session in sessions(model):
        np.testing.assert_array_equal(session.run(data)["result"], expected)


def test_every_function_has_a_reference_and_says_what_it_means() -> None:
    assert FUNCTIONS.keys() == REFERENCES.keys()
    assert all(f.doc_string for f in FUNCTIONS.values())


def test_no_function_computes_with_floats() -> None:
    """No node of theirs makes a float; what they read are integers."""
    standard = {n.op_type for f in FUNCTIONS.values() for n in f.node if n.domain != DOMAIN}
    assert standard <= {
        *("Abs", "Add", "BitShift", "Cast", "CastLike", "Constant", "Div", "Equal", "Gather"),
        *("Greater", "GreaterOrEqual", "Less", "Max", "Min", "Mod", "Mul", "Neg", "ReduceMax"),
        *("ReduceProd", "ReduceSum", "Reshape", "Shape", "Sub", "Unsqueeze", "Where", "Xor"),
    }


def test_closure_holds_what_is_called_before_its_caller() -> None:
    names = [f.name for f in closure(["IntegerSoftmax", "Requantize"])]
    assert len(names) == len(set(names))
    assert names.index("RoundingRightShift") < names.index("IntegerExp")
    assert names.index("IntegerExp") < names.index("IntegerSoftmax")
    assert "Center" in names
    assert "IntegerSqrt" not in names
