"""Scales of activations and weights by the error that comes out, not by the values that go in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnxq.passes.solve.calibrate import activation_types, probabilities_of_codes
from onnxq.passes.solve.search_activation_scales import Trial, rules, search_ranges
from onnxq.passes.solve.search_weight_scales import search_weight_scale

from onnxq.graph import Graph
from onnxq.observe import Histogram, Observer
from onnxq.pipeline import Context
from onnxq.qtype import QTensor
from onnxq.solver import Layer, WeightSolver

ACTIVATIONS = "activations"  # what is noted as solved of a whole model


@dataclass(frozen=True)
class SearchScales(WeightSolver):
    """New ranges for `activations` by the model's outputs, on `samples` of the samples and with
    at most `evaluations` of the model on each; scales and codes for `weights` by their layer's.

    Ranges that made-up samples gave stay: what those excite is not what real ones will.
    """

    weights: bool = True
    activations: bool = True
    samples: int = 16
    evaluations: int = 150
    name: ClassVar[str] = "search-scales"

    def solve(self, layer: Layer) -> QTensor:
        return search_weight_scale(layer)

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        if not self.activations or (ctx.samples is not None and ctx.samples.synthesised):
            return {}
        return {_key(name): Histogram() for name in activation_types(graph, ctx)}

    def apply(self, graph: Graph, ctx: Context) -> int:
        changed = self._search_activations(graph, ctx) if self.activations else 0
        return changed + (super().apply(graph, ctx) if self.weights else 0)

    def _search_activations(self, graph: Graph, ctx: Context) -> int:
        fixed = probabilities_of_codes(graph, activation_types(graph, ctx))
        tables = {id(q) for name, q in ctx.activations.items() if _key(name) not in ctx.stats}
        candidates = {
            name: rules(ctx.stats[_key(name)], now)
            for name, now in ctx.activations.items()
            if _key(name) in ctx.stats and name not in fixed and id(now) not in tables
        }
        if (self.name, ACTIVATIONS) in ctx.solved or not candidates or ctx.samples is None:
            return 0
        ctx.solved.add((self.name, ACTIVATIONS))
        loudest = [ctx.stats[_key(name)].extremes.loudest for name in candidates]
        chosen = telling_samples(loudest, len(ctx.samples), self.samples)
        feeds = [feed for number, feed in enumerate(ctx.samples) if number in chosen]
        trial = Trial(graph, ctx, feeds)
        if not trial.names:
            return 0  # no output to measure by
        sharing: dict[int, list[str]] = {}
        for name in candidates:
            sharing.setdefault(id(ctx.activations[name]), []).append(name)
        before = dict(ctx.activations)
        for names in sharing.values():  # what only moves values keeps the scale it came with
            candidates |= dict.fromkeys(names, candidates[names[0]])
        ctx.activations.update(
            search_ranges(trial, candidates, list(sharing.values()), self.evaluations)
        )
        return sum(ctx.activations[name] is not before[name] for name in before)


def telling_samples(loudest: Sequence[int], total: int, count: int) -> set[int]:
    """Which of `total` samples to measure on, `count` at most: half are those with the largest
    values of most tensors, which a range that is cut harms first, half are spread over all.
    """
    chosen = {number for number, _ in Counter(loudest).most_common(max(1, count // 2))}
    others = [number for number in range(total) if number not in chosen]
    left = min(count - len(chosen), len(others))
    return chosen | {others[k * len(others) // left] for k in range(left)}


def _key(name: str) -> str:
    return f"{name}#histogram"
