"""Small models, each awkward in its own way, and shorthands to run and quantize them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxq.passes import FoldBatchNorm, Normalize

from onnxq import graph as g
from onnxq.pipeline import Context, Pass, Pipeline, Result
from onnxq.recipe import load_recipe
from onnxq.report import Report
from onnxq.runtime import Session
from onnxq.samples import Samples, input_specs, open_samples
from onnxq.target import Target, load_target

Array = NDArray[Any]
Feeds = list[dict[str, Array]]

MODELS = Path(__file__).parents[1] / "models"
STATIC_FLOAT = (Normalize(), FoldBatchNorm())


def model(text: str, opset: int = 13, **weights: Array) -> onnx.ModelProto:
    """A model from ONNX's text form, `(inputs) => (outputs) { nodes }`, and its initializers."""
    graph = onnx.parser.parse_graph("g " + text)
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()
    )
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8 + 2 * (opset > 18)
    )
    onnx.checker.check_model(made)
    return made


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def feeds_of(n: int = 8, **shapes: tuple[int, ...]) -> Feeds:
    return [
        {name: normal(*shape, seed=100 * k + i) for i, (name, shape) in enumerate(shapes.items())}
        for k in range(n)
    ]


def batch_norm(channels: int, prefix: str, seed: int = 0) -> dict[str, Array]:
    """γ, β, μ and σ² under the names that `BN(prefix)` reads."""
    rng = np.random.default_rng(seed + 50)
    values = {
        "gamma": rng.uniform(0.5, 1.5, channels) * rng.choice([-1, 1, 1], channels),
        "beta": rng.normal(0, 0.5, channels),
        "mean": rng.normal(0, 0.5, channels),
        "var": rng.uniform(0.5, 2.0, channels),
    }
    return {f"{prefix}_{key}": value.astype(np.float32) for key, value in values.items()}


def bn(x: str, prefix: str) -> str:
    parts = ", ".join(f"{prefix}_{part}" for part in ("gamma", "beta", "mean", "var"))
    return f"BatchNormalization <epsilon = 0.001> ({x}, {parts})"


# ── running ──────────────────────────────────────────────────────────────────────────────────────


def run(
    source: onnx.ModelProto | g.Graph, feed: dict[str, Array], optimize: bool = True
) -> dict[str, Array]:
    proto = source if isinstance(source, onnx.ModelProto) else g.to_proto(source)
    return Session(proto, optimize=optimize, threads=1).run(feed)


def samples_of(source: onnx.ModelProto, feeds: Feeds) -> Samples:
    return open_samples(feeds, input_specs(source))


def context(target: str | Target = "cpu", samples: Samples | None = None, **fields: Any) -> Context:
    device = target if isinstance(target, Target) else load_target(target)
    return Context(device, samples, Report(), threads=1, **fields)


def apply(step: Pass, source: onnx.ModelProto, **fields: Any) -> tuple[g.Graph, int, Context]:
    """A pass by itself: the graph it leaves, how many rewrites it made, the Context."""
    graph, ctx = g.load(source), context(**fields)
    return graph, step.apply(graph, ctx), ctx


def pipeline(
    source: onnx.ModelProto,
    feeds: Feeds | None,
    preset: str = "int8-static",
    target: str | Target = "cpu",
    settings: Sequence[str] = (),
    **options: Any,
) -> Result:
    """A preset's passes without the files and the verification around them."""
    device = target if isinstance(target, Target) else load_target(target)
    samples = samples_of(source, feeds) if feeds else None
    steps = load_recipe(preset, settings).passes
    return Pipeline(steps).run(g.load(source), samples, device, threads=1, **options)


def relative(actual: Array, expected: Array) -> float:
    """max |a − b| / max |b|."""
    difference = np.abs(np.asarray(actual, np.float64) - expected).max()
    return float(difference / np.abs(expected).max())


def sqnr(actual: Array, expected: Array) -> float:
    """Signal to noise, dB."""
    noise = np.square(np.asarray(actual, np.float64) - expected).sum()
    return float(10 * np.log10(np.square(expected, dtype=np.float64).sum() / max(noise, 1e-30)))


def ops(source: onnx.ModelProto | g.Graph) -> list[str]:
    if isinstance(source, onnx.ModelProto):
        return [node.op_type for node in source.graph.node]
    return [node.op for node in g.walk(source)]


