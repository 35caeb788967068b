"""Integer forms of operators against what the operator gives for what the codes stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from graphs import Array, Feeds, feeds_of, model, normal, pipeline, run

from onnxq import graph as g
from onnxq.float_operators import float_operators
from onnxq.pipeline import Result
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
    "gather elements": (
        X2, "y = GatherElements <axis = 1> (x, i)", {"i": np.array([[0], [7], [3]])},
    ),
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


# ── polynomials: what they err beside the rounding ───────────────────────────────────────────────

NORM = {"g": normal(8, seed=5), "b": normal(8, seed=6)}
SPELLED_NORM = """m = ReduceMean <keepdims = 1> (x, last) d = Sub (x, m) s = Mul (d, d)
    v = ReduceMean <keepdims = 1> (s, last) e = Add (v, eps) r = Sqrt (e) n = Div (d, r)
    t = Mul (n, g) y = Add (t, b)"""
SPELLED_RMS = """s = Mul (x, x) v = ReduceMean <keepdims = 1> (s, last) e = Add (v, eps)
    r = Sqrt (e) n = Div (x, r) y = Mul (n, g)"""
SPELLED = NORM | {"last": np.array([-1]), "eps": np.float32(1e-5)}
HALVES = {"two": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}
CLOSE = {
    # ⌊n + 1/2⌋ of n = (x − μ) / σ in Q15 errs by half of 2⁻¹⁵ and the root by as much of n.
    "layer norm": ("y = LayerNormalization (x, g, b)", NORM, 5e-4),
    "layer norm, spelled out": (SPELLED_NORM, SPELLED, 5e-4),
    "layer norm over two axes": (
        "y = LayerNormalization <axis = 1> (x, g, b)",
        {"g": normal(5, 8), "b": normal(5, 8, seed=1)}, 5e-4,
    ),
    "layer norm over two axes, spelled out": (
        SPELLED_NORM,
        SPELLED | {"last": np.array([1, 2]), "g": normal(5, 8)}, 5e-4,
    ),
    "rms norm": ("y = RMSNormalization (x, g)", {"g": NORM["g"]}, 5e-4),
    "rms norm, spelled out": (
        SPELLED_RMS, {k: v for k, v in SPELLED.items() if k != "b"}, 5e-4,
    ),
    # I-BERT §3.4: i-GELU is within 0.0182 of GELU.
    "gelu": ("y = Gelu (x)", {}, 0.0182),
    "gelu, spelled out": (
        "d = Div (x, two) e = Erf (d) a = Add (e, one) m = Mul (x, a) y = Mul (m, half)",
        HALVES, 0.0182,
    ),
    "gelu by sigmoid": (  # the sigmoid as below, of 1.702 x
        "h = Mul (x, c) s = Sigmoid (h) y = Mul (x, s)", {"c": np.float32(1.702)},
        0.25 * 0.002 * 4.5 + 1e-3,
    ),
    # x σ(x) with exp off by 0.002: the sigmoid by a quarter of it, x being below 4.5 here.
    "silu": ("s = Sigmoid (x) y = Mul (x, s)", {}, 0.25 * 0.002 * 4.5 + 1e-3),
    # Numerator and sum are off by 0.2% at most each.
    "softmax": ("y = Softmax (x)", {}, 4e-3),
    "softmax along another axis": ("y = Softmax <axis = 1> (x)", {}, 4e-3),
    # The quotient of two codes: rounded once, but of operands that were rounded before.
    "div": ("c = Clip (x, one, ten) y = Div (x, c)",
            {"one": np.float32(1), "ten": np.float32(10)}, 1e-3),
    "one over": ("c = Clip (x, half, ten) y = Div (one, c)",
                 HALVES | {"ten": np.float32(10)}, 1e-3),
    # The square of a code, rounded once; its root of 15 fraction bits.
    "root of a square": ("p = Pow (x, two) y = Sqrt (p)", {"two": np.float32(2)}, 2e-2),
    # A root rounded down in Q8 of a sum of 40 squares.
    "l2 norm": ("y = ReduceL2 <keepdims = 0> (x, a)", {"a": np.array([1, 2])}, 1e-2),
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSE)
def test_polynomials_stay_within_their_bounds(case: str) -> None:
    body, weights, bound = CLOSE[case]
    done = quantized(graph_text(X3, body), feeds_of(x=X3), opset=23, **weights)
    assert float_operators(g.to_proto(done.graph)) == []
    steps = errors_in_steps(done, feeds_of(x=X3))["y"]
    assert steps * float(done.context.activations["y"].scale) <= bound


def test_instance_normalization() -> None:
    body = "y = InstanceNormalization (x, g, b)"
    weights = {"g": normal(4), "b": normal(4, seed=1)}
    done = quantized(graph_text(X4, body), feeds_of(x=X4), **weights)
    assert float_operators(g.to_proto(done.graph)) == []
    steps = errors_in_steps(done, feeds_of(x=X4))["y"]
    assert steps * float(done.context.activations["y"].scale) <= 5e-4


@pytest.mark.parametrize("masked", [-np.inf, -1e4, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("how", ["Add", "Where"])
def test_masks_take_nothing_from_the_scores(masked: float, how: str) -> None:
    """A grid that held the mask itself would have no step left for scores of size 1."""
    body = {
        "Add": "s = Add (x, mask) y = Softmax (s)",
        "Where": "s = Where (keep, x, low) y = Softmax (s)",
    }[how]
    mask = np.where(np.arange(8) < 5, 0, np.float32(masked)).astype(np.float32)
    weights = {"mask": mask} if how == "Add" else {"keep": mask == 0, "low": np.float32(masked)}
    feeds = feeds_of(x=X3)
    done = quantized(graph_text(X3, body), feeds, **weights)
    float_one = model(graph_text(X3, body), 21, **weights)
    for feed in feeds:
        expected, actual = run(float_one, feed)["y"], run(done.graph, feed)["y"]
        np.testing.assert_allclose(actual, expected, atol=5e-3)
        assert not actual[..., 5:].any()


@pytest.mark.parametrize("op", ["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"])
@pytest.mark.parametrize("order", ["(x, c)", "(c, x)"])
def test_codes_compare_with_constants_as_their_values_do(op: str, order: str) -> None:
    """A constant that is a code, and one between two."""
    feeds = [{"x": np.linspace(-1, 1, 65, dtype=np.float32)}]
    step = 1 / 32767
    for constant in (0.0, 16384 * step, 0.25 + 0.3 * step, 5.0, -np.inf):
        text = f"(float[65] x) => (bool y) {{ y = {op} {order} }}"
        done = quantized(text, feeds, c=np.float32(constant))
        scale = float(next(iter(done.context.activations.values())).scale)
        held = np.rint(feeds[0]["x"] / np.float32(scale)) * scale
        pair = (held, constant) if order == "(x, c)" else (constant, held)
        names = {"Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
                 "GreaterOrEqual": np.greater_equal, "Equal": np.isclose}  # fmt: skip
        extra = {"rtol": 0, "atol": 0.01 * step} if op == "Equal" else {}
        near = np.abs(held - constant) < 0.01 * step  # is meant to be that code
        expected = np.where(
            near, op in ("LessOrEqual", "GreaterOrEqual", "Equal"), names[op](*pair, **extra)
        )
        np.testing.assert_array_equal(run(done.graph, feeds[0])["y"], expected)


def test_tensors_on_grids_of_their_own_compare() -> None:
    check("(float[3,8] x) => (bool y) { t = Mul (x, c) u = Neg (t) y = Less (x, u) }",
          feeds_of(x=X2), c=np.float32(0.37))  # fmt: skip


def test_integers_and_booleans_enter_and_leave() -> None:
    text = """(int64[3,8] i, bool[3,8] b) => (float y, int64 k, bool t) {
        f = Cast <to = 1> (i) h = Cast <to = 1> (b) s = Mul (f, half) y = Add (s, h)
        k = Cast <to = 7> (y) t = Cast <to = 9> (h)
    }"""
    rng = np.random.default_rng(0)
    feeds = [{"i": rng.integers(-9, 9, (3, 8)), "b": rng.random((3, 8)) < 0.5} for _ in range(4)]
    feeds.append({"i": np.full((3, 8), 2**31), "b": np.ones((3, 8), bool)})  # saturates
    done = quantized(text, feeds[:4], half=np.float32(0.5))
    found = [each.name for each in float_operators(g.to_proto(done.graph))]
    assert found == []
    for feed in feeds[:4]:
        said = run(done.graph, feed)
        np.testing.assert_allclose(said["y"], feed["i"] / 2 + feed["b"], atol=1e-3)
        near_half = feed["i"] % 2 == 1
        assert np.abs(said["k"] - np.trunc(feed["i"] / 2 + feed["b"]))[near_half].max() == 0
        np.testing.assert_array_equal(said["t"], feed["b"])
    assert run(done.graph, feeds[4])["y"].max() <= done.context.activations["y"].range[1]


@pytest.mark.parametrize("order", [1, 16])
def test_rows_of_embeddings_have_multipliers_of_their_own(order: int) -> None:
    """Rows of very different sizes all keep 7 bits."""
    table = normal(20, 32) * np.logspace(-2, 0, 20, dtype=np.float32)[:, None]
    feeds = [{"ids": np.random.default_rng(k).integers(-20, 20, (2, 5))} for k in range(6)]
    feeds.append({"ids": np.arange(20).reshape(2, 10)})
    done = quantized("(int64[n,m] ids) => (float y) { y = Gather (t, ids) }", feeds, t=table)
    assert float_operators(g.to_proto(done.graph)) == []
    assert errors_in_steps(done, feeds)["y"] <= 1.01
    actual = run(done.graph, feeds[-1])["y"].reshape(20, 32)
    step = float(done.context.activations["y"].scale)
    largest = np.abs(table).max(axis=1, keepdims=True)
    assert (np.abs(actual - table) <= largest / 254 + step).all()


# ── convolution transposed ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "attrs",
    [
        "strides = [2,2]", "strides = [2,3], pads = [1,0,1,2]",
        "dilations = [2,1], pads = [2,1,2,1]",
        "strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]",
        "strides = [3,1], pads = [2,2,2,2]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(attrs: str, groups: int) -> None:
    body = f"c = ConvTranspose <group = {groups}, {attrs}> (x, w, b) y = Relu (c)"
    weights = {"w": normal(4, 3, 3, 3, scale=0.4), "b": normal(3 * groups, seed=1)}
    check(graph_text(X4, body), feeds_of(x=X4), **weights)


def test_a_transposed_convolution_whose_kernel_is_shorter_than_its_stride() -> None:
    """Values that no input reaches: zeros, and the bias."""
    body = "y = ConvTranspose <strides = [3,2]> (x, w, b)"
    check(graph_text(X4, body), feeds_of(x=X4), w=normal(4, 3, 1, 1), b=normal(3))


# ── what the preset promises ─────────────────────────────────────────────────────────────────────

CHAIN = """(float[3,8] x) => (float y) {
    h = MatMul (x, w) r = Relu (h) m = MatMul (r, v) s = Add (m, x) t = Mul (s, s)
    y = LayerNormalization (t, g, b)
}"""
CHAIN_WEIGHTS = {"w": normal(8, 16), "v": normal(16, 8, seed=1), **NORM}


def test_powers_of_two_leave_shifts_alone() -> None:
    """Ratios of powers of two are powers of two: a multiplier is 1, or shifts to a finer grid."""
    text = """(float[2,4,7,6] x) => (float y) {
        c = Conv <pads = [1,1,1,1]> (x, w) r = Relu (c) s = Add (r, x)
        p = MaxPool <kernel_shape = [2,2]> (s) t = Concat <axis = 1> (p, p) y = Mul (t, t)
    }"""
    feeds = feeds_of(x=X4)
    done = quantized(text, feeds, ["assign.power_of_two=true"], w=normal(4, 4, 3, 3))
    ops = [node.op for node in g.walk(done.graph)]
    assert "ShiftRequantize" in ops
    for node in g.walk(done.graph):
        for tensor in node.inputs:
            if g.is_constant(tensor) and "multiplier" in tensor.name:
                values = g.values(tensor)
                assert (values & (values - 1) == 0).all(), tensor.name
    assert float_operators(g.to_proto(done.graph)) == []
    # A code of 8 bits that falls to the other side of a tie, squared: 2 · 128 of them and a bit,
    # each two steps of y.
    assert errors_in_steps(done, feeds)["y"] <= 2 * 2 * 129


def test_an_excluded_layer_stays_float_between_quantizers_and_is_reported() -> None:
    made = model(CHAIN, 21, **CHAIN_WEIGHTS)
    feeds = feeds_of(x=X2)
    done = pipeline(made, feeds, "integer-only", settings=['assign.exclude=["m"]'])
    left = [each.op for each in float_operators(g.to_proto(done.graph))]
    assert left == ["DequantizeLinear", "MatMul", "QuantizeLinear"]
    assert {r.name: r.reason for r in done.report.layers}["m"] == "excluded by the user"


def test_a_refused_operator_stays_float_with_its_tail_and_is_reported() -> None:
    text = """(float[2,4,7,6] x, float[4,4,1,1] w) => (float y) {
        a = Neg (x) r = Resize <mode = "linear"> (a, "", s) c = Relu (r) y = Neg (c)
    }"""
    feeds = feeds_of(x=X4, w=(4, 4, 1, 1))
    done = quantized(text, feeds, s=np.float32([1, 1, 2, 2]))
    left = [each.op for each in float_operators(g.to_proto(done.graph))]
    assert left == ["DequantizeLinear", "Resize", "Relu", "QuantizeLinear"]
    reasons = {record.name: record.reason for record in done.report.layers}
    assert reasons["r"] == reasons["c"] == "it interpolates"
    for feed in feeds:
        for optimize in (False, True):
            expected = -np.maximum(run(model(text, 21, s=np.float32([1, 1, 2, 2])), feed)["y"], -9)
            np.testing.assert_allclose(-run(done.graph, feed, optimize)["y"], expected, atol=0.1)


def test_one_tensor_quantized_in_two_bodies_keeps_both_grids() -> None:
    """Each branch sees other values, and a grid of its own must not be taken for the other's."""
    text = """(float[n,4] x, bool choice) => (float[n,4] y) {
        y = If (choice) <
            then_branch = yes () => (float[n,4] a) { a = MatMul (x, w) },
            else_branch = no () => (float[n,4] b) { b = MatMul (x, w) }
        >
    }"""
    feeds = feeds_of(x=(2, 4))
    for k, feed in enumerate(feeds):
        feed["choice"] = np.array(k % 2 == 0)
        feed["x"] = feed["x"] * np.float32(100 if k % 2 else 1)
    done = quantized(text, feeds, w=normal(4, 4))
    for feed in feeds:
        expected, actual = feed["x"] @ normal(4, 4), run(done.graph, feed)["y"]
        assert np.abs(actual - expected).max() < 0.03 * np.abs(expected).max()


