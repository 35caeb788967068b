"""Integer forms of operators against what the operator gives for what the codes stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from graphs import Array, Feeds, feeds_of, model, normal, pipeline, run

from onnxq import graph as g
from onnxq.float_operators import float_operators
from onnxq.pipeline import Result
from onnxq.recipe import load_recipe
from onnxq.runtime import Session

MINMAX = "calibrate.method=minmax"


def quantized(
    text: str, feeds: Feeds, settings: Sequence[str] = (), opset: int = 21, **weights: Array
) -> Result:
    """By the preset, with ranges that hold all that comes."""
    made = model(text, opset, **weights)
    return pipeline(made, feeds, "integer-only", settings=[MINMAX, *settings])


def errors_in_steps(done: Result, feeds: Feeds) -> dict[str, float]:
    """The largest distance to the plan with quantizers between float operators, in steps of each
    output's grid. Both read the same codes and weights; optimizations off and on agree to the bit.
    """
    off, on = (Session(g.to_proto(done.graph), optimize=o, threads=1) for o in (False, True))
    assert done.context.qdq_form is not None
    reference = Session(g.to_proto(done.context.qdq_form), optimize=False, threads=1)
    worst: dict[str, float] = {}
    for feed in feeds:
        expected, actual, optimized = reference.run(feed), off.run(feed), on.run(feed)
        for name, values in actual.items():
            np.testing.assert_array_equal(values, optimized[name])
            if values.dtype.kind != "f":
                np.testing.assert_array_equal(values, expected[name])
                continue
            step = float(done.context.activations[name].scale)
            distance = np.abs(values.astype(np.float64) - expected[name]).max(initial=0) / step
            worst[name] = max(worst.get(name, 0.0), float(distance))
    return worst


def check(
    text: str,
    feeds: Feeds,
    within: float = 1.01,
    settings: Sequence[str] = (),
    **weights: Array,
) -> Result:
    done = quantized(text, feeds, settings, **weights)
    assert [each.name for each in float_operators(g.to_proto(done.graph))] == []
    for name, steps in errors_in_steps(done, feeds).items():
        assert steps <= within, f"{name}: {steps} steps"
    return done


# ── what is exact until its one rounding ─────────────────────────────────────────────────────────

X2, X3, X4 = (3, 8), (2, 5, 8), (2, 4, 7, 6)
CONV = {"w": normal(6, 4, 3, 3, scale=0.4), "b": normal(6, seed=1)}
EXACT = {
    "conv": (X4, "y = Conv <pads = [1,1,1,1]> (x, w, b)", CONV),
    "conv, strided": (X4, "y = Conv <strides = [2,1], dilations = [1,2]> (x, w, b)", CONV),
    "conv, same upper": (X4, "y = Conv <auto_pad = \"SAME_UPPER\", strides = [2,2]> (x, w)", CONV),
    "conv, same lower": (X4, "y = Conv <auto_pad = \"SAME_LOWER\", strides = [2,2]> (x, w)", CONV),
    "conv, grouped": (
        X4, "y = Conv <group = 2> (x, w, b)", {"w": normal(6, 2, 3, 3), "b": normal(6)},
    ),
    "conv, depthwise": (
        X4, "y = Conv <group = 4, pads = [0,1,1,0]> (x, w)", {"w": normal(4, 1, 3, 3)},
    ),
    "conv, relu": (X4, "c = Conv (x, w, b) y = Relu (c)", CONV),
    "conv, clip": (
        X4, "c = Conv (x, w, b) y = Clip (c, low, high)",
        CONV | {"low": np.float32(-0.5), "high": np.float32(1.5)},
    ),
    "conv, a constant by channel": (
        X4, "c = Conv (x, w) d = Add (v, c) y = Relu (d)", CONV | {"v": normal(6, 1, 1)},
    ),
    "conv, a constant along its last axis": (
        X4, "c = Conv (x, w) y = Add (c, v)", {"w": normal(6, 4, 3, 1), "v": normal(6)},
    ),
    "conv, 1d": ((2, 4, 9), "y = Conv (x, w)", {"w": normal(3, 4, 2)}),
    "conv, 3d": ((1, 2, 4, 4, 4), "y = Conv (x, w)", {"w": normal(3, 2, 2, 2, 2)}),
    "gemm": (X2, "y = Gemm (x, w, b)", {"w": normal(8, 5), "b": normal(5)}),
    "gemm, both sides turned, alpha and beta": (
        (8, 3), "y = Gemm <transA = 1, transB = 1, alpha = 0.3, beta = 1.7> (x, w, b)",
        {"w": normal(5, 8), "b": normal(5)},
    ),
    "gemm, no beta": (X2, "y = Gemm <beta = 0.0> (x, w, b)", {"w": normal(8, 5), "b": normal(5)}),
    "gemm, a bias by row": (X2, "y = Gemm (x, w, b)", {"w": normal(8, 5), "b": normal(3, 1)}),
    "gemm, a bias matrix": (X2, "y = Gemm (x, w, b)", {"w": normal(8, 5), "b": normal(3, 5)}),
    "gemm, a negative alpha": (X2, "y = Gemm <alpha = -2.0> (x, w)", {"w": normal(8, 5)}),
    "matmul": (X3, "y = MatMul (x, w)", {"w": normal(8, 5)}),
    "matmul, bias, factor and relu": (
        X3, "m = MatMul (x, w) a = Add (b, m) d = Div (a, eight) y = Relu (d)",
        {"w": normal(8, 5), "b": normal(5), "eight": np.float32(8)},
    ),
    "matmul, a factor below zero": (
        X3, "m = MatMul (x, w) y = Mul (m, f)", {"w": normal(8, 5), "f": np.float32([-0.3])},
    ),
    "matmul, batched": ((2, 5, 8), "y = MatMul (x, w)", {"w": normal(2, 8, 5)}),
    "matmul of activations": (
        X3, "t = Transpose <perm = [0,2,1]> (x) y = MatMul (x, t)", {},
    ),
    "add a constant": (X3, "y = Add (x, c)", {"c": normal(5, 1)}),
    "add to a constant that is larger": (X2, "y = Add (c, x)", {"c": normal(4, 1, 8)}),
    "take from a constant": (X3, "y = Sub (c, x)", {"c": normal(8)}),
    "a constant far beyond its operand": (X3, "y = Add (x, c)", {"c": np.float32(1000)}),
    "add itself, broadcast": (X3, "t = Slice (x, zero, one, one) y = Sub (x, t)",
        {"zero": np.array([0]), "one": np.array([1])},
    ),
    "mul by a constant": (X3, "y = Mul (c, x)", {"c": normal(5, 8)}),
    "mul itself": (X3, "y = Mul (x, x)", {}),
    "div by a constant": (X3, "y = Div (x, c)", {"c": np.float32([[0.3], [-4], [2], [7], [1]])}),
    "batch norm": (
        X4, "y = BatchNormalization (x, s, b, m, v)",
        {k: normal(4, seed=n) ** (2 if k == "v" else 1) for n, k in enumerate("sbmv")},
    ),
    "batch norm far from zero": (
        X4, "y = BatchNormalization (x, s, b, m, v)",
        {"s": np.float32([50, 1, 1, 1]), "b": np.float32([-300, 0, 0, 0]),
         "m": np.float32([-6, 0, 0, 0]), "v": np.float32([1, 1, 1, 1])},
    ),
    "neg": (X3, "y = Neg (x)", {}),
    "abs": (X3, "y = Abs (x)", {}),
    "relu": (X3, "y = Relu (x)", {}),
    "clip": (X3, "y = Clip (x, a, b)", {"a": np.float32(0.2), "b": np.float32(0.9)}),
    "p relu": (X4, "y = PRelu (x, s)", {"s": normal(4, 1, 1)}),
    "leaky relu": (X4, "y = LeakyRelu <alpha = 0.2> (x)", {}),
    "sigmoid": (X3, "y = Sigmoid (x)", {}),
    "hard swish": (X3, "y = HardSwish (x)", {}),
    "erf": (X3, "y = Erf (x)", {}),
    "exp": (X3, "y = Exp (x)", {}),
    "square": (X3, "y = Pow (x, two)", {"two": np.float32(2)}),
    "max pool": (X4, "y = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (x)", {}),
    "global max pool": (X4, "y = GlobalMaxPool (x)", {}),
    "global average pool": (X4, "y = GlobalAveragePool (x)", {}),
    "average pool": (X4, "y = AveragePool <kernel_shape = [3,2], strides = [2,1]> (x)", {}),
    "average pool, padded": (
        X4, "y = AveragePool <kernel_shape = [3,3], pads = [1,1,1,0]> (x)", {},
    ),
    "average pool, padding counted": (
        X4, "y = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (x)",
        {},
    ),
    "reduce mean": (X3, "y = ReduceMean <keepdims = 0> (x, a)", {"a": np.array([1])}),
    "reduce mean of all": (X3, "y = ReduceMean (x)", {}),
    "reduce sum": (X3, "y = ReduceSum (x, a)", {"a": np.array([1, -1])}),
    "reduce max": (X3, "y = ReduceMax (x, a)", {"a": np.array([-1])}),
    "concat of two grids": (
        X3, "t = Mul (x, c) y = Concat <axis = 1> (x, t, k)",
        {"c": np.float32(3), "k": normal(2, 2, 8)},
    ),
    "where": (X3, "t = Neg (x) m = Greater (x, z) y = Where (m, t, c)",
        {"z": np.float32(0.1), "c": normal(8)}),
    "minimum": (X3, "t = Neg (x) y = Min (x, t, c)", {"c": np.float32(0.3)}),
    "maximum": (X3, "y = Max (x, c)", {"c": normal(8)}),
    "sum of three": (X3, "t = Neg (x) u = Mul (x, c) y = Sum (x, t, u)", {"c": np.float32(3)}),
    "mean of three": (X3, "t = Neg (x) u = Mul (x, c) y = Mean (x, t, u)", {"c": np.float32(3)}),
    "moves": (
        X4, """t = Transpose <perm = [0,2,3,1]> (x) a, b = Split <axis = 1, num_outputs = 2> (t)
        p = Pad <mode = \"reflect\"> (a, pads) e = Expand (p, shape) y = Reshape (e, flat)""",
        {"pads": np.array([0, 1, 0, 0, 0, 0, 1, 0]), "shape": np.array([2, 2, 1, 1, 1]),
         "flat": np.array([0, -1])},
    ),
    "pad by a value": (
        X3, "y = Pad (x, p, v)", {"p": np.array([0, 1, 0, 0, 0, 2]), "v": np.float32(0.7)},
    ),
    "depth to space": (X4, "y = DepthToSpace <blocksize = 2> (x)", {}),
    "resize by factors": (
        X4, "y = Resize <mode = \"nearest\", nearest_mode = \"floor\"> (x, \"\", s)",
        {"s": np.float32([1, 1, 2, 3])},
    ),
    "resize to a size": (
        X4, "y = Resize <coordinate_transformation_mode = \"asymmetric\"> (x, \"\", \"\", s)",
        {"s": np.array([2, 4, 10, 3])},
    ),
    "gather elements": (X2, "y = GatherElements <axis = 1> (x, i)", {"i": np.array([[0], [7], [3]])}),
    "scatter": (
        X2, "t = Neg (u) y = ScatterND (x, i, t)", {"i": np.array([[2], [0]]), "u": normal(2, 8)},
    ),
    "top k": (X3, "y, place = TopK (x, k)", {"k": np.array([3])}),
}  # fmt: skip


def graph_text(shape: tuple[int, ...], body: str, kind: str = "float") -> str:
    """One input and one output of unknown rank."""
    return f"({kind}[{','.join(map(str, shape))}] x) => ({kind} y) {{ {body} }}"


@pytest.mark.parametrize("case", EXACT)
def test_one_rounding_is_all_that_is_lost(case: str) -> None:
    """Exact until the one rounding to the result's grid. Floats round there too, from sums that
    are themselves rounded, so that a tie may fall to the other side: one step apart at most.
    """
    shape, body, weights = EXACT[case]
    check(graph_text(shape, body), feeds_of(x=shape), **weights)
