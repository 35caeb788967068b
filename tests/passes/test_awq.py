from typing import Any

import numpy as np
import onnx
import pytest
from graphs import (
    Array,
    Feeds,
    context,
    feeds_of,
    model,
    normal,
    ops,
    relative,
    run,
    samples_of,
    sqnr,
)
from onnxq.passes import AWQ, Assign, RoundToNearest
from onnxq.passes.prepare.awq import Layer, mean_magnitude, salience_scale

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.pipeline import Context, NodePlan, Pipeline
from onnxq.qtype import QType
from onnxq.target import load_target

WIDTH = 64
U4 = QType.parse("u4a:32")
LOUD = np.ones(WIDTH, np.float32)
LOUD[[3, 11, 40]] = 60


def mlp(gate: bool = False) -> onnx.ModelProto:
    """A normalization whose gain is large in three channels, and the layers that read it."""
    middle = "g = MatMul (h, wg) s = Sigmoid (g) m = Mul (u, s)" if gate else "m = Relu (u)"
    text = f"""(float[n,t,{WIDTH}] x) => (float[n,t,{WIDTH}] y) {{
        h = LayerNormalization (x, gain, bias)
        u = MatMul (h, wu) {middle}
        y = MatMul (m, wd)
    }}"""
    weights = {
        "wu": normal(WIDTH, 96, seed=1, scale=0.1), "wd": normal(96, WIDTH, seed=2, scale=0.1),
        "gain": LOUD, "bias": 0.1 * LOUD,
    }  # fmt: skip
    if gate:
        weights["wg"] = normal(WIDTH, 96, seed=3, scale=0.02)
    return model(text, opset=17, **weights)


FEEDS = feeds_of(n=6, x=(1, 16, WIDTH))
UNSEEN = [{"x": normal(1, 16, WIDTH, seed=700 + k)} for k in range(4)]


def planned(source: onnx.ModelProto, feeds: Feeds, qtype: QType = U4) -> tuple[g.Graph, Context]:
    """All of a model's MatMuls are to have their weights in blocks."""
    graph, ctx = g.load(source), context(samples=samples_of(source, feeds))
    for node in g.walk(graph):
        if node.op in ("MatMul", "Gemm", "Conv") and g.weight_view(node):
            ctx.plan[node.name] = NodePlan(weight=qtype)
    return graph, ctx


def scaled(source: onnx.ModelProto, feeds: Feeds, step: AWQ) -> tuple[g.Graph, int, Context]:
    graph, ctx = planned(source, feeds)
    assert ctx.samples is not None
    if wanted := step.observe(graph, ctx):
        ctx.stats |= observe(graph, wanted, ctx.samples, threads=1)
    return graph, step.apply(graph, ctx), ctx


def rounded(graph: g.Graph, ctx: Context) -> g.Graph:
    """Weights as the model would have them of their codes."""
    graph = g.copy(graph)
    RoundToNearest().apply(graph, ctx)
    for node, _ in ctx.plan.quantized(g.walk(graph)):
        view = g.weight_view(node)
        assert view is not None
        matrix = ctx.weights[view.tensor.name].dequantize()
        node.inputs[1] = g.constant(view.tensor.name, view.from_matrix(matrix))
    return graph


def error(source: onnx.ModelProto, graph: g.Graph, feeds: Feeds) -> float:
    return max(relative(run(graph, feed)["y"], run(source, feed)["y"]) for feed in feeds)


def mean_sqnr(source: onnx.ModelProto, graph: g.Graph, feeds: Feeds) -> float:
    return float(np.mean([sqnr(run(graph, f)["y"], run(source, f)["y"]) for f in feeds]))


@pytest.mark.parametrize("gate", [False, True])
def test_the_float_function_stays_and_it_all_folds(gate: bool) -> None:
    source = mlp(gate)
    graph, changes, ctx = scaled(source, FEEDS, AWQ())
    assert changes == 2  # what reads the normalization; the last layer
    assert ops(graph) == ops(source)
    assert error(source, graph, FEEDS) < 1e-5
    assert not ctx.stats


@pytest.mark.parametrize("gate", [False, True])
def test_weights_of_loud_channels_err_less_end_to_end(gate: bool) -> None:
    source = mlp(gate)
    plain = mean_sqnr(source, rounded(*planned(source, FEEDS)), UNSEEN)
    graph, _, ctx = scaled(source, FEEDS, AWQ())
    assert mean_sqnr(source, rounded(graph, ctx), UNSEEN) > plain + 2  # dB


def test_the_objective_is_never_worse_than_without() -> None:
    for seed in range(8):
        weight, rows = normal(24, WIDTH, seed=seed), normal(50, WIDTH, seed=90 + seed) * LOUD
        layer = Layer(weight, rows, np.arange(WIDTH), U4)
        errors = [
            layer.error(salience_scale(mean_magnitude([layer], WIDTH), r / 20)) for r in range(21)
        ]
        assert min(errors) < 0.5 * errors[0]
        assert errors[0] == pytest.approx(layer.error(np.ones(WIDTH)))


