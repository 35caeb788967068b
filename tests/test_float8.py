"""FP8: the codes, the models that hold them, and who takes them."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import Array, context, feeds_of, model, normal, pipeline, run, sqnr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnxq.passes import AdaRound, Assign, AutoRound
from onnxq.passes.solve.calibrate import search_range
from onnxq.passes.solve.coordinate_descent import coordinate_descent
from onnxq.passes.solve.gptq import gptq

import onnxq
from onnxq import cache
from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.observe import Histogram
from onnxq.qtype import (
    QParams,
    QTensor,
    QType,
    quantize,
    quantize_weight,
    scale_and_zero,
    weight_scale,
)
from onnxq.recipe import check_target, load_recipe, preset_names
from onnxq.runtime import Session
from onnxq.solver import Layer
from onnxq.target import Format, load_target

KINDS = {
    "f8e4m3": (ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN, 448),
    "f8e5m2": (ml_dtypes.float8_e5m2, TensorProto.FLOAT8E5M2, 57344),
}
ONE = np.float32(1)


def bits(codes: Array) -> Array:
    return codes.view(np.uint8)


# ── the format ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("marks", ["", ":channel", "p", "p:channel"])
def test_it_is_read_written_and_bounded(text: str, marks: str) -> None:
    dtype, _, largest = KINDS[text]
    qtype = QType.parse(text + marks)
    assert str(qtype) == text + marks
    assert (qtype.qmin, qtype.middle, qtype.qmax) == (-largest, 0, largest)
    assert qtype.dtype == dtype
    assert (qtype.bits, qtype.signed, qtype.symmetric) == (8, True, True)
    assert (qtype.group, qtype.power_of_two) == (-1 if ":" in marks else None, "p" in marks)


@pytest.mark.parametrize("text", ["f8", "f8e3m4", "f8e4m3a", "f8e4m3:32", "f16e4m3"])
def test_what_is_no_float8_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"FP8 has a scale per tensor|is no number format"):
        QType.parse(text)


@pytest.mark.parametrize("text", KINDS)
@given(
    x=hnp.arrays(np.float32, 32, elements=st.floats(-1e6, 1e6, width=32)),
    scale=st.floats(0.0078125, 64, width=32),
)
def test_codes_are_the_cast_of_what_is_within_the_largest(
    text: str, x: Array, scale: float
) -> None:
    dtype, _, largest = KINDS[text]
    qtype, unit = QType.parse(text), np.float32(scale)
    codes = quantize(x, unit, np.zeros((), dtype), qtype)
    assert codes.dtype == dtype
    np.testing.assert_array_equal(
        bits(codes), bits(np.clip(x / unit, -largest, largest).astype(dtype))
    )


@pytest.mark.parametrize("text", KINDS)
def test_it_saturates_and_keeps_subnormals_and_the_sign_of_zero(text: str) -> None:
    dtype, _, largest = KINDS[text]
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    x = np.array([1e30, -1e30, np.inf, largest * 1.01, least, -least, least / 2, 0.0, -0.0])
    codes = quantize(x.astype(np.float32), ONE, np.zeros((), dtype), QType.parse(text))
    expected = [largest, -largest, largest, largest, least, -least, 0, 0, 0]
    assert codes.astype(np.float32).tolist() == expected
    assert np.signbit(codes.astype(np.float32)).tolist() == [
        False, True, False, False, False, True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("text", KINDS)
def test_onnxruntime_gives_the_same_codes(text: str) -> None:
    dtype, kind, _ = KINDS[text]
    scale = np.float32(0.37)
    inits = [
        onnx.numpy_helper.from_array(scale, "s"),
        onnx.numpy_helper.from_array(np.zeros((), dtype), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], inits)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    assert inits[1].data_type == kind
    rng = np.random.default_rng(0)
    x = (rng.normal(size=20000) * 10 ** rng.uniform(-8, 6, 20000)).astype(np.float32)
    mine = quantize(x, scale, np.zeros((), dtype), QType.parse(text)).astype(np.float32) * scale
    said = run(made, {"x": x})["y"]
    np.testing.assert_array_equal(said, mine)
    np.testing.assert_array_equal(np.signbit(said), np.signbit(mine))


@pytest.mark.parametrize("text", KINDS)
def test_the_scale_puts_the_largest_magnitude_on_the_largest_code(text: str) -> None:
    largest = KINDS[text][2]
    scale, zero = scale_and_zero(-3.0, 2.0, QType.parse(text))
    assert scale == np.float32(3.0 / largest)
    assert float(zero) == 0
    low, high = QParams.from_range(-3, 2, QType.parse(text)).range
    assert (low, high) == pytest.approx((-3, 3))
    assert scale_and_zero(0, 0, QType.parse(text))[0] == 1


@pytest.mark.parametrize("text", KINDS)
def test_a_weight_has_a_scale_per_channel_and_no_nan(text: str) -> None:
    qtype = QType.parse(f"{text}:channel")
    weight = normal(6, 40) * np.geomspace(1e-6, 1e6, 6)[:, None].astype(np.float32)
    weight[2] = 0
    q = quantize_weight(weight, *weight_scale(weight, qtype), qtype)
    assert q.scale.shape == (6,)
    assert np.isfinite(q.dequantize()).all()
    # Half a step of 3 or 2 bits of mantissa, beside what is below the least normal number.
    mantissa = 3 if text == "f8e4m3" else 2
    least = float(ml_dtypes.finfo(qtype.dtype).smallest_subnormal)
    bound = np.abs(weight) * 2.0 ** -(mantissa + 1) + q.scale[:, None] * least
    assert (np.abs(q.dequantize() - weight) <= bound * 1.0001).all()


def test_e4m3_is_finer_and_e5m2_wider() -> None:
    x = normal(4, 500)
    far = np.append(x * np.float32(1e-6), np.ones((4, 1), np.float32), axis=1)

    def error(values: Array, text: str) -> float:
        qtype = QType.parse(f"{text}:channel")
        made = quantize_weight(values, *weight_scale(values, qtype), qtype).dequantize()
        return float(np.median(np.abs(made - values) / np.abs(values)))

    assert error(x, "f8e4m3") < error(x, "f8e5m2")
    assert error(far, "f8e5m2") < error(far, "f8e4m3")


@pytest.mark.parametrize("text", KINDS)
def test_it_comes_back_from_the_cache_bit_for_bit(text: str) -> None:
    qtype = QType.parse(f"{text}:channel")
    weight = normal(4, 8)
    q = quantize_weight(weight, *weight_scale(weight, qtype), qtype)
    cache.put("float8", q)
    found = cache.get("float8")
    assert found.qtype == qtype
    assert found.codes.dtype == qtype.dtype
    np.testing.assert_array_equal(bits(found.codes), bits(q.codes))


# ── solvers ──────────────────────────────────────────────────────────────────────────────────────


def layer(qtype: QType) -> Layer:
    x = normal(64, 3) @ normal(3, 12, seed=1) + 0.1 * normal(64, 12, seed=2)
    hessian = (x.T @ x / len(x)).astype(np.float32)[None]
    weight = normal(5, 12, seed=3)
    start = quantize_weight(weight, *weight_scale(weight, qtype), qtype)
    return Layer(weight, qtype, hessian, None, start)


def loss(work: Layer, q: QTensor) -> float:
    d = work.weight - q.dequantize()
    return float(np.einsum("oi,ij,oj->", d, work.hessian[0], d))


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("solve", [gptq, lambda work: coordinate_descent(work, 4)])
def test_what_feeds_errors_on_beats_rounding(text: str, solve: object) -> None:
    work = layer(QType.parse(f"{text}:channel"))
    q = solve(work)  # type: ignore[operator]
    assert isinstance(work.start, QTensor)
    assert q.codes.dtype == work.qtype.dtype
    assert loss(work, q) < loss(work, work.start)


@pytest.mark.parametrize("step", [AdaRound(), AutoRound()])
def test_what_learns_integers_says_so(step: AdaRound | AutoRound) -> None:
    with pytest.raises(OnnxqError, match=rf"{step.name} is for integers"):
        step.solve(layer(QType.parse("f8e4m3:channel")))


def test_ranges_by_entropy_are_for_integers_and_by_mse_for_both() -> None:
    seen = Histogram()
    seen.update(np.append(normal(5000), np.float32(40)))
    qtype = QType.parse("f8e4m3")
    with pytest.raises(OnnxqError, match="entropy is for integers"):
        search_range(seen.result(), qtype, "entropy")
    low, high = search_range(seen.result(), qtype, "mse")
    assert seen.result().low <= low < high <= seen.result().high


# ── models ───────────────────────────────────────────────────────────────────────────────────────


NET = """(float[n,3,8,8] x) => (float[n,6] y) {
    a = Conv <pads = [1,1,1,1]> (x, w, b)
    r = Relu (a)
    c = Conv <pads = [1,1,1,1]> (r, u)
    k = Clip (c, zero, six)
    d = Conv <pads = [1,1,1,1]> (k, t)
    e = Conv <pads = [1,1,1,1]> (d, s)
    p = GlobalAveragePool (e)
    f = Flatten (p)
    h = Relu (f)
    y = Gemm <transB = 1> (h, v, g)
}"""


def net() -> onnx.ModelProto:
    return model(
        NET,
        w=normal(8, 3, 3, 3, scale=0.3),
        b=normal(8, seed=1),
        u=normal(8, 8, 3, 3, scale=0.3, seed=2),
        t=normal(8, 8, 3, 3, scale=0.3, seed=3),
        s=normal(8, 8, 3, 3, scale=0.3, seed=4),
        v=normal(6, 8, seed=5),
        g=normal(6, seed=6),
        zero=np.float32(0),
        six=np.float32(6),
    )


@pytest.mark.parametrize("format", ["w8a8e4m3", "w8a8e5m2"])
def test_a_model_of_float8_runs_with_optimizations_off_and_on(format: str) -> None:
    feeds = feeds_of(8, x=(2, 3, 8, 8))
    made = pipeline(net(), feeds, "fp8", "generic-qdq", [f"assign.format={format}"])
    proto = g.to_proto(made.graph)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version >= 19
    kind = KINDS[f"f8{format[4:]}"][1]
    stored = [t for t in proto.graph.initializer if t.data_type == kind]
    assert len([t for t in stored if len(t.dims) > 1]) == 5
    assert not [t for t in proto.graph.initializer if t.data_type == TensorProto.INT32]
    for feed in feeds:
        off, on, want = (
            run(proto, feed, False)["y"], run(proto, feed)["y"], run(net(), feed)["y"]
        )  # fmt: skip
        np.testing.assert_allclose(on, off, rtol=1e-5, atol=1e-5)
        assert sqnr(off, want) > (20 if "e4m3" in format else 14)


def test_weights_alone_are_codes_in_the_file() -> None:
    made = pipeline(net(), None, "int8-weights", "generic-qdq", ["assign.format=w8e4m3"])
    proto = g.to_proto(made.graph)
    assert "QuantizeLinear" not in {node.op_type for node in proto.graph.node}
    (feed,) = feeds_of(1, x=(2, 3, 8, 8))
    assert sqnr(run(proto, feed)["y"], run(net(), feed)["y"]) > 20


def test_quantize_verifies_and_writes_a_file_that_loads(tmp_path: Path) -> None:
    path, out = tmp_path / "net.onnx", tmp_path / "q.onnx"
    onnx.save(net(), path)
    samples = feeds_of(12, x=(2, 3, 8, 8))
    recipe = load_recipe("fp8").without("reconstruct-layers")
    result = onnxq.quantize(path, recipe=recipe, samples=samples, target="tensorrt", output=out)
    assert result.report.verified
    assert result.report.outputs[0].cosine > 0.99
    assert {r.form for r in result.report.ranked} == {"w f8e4m3:channel, a f8e4m3"}
    Session(out).run(samples[0])


# ── who takes it ─────────────────────────────────────────────────────────────────────────────────


def test_a_format_of_float8_is_written_behind_the_widths() -> None:
    assert Format.parse("w8a8e4m3") == Format(8, 8, float8="e4m3")
    for text in ("w8a8e5m2", "w8e4m3", "a8e4m3"):
        assert str(Format.parse(text)) == text
        assert Format.parse(text).opset == 19
    for text in ("e4m3", "w8a8e3m4", "w8e4m3a8"):
        with pytest.raises(ValueError, match="for example"):
            Format.parse(text)


def test_eight_bits_of_integers_are_not_eight_bits_of_floats() -> None:
    node = g.load(net()).nodes[0]
    target = load_target("tensorrt")
    eight, float8 = (target.rule(node, "static", Format.parse(f)) for f in ("w8a8", "w8a8e4m3"))
    assert eight is not None
    assert float8 is not None
    assert (str(eight.weight), str(float8.weight)) == ("s8:channel", "f8e4m3:channel")
    assert target.rule(node, "static", Format.parse("w8a8e5m2")) is None


def test_a_target_without_rules_for_a_preset_names_those_that_have_them() -> None:
    with pytest.raises(OnnxqError) as error:
        check_target(load_recipe("fp8"), load_target("cpu"))
    text = str(error.value)
    assert "target cpu has no rules for w8a8e4m3 (static), which 'fp8' wants" in text
    assert "targets that have: cuda, generic-qdq, tensorrt" in text
    assert "presets for cpu:" in text
    assert "int8-static" in text
    assert "fp8" not in text.split("presets for cpu:")[1]
    assert "\n" not in text


def test_every_preset_that_suits_a_target_is_named_to_suit_it() -> None:
    with pytest.raises(OnnxqError) as error:
        check_target(load_recipe("int4"), load_target("nnapi"))
    named = str(error.value).split("presets for nnapi: ")[1].split(", ")
    for name in preset_names():
        recipe = load_recipe(name)
        if name in named:
            check_target(recipe, load_target("nnapi"))
        else:
            with pytest.raises(OnnxqError, match="has no rules for"):
                check_target(recipe, load_target("nnapi"))


def test_assign_refuses_too() -> None:
    graph = g.load(net())
    with pytest.raises(OnnxqError, match="cpu has no static rule for w8a8e4m3, only for"):
        Assign(format="w8a8e4m3").apply(graph, context())
