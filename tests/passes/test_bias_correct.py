import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import Array, Feeds, context, feeds_of, model, normal, run, samples_of
from onnxq.passes.lower.fuse_integer import FuseInteger
from onnxq.passes.solve.bias_correct import BiasCorrect, by_depth, takes_bias

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.observe import Moments
from onnxq.pipeline import Context
from onnxq.recipe import load_recipe

BEFORE = ("widen", "normalize", "fold-batchnorm", "assign", "calibrate", "round-to-nearest")
STEPS = {step.name: step for step in load_recipe("int8-static").passes}
LOWERING = tuple(STEPS[name] for name in ("quantize-bias", "insert-qdq"))


def solved(made: onnx.ModelProto, feeds: Feeds, bits: int = 2) -> tuple[g.Graph, Context]:
    """As it is before biases are corrected; weights of few bits shift the outputs much."""
    graph, samples = g.load(made), samples_of(made, feeds)
    ctx = context(samples=samples, lowering=LOWERING)
    for name in BEFORE:
        step = STEPS[name]
        wanted = step.observe(graph, ctx)
        ctx.stats |= observe(graph, wanted, samples, threads=1) if wanted else {}
        step.apply(graph, ctx)
    for name, q in ctx.weights.items():
        coarse = np.rint(q.codes.astype(float) / 2 ** (8 - bits)) * 2 ** (8 - bits)
        ctx.weights[name] = type(q)(
            coarse.clip(-127, 127).astype(np.int8), q.scale, q.zero, q.qtype
        )
    return graph, ctx


def shifts(expected: g.Graph, graph: g.Graph, ctx: Context) -> list[float]:
    """max |E[y] − E[ŷ]| / deviation of every layer."""
    quantized, found = ctx.quantized(graph, qdq=True), []
    for node, plan in ctx.plan.quantized(g.walk(expected)):
        if plan.weight is None:
            continue
        key = f"{node.outputs[0].name}#m"
        axis = 1 if node.op == "Conv" else -1
        seen = [
            observe(each, {key: Moments(axis)}, ctx.samples, threads=1)[key]
            for each in (expected, quantized)
        ]
        deviation = np.sqrt(seen[0].variance.mean())
        found.append(float(np.abs(seen[0].mean - seen[1].mean).max() / deviation))
    return found


def chain() -> tuple[onnx.ModelProto, Feeds]:
    text = """(float[n,3,6,6] x) => (float[n,5] y) {
        a = Conv <pads = [1,1,1,1]> (x, w1, b)
        r = Relu (a)
        c = Conv <group = 2> (r, w2)
        s = Relu (c)
        d = Conv <strides = [2,2]> (s, w3, b)
        j = Concat <axis = 1> (d, d)
        t = Flatten (j)
        y = Gemm <alpha = 0.5, beta = 2.0> (t, w4, b4)
    }"""
    weights = {
        "w1": normal(6, 3, 3, 3, scale=0.3),
        "w2": normal(8, 3, 1, 1, seed=1),
        "w3": normal(6, 8, 3, 3, seed=2, scale=0.2),
        "b": normal(6, seed=3),
        "w4": normal(48, 5, seed=4, scale=0.2),
        "b4": normal(1, 5, seed=5),
    }
    feeds = feeds_of(12, x=(2, 3, 6, 6))
    for feed in feeds:
        feed["x"] += 1  # a mean for errors to show in
    return model(text, **weights), feeds


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_the_mean_of_every_layer_comes_back(form: str) -> None:
    """Also where the file will hold QLinear operators, which join no float tensors."""
    made, feeds = chain()
    graph, ctx = solved(made, feeds)
    ctx.lowering += (FuseInteger(),) if form == "qoperator" else ()
    expected = g.copy(graph)
    before = shifts(expected, graph, ctx)
    assert BiasCorrect().apply(graph, ctx) == 4
    after = shifts(expected, graph, ctx)
    assert min(before) > 0.02
    assert max(after) < 0.005  # what an int32 bias and the rounding of activations leave
    assert BiasCorrect().apply(graph, ctx) == 0


