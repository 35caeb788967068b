from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Array, Feeds, context, feeds_of, model, normal, ops, relative, run, samples_of
from onnxq.passes import SmoothQuant
from onnxq.passes.prepare.smoothquant import Layer, smoothing_scale

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.observe_channels import ChannelRows
from onnxq.pipeline import Pass, Pipeline
from onnxq.recipe import load_recipe
from onnxq.target import load_target

WIDTH, HEADS = 32, 4
OUTLIERS = np.ones(WIDTH, np.float32)
OUTLIERS[[3, 11, 20]] = 100


def smoothed(source: onnx.ModelProto, feeds: Feeds, **fields: Any) -> tuple[g.Graph, int]:
    graph, ctx, step = (
        g.load(source),
        context(samples=samples_of(source, feeds)),
        SmoothQuant(**fields),
    )
    assert ctx.samples is not None
    ctx.stats |= observe(graph, step.observe(graph, ctx), ctx.samples, threads=1)
    return graph, step.apply(graph, ctx)


def check_same(source: onnx.ModelProto, graph: g.Graph, feeds: Feeds) -> None:
    for feed in feeds:
        expected = run(source, feed)
        for key, values in run(graph, feed).items():
            assert relative(values, expected[key]) < 1e-5


def block(kind: str = "LayerNormalization") -> onnx.ModelProto:
    """A transformer's block whose normalizations have three gains of 100, as trained ones have."""
    names = {"LayerNormalization": ("gain, bias", "gain2, bias2"), "rms": ("gain", "gain2")}[kind]

    def norm(x: str, out: str, parts: str) -> str:
        if kind == "LayerNormalization":
            return f"{out} = LayerNormalization ({x}, {parts})"
        return (
            f"{out}s = Mul ({x}, {x}) {out}m = ReduceMean <axes = [-1]> ({out}s) "
            f"{out}e = Add ({out}m, eps) {out}r = Sqrt ({out}e) {out}d = Div ({x}, {out}r) "
            f"{out} = Mul ({out}d, {parts})"
        )

    text = f"""(float[n,t,{WIDTH}] x) => (float[n,t,{WIDTH}] y) {{
        {norm("x", "h", names[0])}
        q = MatMul (h, wq) k = MatMul (h, wk) v = MatMul (h, wv)
        vb = Add (v, bv)
        q4 = Reshape (q, heads) k4 = Reshape (k, heads) v4 = Reshape (vb, heads)
        qt = Transpose <perm = [0,2,1,3]> (q4)
        kt = Transpose <perm = [0,2,3,1]> (k4)
        vt = Transpose <perm = [0,2,1,3]> (v4)
        scores = MatMul (qt, kt) scaled = Mul (scores, scale)
        p = Softmax (scaled)
        c = MatMul (p, vt)
        ct = Transpose <perm = [0,2,1,3]> (c)
        c3 = Reshape (ct, flat)
        o = MatMul (c3, wo)
        a = Add (x, o)
        {norm("a", "f", names[1])}
        up = MatMul (f, wu) gate = MatMul (f, wg)
        sg = Sigmoid (gate) act = Mul (gate, sg) mid = Mul (act, up)
        down = MatMul (mid, wd)
        y = Add (a, down)
    }}"""
    quiet = (1 / OUTLIERS)[:, None]  # trained weights make little of what is loud
    square = {
        name: normal(WIDTH, WIDTH, seed=k, scale=0.2) * quiet
        for k, name in enumerate(("wq", "wk", "wv"))
    }
    weights = square | {
        "wo": normal(WIDTH, WIDTH, seed=4, scale=0.2),
        "wu": normal(WIDTH, 48, seed=5, scale=0.2) * quiet,
        "wg": normal(WIDTH, 48, seed=6, scale=0.2) * quiet,
        "wd": normal(48, WIDTH, seed=7, scale=0.2), "bv": normal(WIDTH, seed=8),
        "gain": OUTLIERS, "bias": 0.1 * OUTLIERS, "gain2": OUTLIERS, "bias2": 0.1 * OUTLIERS,
        "eps": np.float32(1e-5), "scale": np.float32(8**-0.5),
        "heads": np.array([0, 0, HEADS, WIDTH // HEADS]), "flat": np.array([0, 0, WIDTH]),
    }  # fmt: skip
    used = {k: v for k, v in weights.items() if f" {k}" in text.replace("(", " ")}
    return model(text, opset=17, **used)


def quantized(source: onnx.ModelProto, feeds: Feeds, *extra: Pass) -> g.Graph:
    steps = list(load_recipe("int8-static").passes)
    at = [step.name for step in steps].index("fold-batchnorm") + 1
    steps[at:at] = extra
    samples = samples_of(source, feeds)
    return Pipeline(steps).run(g.load(source), samples, load_target("cpu"), threads=1).graph


def cosine(source: onnx.ModelProto, graph: g.Graph, feeds: Feeds) -> float:
    a, b = (np.concatenate([run(m, f)["y"].ravel() for f in feeds]) for m in (source, graph))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


FEEDS = feeds_of(n=12, x=(1, 9, WIDTH))
UNSEEN = [{"x": normal(1, 9, WIDTH, seed=900 + k)} for k in range(6)]


@pytest.mark.parametrize("kind", ["LayerNormalization", "rms"])
def test_three_channels_a_hundred_times_the_rest(kind: str) -> None:
    source = block(kind)
    assert cosine(source, quantized(source, FEEDS), UNSEEN) < 0.99
    assert cosine(source, quantized(source, FEEDS, SmoothQuant()), UNSEEN) >= 0.999


@pytest.mark.parametrize("kind", ["LayerNormalization", "rms"])
def test_it_all_folds_into_norms_and_layers_and_the_function_stays(kind: str) -> None:
    source = block(kind)
    graph, changes = smoothed(source, FEEDS, alpha=0.5)
    assert changes == 4  # q, k, v; o; gate, up; down
    assert ops(graph) == ops(source)
    check_same(source, graph, FEEDS)


def test_the_scale_is_equation_4() -> None:
    x, w = np.array([4.0, 100, 0, 2]), np.array([0.5, 0.25, 3, 0])
    np.testing.assert_allclose(
        smoothing_scale(x, w, 0.5), [np.sqrt(4 / 0.5), np.sqrt(100 / 0.25), 1, 1]
    )
    np.testing.assert_allclose(smoothing_scale(x, w, 1.0), [4, 100, 1, 1])
    np.testing.assert_allclose(smoothing_scale(x, w, 0.0), [2, 4, 1, 1])


def test_the_error_is_that_of_quantizing_the_layer() -> None:
    """Against every step written out, on the rows that the range was not taken from."""
    w, seen, rows = normal(5, 6), normal(20, 6, seed=1), normal(7, 6, seed=2)
    s = np.linspace(0.5, 3, 6)
    halves = tuple(ChannelRows(r, r.min(axis=0), r.max(axis=0)) for r in (seen, rows))
    found = Layer(w, halves, np.arange(6)).error(s, 0)  # type: ignore[arg-type]
    low, high = (seen / s).min(), (seen / s).max()
    step = (high - low) / 255
    zero = np.rint(-low / step)
    x = (np.clip(np.rint(rows / s / step) + zero, 0, 255) - zero) * step
    scale = np.abs(w * s).max(axis=1, keepdims=True) / 127
    ws = np.rint(w * s / scale) * scale
    errors = [
        np.sum((x[k] @ ws.T - rows[k] @ w.T) ** 2) / np.sum((rows[k] @ w.T) ** 2) for k in range(7)
    ]
    assert found == pytest.approx(np.mean(errors), rel=1e-3)


def residual_reader() -> onnx.ModelProto:
    """A normalization that a residual reads as well, as in BERT."""
    text = f"""(float[n,t,{WIDTH}] x) => (float[n,t,{WIDTH}] y) {{
        h = LayerNormalization (x, gain, bias)
        a = MatMul (h, w) r = Relu (a) b = MatMul (r, v)
        y = Add (b, h)
    }}"""
    quiet = (1 / OUTLIERS)[:, None]
    weights = {"w": normal(WIDTH, 64) * quiet, "v": normal(64, WIDTH, seed=1)}
    return model(text, opset=17, gain=OUTLIERS, bias=0 * OUTLIERS, **weights)


def test_a_mul_divides_where_something_else_reads_the_norm_and_it_pays() -> None:
    source = residual_reader()
    graph, _ = smoothed(source, FEEDS)
    assert ops(graph).count("Mul") == 1
    check_same(source, graph, FEEDS)
    norm = next(n for n in graph.nodes if n.op == "LayerNormalization")
    np.testing.assert_array_equal(g.values(norm.inputs[1]), OUTLIERS)
    assert "Mul" not in ops(smoothed(source, FEEDS, explicit=1)[0])


def test_no_mul_is_made_where_it_does_not_pay() -> None:
    text = "(float[n,16] x) => (float[n,8] y) { y = MatMul (x, w) }"
    source = model(text, w=normal(16, 8))
    even = [{"x": np.tanh(10 * feed["x"])} for feed in feeds_of(x=(9, 16))]
    assert smoothed(source, even)[1] == 0


@pytest.mark.parametrize(
    ("body", "folds"),
    [
        ("a = Gemm (x, w, b) r = Relu (a) y = MatMul (r, v)", 1),
        ("a = MatMul (x, w) c = Mul (a, b) t = Tanh (c) d = Mul (t, b) y = MatMul (d, v)", 1),
        ("a = MatMul (x, w) u = MatMul (x, w2) t = Tanh (a) m = Mul (t, u) y = MatMul (m, v)", 1),
        ("a = MatMul (x, w) t = Tanh (a) y = MatMul (t, v)", 0),
    ],
    ids=["linear", "constant Mul", "gate", "nothing"],
)
def test_where_it_folds(body: str, folds: int) -> None:
    weights = {"w": normal(4, 8), "b": normal(8, seed=1), "v": normal(8, 3, seed=2)}
    weights["w2"] = normal(4, 8, seed=3)
    used = {k: v for k, v in weights.items() if f"{k})" in body or f" {k}," in body}
    source = model(f"(float[n,4] x) => (float[n,3] y) {{ {body} }}", **used)
    feeds = feeds_of(x=(9, 4))
    graph, changes = smoothed(source, feeds, alpha=0.5, explicit=1)
    assert changes == folds
    assert ops(graph) == ops(source)
    check_same(source, graph, feeds)


def grouped_attention() -> onnx.ModelProto:
    """Two heads of values for four of queries: values are repeated before the product."""
    text = """(float[1,5,16] x, float[1,4,5,5] p) => (float[1,5,6] y) {
        v = MatMul (x, wv)
        v4 = Reshape (v, heads)
        vt = Transpose <perm = [0,2,1,3]> (v4)
        u = Unsqueeze (vt, two)
        e = Expand (u, wide)
        r = Reshape (e, four)
        c = MatMul (p, r)
        ct = Transpose <perm = [0,2,1,3]> (c)
        c3 = Reshape (ct, flat)
        y = MatMul (c3, wo)
    }"""
    return model(
        text, wv=normal(16, 8), wo=normal(16, 6, seed=1), heads=np.array([1, 5, 2, 4]),
        two=np.array([2]), wide=np.array([1, 2, 2, 5, 4]), four=np.array([1, 4, 5, 4]),
        flat=np.array([1, 5, 16]),
    )  # fmt: skip


def test_repeated_values_share_a_scale_with_their_copies() -> None:
    source, feeds = grouped_attention(), feeds_of(x=(1, 5, 16), p=(1, 4, 5, 5))
    graph, changes = smoothed(source, feeds, alpha=0.5, explicit=1)
    assert changes == 1
    check_same(source, graph, feeds)
    first = next(iter(graph.nodes))
    wv: Array = g.values(first.inputs[1])
    ratio = wv / normal(16, 8)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-4)
    assert not np.allclose(ratio[0], 1)


def test_alpha_is_a_share() -> None:
    with pytest.raises(OnnxqError, match="alpha"):
        SmoothQuant(alpha=1.5)
