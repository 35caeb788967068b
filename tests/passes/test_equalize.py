from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import (
    Array,
    Feeds,
    batch_norm,
    bn,
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
from onnxq.passes import Equalize, FoldBatchNorm, Normalize
from onnxq.passes.prepare.equalize import scale_between

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.pipeline import Context, Pipeline
from onnxq.recipe import load_recipe
from onnxq.target import Target, load_target, target_text

SPREAD = np.geomspace(0.1, 10, 8).astype(np.float32)  # over 100×


def equalized(
    source: onnx.ModelProto, feeds: Feeds | None = None, step: Equalize | None = None
) -> tuple[g.Graph, int, Context]:
    step = step or Equalize()
    graph = g.load(source)
    ctx = context(samples=samples_of(source, feeds) if feeds else None)
    if feeds:
        assert ctx.samples is not None
        ctx.stats |= observe(graph, step.observe(graph, ctx), ctx.samples, threads=1)
    return graph, step.apply(graph, ctx), ctx


def weight(graph: g.Graph, output: str) -> Array:
    node = next(n for n in graph.nodes if n.outputs[0].name == output)
    return g.values(node.inputs[1])


def check_same(source: onnx.ModelProto, graph: g.Graph, feeds: Feeds) -> None:
    for feed in feeds:
        expected = run(source, feed)
        for key, values in run(graph, feed).items():
            assert relative(values, expected[key]) < 1e-5


def two_layers(activation: str) -> onnx.ModelProto:
    text = (
        f"(float[n,4] x) => (float[n,3] y) {{ a = Gemm (x, w, b) {activation} y = MatMul (r, v) }}"
    )
    weights = {"w": normal(4, 8) * SPREAD, "b": normal(8, seed=1), "v": normal(8, 3, seed=2)}
    return model(text, slope=np.float32([0.2]), **weights)


def test_one_step_of_two_layers_is_equation_11() -> None:
    source = two_layers("r = Relu (a)")
    names = [t.name for t in source.graph.initializer]
    w, b, v = (onnx.numpy_helper.to_array(source.graph.initializer[names.index(k)]) for k in "wbv")
    graph, changes, _ = equalized(source)
    assert changes == 1
    s = np.array([np.sqrt(np.abs(w[:, i]).max() / np.abs(v[i]).max()) for i in range(8)])
    np.testing.assert_allclose(weight(graph, "a"), w / s, rtol=1e-5)
    np.testing.assert_allclose(weight(graph, "y"), v * s[:, None], rtol=1e-5)
    np.testing.assert_allclose(g.values(graph.nodes[0].inputs[2]), b / s, rtol=1e-5)
    np.testing.assert_allclose(scale_between(np.abs(w).max(0), np.abs(v).max(1)), s, rtol=1e-6)


@pytest.mark.parametrize(
    "activation", ["r = Relu (a)", "r = LeakyRelu (a)", "r = PRelu (a, slope)", "r = Identity (a)"]
)
def test_ranges_on_both_sides_are_one(activation: str) -> None:
    source = two_layers(activation)
    graph, _, _ = equalized(source)
    r1, r2 = np.abs(weight(graph, "a")).max(axis=0), np.abs(weight(graph, "y")).max(axis=1)
    np.testing.assert_allclose(r1, r2, rtol=1e-3)
    check_same(source, graph, feeds_of(x=(5, 4)))


@pytest.mark.parametrize("activation", ["r = Sigmoid (a)", "r = Tanh (a)", "r = Exp (a)"])
def test_what_is_not_homogeneous_stops_it(activation: str) -> None:
    assert equalized(two_layers(activation))[1] == 0


def separable(clip: bool = False) -> onnx.ModelProto:
    """Conv, depthwise Conv, pointwise Conv, channels spread over 100×, and their inverse after."""
    act = (lambda x: f"Clip ({x}, low, high)") if clip else (lambda x: f"Relu ({x})")
    text = f"""(float[n,3,8,8] x) => (float[n,5,1,1] y) {{
        a = Conv <pads = [1,1,1,1]> (x, w, b)
        r = {act("a")}
        d = Conv <group = 8, pads = [1,1,1,1]> (r, dw, db)
        s = {act("d")}
        p = Conv (s, pw)
        t = Relu (p)
        q = GlobalAveragePool (t)
        y = Conv (q, last)
    }}"""
    wide = SPREAD[:, None, None, None]
    weights = {
        "w": normal(8, 3, 3, 3, scale=0.2) * wide, "b": 0.1 * SPREAD,
        "dw": normal(8, 1, 3, 3, seed=1, scale=0.3) / wide[::-1] / wide, "db": 0.1 / SPREAD[::-1],
        "pw": normal(6, 8, 1, 1, seed=2) * SPREAD[::-1].reshape(1, 8, 1, 1),
        "last": normal(5, 6, 1, 1, seed=3),
    }  # fmt: skip
    bounds = {"low": np.float32(0), "high": np.float32(6)} if clip else {}
    return model(text, **weights, **bounds)


def per_tensor(path: Path) -> Target:
    file = path / "tensor.toml"
    file.write_text(target_text("cpu").replace("s8:channel", "s8"))
    return load_target(str(file))


def test_depthwise_chains_gain_what_per_tensor_scales_lose(tmp_path: Path) -> None:
    source, feeds = separable(), feeds_of(x=(1, 3, 8, 8))
    target, found = per_tensor(tmp_path), []
    for extra in ([], [Equalize()]):
        steps = list(load_recipe("int8-static").passes)
        at = [step.name for step in steps].index("fold-batchnorm") + 1
        steps[at:at] = extra
        done = Pipeline(steps).run(g.load(source), samples_of(source, feeds), target, threads=1)
        said, want = (np.stack([run(m, f)["y"] for f in feeds]) for m in (done.graph, source))
        found.append(sqnr(said, want))
    plain, better = found
    assert better > plain + 10
    assert better > 25


def test_a_clip_that_no_channel_reaches_becomes_a_relu() -> None:
    source, feeds = separable(clip=True), feeds_of(x=(1, 3, 8, 8))
    small = [{"x": feed["x"] * 0.02} for feed in feeds]
    graph, _, _ = equalized(source, small)
    assert "Clip" not in ops(graph)
    check_same(source, graph, small)


def test_channels_that_reach_a_clip_keep_their_scale_and_the_function_stays() -> None:
    source, feeds = separable(clip=True), feeds_of(x=(1, 3, 8, 8))
    graph, changes, _ = equalized(source, feeds)
    assert changes
    assert "Clip" in ops(graph)
    check_same(source, graph, feeds)
    before = onnx.numpy_helper.to_array(source.graph.initializer[0])
    reached = np.stack([_tensor(source, feed, "a") for feed in feeds]).max(axis=(0, 1, 3, 4)) > 6
    assert reached.any()
    assert not reached.all()
    after = weight(graph, "a")
    np.testing.assert_array_equal(after[reached], before[reached])
    assert not np.allclose(after[~reached], before[~reached])


def _tensor(source: onnx.ModelProto, feed: dict[str, Array], name: str) -> Array:
    twin = onnx.ModelProto()
    twin.CopyFrom(source)
    twin.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return run(twin, feed)[name]


def test_without_samples_or_statistics_a_clip_is_left_alone() -> None:
    graph, _, _ = equalized(separable(clip=True))
    before = separable(clip=True).graph.initializer
    np.testing.assert_array_equal(weight(graph, "a"), onnx.numpy_helper.to_array(before[0]))


def test_statistics_of_batch_normalization_follow_the_scales() -> None:
    body = f"c = Conv (x, w) z = {bn('c', 'p')} r = Relu (z) y = Conv (r, v)"
    text = f"(float[n,4,5,5] x) => (float[n,2,5,5] y) {{ {body} }}"
    source = model(
        text, w=normal(6, 4, 1, 1) * 5, v=normal(2, 6, 1, 1, seed=1), **batch_norm(6, "p")
    )
    graph, ctx = g.load(source), context()
    for step in (Normalize(), FoldBatchNorm()):
        step.apply(graph, ctx)
    before, old = ctx.batch_statistics["z"], weight(graph, "z")
    assert Equalize().apply(graph, ctx) == 1
    s = np.abs(old).max(axis=(1, 2, 3)) / np.abs(weight(graph, "z")).max(axis=(1, 2, 3))
    for was, now in zip(before, ctx.batch_statistics["z"], strict=True):
        np.testing.assert_allclose(now, was / s, rtol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "a = MatMul (x, w) r = Relu (a) y = MatMul (r, v) z = Neg (r)",
        "a = MatMul (x, w) r = Relu (a) y = MatMul (r, v) z = MatMul (a, w2)",
        "r = MatMul (x, w) y = MatMul (r, v) u = MatMul (x, w) z = Sigmoid (u)",
    ],
    ids=["an output", "equal readers", "a shared weight"],
)
def test_readers_that_do_not_scale_stop_it(body: str) -> None:
    text = f"(float[n,4] x) => (float[n,3] y, float[n,k] z) {{ {body} }}"
    source = model(text, w=normal(4, 8) * SPREAD, v=normal(8, 3, seed=1), w2=normal(8, 2, seed=2))
    graph, changes, _ = equalized(source)
    assert changes == ("w2" in body)
    check_same(source, graph, feeds_of(x=(5, 4)))