def test_only_biases_change_and_a_shared_one_is_forked() -> None:
    made, feeds = chain()
    graph, ctx = solved(made, feeds)
    before = {n.name: [t.name for t in n.inputs[:2]] for n in g.walk(graph)}
    BiasCorrect().apply(graph, ctx)
    convolutions = [n for n in graph.nodes if n.op == "Conv"]
    assert {n.name: [t.name for t in n.inputs[:2]] for n in g.walk(graph)} == before
    first, _, last = (g.values(n.inputs[2]) for n in convolutions)
    assert not np.allclose(first, last)
    assert np.abs(first - normal(6, seed=3)).max() > 1e-3
    assert np.abs(last - normal(6, seed=3)).max() > 1e-3


@pytest.mark.parametrize("order", ["h, b", "b, h"])
def test_a_matmul_is_corrected_in_the_add_behind_it(order: str) -> None:
    text = f"""(float[n,4,6] x) => (float[n,4,3] y) {{
        h = MatMul (x, w)
        k = Add ({order})
        y = MatMul (k, v)
    }}"""
    made = model(text, w=normal(6, 8), b=normal(1, 8, seed=1), v=normal(8, 3, seed=2))
    feeds = feeds_of(12, x=(2, 4, 6))
    for feed in feeds:
        feed["x"] += 1
    graph, ctx = solved(made, feeds)
    expected = g.copy(graph)
    before = shifts(expected, graph, ctx)
    assert BiasCorrect().apply(graph, ctx) == 1  # the other has no Add
    add = next(n for n in graph.nodes if n.op == "Add")
    bias = next(t for t in add.inputs if g.is_constant(t))
    assert tuple(bias.shape) == (1, 8)
    key = f"{add.outputs[0].name}#m"
    means = [
        observe(each, {key: Moments(-1)}, ctx.samples, threads=1)[key].mean
        for each in (expected, ctx.quantized(graph))
    ]
    assert np.abs(means[0] - means[1]).max() < 0.01 * max(before)
    assert any("no bias" in warning for warning in ctx.report.warnings)


@pytest.mark.parametrize("name", ["nested_if", "loop_body", "if_with_convolutions", "scan_body"])
def test_layers_in_bodies_are_corrected_too(name: str) -> None:
    case = ZOO[name]()
    graph, ctx = solved(case.model, case.feeds, bits=3)

    def shift(changed: g.Graph) -> float:
        lowered = ctx.quantized(changed)
        total = 0.0
        for feed, expected in zip(case.feeds, case.expected(), strict=True):
            said = run(lowered, feed)
            total += sum(float(np.square(said[k] - expected[k]).sum()) for k in expected)
        return total

    before = shift(g.copy(graph))
    BiasCorrect().apply(graph, ctx)
    assert shift(graph) < 1.1 * before


def test_depth_is_the_longest_path_through_other_layers() -> None:
    text = """(float[n,4] x, bool c) => (float[n,4] y) {
        a = MatMul (x, w)
        b = MatMul (a, w)
        d = MatMul (x, w)
        i = If (c) <
            then_branch = t () => (float[n,4] p) { p = MatMul (b, w) },
            else_branch = e () => (float[n,4] q) { q = MatMul (x, w) }
        >
        s = Add (d, i)
        y = MatMul (s, w)
    }"""
    graph = g.load(model(text, w=normal(4, 4)))
    names = {n.outputs[0].name: n.name for n in g.walk(graph) if n.op == "MatMul"}
    found = by_depth(graph, set(names.values()))
    depth = {name: k for k, level in enumerate(found) for name in level}
    by_output = {out: depth[name] for out, name in names.items()}
    assert by_output["a"] == by_output["d"] == 0
    assert by_output["b"] == 1
    assert by_output["p"] == 2
    assert by_output["q"] == 0
    assert by_output["y"] == 3


@pytest.mark.parametrize(
    ("bias", "attrs", "expected"),
    [(5, "", True), (1, "", True), (5, "<beta = 0.0>", False), (None, "", True)],
)
def test_which_biases_can_be_changed(bias: int | None, attrs: str, expected: bool) -> None:
    third = "" if bias is None else ", b"
    text = f"(float[3,4] x) => (float[3,5] y) {{ y = Gemm {attrs} (x, w{third}) }}"
    more: dict[str, Array] = {} if bias is None else {"b": normal(bias)}
    graph = g.load(model(text, w=normal(4, 5), **more))
    assert takes_bias(graph.nodes[0], graph) is expected


def test_no_samples_is_an_error() -> None:
    made, _ = chain()
    with pytest.raises(OnnxqError, match="needs samples"):
        BiasCorrect().apply(g.load(made), context())
