import numpy as np
import onnx
import pytest
from awkward import ZOO, Case
from graphs import apply, context, feeds_of, model, normal, pipeline, run, sqnr
from onnxq.passes import Assign, FoldBatchNorm, Normalize

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Plan


def plan_of(case: Case, target: str = "cpu", **fields: object) -> tuple[Plan, g.Graph]:
    graph, ctx = g.load(case.model), context(target)
    for step in (Normalize(), FoldBatchNorm(), Assign(**fields)):  # type: ignore[arg-type]
        step.apply(graph, ctx)
    return ctx.plan, graph


def test_heavy_operators_get_the_targets_formats_and_the_rest_follows() -> None:
    plan, _ = plan_of(ZOO["residual"]())
    formats = {name: (str(p.weight), str(p.activation)) for name, p in plan.items() if p.quantized}
    assert formats["a"] == formats["c"] == formats["z"] == ("s8:channel", "u8a")
    assert formats["r"] == formats["s"] == formats["m"] == ("None", "u8a")
    assert plan["z"].inputs == (0,)
    assert plan["s"].inputs == (0, 1)
    # What a kernel fuses is not rounded twice: the pair stands after the Relu.
    assert not plan["a"].output
    assert plan["r"].output
    assert plan["m"].output
    assert plan["a"].rule is not None
    assert plan["a"].rule.pair_limit == 128


def test_light_operators_stay_float_between_float_tensors() -> None:
    text = """(float[n,4,6,6] x) => (float[n,4,1,1] y) {
        s = Add (x, x)
        e = Erf (s)
        p = AveragePool <kernel_shape = [2,2]> (e)
        y = Conv <strides = [9,9]> (p, w)
    }"""
    plan, _ = plan_of(Case(model(text, w=normal(4, 4, 1, 1)), []))
    assert "float" in plan["s"].reason
    assert "float" in plan["p"].reason
    assert "GELU" in plan["e"].reason
    assert plan["y"].quantized


def test_products_of_activations_are_quantized_and_softmax_is_not() -> None:
    plan, _ = plan_of(ZOO["attention"]())
    for name in ("s", "c"):
        assert plan[name].weight is None
        assert str(plan[name].activation) == "u8a"
        assert plan[name].inputs == (0, 1)
    assert plan["p"].reason.startswith("rounding attention weights")
    assert {n for n, p in plan.items() if p.weight} == {"q", "k", "v", "o"}


def test_the_dynamic_form_leaves_products_of_activations_and_convolutions() -> None:
    plan, _ = plan_of(ZOO["attention"](), form="dynamic")
    assert {n for n, p in plan.items() if p.quantized} == {"q", "k", "v", "o"}
    plan, _ = plan_of(ZOO["depthwise"](), form="dynamic")
    assert {n for n, p in plan.items() if p.quantized} == {"y"}
    assert all(p.reason for n, p in plan.items() if n != "y" and p.reason != "")


def test_every_node_left_out_has_a_reason_in_the_report() -> None:
    text = (
        "(float[n,4] x) => (float[n,3] y) { h = MatMul (x, v) l = MatMul (u, h) y = Gemm (l, w) }"
    )
    case = Case(
        model(
            text.replace("float[n,4]", "float[5,4]"), v=normal(4, 4), u=normal(5, 5), w=normal(4, 3)
        ),
        feeds_of(x=(5, 4)),
    )
    result = pipeline(case.model, case.feeds)
    reasons = {record.name: record.reason for record in result.report.layers}
    assert "its constant operand is the left one" in reasons["l"]
    assert not {"h", "y"} & set(reasons)


def test_an_embedding_of_short_rows_is_not_worth_a_scale_for_each() -> None:
    text = "(int64[n] ids) => (float[n,3] y) { e = Gather (table, ids) y = MatMul (e, w) }"
    plan, _ = plan_of(Case(model(text, table=normal(9, 8), w=normal(8, 3)), []))
    assert "rows of fewer than" in plan["e"].reason
    assert plan["y"].quantized


# ── selectors ────────────────────────────────────────────────────────────────────────────────────

