from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import Array, normal
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator

from onnxq.qtype import (
    QParams,
    QTensor,
    QType,
    quantize,
    quantize_weight,
    scale_and_zero,
    spread,
    weight_scale,
)

PLAIN = ["u8", "u8a", "s8", "s8a", "u4", "u4a", "s4", "s4a", "u16", "u16a", "s16", "s16a", "s2a"]
PLAIN += ["u3", "u3a", "s3", "s3a"]
FORMATS = [*PLAIN, *(f"{text}p" for text in PLAIN)]
ENDS = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)


# ── reading and writing ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "qtype", "ends", "scheme"),
    [
        ("s8", QType(8, True, True, None), (-127, 127), "per tensor, symmetric"),
        ("u8a", QType(8, False, False, None), (0, 255), "per tensor, asymmetric"),
        ("s8a:channel", QType(8, True, False, -1), (-128, 127), "per channel, asymmetric"),
        ("u4a:32", QType(4, False, False, 32), (0, 15), "per block of 32, asymmetric"),
        (
            "u4a:32/4",
            QType(4, False, False, 32, scale_bits=4),
            (0, 15),
            "per block of 32, asymmetric, scales of 4 bits",
        ),
        ("u8", QType(8, False, True, None), (1, 255), "per tensor, symmetric"),
        ("u3a:32", QType(3, False, False, 32), (0, 7), "per block of 32, asymmetric"),
        ("s3:32", QType(3, True, True, 32), (-4, 3), "per block of 32, symmetric"),
        ("s2:16", QType(2, True, True, 16), (-2, 1), "per block of 16, symmetric"),
        (
            "s8p:channel",
            QType(8, True, True, -1, True),
            (-127, 127),
            "per channel, symmetric, scales powers of two",
        ),
        ("u4ap:32", QType(4, False, False, 32, True), (0, 15), None),
        ("s32:channel", QType(32, True, True, -1), (-(2**31) + 1, 2**31 - 1), None),
    ],
)
def test_a_format_is_read_written_and_bounded(
    text: str, qtype: QType, ends: tuple[int, int], scheme: str | None
) -> None:
    assert QType.parse(text) == qtype
    assert str(qtype) == text
    assert (qtype.qmin, qtype.qmax) == ends
    assert scheme in (None, qtype.scheme)
    whole = not qtype.symmetric or qtype.blocked
    assert whole or ends[1] - qtype.middle == qtype.middle - ends[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "i8",
        "s7",
        "s8b",
        "u8:",
        "u8:channels",
        "s8:-1",
        "s64",
        "s8 ",
        "S8",
        "s8:1.5",
        "s8pa",
        "s8:channelp",
    ],
)
def test_what_is_no_format_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"no number format.*s8:channel") as error:
        QType.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("s8", np.int8), ("u8", np.uint8), ("s16", np.int16), ("u16", np.uint16), ("s32", np.int32),
        ("s4", ml_dtypes.int4), ("u4", ml_dtypes.uint4), ("u2", ml_dtypes.uint2),
        ("s3", np.int8), ("u3", np.uint8),
    ],
)  # fmt: skip
def test_codes_are_kept_in_the_type_of_the_format(text: str, dtype: Any) -> None:
    assert QType.parse(text).dtype == np.dtype(dtype)


# ── the laws of affine quantization ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", FORMATS)
@given(ENDS, ENDS, hnp.arrays(np.float32, 20, elements=st.floats(0, 1, width=32)))
def test_a_value_in_the_range_returns_within_half_a_step(
    text: str, low: float, high: float, parts: Array
) -> None:
    assume(low <= high)
    qtype = QType.parse(text)
    params = QParams.from_range(low, high, qtype)
    lowest, highest = min(low, 0), max(high, 0)
    x = (lowest + parts * (highest - lowest)).astype(np.float32)
    codes = quantize(x, params.scale, params.zero, qtype)
    assert codes.dtype == qtype.dtype
    real = (codes.astype(np.float64) - int(params.zero)) * float(params.scale)
    rounding = 4 * np.finfo(np.float32).eps * max(-lowest, highest)
    assert (np.abs(real - x) <= float(params.scale) / 2 + rounding).all()


@pytest.mark.parametrize("text", FORMATS)
@given(ENDS, ENDS)
def test_zero_is_exact_and_the_range_covers_what_was_asked(
    text: str, low: float, high: float
) -> None:
    qtype = QType.parse(text)
    params = QParams.from_range(low, high, qtype)
    zero = quantize(np.zeros(1, np.float32), params.scale, params.zero, qtype)
    assert zero[0] == params.zero
    assert qtype.qmin <= int(params.zero) <= qtype.qmax
    step = float(params.scale)
    assert params.range[0] <= low + step / 2 + 1e-6 * abs(low) or low > 0
    assert params.range[1] >= high - step / 2 - 1e-6 * abs(high) or high < 0
    if qtype.symmetric:
        assert params.range[0] == -params.range[1]


