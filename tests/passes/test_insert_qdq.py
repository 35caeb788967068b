from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import (
    NOT_IN_REFERENCE,
    ZOO,
    Case,
    attention,
    conv_bn_relu6,
    depthwise,
    moves,
    residual,
)
from graphs import Array, feeds_of, fused, model, normal, ops, pipeline, run, sqnr
from onnx.reference import ReferenceEvaluator
from onnxq.passes.lower.insert_qdq import saturation_does

from onnxq import graph as g
from onnxq.devices import Job, Place, ask
from onnxq.qtype import QParams, QType
from onnxq.target import Target, load_target

U8 = QType.parse("u8a")


def initializers(source: onnx.ModelProto) -> dict[str, Array]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in source.graph.initializer}


@pytest.mark.parametrize("name", sorted(set(ZOO) - NOT_IN_REFERENCE))
def test_the_emitted_graph_means_the_same_to_the_reference_and_to_the_runtime(name: str) -> None:
    """Codes may fall to either side of a tie: a step of the output, no more."""
    case = ZOO[name]()
    result = pipeline(case.model, case.feeds, target=replace(load_target("cpu"), opset=21))
    proto = g.to_proto(result.graph)
    onnx.checker.check_model(proto, full_check=True)
    reference = ReferenceEvaluator(proto)
    for feed in case.feeds[:3]:
        for output, expected in zip(proto.graph.output, reference.run(None, feed), strict=True):
            for optimize in (False, True):
                actual = run(proto, feed, optimize)[output.name]
                assert actual.shape == expected.shape
                assert sqnr(actual, expected) > 35, (output.name, optimize)


# ── what is stored ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["conv_bn_relu6", "depthwise", "gemm", "matmul", "attention"])
def test_weights_are_stored_as_the_codes_of_the_solver_and_nowhere_as_floats(name: str) -> None:
    case = ZOO[name]()
    result = pipeline(case.model, case.feeds)
    stored = initializers(g.to_proto(result.graph))
    solved = {k: q for k, q in result.context.weights.items() if not k.endswith("#bias")}
    views = [v for v in map(g.weight_view, result.prepared.nodes) if v is not None]
    assert len(views) == len(solved)
    for view in views:
        codes = stored[f"{view.tensor.name}_quantized"]
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, view.from_matrix(solved[view.tensor.name].codes))
        np.testing.assert_array_equal(
            stored[f"{view.tensor.name}_scale"], solved[view.tensor.name].scale
        )
    assert not [n for n, a in stored.items() if a.dtype == np.float32 and a.ndim > 1]


def test_an_embedding_is_looked_up_as_codes_and_never_dequantized_whole() -> None:
    case = ZOO["tied"]()
    result = pipeline(case.model, case.feeds)
    proto = g.to_proto(result.graph)
    table = next(n for n in proto.graph.node if n.op_type == "Gather")
    assert initializers(proto)[table.input[0]].dtype == np.int8
    readers = [n.op_type for n in proto.graph.node if table.output[0] in n.input]
    assert readers == ["Cast"]