def test_a_table_that_is_also_a_weight_is_written_for_each() -> None:
    text = """(int64[n] ids) => (float[n,20] y) {
        h = Gather (t, ids) y = Gemm <transB = 1> (h, t)
    }"""
    table = normal(20, 16)
    feeds = [{"ids": np.random.default_rng(k).integers(0, 20, 6)} for k in range(6)]
    done = quantized(text, feeds, t=table)
    assert float_operators(g.to_proto(done.graph)) == []
    for feed in feeds:
        expected = table[feed["ids"]] @ table.T
        np.testing.assert_allclose(run(done.graph, feed)["y"], expected, atol=0.3)


@pytest.mark.parametrize("kind", ["float16", "double", "bfloat16"])
def test_models_of_other_floats(kind: str) -> None:
    import ml_dtypes

    dtype = {"float16": np.float16, "double": np.float64, "bfloat16": ml_dtypes.bfloat16}[kind]
    text = f"({kind}[3,8] x) => ({kind}[3,8] y) {{ h = MatMul (x, w) r = Relu (h) y = Add (r, x) }}"
    feeds = [{"x": feed["x"].astype(dtype)} for feed in feeds_of(x=X2)]
    done = quantized(text, feeds, w=normal(8, 8).astype(dtype))
    assert float_operators(g.to_proto(done.graph)) == []
    for feed in feeds:
        x = feed["x"].astype(np.float32)
        expected = np.maximum(x @ normal(8, 8), 0) + x
        actual = run(done.graph, feed)["y"]
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.astype(np.float32), expected, atol=0.25)


