"""Widths by recipe and by layer, and the schemes of other hardware, through the real runtime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import ZOO, Case
from graphs import apply, feeds_of, fused, model, normal, ops, pipeline, run, sqnr
from onnxq.passes import Assign
from onnxq.passes.solve.quantize_bias import widen

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Result
from onnxq.qtype import QType, quantize_weight, weight_scale
from onnxq.recipe import load_recipe, parse_recipe

CONVS = """(float[n,8,6,6] x) => (float[n,8,6,6] y) {
    a = Conv <pads = [1,1,1,1]> (x, w, bias)
    b = Conv <pads = [1,1,1,1]> (a, v)
    y = Conv <pads = [1,1,1,1]> (b, u)
}"""


def convs() -> Case:
    weights = {name: normal(8, 8, 3, 3, seed=k) for k, name in enumerate("wvu")}
    return Case(model(CONVS, bias=normal(8, seed=9), **weights), feeds_of(x=(1, 8, 6, 6)))


def layers(*items: str) -> list[str]:
    return [f"assign.layers={list(items)}"]


def least_sqnr(case: Case, result: Result, optimize: bool = True) -> float:
    """dB against the float model, over all samples and outputs."""
    return min(
        sqnr(run(result.graph, feed, optimize)[key], values)
        for feed in case.feeds
        for key, values in run(case.model, feed).items()
    )


def least_agreement(case: Case, result: Result) -> float:
    """dB between graph optimizations off and on."""
    return min(
        sqnr(run(result.graph, feed)[key], values)
        for feed in case.feeds
        for key, values in run(result.graph, feed, optimize=False).items()
    )


# ── each format ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["residual", "gemm", "depthwise", "moves"])
@pytest.mark.parametrize(
    ("format", "least"),
    [
        ("w8a8", 25), ("w4a8", 10), ("w8a16", 35), ("w4a16", 10), ("w8a4", 8), ("w8", 30),
        ("w4", 8), ("a8", 25), ("a16", 55),
    ],
)  # fmt: skip
def test_a_format_says_the_same_with_and_without_optimizations(
    name: str, format: str, least: float
) -> None:
    case = ZOO[name]()
    result = pipeline(case.model, case.feeds, settings=[f"assign.format={format}"])
    onnx.checker.check_model(result.to_proto(), full_check=True)
    plan = [p for _, p in result.context.plan.quantized(g.walk(result.prepared))]
    weights = {f"w{p.weight.bits}" for p in plan if p.weight}
    activations = {f"a{p.activation.bits}" for p in plan if p.activation}
    assert "".join(sorted(weights | activations, reverse=True)) == format
    assert least_sqnr(case, result) > least
    assert least_agreement(case, result) > (25 if format in ("w8", "w4") else 80)


def test_float_leaves_everything_and_is_an_error() -> None:
    case = convs()
    with pytest.raises(OnnxqError, match="left float by the recipe"):
        pipeline(case.model, case.feeds, settings=["assign.format=float"])
    with pytest.raises(OnnxqError, match="no format"):
        pipeline(case.model, case.feeds, settings=["assign.format=int8"])


def test_4_bit_weights_are_packed_and_run_in_the_kernels_of_8(tmp_path: Path) -> None:
    for name, kernels in {
        "residual": {"QLinearConv"}, "gemm": {"QGemm"}, "attention": {"MatMulIntegerToFloat"},
        "depthwise": {"QLinearConv", "QGemm"}, "if_with_convolutions": set(),
    }.items():  # fmt: skip
        case = ZOO[name]()
        four, eight = (pipeline(case.model, case.feeds, p) for p in ("w4a8", "int8-static"))
        stored = [i for b in _graphs(four.to_proto().graph) for i in b.initializer]
        packed = [i for i in stored if i.data_type == onnx.TensorProto.INT4]
        assert len(packed) == len({w for w in four.context.weights if "#bias" not in w})
        assert not [i for i in stored if i.data_type == onnx.TensorProto.INT8 and len(i.dims) > 1]
        said = [ops(fused(r.to_proto(), tmp_path / "f.onnx")) for r in (four, eight)]
        assert sorted(said[0]) == sorted(said[1])
        assert kernels <= set(said[0])
        assert least_agreement(case, four) > 80


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [graph, *(found for body in inner for found in _graphs(body))]


def test_4_bit_weights_serve_the_dynamic_form_and_embeddings(tmp_path: Path) -> None:
    text = "(int64[n] ids) => (float[n,8] y) { e = Gather (table, ids) y = MatMul (e, w) }"
    feeds = [{"ids": np.random.default_rng(k).integers(0, 9, 5)} for k in range(4)]
    case = Case(model(text, table=normal(9, 32), w=normal(32, 8, seed=1)), feeds)
    result = pipeline(case.model, case.feeds, "int8-dynamic", settings=["assign.format=w4a8"])
    assert {str(q.qtype) for q in result.context.weights.values()} == {"s4:channel"}
    assert "DynamicQuantizeMatMul" in ops(fused(result.to_proto(), tmp_path / "f.onnx"))
    assert least_agreement(case, result) > 80
    table = result.context.weights["table"].dequantize()
    matrix = result.context.weights["w"].dequantize()
    for feed in feeds:
        y = run(result.graph, feed)["y"]
        assert sqnr(y, table[feed["ids"]] @ matrix.T) > 35  # activations are rounded to 8 bits


def test_recurrences_keep_8_bits_where_4_are_asked_for() -> None:
    case = ZOO["gru"]()
    result = pipeline(case.model, case.feeds, "w4a8")
    assert {q.qtype.bits for q in result.context.weights.values()} == {8}


def test_4_bit_activations_take_16_values_in_8_bit_kernels(tmp_path: Path) -> None:
    case = convs()
    result = pipeline(case.model, case.feeds, settings=["assign.format=w8a4"])
    louder = [{"x": 4 * feed["x"]} for feed in case.feeds]  # beyond the ranges: codes saturate
    values = np.unique(np.concatenate([run(result.graph, f)["y"].ravel() for f in louder]))
    assert 8 < len(values) <= 16
    kernels = ops(fused(result.to_proto(), tmp_path / "f.onnx"))
    assert kernels.count("QLinearConv") == 3
    assert kernels.count("DequantizeLinear") == 1


@pytest.mark.parametrize("name", ["nested_if", "loop_in_if", "old_if"])
def test_weights_alone_in_a_body_load(name: str) -> None:
    case = ZOO[name]()
    result = pipeline(case.model, case.feeds, settings=["assign.format=w8"])
    assert least_sqnr(case, result) > 25


@pytest.mark.parametrize("settings", [["assign.exclude=b"], layers("b=float"), layers("b=w8")])
def test_a_layer_left_float_among_integer_ones_is_float_in_the_runtime(
    settings: list[str], tmp_path: Path
) -> None:
    """onnxruntime rounds float weights between quantized activations of its own accord."""
    case = convs()
    result = pipeline(case.model, case.feeds, settings=settings)
    kernels = ops(fused(result.to_proto(), tmp_path / "f.onnx"))
    assert (kernels.count("Conv"), kernels.count("QLinearConv")) == (1, 2)
    assert least_agreement(case, result) > 80


# ── by layer ─────────────────────────────────────────────────────────────────────────────────────


def formats(source: onnx.ModelProto, **fields: object) -> dict[str, str]:
    _, _, ctx = apply(Assign(**fields), source)  # type: ignore[arg-type]
    halves = {n: (p.weight, p.activation) for n, p in ctx.plan.items()}
    return {
        name: "".join(f"{k}{q.bits}" for k, q in zip("wa", both, strict=True) if q) or "float"
        for name, both in halves.items()
    }


def test_the_last_pattern_that_matches_a_layer_wins() -> None:
    source = convs().model
    found = formats(source, layers=("Conv=w4a8", "re:^[ab]$=w8a16", "b=float"))
    assert found == {"a": "w8a16", "b": "float", "y": "w4a8"}
    assert formats(source, format="w4a8", layers=("?=w8a8", "y=w8"))["y"] == "w8"
    _, _, ctx = apply(Assign(layers=("b=float",)), source)
    assert ctx.plan["b"].reason == "left float by the recipe"


def test_a_name_means_its_node_whatever_characters_are_in_it() -> None:
    source = convs().model
    names = ["x=y[0]*", "x=y[0]*more", "x=y0"]
    for node, name in zip(source.graph.node, names, strict=True):
        node.name = name
    wanted = ("w4a8", "w8", "float")
    pairs = zip(names, wanted, strict=True)
    found = formats(source, layers=tuple(f"{name}={format}" for name, format in pairs))
    assert list(found.values()) == ["w4a8", "w8", "float"]
    found = formats(source, layers=(f"{names[0]}=w4a8",))
    assert list(found.values()) == ["w4a8", "w8a8", "w8a8"]
    assert formats(source, exclude=(names[0],))[names[0]] == "float"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("c=w8a8", "'c' matches no node name or operator"),
        ("Cnov=w8a8", "nearest: Conv"),
        ("part:attention=float", "no attention was found in this model"),
        ("a", "wants pattern=format"),
        ("=w8a8", "wants pattern=format"),
        ("a=", "is no format"),
        ("a=int8", "is no format"),
        ("re:[=w8a8", "no regular expression"),
    ],
)
def test_a_layer_that_cannot_be_meant_is_an_error(layer: str, message: str) -> None:
    with pytest.raises(OnnxqError, match=message) as error:
        formats(convs().model, layers=(layer,))
    assert "\n" not in str(error.value)


def test_layers_survive_a_recipe_as_text() -> None:
    text = 'summary = "s"\n[[pass]]\nname = "assign"\nlayers = ["/e/0/MatMul=w4a8", "h*=float"]\n'
    recipe = parse_recipe("r", text)
    assert recipe.passes == (Assign(layers=("/e/0/MatMul=w4a8", "h*=float")),)
    assert parse_recipe("r", recipe.text).passes == recipe.passes


def test_a_layer_of_4_bits_raises_the_opset() -> None:
    case = convs()
    assert pipeline(case.model, case.feeds).graph.opset == 13
    result = pipeline(case.model, case.feeds, settings=layers("b=w4a8"))
    assert result.graph.opset == 21
    assert [q.qtype.bits for n, q in result.context.weights.items() if n in "wvu"] == [8, 4, 8]


def test_neighbours_of_different_widths_each_read_their_own() -> None:
    case = convs()
    result = pipeline(case.model, case.feeds, settings=layers("b=w8a16"))
    plan, widths = result.context.plan, {}
    for node in result.graph.nodes:
        if node.op == "Conv":
            pair = g.producer(node.inputs[0])
            assert pair is not None
            widths[node.name] = pair.inputs[2].dtype.name
            assert plan[node.name].activation is not None
    assert widths == {"a": "uint8", "b": "uint16", "y": "uint8"}
    assert "Identity" not in ops(result.graph)
    assert least_agreement(case, result) > 80
    assert least_sqnr(case, result) > 30


def test_a_tensor_read_in_two_widths_has_a_pair_for_each() -> None:
    text = """(float[n,8] x) => (float[n,8] y, float[n,8] z) {
        y = MatMul (x, w)
        z = MatMul (x, w)
    }"""
    case = Case(model(text, w=normal(8, 8)), feeds_of(x=(4, 8)))
    result = pipeline(case.model, case.feeds, settings=layers("y=w4a8", "z=w8a16"))
    pairs = [n for n in result.graph.nodes if n.op == "QuantizeLinear" and n.inputs[0].name == "x"]
    assert {n.inputs[2].dtype.name for n in pairs} == {"uint8", "uint16"}
    bits = {n.name: g.producer(n.inputs[0]).inputs[2].dtype.name  # type: ignore[union-attr]
            for n in result.graph.nodes if n.op == "MatMul"}  # fmt: skip
    assert bits == {"y": "uint8", "z": "uint16"}
    stored = {w: q.qtype.bits for w, q in result.context.weights.items()}
    assert sorted(stored.values()) == [4, 8]  # the shared weight is two
    for feed in case.feeds:
        exact, said = run(case.model, feed), run(result.graph, feed)
        assert sqnr(said["z"], exact["z"]) > sqnr(said["y"], exact["y"]) + 10


def test_a_weight_shared_with_a_layer_of_float_weights_stays_float_there() -> None:
    text = """(float[n,8] x) => (float[n,8] y, float[n,8] z) {
        y = Gemm (x, w, b)
        z = Gemm (x, w, b)
    }"""
    w, b = normal(8, 8), normal(8, seed=1)
    case = Case(model(text, w=w, b=b), feeds_of(x=(4, 8)))
    result = pipeline(case.model, case.feeds, settings=layers("z=a8"))
    gemms = {node.name: node for node in result.graph.nodes if node.op == "Gemm"}
    np.testing.assert_array_equal(g.values(gemms["z"].inputs[1]), w)
    np.testing.assert_array_equal(g.values(gemms["z"].inputs[2]), b)
    assert not g.is_constant(gemms["y"].inputs[1])
    assert not g.is_constant(gemms["y"].inputs[2])
    assert least_agreement(case, result) > 80


# ── schemes ──────────────────────────────────────────────────────────────────────────────────────

SHAPES = [
    "residual", "gemm", "depthwise", "attention", "moves", "branches", "lstm", "zero_channels",
    "shared_weight_two_biases", "if_with_convolutions", "tied",
]  # fmt: skip


def _grids(result: Result) -> list[tuple[g.Array, g.Array, bool]]:
    """Scale, zero point, and whether they are a weight's, of every pair in the model."""
    return [
        (g.values(n.inputs[1]), g.values(n.inputs[2]), g.is_constant(n.inputs[0]))
        for n in g.walk(result.graph)
        if n.op in ("QuantizeLinear", "DequantizeLinear")
    ] + [
        (q.scale, q.zero, True)  # of weights alone
        for name, q in result.context.weights.items()
        if "#" not in name
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_in_int8_power_of_two_every_scale_is_one(name: str) -> None:
    case = ZOO[name]()
    result = pipeline(case.model, case.feeds, "int8-power-of-two")
    grids = _grids(result)
    assert grids
    for scale, zero, _ in grids:
        np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)
        assert not zero.any()