EVERYTHING = {"q", "k", "v", "s", "c", "o"}


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ({"exclude": ("q",)}, EVERYTHING - {"q"}),
        ({"exclude": ("[qk]", "o")}, {"v", "s", "c"}),
        ({"exclude": ("re:^[qkv]$",)}, {"s", "c", "o"}),
        ({"include": ("MatMul",)}, EVERYTHING),
        ({"include": ("re:Mat.*",), "exclude": ("s", "c")}, {"q", "k", "v", "o"}),
        ({"include": ("o",)}, {"o"}),
    ],
)
def test_nodes_are_chosen_by_glob_expression_and_type(
    selectors: dict[str, tuple[str, ...]], expected: set[str]
) -> None:
    plan, _ = plan_of(ZOO["attention"](), **selectors)
    assert {n for n, p in plan.items() if p.quantized and n in EVERYTHING} == expected
    for name in EVERYTHING - expected:
        excluded = name not in expected and "exclude" in selectors
        assert plan[name].reason in ("excluded by the user", "not among the included")
        assert excluded or plan[name].reason == "not among the included"


@pytest.mark.parametrize("where", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("MatMull", "MatMul"), ("matmul", "MatMul"), ("layer*", "known:"), ("re:^zzz", "known:")],
)
def test_a_selector_that_matches_nothing_is_an_error_with_the_nearest_names(
    where: str, pattern: str, nearest: str
) -> None:
    with pytest.raises(OnnxqError) as error:
        plan_of(ZOO["attention"](), **{where: (pattern,)})
    message = str(error.value)
    assert repr(pattern) in message
    assert nearest in message
    assert "MatMul" in message
    assert "\n" not in message


def test_selectors_of_the_run_count_like_those_of_the_recipe() -> None:
    case = ZOO["attention"]()
    result = pipeline(case.model, case.feeds, exclude=("q",), settings=['assign.exclude=["k"]'])
    assert not result.context.plan["q"].quantized
    assert not result.context.plan["k"].quantized
    assert result.context.plan["v"].quantized
    with pytest.raises(OnnxqError, match="nearest: MatMul"):
        pipeline(case.model, case.feeds, include=("MatMool",))


def test_a_broken_expression_is_an_error() -> None:
    with pytest.raises(OnnxqError, match="no regular expression"):
        plan_of(ZOO["attention"](), exclude=("re:[",))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Relu (x)", "it has no operator with weights"),
        ("y = ConvTranspose (x, w)", "no integer ConvTranspose"),
    ],
)
def test_nothing_to_quantize_is_an_error_with_the_reason(body: str, reason: str) -> None:
    source = model(f"(float[n,4,5,5] x) => (float[a,b,c,d] y) {{ {body} }}", w=normal(4, 4, 1, 1))
    with pytest.raises(OnnxqError, match="nothing in this model can be quantized") as error:
        apply(Assign(), source)
    assert reason in str(error.value)


def test_everything_excluded_is_an_error() -> None:
    with pytest.raises(OnnxqError, match="excluded by the user"):
        plan_of(ZOO["matmul"](), exclude=("MatMul",))


# ── shared weights ───────────────────────────────────────────────────────────────────────────────


def test_a_weight_read_in_two_ways_becomes_two() -> None:
    """As an embedding a scale belongs to a row, as a matrix to a column."""
    text = """(int64[n,l] ids) => (float[n,l,16] y) {
        e = Gather (w, ids)
        h = MatMul (e, w)
        y = MatMul (h, w)
    }"""
    rng = np.random.default_rng(0)
    feeds = [{"ids": rng.integers(0, 16, (1, 5))} for _ in range(4)]
    case = Case(model(text, w=normal(16, 16)), feeds)
    _, graph = plan_of(case)
    gather, first, second = graph.nodes
    assert gather.inputs[0].name != first.inputs[1].name
    assert first.inputs[1] is second.inputs[1]
    for preset in ("int8-static", "int8-dynamic"):
        result = pipeline(case.model, case.feeds, preset)
        assert len({q.codes.tobytes() for q in result.context.weights.values()}) == 2
        for feed in feeds:
            exact = run(case.model, feed)["y"]
            assert sqnr(run(result.graph, feed)["y"], exact) > 25


def test_a_weight_that_a_float_node_reads_too_is_left_to_it() -> None:
    case = ZOO["shared_weights"]()
    source = case.model
    result = pipeline(source, case.feeds, exclude=("c",))
    kept = {t.name: t.values for t in g.constants(result.graph)}
    original = {t.name: t.values for t in g.constants(g.load(source))}
    float_node = next(n for n in result.graph.nodes if n.name == "c")
    np.testing.assert_array_equal(float_node.inputs[1].values, original["w"])
    assert kept["w"].dtype == np.float32


