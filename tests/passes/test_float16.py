from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import Array, Feeds, context, feeds_of, model, normal, ops, pipeline, run, samples_of
from onnxq.passes import Float16
from onnxq.passes.lower.float16 import LargestFinite, to_half
from test_contract import cosine

from onnxq import api
from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Pipeline, Result
from onnxq.recipe import load_recipe
from onnxq.runtime import Session
from onnxq.target import load_target
from onnxq.verify import with_roundings

HALF = np.float16
REFUSED = {
    "float16": "no float32 tensor", "float16_body": "no float32 tensor",
    "bfloat16_ends": "no float32 tensor", "double": "no float32 tensor",
    "bfloat16": "does not load",  # no more than the model as it came
}  # fmt: skip


def halved(
    source: onnx.ModelProto,
    feeds: Feeds | None = None,
    exclude: tuple[str, ...] = (),
    **fields: bool,
) -> Result:
    samples = samples_of(source, feeds) if feeds else None
    steps = [*load_recipe("float16").passes[:-1], Float16(**fields)]
    return Pipeline(steps).run(g.load(source), samples, load_target("cpu"), exclude=exclude)


def kinds(result: Result) -> dict[str, object]:
    """Node name → the type that it makes."""
    return {n.name: g.dtype(n.outputs[0]) for n in g.walk(result.graph) if n.op != "Cast"}


def rounding(result: Result) -> g.Graph:
    """As a device computes that has float16 alone: the CPU provider spares roundings between."""
    graph = with_roundings(result.graph)
    assert graph is not None
    return graph


def check_close(
    source: onnx.ModelProto, made: Result | g.Graph, feeds: Feeds, least: float
) -> None:
    graph = made if isinstance(made, g.Graph) else made.graph
    for optimize in (False, True):
        said = [run(graph, feed, optimize) for feed in feeds]
        wanted = [run(source, feed) for feed in feeds]
        for key in wanted[0]:
            assert said[0][key].dtype == wanted[0][key].dtype
            assert cosine([s[key] for s in said], [w[key] for w in wanted]) >= least


# ── every graph ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("io", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_it_says_the_same_in_half_the_bits(name: str, io: bool) -> None:
    case = ZOO[name]()
    if name in REFUSED:
        with pytest.raises(OnnxqError, match=REFUSED[name]):
            run(halved(case.model, case.feeds, io=io).graph, case.feeds[0])
        return
    result, expected = halved(case.model, case.feeds, io=io), case.expected()
    if name != "no_shapes":
        onnx.checker.check_model(result.to_proto(), full_check=True)
    assert any(g.dtype(t) == HALF for t in g.tensors(result.graph).values())
    given = {t.name for t in result.graph.outputs if g.is_constant(t)}  # which keep their type
    for graph, optimize in ((result.graph, True), (result.graph, False), (rounding(result), False)):
        said = [run(graph, feed, optimize) for feed in case.feeds]
        for key, first in expected[0].items():
            narrow = io and first.dtype == np.float32 and key not in given
            assert said[0][key].dtype == (HALF if narrow else first.dtype)
            assert cosine([s[key] for s in said], [e[key] for e in expected]) >= 0.999
    once = g.to_proto(result.graph).SerializeToString(deterministic=True)
    assert Float16(io).apply(result.graph, result.context) == 0
    assert g.to_proto(result.graph).SerializeToString(deterministic=True) == once


# ── values ───────────────────────────────────────────────────────────────────────────────────────


def test_finite_stays_finite_and_what_is_not_zero_stays_so() -> None:
    values = np.array([1e30, -7e4, 65504, 1e-12, -1e-9, 0, -0.0, 0.1, np.inf, -np.inf], np.float32)
    half = to_half(values)
    smallest = float(np.finfo(HALF).smallest_subnormal)
    expected = [65504, -65504, 65504, smallest, -smallest, 0, 0, HALF(0.1), np.inf, -np.inf]
    np.testing.assert_array_equal(half, np.array(expected, HALF))
    np.testing.assert_array_equal(np.sign(half), np.sign(values))


def test_weights_beyond_the_range_are_clamped_and_the_report_says_so() -> None:
    w = normal(4, 4)
    w[1, 2] = 1e6
    source = model("(float[n,4] x) => (float[n,4] y) { y = MatMul (x, w) }", w=w)
    result = halved(source)
    (weight,) = g.constants(result.graph)
    assert g.values(weight)[1, 2] == 65504
    assert any("1 of the values of 'w'" in text for text in result.report.warnings)


def test_weights_too_small_for_float16_are_pointed_out() -> None:
    source = model("(float[n,4] x) => (float[n,4] y) { y = MatMul (x, w) }", w=normal(4, 4) * 1e-6)
    assert any("few digits" in text for text in halved(source).report.warnings)


def test_the_largest_finite_value_is_what_counts() -> None:
    seen, other = LargestFinite(), LargestFinite()
    seen.update(np.array([[3.0, -np.inf]], np.float32))
    other.update(np.array([-7.0, np.nan], np.float32))
    other.update(np.zeros((0, 2), np.float32))
    seen.merge(other)
    assert seen.result() == 7


