"""Layers solved in order, each on the inputs it will get, to make up for the errors before it.

Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", and the
asymmetric reconstruction of Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training
Quantization", §3.3. A layer of weight W and bias b gets x in the float model, x̂ in the quantized
one, whose layers before it are solved:

    min over Ŵ, b̂ of E‖W x + b − Ŵ x̂ − b̂‖²,    so b̂ = b + W E[x] − Ŵ E[x̂].

What is left are the centred x, x̂, with Ĥ = cov(x̂) and C = cov(x, x̂), (groups, in, in). Of real
weights the best are W̃ = W C Ĥ⁻¹, and of codes those of least (W̃ − Ŵ) Ĥ (W̃ − Ŵ)ᵀ: the problem that
coordinate descent is for. Where samples say little, W̃ is drawn to W:

    W̃ = W + W (C − Ĥ) (Ĥ + λ tr(Ĥ)/in)⁻¹.

A layer without room for a bias has E[x x̂ᵀ] and E[x̂ x̂ᵀ] in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from onnxq.passes.solve.gptq import gptq
from onnxq.passes.solve.search_weight_scales import search_weight_scale

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph
from onnxq.pipeline import Context, Pass
from onnxq.qtype import Floats
from onnxq.samples import Samples
from onnxq.solver import Job, Layer, jobs, windows
from onnxq.tap import Tap

Array = NDArray[Any]
ROWS = 1024  # of a layer's inputs that are taken of each sample
UNSURE = 3  # rows of one sample are alike, so that so many count as one


@dataclass(frozen=True)
class ReconstructLayers(Pass):
    """Codes, scales and biases of Conv, Gemm and MatMul anew, from the first layer to the last.

    `damping` is λ. A model of which depth times weights exceed `largest` is left as it is: its
    samples run once for each depth. Layers in bodies, weights that several layers share and those
    of batched MatMul keep what they have. `bias-correct` after it leaves the biases that are set
    here.
    """

    damping: float = 0.3
    sweeps: int = 8
    largest: float | None = None
    name: ClassVar[str] = "reconstruct-layers"
    needs_samples: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        if ctx.samples is None:
            raise OnnxqError(f"the pass {self.name!r} needs samples, and there are none")
        todo = self._jobs(graph, ctx)
        if not todo:
            return 0
        float_graph, namer, done = g.copy(graph), g.Namer(graph), 0
        depths = list(by_depth(graph, set(todo)))
        weights = sum(math.prod(job.view.tensor.shape) for job in todo.values())
        if self.largest is not None and len(depths) * weights > self.largest:
            ctx.report.warn(
                f"layers were not reconstructed, which would take long: {weights / 1e6:,.0f} "
                f"million weights run {len(depths)} times for each sample; "
                "--set reconstruct-layers.largest=1e12 has it done"
            )
            return 0
        for depth in depths:
            for window in windows([todo[name] for name in depth], ctx.memory_budget // 2):
                graphs = float_graph, ctx.quantized(graph, qdq=True)
                seen = observe_pairs(graphs, window, ctx.samples, ctx.threads)
                for job, pairs in zip(window, seen, strict=True):
                    ctx.progress(self.name, done, len(todo))
                    done += 1
                    ctx.solved.add((self.name, job.name))
                    if pairs.rows:
                        self._solve(job, pairs, graph, ctx, namer)
        return done

    def _jobs(self, graph: Graph, ctx: Context) -> dict[str, Job]:
        """Weights to solve, by the name of the one node that has each."""
        outermost = {id(node) for node in graph.nodes}
        lowered = {node.name: node.op for node in ctx.quantized(graph, qdq=True).nodes}
        found: dict[str, Job] = {}
        for job in jobs(graph, ctx):
            node = job.view.node
            if job.name not in ctx.weights or (self.name, job.name) in ctx.solved:
                continue
            if id(node) not in outermost or len(job.inputs) > 1 or job.view.batched:
                continue
            # The input of one with weights alone keeps its name, whatever the node becomes.
            kept = ctx.plan[node.name].weights_alone or lowered.get(node.name) == node.op
            if node.op in CHANNELS and kept and not g.is_constant(node.inputs[0]):
                found[node.name] = job
        return found

    def _solve(self, job: Job, pairs: Pairs, graph: Graph, ctx: Context, namer: g.Namer) -> None:
        node, weight = job.view.node, job.view.matrix()
        centred = takes_bias(node, graph)
        moments = pairs.moments(centred)
        target = asymmetric_target(weight, moments.hessian, moments.cross, self.damping)
        layer = Layer(target, job.qtype, moments.hessian, job.pair_limit, None)
        start = search_weight_scale(layer)
        if job.qtype.blocked:
            start = gptq(layer._replace(start=start))
        q = ctx.weights[job.name] = coordinate_descent(layer._replace(start=start), self.sweeps)
        if centred:
            wanted = mean_output(weight, moments.mean)
            shift = wanted - mean_output(q.dequantize(), moments.mean_of_seen)
            add_to_bias(node, graph, shift * float(node.attrs.get("alpha", 1.0)), namer)
            ctx.solved.add((BiasCorrect.name, node.name))


def asymmetric_target(weight: Floats, hessian: Array, cross: Array, damping: float) -> Floats:
    """W̃ (out, in) of W (out, in), Ĥ and C (groups, in, in); λ ≥ 0."""
    groups, size, _ = hessian.shape
    exact = hessian.astype(np.float64)
    ridge = damping * np.trace(exact, axis1=1, axis2=2) / size + np.finfo(np.float32).tiny
    by_group = weight.reshape(groups, -1, size).astype(np.float64)
    gap = by_group @ (cross - exact)
    exact += ridge[:, None, None] * np.eye(size)
    change = np.linalg.solve(exact, gap.swapaxes(1, 2)).swapaxes(1, 2)
    return np.asarray((by_group + change).reshape(weight.shape), np.float32)


def mean_output(weight: Floats, mean: Array) -> NDArray[np.float64]:
    """W E[x], (out,), of a weight (out, in) and means (groups, in)."""
    by_group = weight.reshape(len(mean), -1, weight.shape[1]).astype(np.float64)
    return np.asarray((by_group @ mean[:, :, None]).ravel())


# ── what is measured ─────────────────────────────────────────────────────────────────────────────


class PairMoments(NamedTuple):
    """Ĥ and C (groups, in, in); E[x] and E[x̂] (groups, in)."""

    hessian: Array
    cross: Array
    mean: Array
    mean_of_seen: Array


@dataclass
class Pairs:
    """Sums over pairs of x and x̂, of which `unfold` makes rows, `ROWS` at most of each sample."""

    unfold: g.Unfolding
    product: Array | float = 0.0
    cross: Array | float = 0.0
    total: Array | float = 0.0
    total_of_seen: Array | float = 0.0
    rows: int = 0

    def update(self, x: Array, seen: Array) -> None:
        """Raises FloatingPointError for NaN and infinite values."""
        if x.shape != seen.shape or not x.size:
            return  # a shape may hang on values, and rows are no pairs then
        a, b = (np.ascontiguousarray(self.unfold(t, ROWS), np.float32) for t in (x, seen))
        total, total_of_seen = (rows.sum(axis=1, dtype=np.float64) for rows in (a, b))
        if not np.isfinite(total + total_of_seen).all():
            raise FloatingPointError("NaN or infinite")
        self.total, self.total_of_seen = self.total + total, self.total_of_seen + total_of_seen
        self.product = self.product + b.swapaxes(1, 2) @ b
        self.cross = self.cross + a.swapaxes(1, 2) @ b
        self.rows += a.shape[1]

    def moments(self, centred: bool) -> PairMoments:
        """Covariances between columns, of x̂ and of x with x̂, are shrunk as `SecondMoments.shrunk`
        does: chance alone makes inputs vary together in few rows, and codes would follow it.
        """
        count = max(self.rows, 1)
        mean, of_seen = np.asarray(self.total) / count, np.asarray(self.total_of_seen) / count
        size = mean.shape[1]
        sure = np.full((size, size), count / (count + UNSURE * size), np.float32)
        np.fill_diagonal(sure, 1)
        products = []
        for product, left in ((self.product, of_seen), (self.cross, mean)):
            outer = (left[:, :, None] * of_seen[:, None, :]).astype(np.float32)
            covariance = (np.asarray(product) / np.float32(count) - outer) * sure
            products.append(covariance if centred else covariance + outer)
        return PairMoments(products[0], products[1], mean, of_seen)


def observe_pairs(
    graphs: tuple[Graph, Graph], window: Sequence[Job], samples: Samples, threads: int | None
) -> list[Pairs]:
    """Inputs of the same layers in the float graph and the quantized one, in two runs at once."""
    by_node = [{n.name: n.inputs[0].name for n in graph.nodes if n.inputs} for graph in graphs]
    in_float = [by_node[0][job.view.node.name] for job in window]
    in_codes = [by_node[1].get(j.view.node.name, x) for j, x in zip(window, in_float, strict=True)]
    wanted = [in_float, in_codes]
    probes = [
        Tap(graph, list(dict.fromkeys(tensors)), threads=threads)
        for graph, tensors in zip(graphs, wanted, strict=True)
    ]
    pairs = [Pairs(job.inputs[0][1]) for job in window]
    for number, feed in enumerate(samples):
        try:
            values, seen = (probe.run(feed) for probe in probes)
            for pair, one, other in zip(pairs, *wanted, strict=True):
                pair.update(values[one][0], seen[other][0])
        except OnnxqError as error:
            raise OnnxqError(f"{samples.where(number)}: {error}") from None
        except FloatingPointError:
            raise OnnxqError(
                f"{samples.where(number)} makes the input of a layer NaN or infinite; leave that "
                "sample out, or check its preprocessing"
            ) from None
    return pairs