@pytest.mark.parametrize(
    "body",
    [
        "a = Conv (x, w) r = Relu (a) b = Conv (x, w2) s = Add (r, b) t = Relu (s) y = Conv (t, v)",
        "a = Conv (x, w) m = MaxPool <kernel_shape = [2,2]> (a) f = Flatten (m) y = Gemm (f, fc)",
        "a = Conv (x, w) q = GlobalAveragePool (a) f = Reshape (q, shape) y = MatMul (f, head)",
        "a = Conv (x, w) t = Transpose <perm = [0,2,3,1]> (a) y = MatMul (t, head)",
        "a = Conv (x, w) r = Relu (a) t = ConvTranspose (r, up) y = Relu (t)",
        "a = Conv (x, w) p = Pad (a, pads) d = Conv <group = 2> (p, grouped) y = Relu (d)",
    ],
    ids=["residual", "flatten", "reshape", "transpose", "transposed", "grouped"],
)
def test_channels_are_followed(body: str) -> None:
    text = f"(float[1,3,5,5] x) => (float y) {{ {body} }}"
    weights = {
        "w": normal(8, 3, 2, 2) * SPREAD[:, None, None, None], "w2": normal(8, 3, 2, 2, seed=1),
        "v": normal(4, 8, 1, 1, seed=2), "fc": normal(72, 4, seed=3), "head": normal(8, 4, seed=4),
        "up": normal(8, 3, 2, 2, seed=5), "grouped": normal(6, 4, 1, 1, seed=6),
        "shape": np.array([1, 8]), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }  # fmt: skip
    used = {k: v for k, v in weights.items() if f" {k})" in body or f" {k}," in body}
    source = onnx.ModelProto()
    source.CopyFrom(_without_shape(text, used))
    graph, changes, _ = equalized(source)
    assert changes == 1
    check_same(source, graph, feeds_of(x=(1, 3, 5, 5)))