def test_one_tensor_has_one_pair_however_many_read_it() -> None:
    case = attention()
    proto = g.to_proto(pipeline(case.model, case.feeds).graph)
    quantized = [n.input[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert len(set(quantized)) == len(quantized)
    assert quantized.count("x") == 1


def test_the_names_of_inputs_outputs_and_float_tensors_stay() -> None:
    case = residual()
    proto = g.to_proto(pipeline(case.model, case.feeds).graph)
    assert [t.name for t in proto.graph.input] == ["x"]
    assert [t.name for t in proto.graph.output] == ["y"]


# ── what the runtime makes of it ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("make", "integer", "gone"),
    [
        (conv_bn_relu6, {"QLinearConv": 2}, {"Conv", "Clip", "BatchNormalization"}),
        (
            depthwise,
            {"QLinearConv": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
            {"Conv", "Gemm"},
        ),
        (residual, {"QLinearConv": 3, "QLinearAdd": 1}, {"Conv", "Add", "Relu"}),
        (moves, {"QLinearConv": 1, "QLinearConcat": 1, "QGemm": 1}, {"Conv", "Gemm", "Relu"}),
        (attention, {"QLinearMatMul": 4, "MatMulIntegerToFloat": 2}, {"MatMul"}),
    ],
)
def test_the_runtime_fuses_every_layer(
    make: object, integer: dict[str, int], gone: set[str], tmp_path: Path
) -> None:
    case = make()  # type: ignore[operator]
    result = pipeline(case.model, case.feeds)
    runs = ops(fused(g.to_proto(result.graph), tmp_path / "optimized.onnx"))
    assert {op: runs.count(op) for op in integer} == integer, runs
    assert not gone & set(runs), runs


def test_codes_are_moved_without_a_float_between(tmp_path: Path) -> None:
    case = moves()
    optimized = fused(g.to_proto(pipeline(case.model, case.feeds).graph), tmp_path / "o.onnx")
    assert ops(optimized).count("QuantizeLinear") == 1
    assert ops(optimized).count("DequantizeLinear") <= 1


# ── Relu and Clip ────────────────────────────────────────────────────────────────────────────────


def node(body: str) -> g.Node:
    bounds = {"zero": np.float32(0), "six": np.float32(6), "one": np.float32(1)}
    used = {k: v for k, v in bounds.items() if k in body}
    return g.load(model(f"(float[n] x) => (float[n] y) {{ y = {body} }}", **used)).nodes[0]


@pytest.mark.parametrize(
    ("body", "low", "high", "expected"),
    [
        ("Relu (x)", 0, 6, True),
        ("Relu (x)", -1, 6, False),
        ("Clip (x, zero, six)", 0, 6, True),
        ("Clip (x, zero, six)", 0, 5, True),  # the codes end before the Clip does
        ("Clip (x, zero, six)", 0, 7, False),
        ("Clip (x, zero, six)", -1, 6, False),
        ("Clip (x, zero)", 0, 9, True),
        ("Clip (x, , six)", -3, 6, True),
        ("Clip (x, , six)", -3, 7, False),
        ("Clip (x, one, six)", 0, 6, False),
        ("Abs (x)", 0, 6, False),
    ],
)
def test_saturation_does_the_work_of_a_relu_just_where_the_codes_end_in_its_bounds(
    body: str, low: float, high: float, expected: bool
) -> None:
    assert saturation_does(node(body), QParams.from_range(low, high, U8)) is expected


@pytest.mark.parametrize(
    ("low", "high", "stays"), [(0.0, 6.0, False), (0.5, 6.0, True), (-1.0, 1.0, False)]
)
def test_a_clip_goes_only_where_nothing_changes(low: float, high: float, stays: bool) -> None:
    text = """(float[n,3,4,4] x) => (float[n,2,4,4] y) {
        c = Conv (x, w)
        r = Clip (c, low, high)
        y = Conv (r, v)
    }"""
    source = model(
        text,
        w=normal(4, 3, 1, 1, scale=4),
        v=normal(2, 4, 1, 1, seed=1),
        low=np.float32(low),
        high=np.float32(high),
    )
    feeds = feeds_of(x=(1, 3, 4, 4))
    result = pipeline(source, feeds)
    assert ("Clip" in ops(result.graph)) is stays
    for feed in feeds:
        exact = run(source, feed)["y"]
        for optimize in (False, True):
            assert sqnr(run(result.graph, feed, optimize)["y"], exact) > 25


# ── outputs and several readers ──────────────────────────────────────────────────────────────────


def test_what_keeps_a_float_layer_from_fusing_fits_into_64_bit_codes() -> None:
    """A provider that clips codes instead must not overflow, as OpenVINO does."""
    text = """(float[n,3,6,6] x) => (float[n,2] y) {
        a = Conv (x, w)
        b = Flatten (a)
        y = Gemm (b, v)
    }"""
    case = Case(model(text, w=normal(1, 3, 1, 1), v=normal(36, 2)), feeds_of(x=(1, 3, 6, 6)))
    graph = pipeline(case.model, case.feeds, exclude=("y",)).graph
    (clip,) = (node for node in graph.nodes if node.op == "Clip")
    maker = g.producer(clip.inputs[0])
    while maker is not None and maker.op != "DequantizeLinear":
        maker = g.producer(maker.inputs[0])
    assert maker is not None
    low, high = (
        float(g.values(bound)) / float(g.values(maker.inputs[1])) for bound in clip.inputs[1:]
    )
    assert -(2**62) < low < -(2**17)
    assert 2**17 < high < 2**62


def test_a_body_reads_no_pair_that_the_runtime_would_move() -> None:
    """onnxruntime 1.31 takes the process down where it can, once it has inlined the first If."""
    text = """(float[1,3,6,6] x, bool c) => (float[a,b] y) {
        a = Conv (x, w)
        n = Shape (x)
        first = Gather (n, zero)
        is_one = Equal (first, one)
        r = If (is_one) <then_branch = t () => (float[a,b] u) { u = Transpose (a) },
                         else_branch = e () => (float[a,b] v) { v = Identity (a) }>
        y = If (c) <then_branch = t () => (float[a,b] u) { u = Exp (r) },
                    else_branch = e () => (float[a,b] v) { v = Neg (r) }>
    }"""
    feeds = [feed | {"c": np.array(True)} for feed in feeds_of(x=(1, 3, 6, 6))]
    proto = pipeline(
        model(text, w=normal(4, 3, 1, 1), zero=np.array(0), one=np.array(1)), feeds
    ).to_proto()
    (answer,) = ask(Place.parse("cpu"), [Job(proto, feeds[:1])])
    assert answer.error == ""


def test_an_output_that_layers_read_too_keeps_its_name_and_passes_one_pair() -> None:
    text = """(float[n,3,6,6] x) => (float[n,4,6,6] middle, float[n,2,6,6] y) {
        middle = Conv (x, w)
        y = Conv (middle, v)
    }"""
    case = Case(model(text, w=normal(4, 3, 1, 1), v=normal(2, 4, 1, 1, seed=1)),
                feeds_of(x=(1, 3, 6, 6)))  # fmt: skip
    result = pipeline(case.model, case.feeds)
    assert ops(result.graph).count("QuantizeLinear") == 3
    for feed in case.feeds:
        exact = run(case.model, feed)
        for optimize in (False, True):
            found = run(result.graph, feed, optimize)
            assert list(found) == ["middle", "y"]
            assert min(sqnr(found[k], exact[k]) for k in exact) > 30


# ── custom targets ───────────────────────────────────────────────────────────────────────────────


def custom(tmp_path: Path, ops: str, weight: str, extra: str = "") -> Target:
    path = tmp_path / "mine.toml"
    path.write_text(
        f"""
        summary = "made for a test"
        providers = ["CPUExecutionProvider"]
        opset = 21
        [[rule]]
        ops = [{ops}]
        form = "static"
        constant_weight = true
        activation = "u8a"
        weight = "{weight}"
        output = "float"
        source = "a test"
        {extra}
        """
    )
    return load_target(str(path))


BLOCKED = {
    "MatMul": "(float[n,40] x) => (float[n,6] y) { y = MatMul (x, w) }",
    "Gemm": "(float[n,40] x) => (float[n,6] y) { y = Gemm (x, w, b) }",
    "Gemm transB": "(float[n,40] x) => (float[n,6] y) { y = Gemm <transB = 1> (x, w, b) }",
}


@pytest.mark.parametrize("weight", ["s8:32", "s4:32", "u4a:32", "s4:8", "s8:channel", "s8", "u8a"])
@pytest.mark.parametrize("layer", BLOCKED)
def test_weights_in_blocks_are_those_of_the_solver(layer: str, weight: str, tmp_path: Path) -> None:
    """40 columns: the last block of 32 is short."""
    w = normal(40, 6) * np.logspace(-1, 1, 40, dtype="f4")[:, None]
    w = np.ascontiguousarray(w.T) if layer == "Gemm transB" else w
    source = model(BLOCKED[layer], w=w, **({"b": normal(6)} if "Gemm" in layer else {}))
    feeds = feeds_of(x=(3, 40))
    target = custom(tmp_path, '"MatMul", "Gemm"', weight)
    result = pipeline(source, feeds, target=target, settings=[f"assign.format=w{weight[1]}a8"])
    proto = g.to_proto(result.graph)
    onnx.checker.check_model(proto, full_check=True)
    assert str(result.context.weights["w"].qtype) == weight
    matrix = result.context.weights["w"].dequantize()
    params = result.context.activations["x"]
    for feed in feeds:
        codes = np.clip(np.rint(feed["x"] / params.scale) + int(params.zero), 0, 255)
        x = (codes - int(params.zero)) * params.scale
        expected = x @ matrix.T + (normal(6) if "Gemm" in layer else 0)
        y = run(proto, feed, optimize=False)["y"]
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3 * np.abs(expected).max())
        if (layer, weight) != ("MatMul", "s8:32"):  # which the runtime fuses and then refuses
            assert sqnr(run(proto, feed)["y"], expected) > 35  # some kernels round x again


def test_four_bits_are_packed_into_half_a_byte(tmp_path: Path) -> None:
    source = model(BLOCKED["MatMul"], w=normal(40, 6))
    target, settings = custom(tmp_path, '"MatMul"', "s4:8"), ["assign.format=w4a8"]
    result = pipeline(source, feeds_of(x=(3, 40)), target=target, settings=settings)
    stored = {i.name: i for i in g.to_proto(result.graph).graph.initializer}["w_quantized"]
    assert stored.data_type == onnx.TensorProto.INT4
    assert len(stored.raw_data) == 40 * 6 // 2


TRANSPOSED = {
    "plain": ("<strides = [2,2]>", (4, 6, 3, 3)),
    "with a bias": ("<strides = [2,2]>", (4, 6, 3, 3)),
    "1-D": ("", (4, 6, 3)),
}


@pytest.mark.parametrize("weight", ["s8", "s8:channel"])
@pytest.mark.parametrize("layer", TRANSPOSED)
def test_conv_transpose_with_a_rule_is_quantized(layer: str, weight: str, tmp_path: Path) -> None:
    attributes, shape = TRANSPOSED[layer]
    rank = len(shape)
    names = [",".join(row[: rank - 1]) for row in ("cdef", "ghij")]
    bias = ", b" if "bias" in layer else ""
    text = f"""(float[n,{names[0]}] x) => (float[m,{names[1]}] y) {{
        y = ConvTranspose {attributes} (x, w{bias})
    }}"""
    w = normal(*shape) * np.logspace(-1, 1, 6, dtype="f4").reshape(1, 6, *(1,) * (rank - 2))
    source = model(text, w=w, **({"b": normal(6)} if bias else {}))
    feeds = feeds_of(x=(1, 4, *(5,) * (rank - 2)))
    result = pipeline(source, feeds, target=custom(tmp_path, '"ConvTranspose"', weight))
    stored = initializers(g.to_proto(result.graph))["w_quantized"]
    assert (stored.dtype, stored.shape) == (np.int8, shape)
    for feed in feeds:
        exact = run(source, feed)["y"]
        for optimize in (False, True):
            assert sqnr(run(result.graph, feed, optimize)["y"], exact) > 30


def test_conv_transpose_in_groups_has_the_scales_of_its_axis(tmp_path: Path) -> None:
    text = "(float[n,4,5,5] x) => (float[m,6,7,7] y) { y = ConvTranspose <group = 2> (x, w) }"
    source = model(text, w=normal(4, 3, 3, 3))
    feeds = feeds_of(x=(1, 4, 5, 5))
    result = pipeline(source, feeds, target=custom(tmp_path, '"ConvTranspose"', "s8:channel"))
    for feed in feeds:
        assert sqnr(run(result.graph, feed)["y"], run(source, feed)["y"]) > 30


def test_16_bit_activations_and_weights_are_closer_to_float(tmp_path: Path) -> None:
    source = model(BLOCKED["Gemm"], w=normal(40, 6), b=normal(6))
    feeds = feeds_of(x=(3, 40))
    path = tmp_path / "wide.toml"
    path.write_text("""
        summary = "16 bits"
        providers = ["CPUExecutionProvider"]
        opset = 21
        [[rule]]
        ops = ["Gemm"]
        form = "static"
        activation = "u16a"
        weight = "s16:channel"
        output = "float"
        source = "a test"
    """)
    result = pipeline(
        source, feeds, target=load_target(str(path)), settings=["assign.format=w16a16"]
    )
    for feed in feeds:
        assert sqnr(run(result.graph, feed, False)["y"], run(source, feed)["y"]) > 70