def test_outputs_that_are_read_inputs_and_one_tensor_twice() -> None:
    text = """(float[3,8] x) => (float[3,8] h, float[3,8] x, float[3,8] t, float[3,8] y) {
        h = MatMul (x, w) t = Identity (h) y = Relu (h)
    }"""
    feeds = feeds_of(x=X2)
    done = quantized(text, feeds, w=normal(8, 8))
    for feed in feeds:
        said = run(done.graph, feed)
        np.testing.assert_array_equal(said["x"], feed["x"])
        np.testing.assert_array_equal(said["h"], said["t"])
        np.testing.assert_allclose(said["y"], np.maximum(said["h"], 0), atol=0.03)  # ends


def test_the_same_input_gives_the_same_bytes() -> None:
    once, again = (
        quantized(CHAIN, feeds_of(x=X2), **CHAIN_WEIGHTS).to_proto().SerializeToString()
        for _ in range(2)
    )
    assert once == again


# ── what would overflow ──────────────────────────────────────────────────────────────────────────


def reasons_of(done: Result) -> list[str]:
    return [record.reason for record in done.report.layers if record.reason]


def test_products_too_long_for_32_bits_stay_float() -> None:
    rows = 1 << 17
    feeds = [{"x": np.random.default_rng(k).random((1, rows), np.float32)} for k in range(2)]
    text = f"(float[1,{rows}] x) => (float y) {{ h = MatMul (x, w) y = Neg (h) }}"
    done = quantized(text, feeds, w=np.ones((rows, 2), np.float32))
    assert reasons_of(done) == ["its sums can exceed 32 bits: it adds up too many products"]