def test_the_error_is_equation_4_written_out() -> None:
    weight, rows, s = normal(5, 8), normal(20, 8, seed=1), np.linspace(0.5, 2, 8)
    layer = Layer(weight, rows, np.arange(8), QType.parse("u4a:4"))
    off = np.zeros((5, 8))
    for row in range(5):
        for block in (slice(0, 4), slice(4, 8)):
            w = weight[row, block] * s[block]
            low, high = min(w.min(), 0), max(w.max(), 0)
            scale = np.float64(np.float16((high - low) / 15))
            zero = np.rint(-low / ((high - low) / 15))
            codes = np.clip(np.rint(w / scale) + zero, 0, 15)
            off[row, block] = (codes - zero) * scale / s[block] - weight[row, block]
    expected = np.square(rows @ off.T).sum() / np.square(rows @ weight.T).sum()
    assert layer.error(s) == pytest.approx(expected, rel=1e-3)


def test_the_scale_is_a_power_of_the_mean_magnitude() -> None:
    magnitude = np.array([4.0, 1, 16, 0])
    s = salience_scale(magnitude, 0.5)
    np.testing.assert_allclose(s / s[1], [2, 1, 4, np.sqrt(16e-4)])
    assert s.max() * s.min() == pytest.approx(1)
    np.testing.assert_array_equal(salience_scale(magnitude, 0), np.ones(4))
    np.testing.assert_array_equal(salience_scale(np.zeros(3), 0.5), np.ones(3))


def test_layers_that_share_an_input_share_the_scale() -> None:
    graph, _, _ = scaled(mlp(gate=True), FEEDS, AWQ())
    norm, up, gate = (
        next(n for n in graph.nodes if n.outputs[0].name == name) for name in ("h", "u", "g")
    )
    s = LOUD / g.values(norm.inputs[1])
    assert s.max() / s.min() > 2

    def factor(node: g.Node, before: Array) -> Array:
        return g.values(node.inputs[1])[:, 0] / before[:, 0]

    up_s = factor(up, normal(WIDTH, 96, seed=1, scale=0.1))  # its rows are divided for the last
    np.testing.assert_allclose(up_s / up_s[0], s / s[0], rtol=1e-4)
    gate_s = factor(gate, normal(WIDTH, 96, seed=3, scale=0.02))
    np.testing.assert_allclose(gate_s, s, rtol=1e-4)


def residual_reader() -> onnx.ModelProto:
    text = f"""(float[n,t,{WIDTH}] x) => (float[n,t,{WIDTH}] y) {{
        h = LayerNormalization (x, gain, bias)
        a = MatMul (h, w)
        y = Add (a, h)
    }}"""
    w = normal(WIDTH, WIDTH, scale=0.1)
    return model(text, opset=17, gain=LOUD, bias=0 * LOUD, w=w)


def test_a_mul_of_its_own_only_on_demand() -> None:
    source = residual_reader()
    assert scaled(source, FEEDS, AWQ())[1] == 0
    graph, changes, _ = scaled(source, FEEDS, AWQ(explicit=0.3))
    assert changes == 1
    assert ops(graph).count("Mul") == 1
    assert error(source, graph, FEEDS) < 1e-5


def test_layers_left_float_are_only_carried_along() -> None:
    source = mlp(gate=True)
    graph, ctx = planned(source, FEEDS)
    first = next(n for n in graph.nodes if n.op == "MatMul")
    for name in list(ctx.plan):
        if name != first.name:
            del ctx.plan[name]
    step = AWQ()
    assert ctx.samples is not None
    ctx.stats |= observe(graph, step.observe(graph, ctx), ctx.samples, threads=1)
    assert step.apply(graph, ctx) == 1
    assert error(source, graph, FEEDS) < 1e-5


def test_without_a_plan_nothing_is_measured() -> None:
    graph = g.load(mlp())
    assert AWQ().observe(graph, context()) == {}


def test_results_are_compared_with_the_scaled_model() -> None:
    """Tensors inside are divided: those of the result are, and so are the reference's."""
    steps: list[Any] = [Assign(format="w8"), AWQ(), RoundToNearest()]
    source = mlp()
    result = Pipeline(steps).run(
        g.load(source), samples_of(source, FEEDS), load_target("cpu"), threads=1
    )
    norm = next(n for n in result.prepared.nodes if n.op == "LayerNormalization")
    assert not np.allclose(g.values(norm.inputs[1]), LOUD)


def test_a_grid_has_steps() -> None:
    with pytest.raises(OnnxqError, match="grid"):
        AWQ(grid=0)