# ── 16-bit activations ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["residual", "moves", "attention", "gemm"])
def test_16_bits_are_taken_where_asked_for_and_nowhere_else(name: str) -> None:
    case = ZOO[name]()
    for bits, target in ((8, "cpu"), (16, "cpu"), (16, "cpu-vnni"), (16, "cpu-arm64")):
        plan, graph = plan_of(case, target, format=f"w8a{bits}")
        found = {p.activation.bits for _, p in plan.quantized(g.walk(graph)) if p.activation}
        assert found == {bits}
        products = [p for n, p in plan.quantized(g.walk(graph)) if g.weight_view(n) is not None]
        assert {str(p.weight) for p in products} == {"s8:channel"}


def test_int16x8_stores_16_bit_pairs_and_the_runtime_agrees_with_itself() -> None:
    for name in ("conv_bn_relu6", "residual", "gemm", "attention", "moves", "branches", "pools"):
        case = ZOO[name]()
        result = pipeline(case.model, case.feeds, "int16x8")
        proto = result.to_proto()
        assert proto.opset_import[0].version == 21
        zeros = {n.inputs[2].dtype for n in result.graph.nodes if n.op == "QuantizeLinear"}
        assert zeros == {np.dtype(np.uint16)}
        for feed in case.feeds:
            on, off = run(proto, feed), run(proto, feed, False)
            assert min(sqnr(on[key], off[key]) for key in off) > 80


def test_16_bit_activations_lose_what_the_weights_lose_and_no_more() -> None:
    """Weights that 8 bits hold exactly: what is left is the error of the activations."""
    weight = np.round(normal(16, 8, scale=40)).clip(-127, 127)
    weight[0] = 127
    text = "(float[n,16] x) => (float[n,8] y) { y = MatMul (x, w) }"
    case = Case(model(text, w=weight), [{"x": normal(4, 16, seed=k)} for k in range(8)])
    errors = {}
    for preset in ("int8-static", "int16x8"):
        settings = ["calibrate.method=minmax"]
        result = pipeline(case.model, case.feeds, preset, "cpu-vnni", settings)
        errors[preset] = min(
            sqnr(run(result.graph, feed)["y"], run(case.model, feed)["y"]) for feed in case.feeds
        )
    assert errors["int16x8"] > errors["int8-static"] + 30  # 8 bits are 48 dB


@pytest.mark.parametrize(
    ("form", "format"), [("static", "w2a8"), ("dynamic", "w8a16"), ("dynamic", "a8")]
)
def test_formats_that_a_target_has_no_rule_for_are_an_error_in_one_line(
    form: str, format: str
) -> None:
    for wishes in ({"format": format}, {"layers": (f"a={format}",)}):
        with pytest.raises(
            OnnxqError, match=f"target cpu has no {form} rule for {format}"
        ) as error:
            plan_of(ZOO["residual"](), form=form, **wishes)
        assert "w8a8" in str(error.value)
        assert "\n" not in str(error.value)


# ── what transformers are made of ────────────────────────────────────────────────────────────────


def written_out_norm() -> onnx.ModelProto:
    text = """(float[n,8] x) => (float[n,8] y) {
        a = MatMul (x, w)
        m = ReduceMean <axes = [-1]> (a)
        c = Sub (a, m)
        p = Mul (c, c)
        v = ReduceMean <axes = [-1]> (p)
        e = Add (v, eps)
        s = Sqrt (e)
        d = Div (c, s)
        k = Mul (d, gain)
        b = Add (k, bias)
        y = MatMul (b, w)
    }"""
    ones = np.ones(8, np.float32)
    return model(text, w=normal(8, 8), eps=np.float32(1e-5), gain=ones, bias=ones)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [((), "part of a layer normalization, which 8 bits"), (("p=w8a8",), "its inputs are float")],
)
def test_steps_of_a_normalization_stay_float_unless_they_are_asked_for(
    layers: tuple[str, ...], reason: str
) -> None:
    _, _, ctx = apply(Assign(layers=layers), written_out_norm())
    assert ctx.plan["p"].reason.startswith(reason)
    assert ctx.plan["k"].reason.startswith("part of a layer normalization")
    assert ctx.plan["y"].quantized
