"""Activation ranges from what the samples showed.

`minmax` takes the whole range. The other methods cut the tails, where a few values would make every
code coarser; each picks the range [low, high] that minimises a loss over the histogram:

- `percentile` keeps the given share of all values;
- `mse` minimises the mean squared error of rounding and clipping, E[(x − q(x))²];
- `entropy` minimises KL(P ‖ Q) between the clipped histogram and its rounding to 2ᵇ levels
  (Migacz 2017, "8-bit Inference with TensorRT").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnxq.passes.solve.assign import MOVERS
from onnxq.passes.solve.integer_planner import KEEP_GRID, WIDE
from onnxq.passes.solve.masks import masked
from onnxq.passes.solve.trained import trained_draws

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph
from onnxq.observe import Extremes, Histogram, HistogramResult, MinMax, Observer
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QParams, QType, nearest

Method = Literal["minmax", "percentile", "entropy", "mse"]
CANDIDATES = 40
OUTLIER = 4.0  # times the largest magnitude of all other samples


@dataclass(frozen=True)
class Calibrate(Pass):
    """Scale and zero point of every activation in the plan.

    `percentile` is the share of values kept by the method of that name, in percent.
    """

    method: Method = "minmax"
    percentile: float = 99.99
    name: ClassVar[str] = "calibrate"
    analysis: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise OnnxqError(f"calibrate.percentile is in (0, 100], not {self.percentile}")

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        types = activation_types(graph, ctx)
        # Made-up samples excite less than real ones: their tails are not cut.
        extremes = self.method == "minmax" or (ctx.samples is not None and ctx.samples.synthesised)
        scores = masked(graph)

        def observer(name: str) -> Observer:
            if name in scores and (types[name].bits == WIDE or ctx.target.whole):
                return scores[name]()
            return MinMax() if extremes or types[name].bits == WIDE else Histogram()

        return {name: observer(name) for name in types if name not in ctx.activations}

    def apply(self, graph: Graph, ctx: Context) -> int:
        made = 0
        types = activation_types(graph, ctx)
        _range_constants(graph, ctx)
        probabilities = probabilities_of_codes(graph, types)
        for name, qtype in types.items():
            if name not in ctx.activations:
                draws = trained_draws(graph, ctx, name)
                seen = ctx.stats[name] if draws is None else histogram_of(draws)
                low, high = self.range(seen, qtype)
                if name in probabilities:
                    low, high = 0.0, 1.0
                ctx.activations[name] = QParams.from_range(low, high, qtype)
                if draws is None:
                    self._warn_of_outlier(name, seen, max(-low, high), ctx)
                made += 1
        _share_along_movers(graph, ctx)
        return made

    def _warn_of_outlier(
        self, name: str, seen: HistogramResult | Extremes, limit: float, ctx: Context
    ) -> None:
        """A range that one sample sets, far beyond all others, makes every code coarser."""
        extremes = seen if isinstance(seen, Extremes) else seen.extremes
        if extremes.others and limit > OUTLIER * extremes.others:
            ctx.report.warn(
                f"sample {extremes.loudest} alone sets the range of {name!r}: {limit:.3g}, where "
                f"all others stay within {extremes.others:.3g}; leave it out if it is a mistake"
            )

    def range(self, seen: HistogramResult | Extremes, qtype: QType) -> tuple[float, float]:
        """The real range to represent, from a histogram or from the extremes alone."""
        if isinstance(seen, Extremes) or self.method == "minmax":
            return seen.low, seen.high
        if self.method == "percentile":
            return percentile_range(seen, self.percentile)
        return search_range(seen, qtype, self.method)


def histogram_of(draws: NDArray[np.float32]) -> HistogramResult:
    seen = Histogram()
    for part in np.array_split(draws, 16):
        seen.update(part)
    return seen.result()


def activation_types(graph: Graph, ctx: Context) -> dict[str, QType]:
    """Every tensor that the plan quantizes, with its format."""
    types: dict[str, QType] = {}
    for node, plan in ctx.plan.quantized(g.walk(graph)):
        if plan.activation is None:
            continue
        for slot in plan.inputs:
            if not g.is_constant(node.inputs[slot]):
                types.setdefault(node.inputs[slot].name, plan.activation)
        if plan.handed_on:
            for tensor in node.outputs:
                if g.dtype(tensor) is None or g.is_float(tensor):  # not the places of a TopK
                    types.setdefault(tensor.name, plan.handed_on)
    return types


def probabilities_of_codes(graph: Graph, types: Mapping[str, QType]) -> set[str]:
    """Tensors that a Softmax of codes makes, moved or not. Its integer kernel (onnxruntime 1.31)
    does not saturate but wraps around, so that their range must hold all that may come.
    """
    found: set[str] = set()
    for node in g.walk(graph):
        moved = node.op in MOVERS and node.inputs[0].name in found
        if moved or (node.op == "Softmax" and _stands_for(node.inputs[0]) & set(types)):
            found |= {t.name for t in node.outputs}
    return found


def _range_constants(graph: Graph, ctx: Context) -> None:
    """Of operands that no sample changes, their values are the range."""
    scores = masked(graph)
    for node, plan in ctx.plan.quantized(g.walk(graph)):
        for tensor in (node.inputs[slot] for slot in plan.inputs):
            if not g.is_constant(tensor) or plan.activation is None:
                continue
            seen = scores.get(tensor.name, MinMax)()
            seen.update(np.asarray(g.values(tensor), np.float32))
            ends = seen.result()
            ctx.activations[tensor.name] = QParams.from_range(ends.low, ends.high, plan.activation)


def _stands_for(tensor: gs.Tensor) -> set[str]:
    """A tensor and those that were only moved to become it."""
    names = {tensor.name}
    maker = g.producer(tensor)
    while maker is not None and maker.op in MOVERS:
        names.add(maker.inputs[0].name)
        maker = g.producer(maker.inputs[0])
    return names


def _share_along_movers(graph: Graph, ctx: Context) -> None:
    """What only moves values keeps their scale, so that the runtime moves codes."""
    for node, plan in ctx.plan.quantized(g.walk(graph)):
        keeps = node.op in KEEP_GRID or (plan.rule is not None and plan.rule.keeps_grid)
        source = ctx.activations.get(node.inputs[0].name) if keeps else None
        if source is not None and plan.output:
            for tensor in node.outputs:
                ctx.activations[tensor.name] = source


def percentile_range(seen: HistogramResult, percentile: float) -> tuple[float, float]:
    """The range that leaves (100 − percentile)/2 percent of the values on either side.

    100 is the exact minimum and maximum.
    """
    if percentile >= 100 or not seen.counts.sum():
        return seen.low, seen.high
    tail = (100 - percentile) / 200
    cumulative = np.cumsum(seen.counts) / seen.counts.sum()
    centers = seen.centers
    first = int(np.searchsorted(cumulative, tail))
    last = min(int(np.searchsorted(cumulative, 1 - tail)), len(centers) - 1)
    low, high = centers[first], centers[last]
    return max(float(low), seen.low), min(float(high), seen.high)


def search_range(seen: HistogramResult, qtype: QType, method: str) -> tuple[float, float]:
    """The range of least loss: first both ends shrink together, then each by itself."""
    if not seen.counts.sum() or seen.low == seen.high:
        return seen.low, seen.high
    used = np.flatnonzero(seen.counts)
    part = slice(used[0], used[-1] + 1)
    x, weight = seen.centers[part], seen.counts[part].astype(np.float64)
    if method == "entropy":
        weight = _without_spike(x, weight)
    loss = mse_loss if method == "mse" else kl_loss
    shrink = np.linspace(1 / CANDIDATES, 1, CANDIDATES)
    low, high = seen.low, seen.high
    for ends in ((1, 1), (1, 0), (0, 1)):
        tried = [(low * (f if ends[0] else 1), high * (f if ends[1] else 1)) for f in shrink[::-1]]
        losses = [loss(x, weight, a, b, qtype) for a, b in tried]
        low, high = tried[int(np.argmin(losses))]
    return float(low), float(high)


def mse_loss(
    x: NDArray[np.float64], weight: NDArray[np.float64], low: float, high: float, qtype: QType
) -> float:
    """E[(x − q(x))²] over a histogram with centers x."""
    params = QParams.from_range(low, high, qtype)
    scale, zero = float(params.scale), float(params.zero)
    codes = nearest(x / scale, qtype, zero)
    return float(weight @ ((codes - zero) * scale - x) ** 2 / weight.sum())


def kl_loss(
    x: NDArray[np.float64], weight: NDArray[np.float64], low: float, high: float, qtype: QType
) -> float:
    """KL(P ‖ Q): P is the histogram with its outside moved to the edge bins, Q its rounding."""
    if qtype.float8:
        raise OnnxqError("calibrate.method = entropy is for integers; FP8 takes minmax or mse")
    inside = (x >= low) & (x <= high)
    levels = qtype.qmax - qtype.qmin + 1
    if inside.sum() <= levels // 2:
        return np.inf  # fewer bins than codes: rounding would look free
    p = weight[inside].copy()
    q_source = p.copy()
    p[0] += weight[x < low].sum()
    p[-1] += weight[x > high].sum()
    level = np.minimum((np.arange(len(p)) * levels / len(p)).astype(int), levels - 1)
    occupied = q_source > 0
    mass = np.bincount(level, q_source, levels)
    bins = np.bincount(level, occupied, levels)
    q = np.where(occupied, mass[level] / np.maximum(bins[level], 1), 0)
    if not q.sum():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    floor = 1e-9  # P has mass where Q has none: costly, but not infinitely so
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], floor))))


def _without_spike(x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """ReLU's zeros are exact at any scale; counted, they would drown all other values."""
    at_zero = int(np.argmin(np.abs(x)))
    lone = weight.copy()
    neighbours = [weight[i] for i in (at_zero - 1, at_zero + 1) if 0 <= i < len(weight)]
    lone[at_zero] = max(neighbours, default=0.0)
    return lone if lone.sum() else weight