def fused(source: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The graph as ONNX Runtime runs it, read back from the file it writes."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(source.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


# ── the zoo ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Case:
    model: onnx.ModelProto
    feeds: Feeds


def conv_bn_relu6() -> Case:
    text = f"""(float[n,3,8,8] x) => (float[n,4,8,8] y) {{
        c = Conv <pads = [1,1,1,1]> (x, w)
        b = {bn("c", "one")}
        r = Clip (b, low, high)
        y = Conv (r, v, bias)
    }}"""
    weights = {
        "w": normal(8, 3, 3, 3, scale=0.4),
        "v": normal(4, 8, 1, 1, seed=1),
        "bias": normal(4, seed=2),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    return Case(model(text, **weights, **batch_norm(8, "one")), feeds_of(x=(1, 3, 8, 8)))


def depthwise() -> Case:
    text = f"""(float[n,3,8,8] x) => (float[n,5] y) {{
        a = Conv (x, w)
        b = {bn("a", "one")}
        c = Relu (b)
        d = Conv <group = 8, pads = [1,1,1,1]> (c, dw)
        e = {bn("d", "two")}
        f = Relu (e)
        p = GlobalAveragePool (f)
        t = Flatten (p)
        y = Gemm <transB = 1> (t, fc, bias)
    }}"""
    weights = {
        "w": normal(8, 3, 1, 1),
        "dw": normal(8, 1, 3, 3, seed=1),
        "fc": normal(5, 8, seed=2),
        "bias": normal(5, seed=3),
    }
    made = model(text, **weights, **batch_norm(8, "one"), **batch_norm(8, "two", 1))
    return Case(made, feeds_of(x=(1, 3, 8, 8)))


def residual() -> Case:
    text = """(float[n,4,6,6] x) => (float[n,4,1,1] y) {
        a = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r = Relu (a)
        c = Conv <pads = [1,1,1,1]> (r, w2, b2)
        s = Add (c, r)
        t = Relu (s)
        m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t)
        z = Conv (m, w3)
        y = GlobalAveragePool (z)
    }"""
    weights = {
        "w1": normal(4, 4, 3, 3, scale=0.3),
        "b1": normal(4, seed=1),
        "w2": normal(4, 4, 3, 3, seed=2, scale=0.3),
        "b2": normal(4, seed=3),
        "w3": normal(4, 4, 1, 1, seed=4),
    }
    return Case(model(text, **weights), feeds_of(x=(1, 4, 6, 6)))


def gemm() -> Case:
    text = """(float[12,3] x) => (float[3,5] y) {
        a = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (x, w1, b1)
        r = Relu (a)
        y = Gemm (r, w2, b2)
    }"""
    weights = {
        "w1": normal(16, 12),
        "b1": normal(16, seed=1),
        "w2": normal(16, 5, seed=2),
        "b2": normal(5, seed=3),
    }
    return Case(model(text, **weights), feeds_of(x=(12, 3)))


def matmul() -> Case:
    text = """(float[n,l,16] x) => (float[n,l,6] y) {
        a = MatMul (x, w1)
        b = Add (a, b1)
        r = Relu (b)
        y = MatMul (r, w2)
    }"""
    weights = {"w1": normal(16, 24), "b1": normal(24, seed=1), "w2": normal(24, 6, seed=2)}
    feeds = [{"x": normal(1, length, 16, seed=length)} for length in (3, 5, 7, 4)]
    return Case(model(text, **weights), feeds)


def tied() -> Case:
    """An embedding table that is the output layer too, behind a Transpose."""
    text = """(int64[n,l] ids) => (float[n,l,20] y) {
        e = Gather (table, ids)
        h = MatMul (e, w)
        t = Transpose <perm = [1,0]> (table)
        y = MatMul (h, t)
    }"""
    rng = np.random.default_rng(0)
    feeds = [{"ids": rng.integers(0, 20, (1, 6))} for _ in range(6)]
    return Case(model(text, table=normal(20, 16), w=normal(16, 16, seed=1)), feeds)


def constant_nodes() -> Case:
    """Weights in Constant nodes, one of them flat and behind a Reshape."""
    text = """(float[n,4] x) => (float[n,2] y) {
        flat = Constant <value = float[12] {1.5,-2,0.5,0.25,1,-1,0.75,2,-0.5,0.3,-0.9,1.1}> ()
        shape = Constant <value_ints = [4,3]> ()
        w = Reshape (flat, shape)
        h = MatMul (x, w)
        i = Identity (h)
        v = Constant <value = float[3,2] {1,-1,0.5,2,-0.25,0.125}> ()
        y = MatMul (i, v)
    }"""
    return Case(model(text), feeds_of(x=(3, 4)))


def attention() -> Case:
    text = """(float[n,l,16] x) => (float[n,l,16] y) {
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        t = Transpose <perm = [0,2,1]> (k)
        s = MatMul (q, t)
        d = Div (s, root)
        p = Softmax <axis = -1> (d)
        c = MatMul (p, v)
        o = MatMul (c, wo)
        y = Add (o, x)
    }"""
    weights = {f"w{name}": normal(16, 16, seed=k) for k, name in enumerate("qkvo")}
    made = model(text, **weights, root=np.float32(4))
    return Case(made, [{"x": normal(2, length, 16, seed=length)} for length in (3, 5, 7, 6)])


def if_body() -> Case:
    """A body that reads a tensor and a weight of the graph around it."""
    text = """(float[n,4] x, bool choice) => (float[n,3] y) {
        h = MatMul (x, w1)
        y = If (choice) <
            then_branch = yes () => (float[n,3] a) { a = MatMul (h, w2) },
            else_branch = no () => (float[n,3] b) {
                v = Constant <value = float[4,3] {1,2,3,4,5,6,7,8,9,1,2,3}> ()
                m = MatMul (h, v)
                b = Identity (m)
            }
        >
    }"""
    made = model(text, w1=normal(4, 4), w2=normal(4, 3, seed=1))
    feeds = feeds_of(x=(2, 4))
    return Case(made, [feed | {"choice": np.array(k % 2 == 0)} for k, feed in enumerate(feeds)])


def opset_11() -> Case:
    text = """(float[n,3,6,6] x) => (float[n,2] y) {
        c = Conv (x, w)
        r = Clip (c, low, high)
        d = Dropout <ratio = 0.5> (r)
        p = GlobalAveragePool (d)
        s = Squeeze <axes = [2,3]> (p)
        y = Gemm (s, fc, bias)
    }"""
    weights = {
        "w": normal(8, 3, 3, 3, scale=0.3),
        "fc": normal(8, 2, seed=1),
        "bias": normal(2, seed=2),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    return Case(model(text, opset=11, **weights), feeds_of(x=(1, 3, 6, 6)))


def shared_weights() -> Case:
    """One weight read by two Conv, one of which has a BatchNormalization to fold."""
    text = f"""(float[n,4,5,5] x) => (float[n,4,5,5] y) {{
        a = Conv (x, w)
        b = {bn("a", "one")}
        c = Conv (b, w)
        y = Add (c, x)
    }}"""
    return Case(model(text, w=normal(4, 4, 1, 1), **batch_norm(4, "one")), feeds_of(x=(1, 4, 5, 5)))


def inner_output() -> Case:
    """A Conv whose float result is an output of the model, and read inside it as well."""
    text = f"""(float[n,3,6,6] x) => (float[n,4,6,6] middle, float[n,2,6,6] y) {{
        middle = Conv (x, w)
        b = {bn("middle", "one")}
        r = Relu (b)
        y = Conv (r, v)
    }}"""
    weights = {"w": normal(4, 3, 1, 1), "v": normal(2, 4, 1, 1, seed=1)}
    return Case(model(text, **weights, **batch_norm(4, "one")), feeds_of(x=(1, 3, 6, 6)))


def three_dimensions() -> Case:
    """A MatMul whose constant operand has a batch of its own: no matrix, so not a weight to us."""
    text = """(float[n,2,3,8] x) => (float[n,2,3,5] y) {
        h = MatMul (x, w)
        y = MatMul (h, v)
    }"""
    made = model(text, w=normal(2, 8, 6), v=normal(6, 5, seed=1))
    return Case(made, feeds_of(x=(1, 2, 3, 8)))


def moves() -> Case:
    """Integer layers with nothing but moved values between them."""
    text = """(float[n,4,6,6] x) => (float[n,3] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        r = Relu (c)
        p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
        a, b = Split <axis = 1> (p)
        j = Concat <axis = 1> (b, a)
        t = Transpose <perm = [0,2,3,1]> (j)
        f = Reshape (t, shape)
        y = Gemm (f, fc, bias)
    }"""
    weights = {
        "w": normal(8, 4, 3, 3, scale=0.3),
        "shape": np.array([-1, 72]),
        "fc": normal(72, 3, seed=1, scale=0.2),
        "bias": normal(3, seed=2),
    }
    return Case(model(text, **weights), feeds_of(x=(1, 4, 6, 6)))


ZOO: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        conv_bn_relu6, depthwise, residual, gemm, matmul, tied, constant_nodes, attention, if_body,
        opset_11, shared_weights, inner_output, three_dimensions, moves,
    )
}  # fmt: skip
