"""Small models, each awkward in its own way, and shorthands to run and quantize them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxq.passes import FoldBatchNorm, Normalize, SpareSlow

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
    """A preset's passes without the files, the stopwatch and the verification around them."""
    device = target if isinstance(target, Target) else load_target(target)
    samples = samples_of(source, feeds) if feeds else None
    steps = [s for s in load_recipe(preset, settings).passes if s.name != SpareSlow.name]
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
