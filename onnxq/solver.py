"""What every algorithm shares that chooses codes weight by weight: it writes `solve` alone.

How much an error in a weight is seen in the layer's output is told by its inputs. For errors
D = W − Ŵ (out, in),

    E‖x Dᵀ‖² = Σ_rows d H dᵀ,    H = E[xxᵀ] (in, in).

H of one layer with 4608 inputs takes 85 MB. Layers are solved in windows that fit the budget of
memory, with a run over the samples for each.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple

import numpy as np
from joblib import Parallel, cpu_count, delayed
from numpy.typing import NDArray

from onnxq import cache
from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.codebook import CodebookTensor
from onnxq.errors import OnnxqError
from onnxq.graph import Graph
from onnxq.lattice import LatticeTensor
from onnxq.observe_channels import Hessian, SecondMoments
from onnxq.pipeline import Context, Pass
from onnxq.qtype import Floats, QTensor, QType
from onnxq.spool import Coded, Weights

ROWS = 1 << 12  # inputs of a layer that H is made of, of all samples together, and at least
WORTH_PROCESSES = 10**11  # multiply-adds; starting processes takes as long as some 10¹⁰
ROWS_PER_COLUMN = 16  # as many times the size of one: what H cannot do with fewer of, see `shrunk`


class Layer(NamedTuple):
    """One weight to be solved.

    `hessian` is (groups, in, in): the rows of `weight` (out, in) belong to groups in turn. `start`
    holds the codes so far, None before there are any.
    """

    weight: Floats
    qtype: QType
    hessian: NDArray[np.floating[Any]]
    pair_limit: int | None
    start: QTensor | CodebookTensor | LatticeTensor | None


@dataclass(frozen=True)
class Solver(Pass, Generic[Coded]):
    """Base of algorithms that solve one weight after another, knowing H of its inputs."""

    analysis: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = True

    @abstractmethod
    def solve(self, layer: Layer) -> Coded:
        """Codes for one weight."""

    @abstractmethod
    def solved(self, ctx: Context) -> Weights[Coded]:
        """Where codes so far are, and will be."""

    @abstractmethod
    def takes(self, name: str, ctx: Context) -> bool:
        """Whether it is for the weight of this name."""

    def apply(self, graph: Graph, ctx: Context) -> int:
        weights, done = self.solved(ctx), 0
        todo = [
            job
            for job in jobs(graph, ctx)
            if self.takes(job.name, ctx) and (self.name, job.name) not in ctx.solved
        ]
        for window in windows(todo, ctx.memory_budget // 2):  # half of it is for solving
            left = []
            for job in window:
                ctx.solved.add((self.name, job.name))
                kept = ctx.checkpoint.get(self.name, job.name)
                if kept is None:
                    left.append(job)
                else:
                    weights[job.name] = kept
            done += len(window) - len(left)
            if not left:
                continue
            # Of the whole window: which tensors a run gives out may move them by a rounding.
            moments = observe_moments(window, graph, ctx)
            left = [job for job in left if moments[job.name].rows]  # a branch may never have run
            layers = (job.layer(moments.pop(job.name), weights.get(job.name)) for job in left)
            for job, q in zip(left, self._solve_all(left, layers, ctx), strict=True):
                ctx.progress(self.name, done, len(todo))
                done += 1
                weights[job.name] = q
                ctx.checkpoint.put(self.name, job.name, q)
        return done

    def _solve_all(
        self, jobs: Sequence[Job], layers: Iterable[Layer], ctx: Context
    ) -> Iterator[Coded]:
        """Layers in turn; large ones side by side, a process each, with one thread for BLAS."""
        widest = max(job.bytes for job in jobs) if jobs else 1
        processes = min(len(jobs), ctx.threads or cpu_count(), ctx.memory_budget // 2 // widest)
        if processes < 2 or sum(job.work for job in jobs) < WORTH_PROCESSES:
            yield from map(self._solved_once, layers)
            return
        run = Parallel(
            n_jobs=processes, return_as="generator", pre_dispatch=processes, mmap_mode="c"
        )
        yield from run(delayed(self._solved_once)(layer) for layer in layers)

    def _solved_once(self, layer: Layer) -> Coded:
        """Recipes that are tried with one pass more or less solve the same layers again."""
        if cache.folder() is None:
            return self.solve(layer)
        name = cache.key(self.name, self.settings(), layer)
        found: Coded | None = cache.get(name)
        if found is None:
            found = self.solve(layer)
            cache.put(name, found)
        return found


@dataclass(frozen=True)
class WeightSolver(Solver[QTensor]):
    """For weights that have no table of levels."""

    def solved(self, ctx: Context) -> Weights[QTensor]:
        return ctx.weights

    def takes(self, name: str, ctx: Context) -> bool:
        return name not in ctx.codebooks


@dataclass(frozen=True)
class CodebookSolver(Solver[CodebookTensor | LatticeTensor]):
    """For weights that have one."""

    def solved(self, ctx: Context) -> Weights[CodebookTensor | LatticeTensor]:
        return ctx.codebooks

    def takes(self, name: str, ctx: Context) -> bool:
        return isinstance(ctx.codebooks.get(name), CodebookTensor)


@dataclass
class Job:
    """A weight and all that is multiplied with it: names of tensors, and how each becomes rows."""

    view: g.WeightView
    qtype: QType
    pair_limit: int | None
    inputs: list[tuple[str, g.Unfolding]]

    @property
    def name(self) -> str:
        return str(self.view.tensor.name)

    @property
    def columns(self) -> int:
        return self.weights // self.view.rows

    @property
    def weights(self) -> int:
        return math.prod(self.view.tensor.shape)

    @property
    def work(self) -> int:
        """Multiply-adds of a product of the weight with H."""
        return self.view.rows * self.columns**2

    @property
    def alike(self) -> int:
        """How many rows of inputs say as much as one: patches of an image overlap, tokens do not
        (measured by what codes lose on unseen samples).
        """
        return 3 if self.inputs[0][1].kernel else 1

    @property
    def bytes(self) -> int:
        """Of H, of the product that is added to it, and of H shrunk."""
        return 3 * 4 * self.inputs[0][1].groups * self.columns**2

    def layer(
        self, seen: SecondMoments, start: QTensor | CodebookTensor | LatticeTensor | None
    ) -> Layer:
        hessian = seen.shrunk(self.alike)
        return Layer(self.view.matrix(), self.qtype, hessian, self.pair_limit, start)


def jobs(graph: Graph, ctx: Context) -> list[Job]:
    """Every weight of the plan whose inputs can be seen."""
    unseen = {id(node) for body in g.hidden(graph) for node in body.nodes}
    jobs: dict[str, Job] = {}
    for node, plan in ctx.plan.quantized(g.walk(graph)):
        for view in g.weight_views(node):
            unfolding = g.unfolding(view)
            if plan.weight is None or unfolding is None or id(node) in unseen:
                continue
            if view.tensor.name in ctx.tied:
                continue
            limit = plan.rule.pair_limit if plan.rule else None
            job = jobs.setdefault(view.tensor.name, Job(view, plan.weight, limit, []))
            job.inputs.append((node.inputs[0].name, unfolding))
    return list(jobs.values())


def windows(jobs: Iterable[Job], budget: int) -> Iterator[list[Job]]:
    """Jobs in turn whose statistics fit the budget together; one alone may exceed it.

    Weights that read one tensor share what is known of it.
    """
    window: list[Job] = []
    sources: dict[tuple[str, g.Unfolding], int] = {}
    for job in jobs:
        own = dict.fromkeys(job.inputs, job.bytes)
        if window and sum((sources | own).values()) > budget:
            yield window
            window, sources = [], {}
        window.append(job)
        sources |= own
    if window:
        yield window


def observe_moments(window: list[Job], graph: Graph, ctx: Context) -> dict[str, SecondMoments]:
    """Moments of the inputs of every weight, those that several share measured once."""
    if ctx.samples is None:
        raise OnnxqError("rounding by the layers' inputs needs samples, and there are none")
    keys: dict[tuple[str, g.Unfolding], str] = {}
    observers: dict[str, Hessian] = {}
    for job in window:
        rows = max(ROWS, ROWS_PER_COLUMN * job.columns)
        for source in job.inputs:
            if source not in keys:
                keys[source] = f"{source[0]}#hessian{len(keys)}"
                observers[keys[source]] = Hessian(source[1], -(-rows // max(1, len(ctx.samples))))
    seen = observe(
        graph,
        observers,
        ctx.samples,
        threads=ctx.threads,
        progress=lambda done, total: ctx.progress("calibrate", done, total),
    )
    return {job.name: _together([seen[keys[source]] for source in job.inputs]) for job in window}


def _together(moments: list[SecondMoments]) -> SecondMoments:
    """Moments of all inputs of one weight."""
    moments = [seen for seen in moments if seen.rows] or moments[:1]
    if len(moments) == 1:
        return moments[0]
    rows = sum(seen.rows for seen in moments)
    product, mean = (
        np.sum([seen[part] * np.float32(seen.rows / rows) for seen in moments], axis=0)
        for part in (0, 1)
    )
    return SecondMoments(product, mean, rows)
