"""What is slower in integers than in float on this machine stays float.

1. Each region of the plan, layers that hand codes to each other, is cut out of the model; its float
   and its integer form are run in turns on what really comes in.
2. Where kernels of a region are faster in float one by one, the region is timed without them too:
   that they need codes dequantized and quantized again may cost more than it saves.
3. At last the whole model is timed. What a runtime fuses across regions, no region tells.

Weights of spared layers stay codes, which the runtime expands when it loads the model: the file
stays small, and the layer is as fast as it was.

Timings differ from run to run: a form is left only for one that is faster by `margin`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from onnxq.passes.solve.assign import HEAVY
from onnxq.passes.solve.regions import Region, between_codes, region, regions

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, NodePlan, Pass, Plan
from onnxq.runtime import Session
from onnxq.tap import Tap
from onnxq.verify import latency

Feed = Mapping[str, Any]
Reasons = dict[str, str]  # why a node is spared, by name
SECONDS, ROUNDS = 0.4, 60  # for one pair of forms, at most


@dataclass(frozen=True)
class SpareSlow(Pass):
    """Float, with stored weights, wherever integers are slower here by more than `margin`."""

    margin: float = 0.03
    name: ClassVar[str] = "spare-slow"
    analysis: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        samples = ctx.unseen or ctx.samples
        if not ctx.lowering or samples is None or not ctx.target.is_here:
            return 0
        try:
            reasons = self.slow_nodes(graph, ctx, next(iter(samples)))
        except OnnxqError as error:  # verification says what is wrong, if it is
            ctx.report.warn(f"not timed against float: {error}")
            return 0
        spare(reasons, graph, ctx)
        return len(reasons)

    def slow_nodes(self, graph: Graph, ctx: Context, feed: Feed) -> Reasons:
        """Which nodes of the plan had better stay float."""
        parts = regions(graph, ctx.plan)
        watch = _Stopwatch(graph, ctx, parts, feed)
        reasons: Reasons = {}
        known: dict[object, list[str]] = {}  # equal regions are timed once
        for number, part in enumerate(parts):
            ctx.progress("time regions", number, len(parts))
            key = watch.signature(part)
            if key not in known:
                found = self.slow(part, watch)
                known[key] = [found.get(node.name, "") for node in part.nodes]
            reasons |= {n.name: why for n, why in zip(part.nodes, known[key], strict=True) if why}
        if len(reasons) < sum(len(part.nodes) for part in parts):
            integers, floats = watch.time_model(reasons)
            if floats < integers / (1 + self.margin):
                why = _reason(integers, floats, "the whole model takes ")
                reasons = {node.name: why for part in parts for node in part.nodes} | reasons
        return reasons

    def slow(self, part: Region, watch: _Stopwatch) -> Reasons:
        """Which nodes of a region had better stay float."""
        layers = [node for node in part.nodes if node.op in HEAVY]
        reasons = self.slow_kernels(layers, part, watch) if len(layers) > 1 else {}
        integers, floats = watch.time_region(part, reasons, None)
        if floats < integers / (1 + self.margin):
            here = "" if len(layers) == 1 else f"{len(layers)} layers that belong together take "
            return {node.name: _reason(integers, floats, here) for node in part.nodes} | reasons
        return reasons

    def slow_kernels(self, layers: list[Node], part: Region, watch: _Stopwatch) -> Reasons:
        """Of the layers faster in float by themselves, those without which the region is fastest:
        the worst one, the two worst, four, ….
        """
        timed = {node.name: watch.time_kernel(node) for node in layers}
        slow = [name for name, t in timed.items() if t[1] < t[0] / (1 + self.margin)]
        slow.sort(key=lambda name: timed[name][1] - timed[name][0])
        best, fastest = dict[str, str](), 1 / (1 + self.margin)
        for step in range(len(slow).bit_length() + 1):
            tried = {name: _reason(*timed[name]) for name in slow[: 1 << step]}
            if tried and tried != best:
                whole, without = watch.time_region(part, {}, tried)
                if without / whole < fastest:
                    best, fastest = tried, without / whole
        return best


def _reason(integers: float, floats: float, what: str = "") -> str:
    return f"slower here: {what}{integers:.3f} ms in integers, {floats:.3f} ms in float"


def spare(reasons: Reasons, graph: Graph, ctx: Context) -> None:
    """Take nodes out of the plan; their weights stay codes."""
    ctx.plan.update(plan_without(reasons, ctx.plan))
    for node in graph.nodes:
        if node.name in reasons and node.op in HEAVY:
            ctx.report.skip(node.name, node.op, reasons[node.name])


def plan_without(spared: Iterable[str], plan: Plan) -> Plan:
    changed = Plan(plan)
    for name in spared:
        weight = plan[name].weight
        changed[name] = NodePlan(weight=weight) if weight else NodePlan("slower here")
    return changed


# ── timing ───────────────────────────────────────────────────────────────────────────────────────


class _Stopwatch:
    """Times parts of a model in float and in integers, in milliseconds."""

    def __init__(self, graph: Graph, ctx: Context, parts: list[Region], feed: Feed) -> None:
        self.graph, self.ctx, self.feed = graph, ctx, feed
        wanted = {
            name for part in parts for node in part.nodes for name in region([node], graph).inputs
        }
        self.values = {
            k: v[0] for k, v in Tap(graph, sorted(wanted), threads=ctx.threads).run(feed).items()
        }
        self.kernels: dict[object, tuple[float, float]] = {}

    def signature(self, part: Region) -> object:
        """What two regions have in common that take the same time."""
        return (
            tuple(self._describe(node) for node in part.nodes),
            len(part.inputs),
            len(part.outputs),
        )

    def _describe(self, node: Node) -> object:
        shapes = [
            np.shape(self.values[t.name]) if t.name in self.values else tuple(t.shape or ())
            for t in node.inputs
        ]
        plan = self.ctx.plan[node.name]
        return node.op, repr(sorted(node.attrs.items())), repr(shapes), plan.weight, plan.activation

    def time_model(self, spared: Reasons) -> tuple[float, float]:
        """The model in integers, but for what is spared, and in float."""
        return self._time(self._lowered(self.graph, spared), self.graph, self.feed)

    def time_region(self, part: Region, one: Reasons, other: Reasons | None) -> tuple[float, float]:
        """A region without what either form spares; None stands for float."""
        feed = {name: self.values[name] for name in part.inputs}
        float_form = g.cut(self.graph, _types(feed), part.outputs)
        forms = [float_form if r is None else self._lowered(float_form, r) for r in (one, other)]
        return self._time(*forms, feed)

    def time_kernel(self, node: Node) -> tuple[float, float]:
        """One layer, with what its kernel takes in, from codes to codes, and the same in float."""
        key = self._describe(node)
        if key not in self.kernels:
            self.kernels[key] = self._time_kernel(node)
        return self.kernels[key]

    def _time_kernel(self, node: Node) -> tuple[float, float]:
        reader = g.sole_consumer(self.graph, node.outputs[0])
        plan = self.ctx.plan
        fused = reader is not None and reader.name in plan and not plan[reader.name].inputs
        last = reader if fused and reader is not None and plan[reader.name].quantized else node
        part = region([node] if last is node else [node, last], self.graph)
        feed = {name: self.values[name] for name in part.inputs}
        float_form = g.cut(self.graph, _types(feed), [last.outputs[0].name])
        lowered = self._lowered(float_form, {})
        integer_form, codes = between_codes(lowered, feed, self.ctx.activations)
        return self._time(integer_form, float_form, codes, feed)

    def _lowered(self, graph: Graph, spared: Reasons) -> Graph:
        return replace(self.ctx, plan=plan_without(spared, self.ctx.plan)).quantized(graph)

    def _time(self, one: Graph, other: Graph, *feeds: Feed) -> tuple[float, float]:
        """Lower quartiles, which other work on the machine disturbs least, of two forms in turns.

        Each takes a feed of its own, or both the same.
        """
        target = self.ctx.target
        sessions = [
            Session.of(
                form,
                providers=target.providers,
                threads=self.ctx.threads,
                config=target.session,
            )
            for form in (one, other)
        ]
        both = {**feeds[0], **feeds[-1]}
        left, right = latency(sessions, both, seconds=SECONDS, most=ROUNDS)
        return left.low_ms, right.low_ms


def _types(feed: Feed) -> dict[str, Any]:
    return {name: value.dtype for name, value in feed.items()}
