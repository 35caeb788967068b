import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import apply, model, ops, pipeline, run
from onnxq.passes import Assign
from onnxq.passes.solve.fake_quant import (
    Grid,
    dequantize_linear,
    quantize_linear,
    stored,
    twin,
    without_fake_quant,
)
from trained import LAYERS, layer, network

from onnxq import graph as g
from onnxq.errors import OnnxqError


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
def test_codes_are_those_of_the_runtimes_quantize_linear(axis: int | None, dtype: type) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-300, 300, (4, 5, 6)).astype(np.float32) / 2  # every tie there is
    shape = () if axis is None else (values.shape[axis],)
    scale = (2.0 ** rng.integers(-1, 1, shape)).astype(np.float32)
    zero = rng.integers(0, 100, shape).astype(dtype)
    at = "" if axis is None else f"<axis = {axis}>"
    text = f"(float[4,5,6] x) => (float[4,5,6] y, {np.dtype(dtype).name}[4,5,6] q) {{"
    text += f"q = QuantizeLinear {at} (x, s, z) y = DequantizeLinear {at} (q, s, z) }}"
    made = model(text, 21, s=scale, z=zero)
    expected = run(made, {"x": values}, False)
    grid = Grid(scale, zero, 1 if axis is None else axis, 0)
    codes = quantize_linear(values, grid)
    assert codes.dtype == dtype
    np.testing.assert_array_equal(codes, expected["q"])
    np.testing.assert_array_equal(dequantize_linear(codes, grid), expected["y"])


@pytest.mark.parametrize("name", LAYERS)
def test_a_twin_has_the_weight_that_the_layer_computes_with(name: str) -> None:
    case = layer(name)
    node = next(n for n in g.load(case.model).nodes if n.outputs[0].name == "y")
    view = g.weight_view(twin(node))
    assert view is not None
    exact = onnx.ModelProto()
    exact.CopyFrom(case.model)
    exact.graph.output.append(onnx.ValueInfoProto(name=node.inputs[1].name))
    expected = run(exact, case.feeds[0], False)[node.inputs[1].name]
    np.testing.assert_array_equal(view.tensor.values, expected)
    np.testing.assert_array_equal(stored(node.inputs[1]), expected)
    assert node.inputs[1].outputs == [node]  # the graph knows nothing of its twin
    assert stored(node.inputs[0]) is None


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic"])
def test_other_presets_send_a_trained_model_to_qat(preset: str) -> None:
    case = layer("MatMul")
    with pytest.raises(OnnxqError, match="use --preset qat") as error:
        pipeline(case.model, case.feeds, preset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["int8-static", "int8-static-qoperator"])
def test_what_is_quantized_is_not_quantized_twice(preset: str) -> None:
    case = ZOO["residual"]()
    done = pipeline(case.model, case.feeds, preset).to_proto()
    with pytest.raises(OnnxqError, match="this model is quantized already"):
        apply(Assign(), done)


def test_without_its_pairs_a_trained_model_is_the_float_model_it_came_from() -> None:
    case = network()
    for feed in case.feeds:
        bare = without_fake_quant(g.load(case.model))
        assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(bare))
        b = {i.name: onnx.numpy_helper.to_array(i) for i in case.model.graph.initializer}
        plain = model("""(float[n,3,6,6] x) => (float[n,5] y) {
            a = Conv (x, w1, b1)
            r = Relu (a)
            c = Conv (r, w2, b2)
            f = Flatten (c)
            y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, fc, b3)
        }""", **{k: b[k] for k in ("w1", "b1", "w2", "b2", "fc", "b3")})  # fmt: skip
        np.testing.assert_array_equal(run(bare, feed)["y"], run(plain, feed)["y"])