def test_rows_too_small_for_their_epsilon_stay_float() -> None:
    feeds = [{"x": feed["x"] * np.float32(1e-12)} for feed in feeds_of(x=X3)]
    done = quantized(graph_text(X3, "n = LayerNormalization (x, g, b) y = Neg (n)"), feeds, **NORM)
    assert "nothing but its epsilon is left" in reasons_of(done)[0]


def test_a_norm_of_unknown_length_stays_float() -> None:
    text = "(float[n,m] x) => (float y) { r = ReduceL2 (x, a) y = Neg (r) }"
    done = quantized(text, feeds_of(x=X2), a=np.array([1]))
    assert reasons_of(done) == ["how many squares it adds up is not known"]


def test_gains_of_nothing_leave_the_bias() -> None:
    """A multiplier of 0 has no bits, and its shift is not the bias's."""
    gain = NORM["g"].copy()
    gain[:4] = [0, 1e-8, 1e-20, -1e-30]
    body = "y = LayerNormalization (x, g, b)"
    done = quantized(graph_text(X3, body), feeds_of(x=X3), g=gain, b=NORM["b"])
    steps = errors_in_steps(done, feeds_of(x=X3))["y"]
    assert steps * float(done.context.activations["y"].scale) <= 5e-4


def test_offsets_that_cancel_large_products_are_kept_whole() -> None:
    """1000 (x − 100) for x in 99.9 … 100.1: both terms are far beyond the grid of the result. A
    float of 10⁵ is good to 0.004, more than a step of it.
    """
    feeds = [{"x": (100 + 0.1 * np.tanh(f["x"])).astype(np.float32)} for f in feeds_of(x=X4)]
    weights = {"s": np.full(4, 1000, np.float32), "b": np.zeros(4, np.float32),
               "m": np.full(4, 100, np.float32), "v": np.ones(4, np.float32)}  # fmt: skip
    body = "y = BatchNormalization (x, s, b, m, v)"
    done = quantized(graph_text(X4, body), feeds, **weights)
    assert errors_in_steps(done, feeds)["y"] <= 3.5


def test_integers_of_31_bits_are_scaled_without_overflow() -> None:
    feeds = [{"i": np.array([-(2**31), 2**31 - 1, 2**30, -5])}]
    done = quantized("(int64[4] i) => (float y) { y = Cast <to = 1> (i) }", feeds)
    np.testing.assert_allclose(run(done.graph, feeds[0])["y"], feeds[0]["i"], atol=2**16)