# ── islands ──────────────────────────────────────────────────────────────────────────────────────


def test_activations_that_would_overflow_stay_float32() -> None:
    text = """(float[n,4] x) => (float[n,3] y) {
        a = MatMul (x, w) s = Mul (a, a) r = Sqrt (s) d = Relu (r) y = MatMul (d, v)
    }"""
    source = model(text, w=normal(4, 4), v=normal(4, 3))
    feeds = [{"x": 300 * feed["x"]} for feed in feeds_of(x=(5, 4))]
    measured, blind = halved(source, feeds), halved(source)
    check_close(source, measured, feeds, 0.999)
    found = kinds(measured)
    assert found["s"] == found["r"] == np.float32
    assert found["a"] == found["d"] == HALF
    check_close(source, rounding(measured), feeds, 0.999)
    assert not np.isfinite(run(rounding(blind), feeds[0], optimize=False)["y"]).all()
    assert any("no samples" in text for text in blind.report.warnings)
    assert "overflow" in next(r.reason for r in measured.report.layers if r.name == "s")


def test_a_row_that_is_masked_throughout_is_no_nan() -> None:
    text = """(float[n,t,8] x, float[n,1,t] keep) => (float[n,t,8] y) {
        q = MatMul (x, wq) k = MatMul (x, wk) kt = Transpose <perm = [0,2,1]> (k)
        s = MatMul (q, kt) gone = Sub (one, keep) mask = Mul (gone, least)
        masked = Add (s, mask) p = Softmax (masked) y = MatMul (p, x)
    }"""
    source = model(
        text, wq=normal(8, 8), wk=normal(8, 8, seed=1), one=np.float32(1),
        least=np.float32(np.finfo(np.float32).min),
    )  # fmt: skip
    feeds = [{"x": normal(2, 5, 8), "keep": np.stack([np.ones((1, 5)), np.zeros((1, 5))])}]
    feeds[0]["keep"] = feeds[0]["keep"].astype(np.float32)
    for given in (feeds, None):
        check_close(source, rounding(halved(source, given)), feeds, 0.999)


def test_a_normalization_written_out_squares_in_float32() -> None:
    text = """(float[n,8] x) => (float[n,8] y) {
        s = Mul (x, x) m = ReduceMean <axes = [-1]> (s) e = Add (m, eps) r = Sqrt (e)
        d = Div (x, r) h = Mul (d, gain) y = MatMul (h, w)
    }"""
    source = model(text, eps=np.float32(1e-9), gain=normal(8), w=normal(8, 8))
    feeds = [{"x": 900 * feed["x"]} for feed in feeds_of(x=(3, 8))]
    result = halved(source)
    check_close(source, rounding(result), feeds, 0.999)
    assert kinds(result)["y"] == HALF


def test_angles_are_computed_in_float32_from_the_integers_on() -> None:
    text = """(int64[t] position, float[t,8] x) => (float[t,8] y) {
        p = Cast <to = 1> (position) column = Unsqueeze (p, one) angle = MatMul (column, rates)
        c = Cos (angle) m = Mul (x, c) y = MatMul (m, w)
    }"""
    rates = np.float32([[1, 0.7, 0.3, 0.1, 0.05, 0.01, 0.003, 0.001]])
    source = model(text, rates=rates, w=normal(8, 8), one=np.array([1]))
    feeds = [{"position": np.arange(60000, 60009), "x": normal(9, 8)}]
    result = halved(source)
    check_close(source, rounding(result), feeds, 0.9999)
    assert kinds(result)["m"] == HALF


def test_a_weight_that_an_island_reads_too_is_kept_twice() -> None:
    text = "(float[n,4] x) => (float[n,4] y) { a = MatMul (x, w) b = Add (w, x) c = Exp (b) "
    source = model(text + "d = Mul (c, w) e = Add (d, a) y = Relu (e) }", w=normal(4, 4))
    result = halved(source, exclude=("d",))
    stored = {g.dtype(t) for t in g.constants(result.graph)}
    assert stored == {np.dtype(np.float32), np.dtype(HALF)}
    check_close(source, result, [{"x": normal(4, 4, seed=3)}], 0.999)


def test_an_excluded_layer_stays_float32() -> None:
    case = ZOO["matmul"]()
    first = next(n.name for n in g.walk(g.load(case.model)) if n.op == "MatMul")
    result = halved(case.model, exclude=(first,))
    assert kinds(result)[first] == np.float32
    with pytest.raises(OnnxqError, match="matches no"):
        halved(case.model, exclude=("nowhere",))


def test_casts_that_do_nothing_any_more_go() -> None:
    text = "(float[n,4] x) => (float[n,4] y) { a = MatMul (x, w) h = Cast <to = 10> (a) "
    source = model(text + "r = Relu (h) f = Cast <to = 1> (r) y = MatMul (f, w) }", w=normal(4, 4))
    result = halved(source)
    assert ops(result.graph).count("Cast") == 2
    check_close(source, result, feeds_of(x=(3, 4)), 0.999)


