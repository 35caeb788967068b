"""Codes moved one at a time, each to where the layer's output is best served.

Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models": coordinate
descent on a row's error E = dHdᵀ, d = w − ŵ, H = E[xxᵀ]. With all other codes as they are, E is a
parabola in one code: moving it by m changes d_k by −s m, and E by s² H_kk m² − 2 s m (dH)_k, least
at the integer next to

    m = (dH)_k / (s H_kk),

cut to what the format and the bound on pairs allow. E never rises. A sweep visits all columns, as
many rows at once as there are; it stops when no code moves.

Between sweeps scales become the best for their codes, where they need not be powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from onnxq.passes.solve.hessian import Array, Codes, by_group, from_groups, started
from onnxq.passes.solve.refit_scales import refit_scales

from onnxq.qtype import QTensor, QType, nearest
from onnxq.solver import Layer, WeightSolver

BLOCK = 64  # columns whose changes reach all others together, in one matrix product
DEAD = 1e-9  # E[x²] of an input, relative to the mean of all, below which its weights stay


@dataclass(frozen=True)
class CoordinateDescent(WeightSolver):
    """Better codes for every weight that has some, in `sweeps` rounds at most."""

    sweeps: int = 8
    name: ClassVar[str] = "coordinate-descent"

    def solve(self, layer: Layer) -> QTensor:
        return coordinate_descent(layer, self.sweeps)


def coordinate_descent(layer: Layer, sweeps: int = 8) -> QTensor:
    """A weight with codes, whose error is at most that of `layer.start` in every row."""
    start, hessian = started(layer), layer.hessian
    now = by_group(start, len(hessian))
    weight = layer.weight.reshape(now.codes.shape)
    scale = start.scale
    for _ in range(sweeps):
        codes = sweep(weight, now, hessian, layer.qtype, layer.pair_limit)
        moved = not np.array_equal(codes, now.codes)
        now = now._replace(codes=codes)
        if not moved:
            break
        if not layer.qtype.power_of_two:
            size = layer.qtype.group or 0
            scale = refit_scales(weight, now, hessian, scale, size, start.step)
        found = replace(start, codes=from_groups(codes, layer.qtype), scale=scale)
        now = by_group(found, len(hessian))
    return replace(start, codes=from_groups(now.codes, layer.qtype), scale=scale)


def sweep(weight: Array, now: Codes, hessian: Array, qtype: QType, pair_limit: int | None) -> Array:
    """Codes after each column was visited once."""
    codes = now.codes.swapaxes(1, 2).copy()  # (groups, in, rows): a column lies together
    scale = now.scale.swapaxes(1, 2).copy()
    gradient = hessian @ np.ascontiguousarray((weight - now.real).swapaxes(1, 2))  # (dH)ᵀ
    curvature = np.diagonal(hessian, axis1=1, axis2=2).copy()
    curvature[curvature <= DEAD * curvature.mean()] = np.inf  # of no matter: they stay
    columns = codes.shape[1]
    for first in range(0, columns, BLOCK):
        block = slice(first, min(first + BLOCK, columns))
        near, before = gradient[:, block].copy(), codes[:, block].copy()
        inside = hessian[:, block, block]
        for k in range(block.stop - first):
            column = first + k
            unit = scale[:, column]
            best = codes[:, column] + near[:, k] / (unit * curvature[:, column, None])
            target = nearest(best, qtype)
            if pair_limit is not None and (partner := column ^ 1) < columns:
                other = codes[:, partner]
                target = np.clip(target, -pair_limit - other, pair_limit - other)
            change = (target - codes[:, column]) * unit
            codes[:, column] = target
            near -= inside[:, :, k, None] * change[:, None]
        change = (codes[:, block] - before) * scale[:, block]
        gradient -= hessian[:, :, block] @ change
    return np.ascontiguousarray(codes.swapaxes(1, 2))
