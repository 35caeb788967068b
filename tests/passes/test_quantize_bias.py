from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import ZOO, Case
from graphs import Array, feeds_of, fused, model, normal, ops, pipeline, run, sqnr

from onnxq import graph as g
from onnxq.pipeline import Result


def conv_case(w: Array, b: Array) -> Case:
    out, channels = w.shape[:2]
    text = f"(float[n,{channels},5,5] x) => (float[n,{out},5,5] y) {{ y = Conv (x, w, b) }}"
    return Case(model(text, w=w, b=b), feeds_of(x=(1, channels, 5, 5)))


@pytest.mark.parametrize("name", ["conv_bn_relu6", "depthwise", "residual", "gemm"])
def test_every_bias_is_int32_in_units_of_the_accumulator(name: str) -> None:
    case = ZOO[name]()
    result = pipeline(case.model, case.feeds)
    ctx = result.context
    found = 0
    for node in result.prepared.nodes:
        if node.op not in ("Conv", "Gemm") or len(node.inputs) < 3:
            continue
        bias, weight = ctx.weights[f"{node.name}#bias"], ctx.weights[node.inputs[1].name]
        unit = ctx.activations[node.inputs[0].name].scale * weight.scale.astype(float)
        unit = unit * node.attrs.get("alpha", 1.0) / node.attrs.get("beta", 1.0)
        np.testing.assert_allclose(bias.scale, unit, rtol=1e-6)
        assert bias.codes.dtype == np.int32
        assert not bias.zero.any()
        exact = node.inputs[2].values.ravel()
        assert np.abs(bias.dequantize()[:, 0] - exact).max() <= unit.max() * 0.51
        found += 1
    stored = [i for i in g.to_proto(result.graph).graph.initializer if i.data_type == 6]
    assert len([i for i in stored if i.name.endswith("quantized")]) == found > 0


def biased(result: Result) -> onnx.ModelProto:
    return g.to_proto(result.graph)


@pytest.mark.parametrize("tiny", [1e-6, 1e-12, 1e-30, 0.0])
def test_a_bias_beyond_32_bits_widens_its_channel_and_is_kept(tiny: float) -> None:
    w = normal(4, 3, 1, 1)
    w[2] *= tiny
    case = conv_case(w, np.float32([1, -2, 300, -4]))
    result = pipeline(case.model, case.feeds)
    bias = result.context.weights["y#bias"]
    np.testing.assert_allclose(bias.dequantize()[:, 0], [1, -2, 300, -4], rtol=1e-3)
    assert np.abs(bias.codes.astype(np.int64)).max() <= 2**30
    for feed in case.feeds:
        exact = run(case.model, feed)["y"]
        for optimize in (False, True):
            y = run(result.graph, feed, optimize)["y"]
            step = float(result.context.activations["y"].scale)
            assert np.abs(y - exact)[:, 2].max() <= 1.01 * step
            assert np.abs(y - exact).max() <= 1.6 * step


def test_two_layers_that_share_a_weight_agree_on_its_scale() -> None:
    """The second bias widens the channel after the first has been put into its units."""
    w = normal(4, 4, 1, 1)
    w[2] *= 1e-7
    text = """(float[n,4,5,5] x) => (float[n,4,5,5] y, float[n,4,5,5] z) {
        y = Conv (x, w, small)
        z = Conv (x, w, large)
    }"""
    small, large = np.float32([1, 2, 3, 4]), np.float32([1, 2, 5e4, 4])
    case = Case(model(text, w=w, small=small, large=large), feeds_of(x=(1, 4, 5, 5)))
    result = pipeline(case.model, case.feeds)
    for feed in case.feeds:
        exact, found = run(case.model, feed), run(result.graph, feed)
        for name in ("y", "z"):
            step = float(result.context.activations[name].scale)
            assert np.abs(found[name] - exact[name]).max() <= 1.6 * step, name


@pytest.mark.parametrize("shape", [(), (1,), (6,), (1, 6), (3, 1), (3, 6)])
def test_a_gemm_with_any_bias_stays_right(shape: tuple[int, ...]) -> None:
    text = "(float[3,8] x) => (float[3,6] y) { y = Gemm (x, w, b) }"
    source = model(text, w=normal(8, 6), b=np.asarray(normal(*shape, seed=1), np.float32))
    feeds = feeds_of(x=(3, 8))
    for preset in ("int8-static", "int8-dynamic"):
        result = pipeline(source, feeds, preset)
        assert "MatMulInteger" in ops(result.graph) or "QuantizeLinear" in ops(result.graph)
        for feed in feeds:
            assert sqnr(run(result.graph, feed)["y"], run(source, feed)["y"]) > 30


def test_a_shared_bias_is_kept_once_for_each_scale() -> None:
    text = """(float[n,3,5,5] x) => (float[n,3,5,5] y) {
        a = Conv (x, w, b)
        r = Relu (a)
        y = Conv (r, v, b)
    }"""
    source = model(
        text, w=normal(3, 3, 1, 1), v=normal(3, 3, 1, 1, seed=1, scale=9), b=np.float32([1, -2, 3])
    )
    feeds = feeds_of(x=(1, 3, 5, 5))
    result = pipeline(source, feeds)
    biases = [result.context.weights[f"{name}#bias"] for name in "ay"]
    assert not np.array_equal(biases[0].codes, biases[1].codes)
    for feed in feeds:
        assert sqnr(run(result.graph, feed)["y"], run(source, feed)["y"]) > 28


def test_two_layers_that_share_a_weight_and_both_widen_it_stay_fused(tmp_path: Path) -> None:
    """Each bias widens another channel; both kernels take the weight and their bias as codes."""
    w = normal(4, 4, 1, 1)
    w[1] *= 1e-8
    w[2] *= 1e-7
    text = """(float[n,4,5,5] x) => (float[n,4,5,5] y, float[n,4,5,5] z) {
        y = Conv (x, w, one)
        z = Conv (x, w, other)
    }"""
    one, other = np.float32([1, 900, 3, 4]), np.float32([1, 2, 5e4, 4])
    case = Case(model(text, w=w, one=one, other=other), feeds_of(x=(1, 4, 5, 5)))
    result = pipeline(case.model, case.feeds)
    weight, before = result.context.weights["w"], np.abs(w[:, :, 0, 0]).max(axis=1) / 127
    assert (weight.scale[1:3] > 10 * before[1:3]).all()
    for key, exact in (("y", one), ("z", other)):
        bias = result.context.weights[f"{key}#bias"]
        assert np.abs(bias.codes.astype(np.int64)).max() <= 1.001 * 2**30  # a scale is a float32
        np.testing.assert_allclose(bias.dequantize()[:, 0], exact, rtol=1e-3, atol=1e-2)
    assert ops(fused(g.to_proto(result.graph), tmp_path / "f.onnx")).count("QLinearConv") == 2
    for feed in case.feeds:
        exact_outputs = run(case.model, feed)
        for optimize in (False, True):
            found = run(result.graph, feed, optimize)
            for key, values in exact_outputs.items():
                step = float(result.context.activations[key].scale)
                assert np.abs(found[key] - values).max() <= 1.6 * step, key
