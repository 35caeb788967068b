"""What rounding took from a layer, given back in part by two thin matrices.

Zhang et al. 2024, "QERA: an Analytical Framework for Quantization Error Reconstruction", §3: beside
the rounded weight Ŵ stand A (out, r) and B (r, in), y = Ŵx + A(Bx), and of the error D = W − Ŵ that
the layer's output sees, H = E[xxᵀ],

    E‖(D − AB)x‖² = tr((D − AB) H (D − AB)ᵀ),

is least (Theorem 1) for AB = SVD_r(D H^½) H^−½. Any root H = L Lᵀ has the same left singular
vectors U, those of D H Dᵀ, and AB = U_r U_rᵀ D: no root is needed and H may be singular. Each rank
takes back the eigenvalue λ_k of D H Dᵀ that belongs to it.

The first of these are found by subspace iteration from random directions (Halko et al. 2011,
"Finding structure with randomness", algorithm 4.4): D H Dᵀ itself, (out, out), is never made.

A rank costs 16 (out + in) bits: much in a small layer, little in a large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.codebook import CodebookTensor
from onnxq.errors import OnnxqError
from onnxq.graph import Graph
from onnxq.lattice import LatticeTensor
from onnxq.pipeline import Context, Factors, Pass
from onnxq.qtype import QTensor
from onnxq.solver import Job, jobs, observe_moments, windows

Array = NDArray[np.floating[Any]]
BITS = 16  # of each number of A and B in the file
FULL = 8  # times the average share of the budget, which no layer gets more of
ITERATIONS = 6
OVERSAMPLING = 16


class Components(NamedTuple):
    """A (out, r), B (r, in), and what each rank takes back of the error: (r,), in order."""

    a: Array
    b: Array
    gain: Array

    def first(self, rank: int) -> Components:
        return Components(self.a[:, :rank], self.b[:rank], self.gain[:rank])

    @property
    def bits(self) -> int:
        """What one rank costs."""
        return BITS * (self.a.shape[0] + self.b.shape[1])


@dataclass(frozen=True)
class LowRank(Pass):
    """Factors for every layer whose weights alone are rounded, for `bits` per weight on average.

    Ranks go where each bit takes back the most of a layer's error, relative to its output. For
    weights that have codes: behind all passes that choose them. `add-low-rank` writes the factors.
    """

    bits: float = 0.25
    name: ClassVar[str] = "low-rank"
    analysis: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.bits <= 0:
            raise OnnxqError(f"low-rank.bits is above 0, not {self.bits}")

    def apply(self, graph: Graph, ctx: Context) -> int:
        todo = [job for job in jobs(graph, ctx) if self._takes(job, ctx)]
        budget = self.bits * sum(job.weights for job in todo)
        found: dict[str, Components] = {}
        done = 0
        for window in windows(todo, ctx.memory_budget):
            moments = observe_moments(window, graph, ctx)
            for job in window:
                ctx.progress(self.name, done, len(todo))
                done += 1
                ctx.solved.add((self.name, job.name))
                seen = moments.pop(job.name)
                if seen.rows:  # a branch may never have run
                    found[job.name] = self._components(job, ctx, seen.shrunk()[0])
                    found = within(found, budget)
        ctx.corrections |= {name: in_halves(parts) for name, parts in found.items()}
        return len(found)

    def _takes(self, job: Job, ctx: Context) -> bool:
        node = job.view.node
        product = node.op in ("MatMul", "Gemm") and not job.view.batched
        plain = product and not g.is_constant(node.inputs[0]) and ctx.plan[node.name].weights_alone
        return plain and _codes(job, ctx) is not None and (self.name, job.name) not in ctx.solved

    def _components(self, job: Job, ctx: Context, hessian: Array) -> Components:
        weight = job.view.matrix()
        codes = _codes(job, ctx)
        assert codes is not None
        error = weight - codes.dequantize()
        most = int(FULL * self.bits * weight.size / (BITS * sum(weight.shape))) + 1
        parts = components(error, hessian, min(most, *weight.shape))
        output = float(np.sum((weight @ hessian) * weight))
        relative = parts.gain / output if output > 0 else np.zeros_like(parts.gain)
        return parts._replace(gain=relative)


def _codes(job: Job, ctx: Context) -> QTensor | CodebookTensor | LatticeTensor | None:
    """What the weight becomes, if that is settled."""
    return ctx.codebooks.get(job.name) or ctx.weights.get(job.name)


def components(error: Array, hessian: Array, rank: int) -> Components:
    """The best correction of `rank` for D (out, in), given H (in, in); all ranks below as well."""
    out = len(error)
    size = min(out, rank + OVERSAMPLING)
    basis = np.random.default_rng(0).standard_normal((out, size)).astype(np.float32)
    for _ in range(ITERATIONS):
        basis, _ = np.linalg.qr(error @ (hessian @ (error.T @ basis)))
    inside = basis.T @ error
    gain, turn = np.linalg.eigh(inside @ hessian @ inside.T)
    a = basis @ turn[:, ::-1][:, :rank]
    return Components(a, a.T @ error, np.maximum(gain[::-1][:rank], 0))


def within(found: Mapping[str, Components], budget: float) -> dict[str, Components]:
    """The ranks that take back most per bit, `budget` bits of them; layers without any are out.

    The gains of a layer fall from rank to rank, so that the choice is the best there is but for
    the last rank.
    """
    offers = sorted(
        ((gain / parts.bits, name) for name, parts in found.items() for gain in parts.gain),
        key=lambda offer: -offer[0],
    )
    ranks = dict.fromkeys(found, 0)
    left = budget
    for gain, name in offers:
        left -= found[name].bits
        if left < 0 or gain <= 0:
            break
        ranks[name] += 1
    return {name: parts.first(ranks[name]) for name, parts in found.items() if ranks[name]}


def in_halves(parts: Components) -> Factors:
    """A and B in float16, a rank of equal size in both."""
    norms = (np.linalg.norm(parts.a, axis=0), np.linalg.norm(parts.b, axis=1))
    balance = np.sqrt(norms[1] / norms[0])
    a, b = parts.a * balance, parts.b / balance[:, None]
    return Factors(a.astype(np.float16), b.astype(np.float16))
