"""Models as quantization-aware training leaves them, against ONNX Runtime without optimizations."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from awkward import ZOO, Case
from graphs import feeds_of, fused, model, normal, ops, pipeline, run, sqnr
from onnxq.passes import FoldFakeQuant, FuseInteger
from onnxq.passes.solve.fake_quant import stored
from onnxq.passes.solve.round_to_nearest import pair_sums
from trained import LAYERS, around, assert_close, fake, folded, initializers, layer, network

import onnxq
from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Pipeline
from onnxq.recipe import load_recipe
from onnxq.target import load_target

# ── weights ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("block", [0, 4])
def test_four_bits_and_blocks_are_folded_too(dtype: type, block: int) -> None:
    values = normal(8, 6)
    shape = (2, 6) if block else (6,)
    scale = np.full(shape, 0.21, np.float32) + np.arange(6, dtype=np.float32) / 50
    zero = np.full(shape, 7 if dtype is ml_dtypes.uint4 else 0).astype(dtype)
    at = f"axis = {0 if block else 1}" + (f", block_size = {block}" if block else "")
    text = f"""(float[3,8] x) => (float[3,6] y) {{
        q = QuantizeLinear <{at}> (w, s, z)
        d = DequantizeLinear <{at}> (q, s, z)
        y = MatMul (x, d)
    }}"""
    case = Case(model(text, 21, w=values, s=scale, z=zero), feeds_of(3, x=(3, 8)))
    result = folded(case)
    stored_as = {i.name: i.data_type for i in result.to_proto().graph.initializer}
    four = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    assert stored_as["w_quantized"] == four[dtype is ml_dtypes.uint4]
    for feed in case.feeds:
        expected = run(case.model, feed, False)["y"]
        np.testing.assert_allclose(run(result.graph, feed, False)["y"], expected, atol=1e-5)
        assert sqnr(run(result.graph, feed)["y"], expected) > 35  # the runtime rounds x


@pytest.mark.parametrize("opset", [10, 13, 19, 21, 23])
@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_becomes_its_codes_and_the_function_stays(name: str, opset: int) -> None:
    if "Gemm" in name and opset == 10:
        pytest.skip("Gemm wants a bias before opset 11")
    case = layer(name, per_channel=opset >= 13, opset=opset)
    result = folded(case, "cpu-vnni")
    assert ops(result.graph).count("QuantizeLinear") == 1  # that of x
    stored_values = initializers(result)
    assert stored_values[next(n for n in stored_values if "w_quantized" in n)].dtype == np.int8
    scale = next(i for i in case.model.graph.initializer if i.name == "w_s")
    np.testing.assert_array_equal(stored_values["w_s"], onnx.numpy_helper.to_array(scale))
    assert not [n for n, a in stored_values.items() if a.dtype == np.float32 and a.ndim > 1]
    assert_close(case, result)
    plan = result.context.plan["y"]
    assert str(plan.weight) == ("s8:channel" if opset >= 13 else "s8")
    assert str(plan.activation) == "u8"
    assert FoldFakeQuant().apply(result.graph, result.context) == 0


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16])
def test_every_format_and_the_clip_of_some_exporters(
    dtype: type, per_channel: bool, clip: bool
) -> None:
    if clip and dtype is np.int16:
        pytest.skip("ONNX's Clip takes no int16")
    case = layer("Conv", per_channel, dtype, clip, opset=21)
    result = folded(case)
    assert_close(case, result)
    codes = next(a for n, a in initializers(result).items() if n.startswith("w_quantized"))
    middle = 128 if codes.dtype == np.uint8 else 0
    assert bool(np.abs(codes.astype(int) - middle).max() <= 60) is clip


def test_an_embedding_is_looked_up_as_codes() -> None:
    for axis in (0, None):
        w, more = fake("w", normal(20, 8), axis)
        text = f"(int64[n,l] ids) => (float[n,l,8] y) {{ {w} y = Gather (w_d, ids) }}"
        rng = np.random.default_rng(0)
        case = Case(model(text, **more), [{"ids": rng.integers(0, 20, (2, 5))} for _ in range(3)])
        result = folded(case)
        assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(result.graph))
        assert_close(case, result, 1e-6)


def test_one_weight_of_two_layers_is_stored_once_and_constant_nodes_are_read() -> None:
    text = """(float[n,4] x) => (float[n,4] y) {
        w = Constant <value = float[4,4] {1,2,3,4,-1,-2,-3,-4,0.5,0.25,1,0,2,2,2,2}> ()
        s = Constant <value = float {0.05}> ()
        i = Identity (w)
        q = QuantizeLinear (i, s)
        d = DequantizeLinear (q, s)
        a = MatMul (x, d)
        y = MatMul (a, d)
    }"""
    case = Case(model(text), feeds_of(3, x=(2, 4)))
    result = folded(case)
    assert ops(result.graph) == ["DequantizeLinear", "MatMul", "MatMul"]
    assert [a.dtype for a in initializers(result).values() if a.ndim == 2] == [np.uint8]
    assert_close(case, result)


def test_bodies_of_control_flow_are_folded() -> None:
    yes, yes_more = fake("v", normal(4, 3), 1)
    no, no_more = fake("u", normal(4, 3, seed=1))
    w, w_more = fake("w", normal(4, 4), 1)
    text = f"""(float[n,4] x, bool choice) => (float[n,3] y) {{
        {w} h = MatMul (x, w_d)
        y = If (choice) <
            then_branch = yes () => (float[n,3] a) {{ {yes} a = MatMul (h, v_d) }},
            else_branch = no () => (float[n,3] b) {{ {no} b = MatMul (h, u_d) }}
        >
    }}"""
    feeds = [f | {"choice": np.array(k > 1)} for k, f in enumerate(feeds_of(4, x=(2, 4)))]
    case = Case(model(text, **yes_more, **no_more, **w_more), feeds)
    result = folded(case)
    assert "QuantizeLinear" not in ops(result.graph)
    assert len([p for p in result.context.plan.values() if p.quantized]) == 3
    for feed in case.feeds:
        expected = run(case.model, feed, False)["y"]
        np.testing.assert_allclose(run(result.graph, feed, False)["y"], expected, rtol=1e-5)
        assert sqnr(run(result.graph, feed)["y"], expected) > 40  # the runtime rounds x


# ── saturation ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "target", "shifted"),
    [("Conv", "cpu", True), ("Gemm", "cpu", True), ("MatMul", "cpu", True),
     ("MatMul of a Transpose", "cpu", True), ("Conv", "cpu-vnni", False),
     ("Conv depthwise", "cpu", False), ("ConvTranspose", "cpu", False)],
)  # fmt: skip
def test_pairs_that_saturate_are_stored_around_128(
    name: str, target: str, shifted: bool, tmp_path: Path
) -> None:
    case = layer(name)
    result = folded(case, target)
    assert any("stored as uint8 around 128" in w for w in result.report.warnings) is shifted, (
        result.report.warnings
    )
    assert_close(case, result)
    node = next(n for n in result.graph.nodes if n.name == "y")
    codes = node.inputs[1].inputs[0].inputs[0].values
    assert codes.dtype == (np.uint8 if shifted else np.int8)
    original = g.load(case.model)
    before = next(n for n in original.nodes if n.name == "y" or n.outputs[0].name == "y")
    np.testing.assert_array_equal(stored(node.inputs[1]), stored(before.inputs[1]))
    if name != "ConvTranspose":
        runs = set(ops(fused(result.to_proto(), tmp_path / "o.onnx")))
        assert runs & {"MatMulIntegerToFloat", "QGemm", "QLinearConv", "Conv"}


def test_int8_activations_are_no_safer_and_stay_fused(tmp_path: Path) -> None:
    """On x86 the runtime makes them uint8 when it loads the model (measured here)."""
    w, w_more = fake("w", normal(5, 4, 3, 3), 0)
    x, x_more = around("x", zero=np.int8(-3))
    text = f"""(float[2,4,6,6] x) => (float[2,5,4,4] y) {{
        {x} {w} c = Conv (x_d, w_d)
        q = QuantizeLinear (c, x_s, x_z) y = DequantizeLinear (q, x_s, x_z)
    }}"""
    case = Case(model(text, **w_more, **x_more), feeds_of(3, x=(2, 4, 6, 6)))
    result = folded(case)
    assert initializers(result)["w_quantized_around_128"].dtype == np.uint8
    assert "Conv" not in ops(fused(result.to_proto(), tmp_path / "o.onnx"))
    assert_close(case, result, 0.041 / 5)  # a code of y to either side


def test_weights_without_such_pairs_keep_their_type() -> None:
    values = np.tile(np.float32([[1.0, 0.004], [-0.004, 1.0]]), (4, 3))
    w, more = fake("w", values)
    x, x_more = around("x")
    text = f"(float[n,8] x) => (float[n,6] y) {{ {x} {w} y = MatMul (x_d, w_d) }}"
    case = Case(model(text, **more, **x_more), feeds_of(3, x=(2, 8)))
    result = folded(case)
    codes = initializers(result)["w_quantized"]
    assert codes.dtype == np.int8
    assert pair_sums(codes.T).max() <= 128
    assert not result.report.warnings


# ── what else a user sees ────────────────────────────────────────────────────────────────────────


def test_the_report_lists_trained_layers_and_those_that_were_not(tmp_path: Path) -> None:
    case = network()
    path = tmp_path / "trained.onnx"
    onnx.save(case.model, path)
    result = onnxq.quantize(path, "qat", samples=case.feeds, output=tmp_path / "q.onnx")
    forms = {layer.name: layer.form for layer in result.report.layers}
    assert forms == {
        "a": "w u8:channel, a u8",
        "c": "w u8:channel, a u8a",
        "y": "w u8:channel, a u8",
    }
    assert result.report.share("parameters") > 0.9
    assert result.report.share("macs") == 1
    assert [o.cosine > 0.999 for o in result.report.outputs] == [True]
    assert (tmp_path / "q.onnx").stat().st_size < path.stat().st_size


def test_a_float_layer_of_a_trained_model_is_reported() -> None:
    x, x_more = around("x")
    w, w_more = fake("w", normal(8, 8))
    text = f"(float[n,8] x) => (float[n,4] y) {{ {x} {w} h = MatMul (x_d, w_d) y = MatMul (h, v) }}"
    result = folded(Case(model(text, v=normal(8, 4), **x_more, **w_more), []))
    assert [(r.name, r.form) for r in result.report.layers] == [("y", "float")]
    assert "not trained" in result.report.layers[0].reason


def test_inspect_plans_a_trained_model_as_it_was_trained(tmp_path: Path) -> None:
    case = network()
    onnx.save(case.model, tmp_path / "trained.onnx")
    report = onnxq.inspect(tmp_path / "trained.onnx")
    assert {layer.name for layer in report.layers if layer.form != "float"} == {"a", "c", "y"}
    assert report.share("macs") == 1
    done = pipeline(ZOO["residual"]().model, ZOO["residual"]().feeds)
    onnx.save(done.to_proto(), tmp_path / "done.onnx")
    report = onnxq.inspect(tmp_path / "done.onnx")
    assert {layer.reason for layer in report.layers} == {"the model was refused as a whole"}
    assert any("quantized already" in warning for warning in report.warnings)


def test_a_trained_model_in_qoperator_form_has_integer_operators_alone() -> None:
    case = network()
    steps = [*load_recipe("qat").passes, FuseInteger()]
    result = Pipeline(steps).run(g.load(case.model), None, load_target("cpu"))
    found = [op for op in ops(result.graph) if op != "Pad"]
    assert found == ["QuantizeLinear", "QLinearConv", "QLinearConv", "Flatten", "QGemm"]
    for feed in case.feeds:
        expected = run(case.model, feed, False)["y"]
        for optimize in (False, True):
            assert sqnr(run(result.graph, feed, optimize)["y"], expected) > 40


@pytest.mark.parametrize("name", ["residual", "matmul"])
def test_a_float_model_is_refused_by_qat_in_one_line(name: str) -> None:
    with pytest.raises(OnnxqError, match="no weight of this model is fake-quantized") as error:
        pipeline(ZOO[name]().model, None, "qat")
    assert "\n" not in str(error.value)


def test_a_quantized_model_is_refused_by_qat() -> None:
    case = ZOO["residual"]()
    done = pipeline(case.model, case.feeds).to_proto()
    with pytest.raises(OnnxqError, match="quantized already: its weights are integers"):
        pipeline(done, None, "qat")
