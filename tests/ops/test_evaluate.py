"""The exact evaluator against ONNX Runtime, on graphs that it computes exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from running import sessions

from onnxq.errors import OnnxqError
from onnxq.ops import DOMAIN, VERSION, closure
from onnxq.ops.evaluate import evaluate

Array = NDArray[Any]
RNG = np.random.default_rng


def model(text: str, opset: int = 21, **weights: Any) -> onnx.ModelProto:
    graph = onnx.parser.parse_graph("g " + text)
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()
    )
    made = helper.make_model(
        graph,
        functions=closure([n.op_type for n in graph.node if n.domain == DOMAIN], opset),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(made)
    return made


def assert_as_runtime(made: onnx.ModelProto, **feed: Array) -> dict[str, Array]:
    results = evaluate(made, feed)
    for session in sessions(made):
        for name, expected in session.run(feed).items():
            assert results[name].dtype == expected.dtype
            np.testing.assert_array_equal(results[name], expected)
    return results


def codes(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return RNG(seed).integers(0, 256, shape).astype(np.uint8)


@given(
    group=st.sampled_from([1, 2, 4]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    zeros=st.tuples(st.integers(0, 255), st.integers(0, 255)),
)
def test_conv_integer(
    group: int,
    kernel: tuple[int, int],
    stride: int,
    dilation: int,
    padding: str,
    zeros: tuple[int, int],
) -> None:
    pads = ", pads = [1, 0, 2, 1]" if padding == "NOTSET" else ""
    if padding != "NOTSET":
        dilation = 1  # with which onnxruntime pads in a way of its own
    made = model(
        f"""(uint8[n,4,9,11] x) => (int32[n,8,h,v] y) {{
            y = ConvInteger <group = {group}, strides = [{stride}, 1], auto_pad = "{padding}",
                dilations = [{dilation}, {dilation}]{pads}> (x, w, a, b)
        }}""",
        w=codes(8, 4 // group, *kernel, seed=1),
        a=np.uint8(zeros[0]),
        b=np.uint8(zeros[1]),
    )
    assert_as_runtime(made, x=codes(2, 4, 9, 11))


def test_conv_integer_of_one_dimension_and_zero_points_for_each_channel() -> None:
    w, x, zeros = codes(3, 2, 4, seed=1), codes(1, 2, 10), np.array([0, 128, 255], np.uint8)
    text = "(uint8[1,2,10] x) => (int32[1,3,7] y) { y = ConvInteger (x, w, a, b) }"
    y = evaluate(model(text, w=w, a=np.uint8(7), b=zeros), {"x": x})["y"]
    for channel in range(3):
        for at in range(7):
            window = x[0, :, at : at + 4].astype(int) - 7
            assert y[0, channel, at] == (window * (w[channel].astype(int) - zeros[channel])).sum()


@pytest.mark.parametrize("a_shape", [(3, 5), (2, 3, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("columns", [(), (6,)])
def test_mat_mul_integer(a_shape: tuple[int, ...], columns: tuple[int, ...]) -> None:
    left = ",".join(map(str, a_shape[:-1]))
    made = model(
        f"(uint8[{left},5] a) => (int32[{left},6] y) {{ y = MatMulInteger (a, b, az, bz) }}",
        b=codes(5, 6, seed=1),
        az=np.uint8(200),
        bz=codes(*columns, seed=2),
    )
    assert_as_runtime(made, a=codes(*a_shape))


def test_mat_mul_integer_with_a_zero_point_for_each_row() -> None:
    text = "(uint8[2,3] a) => (int32[2,2] y) { y = MatMulInteger (a, b, z) }"
    a, b, z = codes(2, 3), codes(3, 2, seed=1), np.array([3, 250], np.uint8)
    y = evaluate(model(text, b=b, z=z), {"a": a})["y"]
    assert (y == (a.astype(int) - z[:, None]) @ b.astype(int)).all()


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("attributes", ["pads = [1, 1, 1, 1]", 'auto_pad = "SAME_UPPER"'])
def test_max_pool(ceil: int, attributes: str) -> None:
    made = model(
        f"""(uint8[2,3,8,9] x) => (uint8[n,c,h,w] y) {{
            y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], ceil_mode = {ceil},
                {attributes}> (x)
        }}"""
    )
    assert_as_runtime(made, x=codes(2, 3, 8, 9))


def test_arithmetic_and_what_computes_nothing() -> None:
    made = model(
        """(int32[n,4] a, int32[n,4] b)
        => (int32[n,4] c, int64[k,4] d, int32[m,2] e, uint8[n,4] f) {
            s = Add (a, b)
            p = Mul (s, b)
            r = Sub (p, a)
            c = Div (r, three)
            l = Cast <to = 7> (c)
            d = ReduceSum (l, axes)
            q = ReduceMax (a, axes)
            n = Neg (q)
            z = Abs (n)
            t = Concat <axis = 0> (z, c)
            e = Reshape (t, shape)
            u = Clip (a, low, high)
            f = Cast <to = 2> (u)
        }""",
        three=np.int32(-3),
        axes=np.array([0]),
        shape=np.array([-1, 2]),
        low=np.int32(0),
        high=np.int32(255),
    )
    a, b = (RNG(k).integers(-1000, 1000, (5, 4)).astype(np.int32) for k in (0, 1))
    assert_as_runtime(made, a=a, b=b)


NETWORK = """(float[n,2,8,8] x) => (float[n,3] y) {
    q = QuantizeLinear (x, s, z)
    a = ConvInteger <pads = [1, 1, 1, 1]> (q, w, z, w_zero)
    b = Add (a, bias)
    c = ai.onnxq.Requantize (b, none, m, shift, y_zero, low, high)
    d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
    e = ai.onnxq.IntegerMean <keepdims = 0> (d, y_zero, axes, one, nothing, z, low, high)
    f = MatMulInteger (e, v, z, w_zero)
    g = ai.onnxq.Requantize (f, none, one, four, none, wide_low, wide_high)
    h = ai.onnxq.IntegerSoftmax (g, exp_m, exp_n, levels, z, low, high)
    y = DequantizeLinear (h, s)
}"""


def network(**changes: Any) -> onnx.ModelProto:
    weights: dict[str, Any] = {
        "s": np.float32(1 / 256),
        "z": np.uint8(0),
        "w": codes(4, 2, 3, 3, seed=1),
        "w_zero": np.uint8(128),
        "bias": np.array([[[100]], [[-100]], [[0]], [[7]]], np.int32),
        "none": np.int32(0),
        "m": np.array([[[3]], [[5]], [[7]], [[9]]]) * 10**7,
        "shift": np.uint64(34),
        "y_zero": np.uint8(90),
        "low": 0,
        "high": 255,
        "axes": np.array([2, 3]),
        "one": 1,
        "nothing": np.uint64(0),
        "v": codes(4, 3, seed=2),
        "four": np.uint64(4),
        "wide_low": -(2**15),
        "wide_high": 2**15 - 1,
        "exp_m": 1513 << 8,
        "exp_n": np.uint64(2),
        "levels": 255,
    }
    return model(NETWORK, **(weights | changes))


def test_a_network_of_integers_between_floats() -> None:
    x = RNG(0).uniform(0, 1, (5, 2, 8, 8)).astype(np.float32)
    y = assert_as_runtime(network(), x=x)["y"]
    assert y.std() > 0.05  # it says something


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quantization_of_channels(axis: int) -> None:
    size = (2, 3, 4)[axis]
    made = model(
        f"""(float[2,3,4] x) => (int8[2,3,4] q, float[2,3,4] y) {{
            q = QuantizeLinear <axis = {axis}> (x, s, z)
            y = DequantizeLinear <axis = {axis}> (q, s, z)
        }}""",
        s=np.linspace(0.01, 0.7, size).astype(np.float32),
        z=np.arange(-1, size - 1).astype(np.int8),
    )
    assert_as_runtime(made, x=RNG(0).normal(0, 10, (2, 3, 4)).astype(np.float32))


def test_bodies_see_what_is_around_them() -> None:
    made = model(
        """(int32[2] a, bool c) => (int32[2] y) {
            d = Add (a, a)
            y = If (c) <
                then_branch = t () => (int32[2] p) { p = Add (d, a) },
                else_branch = e () => (int32[2] q) { q = Identity (d) }
            >
        }"""
    )
    for condition in (True, False):
        assert_as_runtime(made, a=np.array([3, -4], np.int32), c=np.array(condition))


def test_an_input_may_have_a_default() -> None:
    made = model("(int32[2] a, int32[2] b) => (int32[2] y) { y = Sub (a, b) }", b=np.int32([1, 2]))
    a = np.array([5, 7], np.int32)
    assert evaluate(made, {"a": a})["y"].tolist() == [4, 5]
    assert evaluate(made, {"a": a, "b": a[::-1]})["y"].tolist() == [-2, 2]


def test_functions_in_bodies() -> None:
    made = model(
        """(int32[n,4] a, bool c) => (uint8[n,4] y) {
            y = If (c) <
                then_branch = t () => (uint8[n,4] p) {
                    p = ai.onnxq.IntegerSoftmax <axis = 0> (a, m, n, levels, z, low, high)
                },
                else_branch = e () => (uint8[n,4] q) { q = Cast <to = 2> (z) }
            >
        }""",
        m=151300,
        n=np.uint64(8),
        levels=255,
        z=np.uint8(0),
        low=0,
        high=255,
    )
    made.functions.extend(closure(["IntegerSoftmax"]))
    a = RNG(0).integers(-3000, 3000, (3, 4)).astype(np.int32)
    assert assert_as_runtime(made, a=a, c=np.array(True))["y"].max() > 100


@pytest.mark.parametrize("turns", [1, 5])
def test_loops(turns: int) -> None:
    made = model(
        """(int32[2] a, int64 most) => (int32[2] y, int32[k,2] all) {
            y, all = Loop (most, , a) <
                body = b (int64 i, bool c, int32[2] s) => (bool d, int32[2] t, int32[2] u) {
                    k = Cast <to = 6> (i)
                    r = Add (s, a)
                    t = Sub (r, k)
                    sum = ReduceSum <keepdims = 0> (t)
                    d = Less (sum, hundred)
                    u = Neg (t)
                }
            >
        }""",
        hundred=np.int32(100),
    )
    assert_as_runtime(made, a=np.array([20, 7], np.int32), most=np.array(turns))


OVERFLOWS = [
    ("(int32[1] a) => (int32[1] y) { y = Mul (a, a) }", "Mul"),
    ("(int32[1] a) => (int32[1] y) { y = Add (a, a) }", "Add"),
    ("(int32[1] a) => (uint8[1] y) { y = Cast <to = 2> (a) }", "Cast"),
    ("(int32[1] a) => (int32[1] y) { y = MatMul (a, a) }", "MatMul"),
]


@pytest.mark.parametrize(("text", "named"), OVERFLOWS)
def test_what_does_not_fit_its_type_is_an_error(text: str, named: str) -> None:
    with pytest.raises(OnnxqError, match=rf"node 'y' \({named}\)"):
        evaluate(model(text), {"a": np.array([2**30 + 2**29], np.int32)})