def test_layers_quantized_before_stay_as_they_are() -> None:
    """Between DequantizeLinear and QuantizeLinear float32 stays, or nothing would be fused."""
    case = ZOO["attention"]()
    steps = [*load_recipe("int8-static").passes, Float16()]
    result = Pipeline(steps).run(
        g.load(case.model), samples_of(case.model, case.feeds), load_target("cpu"), threads=1
    )
    check_close(case.model, result, case.feeds, 0.99)
    for node in g.walk(result.graph):
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            assert HALF not in [g.dtype(t) for t in (*node.inputs, *node.outputs)]


def test_matmul_nbits_computes_in_float16_with_scales_of_float16() -> None:
    rng = np.random.default_rng(0)
    nbits = onnx.helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["a"], "n", domain="com.microsoft",
        K=32, N=8, bits=4, block_size=32,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [nbits, onnx.helper.make_node("Relu", ["a"], ["y"], "r")],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 32])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", 8])],
        [
            onnx.numpy_helper.from_array(rng.integers(0, 256, (8, 1, 16), np.uint8), "codes"),
            onnx.numpy_helper.from_array(rng.uniform(0.01, 0.1, 8).astype(np.float32), "scales"),
        ],
    )
    domains = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    source = onnx.helper.make_model(graph, opset_imports=domains, ir_version=8)
    result = halved(source)
    check_close(source, result, feeds_of(x=(3, 32)), 0.999)
    assert {t.name: t.dtype for t in g.constants(result.graph)}["scales"] == HALF


def test_a_custom_operator_is_given_float32() -> None:
    text = "(float[n,4] x) => (float[n,4] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, w) }"
    graph = g.load(model(text, w=normal(4, 4)))
    middle = next(n for n in graph.nodes if n.op == "Relu")
    middle.op, middle.domain = "Own", "mine"
    graph.import_domains = [*(graph.import_domains or []), onnx.helper.make_opsetid("mine", 1)]
    for tensor in graph.tensors().values():
        if not g.is_constant(tensor) and tensor.name == "b":
            tensor.dtype = np.dtype(np.float32)
    Float16().apply(graph, context())
    own = next(n for n in graph.nodes if n.op == "Own")
    assert g.dtype(own.inputs[0]) == g.dtype(own.outputs[0]) == np.float32
    assert [n.op for n in graph.nodes] == [
        "Cast", "MatMul", "Cast", "Own", "Cast", "MatMul", "Cast",
    ]  # fmt: skip


# ── the whole run ────────────────────────────────────────────────────────────────────────────────


def written(tmp_path: Path, source: onnx.ModelProto) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(source, path)
    return path


@pytest.mark.parametrize("io", [False, True])
def test_the_report_measures_the_layers(tmp_path: Path, io: bool) -> None:
    case = ZOO["residual"]()
    result = api.quantize(
        written(tmp_path, case.model), "float16", samples=case.feeds,
        settings=[f"float16.io={str(io).lower()}"], threads=1,
    )  # fmt: skip
    report = result.report
    assert report.verified
    convolutions = [layer for layer in report.layers if layer.op == "Conv"]
    assert {layer.form for layer in convolutions} == {"float16"}
    assert all(layer.sqnr_db is not None and layer.sqnr_db > 50 for layer in convolutions)
    assert report.outputs[0].sqnr_db > 50
    proto = onnx.load(tmp_path / "m.float16.onnx")
    assert proto.graph.input[0].type.tensor_type.elem_type == (10 if io else 1)
    assert Session(proto).run(case.feeds[0])  # float32 is fed to float16 as well


def test_what_overflows_is_refused_not_written(tmp_path: Path) -> None:
    text = "(float[n,4] x) => (float[n,4] y) { a = MatMul (x, w) s = Mul (a, a) y = Sqrt (s) }"
    path = written(tmp_path, model(text, w=3000 * normal(4, 4)))
    with pytest.raises(OnnxqError, match="NaN or infinite"):
        api.quantize(path, "float16", threads=1)
    assert list(tmp_path.iterdir()) == [path]
    feeds = feeds_of(n=12, x=(3, 4))
    report = api.quantize(path, "float16", samples=feeds, threads=1).report
    assert report.outputs[0].sqnr_db > 50


def test_weights_take_half_the_bytes(tmp_path: Path) -> None:
    source = model(
        "(float[n,256] x) => (float[n,256] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }",
        w=normal(256, 256), v=normal(256, 256, seed=1),
    )  # fmt: skip
    result = api.quantize(written(tmp_path, source), "float16", threads=1)
    assert result.report.quantized_bytes < 0.52 * result.report.float_bytes


def test_it_is_one_step_of_a_recipe() -> None:
    case = ZOO["matmul"]()
    result = pipeline(case.model, case.feeds, "float16")
    values: list[Array] = [g.values(t) for t in g.constants(result.graph)]
    assert all(v.dtype != np.float32 for v in values)