def _without_shape(text: str, weights: dict[str, Array]) -> onnx.ModelProto:
    graph = onnx.parser.parse_graph("g " + text)
    graph.output[0].type.tensor_type.ClearField("shape")
    graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8
    )


def test_a_bias_that_keeps_a_channel_above_zero_is_absorbed() -> None:
    text = "(float[n,4] x) => (float[n,3] y) { a = Gemm (x, w, b) r = Relu (a) y = Gemm (r, v, c) }"
    bias = np.float32([0, 0, 40, 0, 50, 0, 0, 0])
    source = model(text, w=normal(4, 8), b=bias, v=normal(8, 3, seed=1), c=normal(3, seed=2))
    feeds = feeds_of(x=(6, 4))
    graph, _, _ = equalized(source, feeds)
    check_same(source, graph, feeds)
    assert np.abs(g.values(graph.nodes[0].inputs[2])).max() < 20
    kept, _, _ = equalized(source, feeds, Equalize(absorb=False))
    assert np.abs(g.values(kept.nodes[0].inputs[2])).max() > 20


def test_nothing_is_absorbed_before_a_convolution_that_pads() -> None:
    text = """(float[n,4,5,5] x) => (float[n,3,5,5] y) {
        a = Conv (x, w, b) r = Relu (a) y = Conv <pads = [1,1,1,1]> (r, v)
    }"""
    bias = np.full(8, 60, np.float32)
    source = model(text, w=normal(8, 4, 1, 1), b=bias, v=normal(3, 8, 3, 3, seed=1))
    feeds = feeds_of(x=(2, 4, 5, 5))
    graph, _, _ = equalized(source, feeds)
    check_same(source, graph, feeds)
    assert len(graph.nodes[2].inputs) == 2
