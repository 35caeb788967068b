from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Array, Feeds, context, feeds_of, model, normal, ops, relative, run, samples_of
from onnxq.passes import SplitOutliers
from onnxq.passes.prepare.split_outliers import split_largest

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.qtype import QType, quantize_weight, weight_scale


def split(source: onnx.ModelProto, feeds: Feeds, **fields: Any) -> tuple[g.Graph, int]:
    graph, ctx, step = (
        g.load(source),
        context(samples=samples_of(source, feeds)),
        SplitOutliers(**fields),
    )
    assert ctx.samples is not None
    if wanted := step.observe(graph, ctx):
        ctx.stats |= observe(graph, wanted, ctx.samples, threads=1)
    return graph, step.apply(graph, ctx)


def check_same(source: onnx.ModelProto, graph: g.Graph, feeds: Feeds) -> None:
    for feed in feeds:
        assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-5


def naive(sizes: list[float], count: int) -> list[tuple[int, float]]:
    """(channel, size) of all parts: the largest part is replaced by two halves."""
    parts = list(enumerate(sizes))
    for _ in range(count):
        largest = max(parts, key=lambda part: part[1])
        parts.remove(largest)
        parts += [(largest[0], largest[1] / 2)] * 2
    return sorted(parts)


@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_the_largest_is_split_again_and_again(count: int) -> None:
    sizes = np.array([1.0, 9.0, 2.0, 4.5])
    found = split_largest(sizes, count)
    parts = sorted((int(k), float(sizes[k] * share)) for k, share in zip(*found[:2], strict=True))
    assert parts == naive(sizes.tolist(), count)
    for channel in range(4):
        assert found.share[found.source == channel].sum() == 1
        assert found.offset[found.source == channel].sum() == 0


def outliers(columns: int = 20) -> Array:
    w = normal(columns, 12)
    w[3] *= 20
    return w


WEIGHTED = "(float[n,20] x) => (float[n,12] y) { y = MatMul (x, w) }"
FEEDS = feeds_of(x=(6, 20))


def test_halves_add_up_to_the_weight_and_their_codes_to_its_code() -> None:
    source = model(WEIGHTED, w=outliers())
    graph, changes = split(source, FEEDS, ratio=0.05)
    assert changes == 1
    gather, layer = graph.nodes
    index, w = g.values(gather.inputs[1]), g.values(layer.inputs[1])
    assert index.tolist() == [*range(20), int(index[-1])]
    total = np.zeros((20, 12), np.float64)
    np.add.at(total, index, w.astype(np.float64))
    np.testing.assert_allclose(total, outliers(), atol=1e-6 * np.abs(w).max())
    assert np.abs(w).max() < 0.6 * np.abs(outliers()).max()
    # round((w - d/2)/2) + round((w + d/2)/2) = round(w): d is the step, per output channel.
    s8 = QType.parse("s8:channel")
    scale, zero = weight_scale(w.T, s8)
    codes = quantize_weight(w.T, scale, zero, s8).codes.astype(int)
    whole = outliers()[index[-1]] / scale
    apart = np.abs(codes[:, index[-1]] + codes[:, -1] - whole)
    assert np.all(apart <= 0.5 + 0.05)  # the step has moved by a quarter of itself in 127
    check_same(source, graph, FEEDS)


def test_what_is_split_is_finer_quantized() -> None:
    """The claim: an outlier is half as large, and so is the step that all others share."""
    s8 = QType.parse("s8")
    w = outliers()
    graph, _ = split(model(WEIGHTED, w=w), FEEDS, ratio=0.1)
    wide = g.values(graph.nodes[1].inputs[1])
    index = g.values(graph.nodes[0].inputs[1])

    def restored(matrix: Array) -> Array:
        return quantize_weight(matrix, *weight_scale(matrix, s8), s8).dequantize()

    total = np.zeros_like(w)
    np.add.at(total, index, restored(wide))
    assert np.square(total - w).mean() < 0.5 * np.square(restored(w) - w).mean()


@pytest.mark.parametrize("of", ["weights", "activations"])
@pytest.mark.parametrize(
    "body",
    [
        "a = Gemm (x, w, b) r = Relu (a) y = Gemm <transB = 1> (r, v)",
        "a = MatMul (x, w) r = LeakyRelu (a) y = Gemm <transB = 1> (r, v)",
    ],
)
def test_the_layer_before_makes_the_copies(body: str, of: str) -> None:
    used = {"w": normal(20, 8), "v": normal(5, 8, seed=2)} | (
        {"b": normal(8, seed=1)} if " b)" in body else {}
    )
    source = model(f"(float[n,20] x) => (float[n,5] y) {{ {body} }}", **used)
    graph, changes = split(source, FEEDS, ratio=0.2, of=of)
    assert changes == 2
    assert ops(graph).count("Gather") == 1  # of x, which nothing makes
    check_same(source, graph, FEEDS)
    last = graph.nodes[-1]
    assert g.values(last.inputs[1]).shape == (5, 10)


@pytest.mark.parametrize("of", ["weights", "activations"])
def test_convolutions_are_split_along_input_channels(of: str) -> None:
    text = """(float[n,6,5,5] x) => (float[n,4,5,5] y) {
        a = Conv (x, w) r = Sigmoid (a) y = Conv <pads = [1,1,1,1]> (r, v, b)
    }"""
    weights = {"w": normal(8, 6, 1, 1), "v": normal(4, 8, 3, 3, seed=1), "b": normal(4, seed=2)}
    source, feeds = model(text, **weights), feeds_of(x=(2, 6, 5, 5))
    graph, changes = split(source, feeds, ratio=0.25, of=of)
    assert changes == 2
    assert {g.values(n.inputs[1]).shape[1] for n in graph.nodes if n.op == "Conv"} == {8, 10}
    check_same(source, graph, feeds)


def test_an_outlier_of_the_activations_is_halved() -> None:
    source = model(WEIGHTED, w=normal(20, 12))
    feeds = [{"x": f["x"] * np.where(np.arange(20) == 7, 50, 1).astype(np.float32)} for f in FEEDS]
    graph, _ = split(source, feeds, ratio=0.05, of="activations")
    gather, halved, _ = graph.nodes
    shares = g.values(halved.inputs[1])
    assert g.values(gather.inputs[1])[-1] == 7
    assert shares.tolist() == [0.5 if k in (7, 20) else 1 for k in range(21)]
    check_same(source, graph, feeds)


def test_the_ratio_is_a_share() -> None:
    with pytest.raises(OnnxqError, match="ratio"):
        SplitOutliers(ratio=0)
