from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import NOT_IN_REFERENCE, ZOO, attention, gemm, matmul
from graphs import feeds_of, fused, model, normal, ops, pipeline, run, sqnr
from onnx.reference import ReferenceEvaluator

from onnxq import graph as g
from onnxq.target import load_target

MODELS = [n for n in ZOO if n not in NOT_IN_REFERENCE and "int8-dynamic" not in ZOO[n]().refused]


@pytest.mark.parametrize("name", MODELS)
def test_the_emitted_graph_means_the_same_to_the_reference_and_to_the_runtime(name: str) -> None:
    case = ZOO[name]()
    proto = g.to_proto(pipeline(case.model, None, "int8-dynamic").graph)
    onnx.checker.check_model(proto, full_check=True)
    reference = ReferenceEvaluator(proto)
    for feed in case.feeds[:3]:
        for output, expected in zip(proto.graph.output, reference.run(None, feed), strict=True):
            for optimize in (False, True):
                assert sqnr(run(proto, feed, optimize)[output.name], expected) > 35


def test_the_product_is_that_of_the_definition() -> None:
    """y = Σ (x_q − z)(w_q) s_x s_w, with x divided by the magnitude of its rows before."""
    case = matmul()
    result = pipeline(case.model, None, "int8-dynamic")
    feed = {"x": normal(1, 5, 16, seed=3) * np.float32([[[1], [10], [100], [0.1], [0]]])}
    rows = np.maximum(np.abs(feed["x"]).max(axis=-1, keepdims=True), 1e-30)
    x = (feed["x"] / rows).astype(np.float32)
    scale = np.float32((max(x.max(), 0) - min(x.min(), 0)) / 255)
    zero = np.clip(np.rint(-min(x.min(), 0) / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    q = result.context.weights["w1"]
    a = codes @ q.codes.T.astype(np.int64) * scale * q.scale * rows
    proto = g.to_proto(result.graph)
    proto.graph.output.append(onnx.ValueInfoProto(name="a"))
    np.testing.assert_allclose(run(proto, feed, optimize=False)["a"], a, rtol=1e-5, atol=1e-6)


def test_a_row_of_large_values_does_not_make_the_others_coarse() -> None:
    """What a scale per row is for, against one for the whole tensor."""
    case = matmul()
    x = normal(1, 6, 16)
    x[0, 2] *= 300
    exact = run(case.model, {"x": x})["y"]
    small = [0, 1, 3, 4, 5]
    quality = {}
    for per_row in ("true", "false"):
        settings = [f"dynamic.per_row={per_row}"]
        result = pipeline(case.model, None, "int8-dynamic", settings=settings)
        y = run(result.graph, {"x": x})["y"]
        quality[per_row] = sqnr(y[0, small], exact[0, small])
    assert quality["true"] > 30
    assert quality["true"] > quality["false"] + 20


def test_rows_of_zeros_stay_zero() -> None:
    case = matmul()
    result = pipeline(case.model, None, "int8-dynamic")
    proto = g.to_proto(result.graph)
    proto.graph.output.append(onnx.ValueInfoProto(name="a"))
    for optimize in (False, True):
        found = run(proto, {"x": np.zeros((1, 4, 16), np.float32)}, optimize)
        assert not found["a"].any()


def test_readers_of_one_tensor_share_its_codes() -> None:
    case = attention()
    graph = pipeline(case.model, None, "int8-dynamic").graph
    assert ops(graph).count("DynamicQuantizeLinear") == 2  # of x, and of what goes into wo
    assert ops(graph).count("MatMulInteger") == 4


@pytest.mark.parametrize("make", [attention, gemm])
def test_the_runtime_fuses_the_products(make: object, tmp_path: Path) -> None:
    case = make()  # type: ignore[operator]
    proto = g.to_proto(pipeline(case.model, None, "int8-dynamic").graph)
    runs = ops(fused(proto, tmp_path / "optimized.onnx"))
    assert "MatMulInteger" not in runs
    assert set(runs) & {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}


def test_weights_are_stored_as_int8_and_no_sample_is_needed() -> None:
    case = gemm()
    result = pipeline(case.model, None, "int8-dynamic")
    stored = {i.name: i for i in g.to_proto(result.graph).graph.initializer}
    wide = [n for n, i in stored.items() if i.data_type == 1 and len(i.dims) > 1]
    assert not wide
    assert [i.data_type for n, i in stored.items() if n.endswith("_quantized")] == [3, 3]


@pytest.mark.parametrize("weight", ["s8", "s8:channel", "u8a"])
@pytest.mark.parametrize("group", [1, 2])
def test_convolutions_with_a_rule_run_as_conv_integer(
    weight: str, group: int, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"""
        summary = "a test"
        providers = ["CPUExecutionProvider"]
        [[rule]]
        ops = ["Conv"]
        form = "dynamic"
        activation = "u8a"
        weight = "{weight}"
        source = "a test"
    """)
    text = f"""(float[n,4,6,6] x) => (float[n,6,6,6] y) {{
        y = Conv <group = {group}, pads = [1,1,1,1]> (x, w, b)
    }}"""
    source = model(text, w=normal(6, 4 // group, 3, 3), b=normal(6, seed=1))
    result = pipeline(source, None, "int8-dynamic", target=load_target(str(path)))
    assert "ConvInteger" in ops(result.graph)
    for feed in feeds_of(3, x=(2, 4, 6, 6)):
        exact = run(source, feed)["y"]
        for optimize in (False, True):
            assert sqnr(run(result.graph, feed, optimize)["y"], exact) > 30
