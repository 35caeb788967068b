from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import Case
from graphs import feeds_of, fused, model, normal, ops, run, sqnr
from trained import around, assert_close, fake, folded, initializers, layer, network


@pytest.mark.parametrize("target", ["cpu", "cpu-vnni"])
def test_a_network_is_all_integers_and_says_the_same(target: str, tmp_path: Path) -> None:
    case = network()
    result = folded(case, target)
    runs = ops(fused(result.to_proto(), tmp_path / "o.onnx"))
    assert runs.count("QLinearConv") == 2
    assert not {"Conv", "Relu"} & set(runs)
    stored_values = initializers(result)
    assert [stored_values[f"b{k}_quantized"].dtype for k in (1, 2)] == [np.int32] * 2
    scales = stored_values["x_s"] * stored_values["w1_s"]
    np.testing.assert_allclose(stored_values["b1_scale"], scales, rtol=1e-6)
    assert np.abs(
        stored_values["b1_quantized"] * stored_values["b1_scale"] - normal(6, seed=3)
    ).max() <= 0.51 * scales.max()  # fmt: skip
    for feed in case.feeds:
        expected = run(case.model, feed, False)["y"]
        assert sqnr(run(result.graph, feed, False)["y"], expected) > 40
        assert sqnr(run(result.graph, feed)["y"], expected) > 40


def test_a_bias_trained_with_eight_bits_becomes_int32_too() -> None:
    b, more = fake("b", normal(5, seed=7))
    case = layer("Conv")
    w = {i.name: onnx.numpy_helper.to_array(i) for i in case.model.graph.initializer}
    x, _ = around("x")
    text, _ = fake("w", w["w"], 0)
    whole = (
        f"(float[a,4,c,d] x) => (float[n,5,p,q] y) {{ {x} {text} {b} y = Conv (x_d, w_d, b_d) }}"
    )
    case = Case(model(whole, **w, **more), feeds_of(3, x=(2, 4, 6, 6)))
    result = folded(case, "cpu-vnni")
    codes = [a for a in initializers(result).values() if a.dtype == np.int32 and a.any()]
    assert len(codes) == 1
    assert_close(case, result, 1e-3)


@pytest.mark.parametrize("tiny", [1e-7, 1e-9, 1e-12])
def test_a_bias_beyond_32_bits_widens_its_channel_alone(tiny: float) -> None:
    """The runtime makes a float bias int32 by itself; there it would overflow."""
    case = network(bias=10, tiny=tiny)
    result = folded(case, "cpu-vnni")
    trained = next(i for i in case.model.graph.initializer if i.name == "w1_s")
    factors = initializers(result)["w1_d_widened_scale"] / onnx.numpy_helper.to_array(trained)
    assert (factors > 1).tolist() == [False, False, True, False, False, False]
    assert [w for w in result.report.warnings if w.startswith("'a': channels of nearly no weight")]
    for feed in case.feeds:
        expected = run(case.model, feed, False)["y"]
        assert sqnr(run(result.graph, feed, False)["y"], expected) > 40
        assert sqnr(run(result.graph, feed)["y"], expected) > 40


@pytest.mark.parametrize("shared", [False, True])
def test_one_scale_for_all_channels_is_widened_for_the_layer_that_needs_it(shared: bool) -> None:
    w, w_more = fake("w", normal(4, 4, 1, 1, scale=1e-9))
    x, x_more = around("x")
    second = "z = Conv (x_d, w_d)" if shared else "z = Identity (x_d)"
    text = f"""(float[n,4,5,5] x) => (float[n,4,5,5] y, float[n,4,5,5] z) {{
        {x} {w} c = Conv (x_d, w_d, b)
        c_q = QuantizeLinear (c, s, x_z) y = DequantizeLinear (c_q, s, x_z)
        {second}
    }}"""
    more = w_more | x_more | {"b": np.float32([1, -2, 3, 0]), "s": np.float32(0.03)}
    case = Case(model(text, **more), feeds_of(3, x=(2, 4, 5, 5)))
    result = folded(case, "cpu-vnni")
    assert any("wider scales than trained" in w for w in result.report.warnings)
    assert_close(case, result, 1e-6)


def test_a_bias_along_other_axes_stays_float_with_a_warning() -> None:
    w, w_more = fake("w", normal(8, 6), 1)
    x, x_more = around("x")
    text = f"(float[3,8] x) => (float[3,6] y) {{ {x} {w} y = Gemm (x_d, w_d, b) }}"
    source = model(text, b=normal(3, 6), **w_more, **x_more)
    case = Case(source, feeds_of(3, x=(3, 8)))
    result = folded(case, "cpu-vnni")
    assert [w for w in result.report.warnings if "'y': the bias cannot be put into int32" in w]
    assert_close(case, result)