@pytest.mark.parametrize("name", SHAPES)
def test_in_int8_symmetric_every_zero_point_is_0(name: str) -> None:
    case = ZOO[name]()
    result = pipeline(case.model, case.feeds, "int8-symmetric")
    grids = _grids(result)
    assert grids
    assert {zero.dtype.name for _, zero, _ in grids} <= {"int8", "int32"}
    assert not any(zero.any() for _, zero, _ in grids)
    assert "DynamicQuantizeLSTM" not in ops(
        pipeline(case.model, case.feeds, "int8-symmetric").graph
    )


@pytest.mark.parametrize("name", [*SHAPES, "embedding"])
def test_in_int8_per_tensor_a_weight_has_one_scale(name: str) -> None:
    case = ZOO[name]()
    result = pipeline(case.model, case.feeds, "int8-per-tensor")
    weights = [q for key, q in result.context.weights.items() if "#bias" not in key]
    assert weights
    assert {q.scale.size for q in weights} == {1}
    for scale, zero, constant in _grids(result):
        assert scale.size == 1 or (constant and zero.dtype == np.int32)


def test_schemes_compose_with_widths() -> None:
    case = convs()
    settings = ["assign.format=w4a8", "assign.power_of_two=true"]
    result = pipeline(case.model, case.feeds, "int8-symmetric", settings=settings)
    plan = result.context.plan["b"]
    assert (str(plan.weight), str(plan.activation)) == ("s4p:channel", "s8p")
    assert least_agreement(case, result) > 80


def test_what_is_quantized_as_it_comes_has_no_scheme() -> None:
    for field in ("symmetric", "power_of_two"):
        with pytest.raises(OnnxqError, match="quantized as they come"):
            load_recipe("int8-dynamic", [f"assign.{field}=true"])


def test_a_widened_channel_keeps_a_power_of_two() -> None:
    w = normal(4, 6)
    for spec in ("s8p:channel", "s8p", "s4p:channel"):
        qtype = QType.parse(spec)
        narrow = quantize_weight(w, *weight_scale(w, qtype), qtype)
        wide = widen(narrow, np.array([1.0, 1.1, 2.0, 3.7]))
        np.testing.assert_array_equal(np.frexp(wide.scale)[0], 0.5)
        factors = wide.scale / narrow.scale
        assert factors.tolist() == ([1, 2, 2, 4] if qtype.group else 4)
        assert np.abs(wide.dequantize() - w).max() <= 0.75 * wide.scale.max()
