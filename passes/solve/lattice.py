"""Eight weights at a time to the nearest point of E8P, 2 bits a weight (see `onnxq.lattice`).

Tseng et al. 2024, "QuIP#", §4.1 (block LDLQ): columns go by eights, B = 1, 2, …; with

    H + λ mean(diag H) I = R Rᵀ,    R upper triangular,    d = w − ŵ,

what a row's error costs is a sum over blocks, Σ_B |(d_B + f_B) R_BB|² with
f_B = Σ_{A<B} d_A R_AB R_BB⁻¹, and ŵ_B is the point nearest to w_B + f_B. After that sweeps visit
each block again, given all others: the best real weights for it are ŵ_B + (dH)_B H_BB⁻¹, and it
moves to the point nearest to them where that lessens dHdᵀ.

The nearest point (§4.2): for each shift ±¼, signs are those of x. If their parity is wrong for a
pattern, that of the smallest |x_i| is turned, which is best for all patterns of S that come with
their permutations; for those that do not it is that of the smallest |x_i| s_i.

A row has one scale, the best of a few around its root mean square. The paper rotates inputs and
outputs first, so that it suits all columns; that would cost every inference, and took little more
of the error where it was tried. Columns far larger than others do want help: `low-rank` after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq.graph import Graph
from onnxq.lattice import SHORT, SIZE, LatticeTensor, odd, patterns, points
from onnxq.pipeline import Context, Pass
from onnxq.qtype import Floats
from onnxq.solver import Job, jobs, observe_moments, windows

Array = NDArray[Any]
SHIFTS = (0.25, -0.25)
AT_ONCE = 1 << 12  # points whose distances to all patterns stay in the cache
GAUSSIAN = 1.03  # the reciprocal of the scale that suits normal weights of deviation 1
SHARES = (0.8, 0.9, 1.0)  # of that scale: H lets errors go where they cost little


@dataclass(frozen=True)
class Lattice(Pass):
    """Points of E8P for weights of MatMul and Gemm that the plan gives blocks of 2 to 4 bits.

    `damping` is λ; `sweeps` visit each block again.
    """

    damping: float = 0.01
    sweeps: int = 3
    name: ClassVar[str] = "lattice"
    analysis: ClassVar[bool] = True
    needs_samples: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        todo = [job for job in jobs(graph, ctx) if _takes(job, ctx)]
        done = 0
        for window in windows(todo, ctx.memory_budget):
            moments = observe_moments(window, graph, ctx)
            for job in window:
                ctx.progress(self.name, done, len(todo))
                seen = moments.pop(job.name)
                if seen.rows:  # a branch may never have run
                    ctx.codebooks[job.name] = self.solve(
                        job.view.matrix(), seen.shrunk()[0], job.qtype.group or 0
                    )
                    ctx.weights.pop(job.name, None)
                    done += 1
        return done

    def solve(self, weight: Floats, hessian: Array, group: int) -> LatticeTensor:
        """A weight (out, in), given H (in, in): the best of a few scales for each row."""
        columns = weight.shape[1]
        lacking = -columns % SIZE
        weight = np.pad(weight, ((0, 0), (0, lacking)))
        hessian = np.pad(hessian, ((0, lacking), (0, lacking)))
        deviation = np.sqrt(np.square(weight, dtype=np.float64).sum(axis=1) / columns)
        least = np.full(len(weight), np.inf)
        codes = np.zeros((len(weight), weight.shape[1] // SIZE), np.uint16)
        scale = np.ones(len(weight), np.float32)
        damped = with_damping(hessian, self.damping)
        for share in SHARES:
            tried = half_scale(share / GAUSSIAN * deviation)
            found = ldlq(weight / tried[:, None], damped)
            error = weight - tried[:, None] * points()[found].reshape(weight.shape)
            cost = np.sum((error @ hessian) * error, axis=1)
            better = cost < least
            codes[better], scale[better] = found[better], tried[better]
            least = np.where(better, cost, least)
        for _ in range(self.sweeps):
            sweep(weight / scale[:, None], damped, codes)
        return LatticeTensor(codes, scale, columns, group)


def _takes(job: Job, ctx: Context) -> bool:
    """Whether it is to have few bits and has none yet, and all that read it multiply with it."""
    readers = job.view.tensor.outputs
    products = all(node.op in ("MatMul", "Gemm") for node in readers)
    alone = all(node.name in ctx.plan and ctx.plan[node.name].weights_alone for node in readers)
    fits = job.qtype.blocked and job.qtype.bits <= 4 and not job.view.batched
    settled = job.name in ctx.codebooks or job.name in ctx.tied
    return products and alone and fits and not settled


def half_scale(scale: Floats) -> NDArray[np.float32]:
    """Scales as files hold them: multiples of 4 of what float16 can tell apart, never 0.

    A half and a quarter of one are used, which are exact then.
    """
    quarter = np.asarray(scale / 4, np.float16).astype(np.float32)
    return np.where(quarter > 0, 4 * quarter, np.float32(1))


def with_damping(hessian: Array, damping: float) -> NDArray[np.float64]:
    """H + λ mean(diag H) I, with a factor."""
    exact = hessian.astype(np.float64)
    exact += np.eye(len(exact)) * (damping * float(np.trace(exact)) / len(exact) or 1.0)
    return exact


def ldlq(weight: Floats, hessian: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Codes (out, in / 8) of weights (out, in) in units of their scales."""
    root = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1].astype(np.float32)
    error = np.zeros_like(weight)
    codes = np.empty((len(weight), weight.shape[1] // SIZE), np.uint16)
    for k, block in _blocks(codes):
        before = slice(0, block.start)
        fed = error[:, before] @ root[before, block] @ np.linalg.inv(root[block, block])
        codes[:, k] = nearest(weight[:, block] + fed)
        error[:, block] = weight[:, block] - points()[codes[:, k]]
    return codes


def sweep(weight: Floats, hessian: NDArray[np.float64], codes: NDArray[np.uint16]) -> None:
    """Move codes (out, in / 8), in place, each once at most: dHdᵀ falls or stays."""
    error = weight - points()[codes].reshape(weight.shape)
    for k, block in _blocks(codes):
        seen = error @ hessian[:, block].astype(np.float32)
        inside = hessian[block, block].astype(np.float32)
        now = points()[codes[:, k]]
        found = nearest(now + seen @ np.linalg.inv(inside))
        move = points()[found] - now
        change = np.sum((move @ inside - 2 * seen) * move, axis=1)
        better = change < 0
        codes[better, k] = found[better]
        error[better, block] -= move[better]


def _blocks(codes: NDArray[np.uint16]) -> Iterator[tuple[int, slice]]:
    return ((k, slice(SIZE * k, SIZE * (k + 1))) for k in range(codes.shape[1]))


def nearest(x: Floats) -> NDArray[np.uint16]:
    """The codes of the points nearest to x (n, 8)."""
    return np.concatenate([
        np.empty(0, np.uint16),
        *(_nearest(x[i : i + AT_ONCE].astype(np.float32)) for i in range(0, len(x), AT_ONCE)),
    ])  # fmt: skip


def _nearest(x: Floats) -> NDArray[np.uint16]:
    codes, least = np.zeros(len(x), np.uint16), np.full(len(x), np.inf, np.float32)
    for number, shift in enumerate(SHIFTS):
        pattern, sign = _nearest_signed(x - np.float32(shift))
        found = (pattern * 256 + sign * 2 + number).astype(np.uint16)
        distance = np.sum((x - points()[found]) ** 2, axis=1)
        codes = np.where(distance < least, found, codes)
        least = np.minimum(distance, least)
    return codes


def _nearest_signed(x: Floats) -> tuple[Array, Array]:
    """The pattern and the seven signs of the point of D̂8 nearest to x (n, 8)."""
    size, negative, each = np.abs(x), x < 0, np.arange(len(x))
    parity = negative.sum(axis=1) % 2
    turned = size.copy()
    turned[each, size.argmin(axis=1)] *= -1
    best, most = np.zeros(len(x), np.int64), np.full(len(x), -np.inf, np.float32)
    for wanted, (places, table) in enumerate(_short_patterns()):
        signed = np.where(parity[:, None] == wanted, size, turned)
        score = np.column_stack([signed, np.ones(len(x), np.float32)]) @ table
        place = score.argmax(axis=1)
        reached = score[each, place]
        best, most = np.where(reached > most, places[place], best), np.maximum(most, reached)
    _try_long(size, parity, best, most)
    flip = (size * patterns()[best]).argmin(axis=1)
    mend = parity != odd()[best]
    negative[each[mend], flip[mend]] ^= True
    return best, negative[:, :7] @ (1 << np.arange(7))


@cache
def _short_patterns() -> list[tuple[Array, Array]]:
    """Those of even and of odd parity, which come with all their permutations: their places, and
    (9, patterns) to be multiplied with (x, 1) for x·s − |s|²/2.
    """
    short = np.sum(patterns() ** 2, axis=1) <= SHORT
    places = [np.flatnonzero(short & (odd() == parity)) for parity in (False, True)]
    return [(p, np.vstack([patterns()[p].T, _offset(patterns()[p])])) for p in places]


def _offset(pattern: Floats) -> Array:
    """−|s|²/2"""
    return np.asarray(-np.sum(pattern**2, axis=1) / 2, np.float32)


def _try_long(size: Floats, parity: Array, best: Array, most: Array) -> None:
    """Put the places of the other patterns into `best` (n,) where they score more than `most`."""
    places = np.flatnonzero(np.sum(patterns() ** 2, axis=1) > SHORT)
    long = patterns()[places]
    score = size @ long.T + _offset(long)  # which wrong parity lessens
    rows = np.flatnonzero(score.max(axis=1) > most)
    lost = 2 * (size[rows, None] * long).min(axis=2)
    score = score[rows] - lost * (parity[rows, None] != odd()[places])
    place = score.argmax(axis=1)
    better = score[np.arange(len(rows)), place] > most[rows]
    best[rows[better]] = places[place[better]]
