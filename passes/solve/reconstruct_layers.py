"""Layers solved in order, each on the inputs it will get, to make up for the errors before it.

Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", and the
asymmetric reconstruction of Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training
Quantization", eq. 25. A layer of weight W and bias b gets x in the float model, x̂ in the quantized
one, whose layers before it are solved:

    min over Ŵ, b̂ of E‖W x + b − Ŵ x̂ − b̂‖²,    so b̂ = b + W E[x] − Ŵ E[x̂].

What is left are the centred x, x̂, with Ĥ = cov(x̂) and C = cov(x, x̂) (groups, in, in). Of real
weights the best are W̃ = W C Ĥ⁻¹, and of codes those of least (W̃ − Ŵ) Ĥ (W̃ − Ŵ)ᵀ: the problem that
coordinate descent is for. Few rows tell little of W̃, so it is drawn to W, by λ times the mean
variance of an input:

    W̃ = W + W (C − Ĥ) (Ĥ + λ tr(Ĥ)/in)⁻¹.

A layer without room for a bias has E[x x̂ᵀ] and E[x̂x̂ᵀ] in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnxq.passes.solve.bias_correct import (
    CHANNELS,
    BiasCorrect,
    add_to_bias,
    by_depth,
    takes_bias,
)
from onnxq.passes.solve.coordinate_descent import coordinate_descent
from onnxq.passes.solve.hessian import output_error
from onnxq.passes.solve.search_weight_scales import search_weight_scale

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph
from onnxq.observe_channels import SecondMoments
from onnxq.pipeline import Context, Pass
from onnxq.probe import Probe
from onnxq.qtype import Floats, QTensor
from onnxq.solver import Job, Layer, jobs, windows

Array = NDArray[Any]
ROWS = 1 << 10  # of a layer's inputs that are taken of each sample


@dataclass(frozen=True)
class ReconstructLayers(Pass):
    """Better codes, scales and biases for all layers that have codes, from the first to the last.

    `damping` is λ. It takes the place of `bias-correct`.
    """

    damping: float = 0.05
    sweeps: int = 8
    rows: int = ROWS
    name: ClassVar[str] = "reconstruct-layers"
    needs_samples: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        if ctx.samples is None:
            raise OnnxqError(f"the pass {self.name!r} needs samples, and there are none")
        todo = {job.view.node.name: job for job in self._jobs(graph, ctx)}
        if not todo:
            return 0
        float_graph, namer, done = g.copy(graph), g.Namer(graph), 0
        for depth in by_depth(ctx.quantized(graph, qdq=True), set(todo)):
            for window in windows([todo[name] for name in depth], ctx.memory_budget):
                seen = self._observe(window, float_graph, ctx.quantized(graph, qdq=True), ctx)
                for job in window:
                    ctx.progress(self.name, done, len(todo))
                    done += 1
                    self._solve(job, seen[job.name], graph, ctx, namer)
        return done

    def _jobs(self, graph: Graph, ctx: Context) -> Iterator[Job]:
        own = {id(node) for node in graph.nodes}
        kept = {node.name: node.op for node in g.walk(ctx.quantized(graph, qdq=True))}
        for job in jobs(graph, ctx):
            node = job.view.node
            if (
                id(node) in own
                and node.op in CHANNELS
                and kept.get(node.name) == node.op
                and not job.view.batched
                and len(job.inputs) == 1
                and not g.is_constant(node.inputs[0])
                and job.name in ctx.weights
                and (self.name, job.name) not in ctx.solved
            ):
                yield job

    def _observe(
        self, window: list[Job], float_graph: Graph, quantized: Graph, ctx: Context
    ) -> dict[str, Pairs]:
        pairs = {job.name: Pairs(job.inputs[0][1], self.rows) for job in window}
        names = [
            {n.name: n.inputs[0].name for n in graph.nodes} for graph in (float_graph, quantized)
        ]
        wanted = [[by_node[job.view.node.name] for job in window] for by_node in names]
        probes = [
            Probe(graph, list(dict.fromkeys(tensors)), threads=ctx.threads)
            for graph, tensors in zip((float_graph, quantized), wanted, strict=True)
        ]
        assert ctx.samples is not None
        for feed in ctx.samples:
            x, seen = (probe.run(feed) for probe in probes)
            for job, one, other in zip(window, *wanted, strict=True):
                pairs[job.name].update(x[one][0], seen[other][0])
        return pairs

    def _solve(self, job: Job, seen: Pairs, graph: Graph, ctx: Context, namer: g.Namer) -> None:
        node = job.view.node
        ctx.solved.add((self.name, job.name))
        if not seen.rows:
            return
        moments = seen.result()
        biased = takes_bias(node, graph)
        layer = job.layer(moments.seen, ctx.weights[job.name])
        weight = layer.weight
        hessian, cross = moments.covariances(biased)
        target = asymmetric_target(weight, hessian, cross, self.damping)
        layer = layer._replace(weight=target, hessian=hessian)
        q = ctx.weights[job.name] = best_codes(layer, self.sweeps)
        if biased:
            ctx.solved.add((BiasCorrect.name, node.name))
            shift = rows_times(weight, moments.mean) - rows_times(q.dequantize(), moments.seen.mean)
            add_to_bias(node, graph, shift, namer)


def best_codes(layer: Layer, sweeps: int) -> QTensor:
    """From the codes so far and from those of the best scale, whichever ends lower."""
    starts = [layer.start, search_weight_scale(layer)]
    ends = [coordinate_descent(layer._replace(start=start), sweeps) for start in starts]
    return ends[1]


def rows_times(weight: Floats, mean: Floats) -> NDArray[np.float64]:
    """W E[x], (out,), of a weight (out, in) and means (groups, in)."""
    by_group = weight.reshape(len(mean), -1, weight.shape[1]).astype(np.float64)
    return np.asarray((by_group @ mean[:, :, None].astype(np.float64)).ravel())


def asymmetric_target(weight: Floats, hessian: Array, cross: Array, damping: float) -> Floats:
    """W̃ (out, in) of W (out, in), Ĥ and C (groups, in, in)."""
    groups, size, _ = hessian.shape
    exact = hessian.astype(np.float64)
    ridge = damping * np.trace(exact, axis1=1, axis2=2) / size + np.finfo(np.float32).tiny
    damped = exact + ridge[:, None, None] * np.eye(size)
    by_group = weight.reshape(groups, -1, size).astype(np.float64)
    change = by_group @ (cross.astype(np.float64) - exact)
    change = np.linalg.solve(damped, change.swapaxes(1, 2)).swapaxes(1, 2)
    return (by_group + change).reshape(weight.shape).astype(np.float32)


class PairMoments(NamedTuple):
    """Of x and x̂: E[x x̂ᵀ] (groups, in, in), E[x] (groups, in), and what is known of x̂."""

    cross: Array
    mean: Array
    seen: SecondMoments

    def covariances(self, centred: bool) -> tuple[Array, Array]:
        """Ĥ and C, shrunk where rows are few."""
        hessian, mean = self.seen.product, self.seen.mean
        if not centred:
            return hessian, self.cross
        return (
            hessian - mean[:, :, None] * mean[:, None, :],
            self.cross - self.mean[:, :, None] * mean[:, None, :],
        )


@dataclass
class Pairs:
    """Second moments of two tensors, x and x̂, `limit` rows of each pair at most."""

    unfold: g.Unfolding
    limit: int
    product: Array | float = 0.0
    cross: Array | float = 0.0
    total: Array | float = 0.0
    total_seen: Array | float = 0.0
    rows: int = 0

    def update(self, x: Array, seen: Array) -> None:
        if x.shape != seen.shape or not x.size:
            return  # where shapes hang on values
        a, b = (np.ascontiguousarray(self.unfold(t, self.limit), np.float32) for t in (x, seen))
        self.product = self.product + b.swapaxes(1, 2) @ b
        self.cross = self.cross + a.swapaxes(1, 2) @ b
        self.total = self.total + a.sum(axis=1, dtype=np.float64)
        self.total_seen = self.total_seen + b.sum(axis=1, dtype=np.float64)
        self.rows += a.shape[1]

    def result(self) -> PairMoments:
        count = self.rows
        seen = SecondMoments(
            np.asarray(self.product) / count, np.asarray(self.total_seen) / count, count
        )
        return PairMoments(np.asarray(self.cross) / count, np.asarray(self.total) / count, seen)