@pytest.mark.parametrize("text", PLAIN)
@given(ENDS, ENDS)
def test_a_power_of_two_is_the_next_above_the_range_s_own_scale(
    text: str, low: float, high: float
) -> None:
    plain, power = (scale_and_zero(low, high, QType.parse(t))[0] for t in (text, f"{text}p"))
    assert np.frexp(power)[0] == 0.5
    assert plain * (1 - 1e-6) <= power < 2 * plain * (1 + 1e-6)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1e-45), (-1e-39, 1e-39)])
def test_a_range_of_nothing_has_a_scale_that_can_be_divided_by(low: float, high: float) -> None:
    for text in ("u8a", "s8"):
        scale, _ = scale_and_zero(low, high, QType.parse(text))
        assert scale == 1.0


# ── the same as ONNX ─────────────────────────────────────────────────────────────────────────────


def onnx_pair(x: Array, scale: Array, zero: Array, axis: int) -> onnx.ModelProto:
    kinds = onnx.helper.np_dtype_to_tensor_dtype
    make, shape = onnx.helper.make_node, list(x.shape)
    inputs = [onnx.helper.make_tensor_value_info("x", kinds(x.dtype), shape)]
    outputs = [
        onnx.helper.make_tensor_value_info("q", kinds(zero.dtype), shape),
        onnx.helper.make_tensor_value_info("y", kinds(x.dtype), shape),
    ]
    nodes = [
        make("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
        make("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
    ]
    constants = [onnx.numpy_helper.from_array(a, n) for a, n in ((scale, "s"), (zero, "z"))]
    graph = onnx.helper.make_graph(nodes, "pair", inputs, outputs, constants)
    opset = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)


@pytest.mark.parametrize("group", ["", ":channel"])
@pytest.mark.parametrize("text", ["u8a", "s8a", "u4a", "s4a", "u16a", "s16a"])
def test_codes_and_values_are_those_of_onnx(text: str, group: str) -> None:
    qtype = QType.parse(text + group)
    weight = normal(5, 64, scale=3)
    scale, zero = weight_scale(weight, qtype)
    x = np.concatenate([weight, 100 * weight, np.rint(weight) + 0.5], axis=1).astype(np.float32)
    x[:, :3] = np.atleast_1d(scale)[:, None] * np.array([0.5, 1.5, -2.5], np.float32)  # ties
    ours = quantize_weight(x, scale, zero, qtype)
    model = onnx_pair(x, scale, zero, axis=0)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for codes, values in (ReferenceEvaluator(model).run(None, {"x": x}), (None, None)):
        if codes is None:
            values = session.run(["y"], {"x": x})[0]
        else:
            np.testing.assert_array_equal(ours.codes.astype(int), codes.astype(int))
        np.testing.assert_array_equal(ours.dequantize(), values)


# ── granularity ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("group", "shape"),
    [("", ()), (":channel", (3,)), (":4", (3, 3)), (":8", (3, 2)), (":16", (3, 1))],
)
def test_each_group_has_the_scale_of_its_own_values(group: str, shape: tuple[int, ...]) -> None:
    weight = normal(3, 10) * np.logspace(0, 2, 10, dtype=np.float32)
    for asymmetric in ("", "a"):
        qtype = QType.parse(f"s8{asymmetric}{group}")
        scale, zero = weight_scale(weight, qtype)
        assert scale.shape == zero.shape == shape
        width = {"": 10, ":channel": 10}.get(group) or int(group[1:])
        wide_scale = np.broadcast_to(spread(scale, weight.shape, qtype.group), weight.shape)
        for row in range(3):
            for start in range(0, 10, width):
                rows = slice(None) if group == "" else row
                part = weight[rows, start : start + width]
                expected, _ = scale_and_zero(part.min(), part.max(), qtype)
                if qtype.blocked and qtype.symmetric:  # all codes, the sign of the farthest weight
                    expected = -part[np.abs(part).argmax()] / 128
                exactly = 2**-11 if qtype.blocked else 0  # float16
                found = wide_scale[row, start : start + width]
                np.testing.assert_allclose(found, expected, rtol=exactly)
        solved = quantize_weight(weight, scale, zero, qtype)
        assert np.abs(solved.dequantize() - weight).max() <= np.abs(scale).max() * 0.57


def test_dequantize_follows_the_definition() -> None:
    codes = np.array([[1, 2, 3], [4, 5, 6]], np.int8)
    scale, zero = np.array([[1, 10], [2, 20]], "f4"), np.array([[0, 1], [2, 3]], np.int8)
    real = QTensor(codes, scale, zero, QType.parse("s8a:2")).dequantize()
    assert real.tolist() == [[1, 2, 20], [4, 6, 60]]
    assert real.dtype == np.float32
