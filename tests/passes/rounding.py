"""Layers to round, and the best rounding of small ones by trying them all."""

from __future__ import annotations

from itertools import product

import numpy as np
from graphs import Array, normal
from onnxq.passes.solve.round_to_nearest import round_to_nearest

from onnxq.qtype import QTensor, QType
from onnxq.solver import Layer


def correlated(columns: int, groups: int = 1, seed: int = 0) -> Array:
    """H (groups, in, in) of inputs that share a few causes."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(groups, columns, columns)) * 0.3
    mix += rng.normal(size=(groups, columns, 2)) @ rng.normal(size=(groups, 2, columns))
    return (mix @ mix.swapaxes(1, 2) / columns).astype(np.float32)


def layer(
    rows: int,
    columns: int,
    spec: str = "s4:channel",
    groups: int = 1,
    pair_limit: int | None = None,
    seed: int = 0,
) -> Layer:
    """A layer with rounded codes to start from."""
    weight, qtype = normal(rows, columns, seed=seed), QType.parse(spec)
    start = round_to_nearest(weight, qtype, pair_limit=pair_limit)
    return Layer(weight, qtype, correlated(columns, groups, seed), pair_limit, start)


def errors(made: Layer, q: QTensor) -> Array:
    """dHdᵀ of each row, in float64, row by row."""
    d = made.weight.astype(np.float64) - q.dequantize()
    hessians = np.repeat(made.hessian.astype(np.float64), len(d) // len(made.hessian), axis=0)
    return np.array([row @ h @ row for row, h in zip(d, hessians, strict=True)])


def least_error(made: Layer, q: QTensor, row: int) -> float:
    """The least dHdᵀ of a row over all 2ⁿ roundings up or down, under the scale of `q`."""
    scale, zero = (float(np.broadcast_to(a, len(made.weight))[row]) for a in (q.scale, q.zero))
    real = made.weight[row].astype(np.float64) / scale + zero
    hessian = made.hessian[row // (len(made.weight) // len(made.hessian))].astype(np.float64)
    best = np.inf
    for ups in product((0, 1), repeat=len(real)):
        codes = np.clip(np.floor(real) + ups, made.qtype.qmin, made.qtype.qmax)
        d = (real - codes) * scale
        best = min(best, float(d @ hessian @ d))
    return best
