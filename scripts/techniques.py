"""What each technique buys on which model: a recipe with one more pass, and with several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from accuracy import markdown_table
from onnx import helper
from onnx.numpy_helper import from_array

import onnxq
from onnxq.errors import OnnxqError
from onnxq.recipe import Recipe, load_pass, load_recipe
from onnxq.runtime import Session
from onnxq.verify import latency

# Where an optional pass stands in a recipe: before the first of these that the recipe has.
BEFORE = {
    "equalize": ("assign",),
    "smoothquant": ("assign",),
    "split-outliers": ("assign",),
    "search-scales": ("spare-quiet", "round-to-nearest"),
    "coordinate-descent": ("spare-slow", "quantize-bias"),
    "adaround": ("spare-slow", "quantize-bias"),
    "reconstruct-layers": ("spare-slow", "quantize-bias"),
    "bias-correct": ("spare-slow", "quantize-bias"),
}
CNN = ("equalize", "search-scales", "coordinate-descent", "bias-correct", "reconstruct-layers")
CASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (  # model, preset, sets of passes
    (
        "mobilenet_v1_0.75_224", "int8-per-tensor",
        ("equalize", "split-outliers", "bias-correct", "equalize bias-correct",
         "equalize split-outliers bias-correct", "equalize split-outliers reconstruct-layers"),
    ),
    (
        "mobilenet_v1_0.75_224", "w4a8",
        ("search-scales", "coordinate-descent", "bias-correct", "search-scales coordinate-descent",
         "reconstruct-layers"),
    ),
    ("mobilenet_v1_0.75_224", "int8-static", (*CNN, "search-scales reconstruct-layers")),
    ("mobilenet_v1_0.25_224", "int8-static", (*CNN, "search-scales reconstruct-layers")),
    (
        "all-MiniLM-L6-v2", "int8-static",
        ("smoothquant", *CNN[1:], "smoothquant reconstruct-layers"),
    ),
)  # fmt: skip


class Models(Protocol):
    """What of `scripts/benchmark`'s Bench is used here."""

    models: list[str]
    page: Path | None

    def model(self, name: str) -> Path: ...
    def top1(self, name: str, model: Path) -> tuple[float, float]: ...
    def cosine(self, model: Path) -> float: ...
    def ours_from_all(self, name: str, preset: str, **options: Any) -> Path: ...


def with_passes(base: Recipe, names: tuple[str, ...]) -> Recipe:
    """The recipe without its optional passes, and with these, each where it belongs."""
    steps = [s for s in base.passes if s.name not in base.optional and s.name not in BEFORE]
    for name in names:
        known = [step.name for step in steps]
        at = min(known.index(after) for after in BEFORE[name] if after in known)
        steps.insert(at, load_pass(name)())
    return replace(base, passes=tuple(steps), optional=frozenset())


@dataclass(frozen=True)
class Line:
    model: str
    preset: str
    added: str
    score: str


def ablation(bench: Models) -> Iterator[Line]:
    """Each pass by itself and some together, scored on the dev split."""
    for model, preset, sets in CASES:
        if bench.models and model not in bench.models:
            continue
        base = load_recipe(preset)
        for names in ("", *sets):
            label = names.replace(" ", ", ") or "nothing"
            try:
                recipe = with_passes(base, tuple(names.split()))
                made = bench.ours_from_all(model, recipe=recipe)
                yield Line(model, preset, label, score(bench, model, made))
            except OnnxqError as error:
                yield Line(model, preset, label, f"refused: {error}")


def score(bench: Models, name: str, made: Path) -> str:
    if name == "all-MiniLM-L6-v2":
        return f"cosine {bench.cosine(made):.4f}"
    top1, agreement = bench.top1(name, made)
    return f"top-1 {top1:.4f}, agrees {agreement:.4f}"


def ablation_table(lines: list[Line]) -> str:
    columns = ["model", "preset", "with", "score"]
    return markdown_table(columns, [[x.model, x.preset, x.added, x.score] for x in lines])


def write_section(page: Path, heading: str, text: str) -> None:
    """Put `text` under a heading of a page, in the place of what stood there, or at the end."""
    before, found, after = page.read_text("utf-8").partition(f"## {heading}\n")
    _, mark, rest = after.partition("\n## ")
    body = f"{before.rstrip()}\n\n## {heading}\n\n{text.strip()}\n"
    page.write_text(body + (f"{mark}{rest}" if found else ""), "utf-8")


ABLATION = "What each technique buys"
ABLATION_TEXT = """
The preset's recipe without its optional passes, with one pass more, and with several; 40 samples
calibrate, the dev split is scored, target `cpu`. One run of

    scripts/benchmark ablation --shared DIR --markdown docs/accuracy.md

{table}
"""


def hardswish_stack(path: Path, channels: int = 64, size: int = 56, blocks: int = 4) -> None:
    """Depthwise Conv, HardSwish, pointwise Conv, HardSwish, again and again, as in MobileNetV3."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for block in range(blocks):
        for kind, shape in (
            ("depthwise", (channels, 1, 3, 3)),
            ("pointwise", (channels, channels, 1, 1)),
        ):
            name = f"{kind}_{block}"
            weight = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
            bias = rng.normal(0, 0.1, channels).astype(np.float32)
            weights += [from_array(weight, f"{name}_w"), from_array(bias, f"{name}_b")]
            attributes = {"group": channels, "pads": [1, 1, 1, 1]} if kind == "depthwise" else {}
            inputs = [x, f"{name}_w", f"{name}_b"]
            nodes.append(helper.make_node("Conv", inputs, [name], name=name, **attributes))
            x = f"{name}_active"
            nodes.append(helper.make_node("HardSwish", [name], [x], name=x))
    shape = [1, channels, size, size]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in ("x", x)]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 14)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)


def hardswish(scratch: Path) -> list[list[Any]]:
    """Latency ÷ float of the stack: as quantize makes it, and without its look at the clock."""
    float_model = scratch / "hardswish.onnx"
    hardswish_stack(float_model)
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.normal(0, 1, (1, 64, 56, 56)).astype(np.float32)} for _ in range(24)]
    sessions = [Session(float_model)]
    labels = {"onnxq int8-static": True, "onnxq int8-static --no-latency-check": False}
    for label, check in labels.items():
        made = scratch / f"{label}.onnx"
        onnxq.quantize(float_model, samples=feeds, output=made, latency_check=check)
        sessions.append(Session(made))
    alone, *others = latency(sessions, feeds[0], seconds=10, most=200)
    return [[label, t.median_ms / alone.median_ms] for label, t in zip(labels, others, strict=True)]
