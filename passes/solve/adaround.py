"""Rounding up or down, learned: the error of the layer's output decides, not that of the weight.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization". In units of the
scale, a weight between two codes becomes

    ŵ = s (⌊w/s⌋ + h(V)),    h(V) = clip(1.2 σ(V) − 0.1, 0, 1),

and V minimises

    Σ_rows dHdᵀ + λ Σ (1 − |2h − 1|^β),    d = w − ŵ,  H = E[xxᵀ],

the second term driving h to 0 or 1 while β falls from 20 to 2. In H the samples are summed up: the
gradient −2s (dH) ⊙ h′(V) needs one matrix product and no data. V begins where ŵ = w; Adam takes
the steps. λ and the error are in units of s² and of the mean E[x²].

Where a bound on pairs holds, pairs that could break it either way keep the codes they came with,
and the others make up for them. A row that ends no better than it came keeps its codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from onnxq.passes.solve.hessian import (
    Array,
    by_group,
    from_groups,
    output_error,
    refuse_float8,
    started,
)

from onnxq.qtype import QTensor
from onnxq.solver import Layer, WeightSolver

STRETCH, SHIFT = 1.2, -0.1  # ζ − γ and γ of the rectified sigmoid
FIRST, LAST = 20.0, 2.0  # β
WARM_UP = 0.2  # the share of the steps without the second term
DECAY = (0.9, 0.999)  # of Adam's two moments


@dataclass(frozen=True)
class AdaRound(WeightSolver):
    """Better codes, one step up or down, for every weight that has some."""

    steps: int = 500
    rate: float = 0.05
    regularization: float = 0.5
    name: ClassVar[str] = "adaround"

    def solve(self, layer: Layer) -> QTensor:
        refuse_float8(layer, self.name)
        return adaround(layer, self.steps, self.rate, self.regularization)


def adaround(
    layer: Layer, steps: int = 500, rate: float = 0.05, regularization: float = 0.5
) -> QTensor:
    """A weight with learned codes, whose error is at most that of `layer.start` in every row."""
    begun, hessian = started(layer), layer.hessian
    start = by_group(begun, len(hessian))
    weight = layer.weight.reshape(start.codes.shape)
    real = weight / start.scale + start.zero
    low, high = bounds(real, start.codes, layer)
    unit = hessian / (np.diagonal(hessian, axis1=1, axis2=2).mean() or 1.0)  # 1: no inputs but 0
    fraction = np.clip(real - low, 0, 1) * (high > low)
    v = logit(fraction)
    mean, square = np.zeros_like(v), np.zeros_like(v)
    for step in range(steps):
        gradient = error_gradient(v, real, low, high, start.scale, unit)
        progress = (step / steps - WARM_UP) / (1 - WARM_UP)
        if progress > 0:
            beta = LAST + (FIRST - LAST) * (1 - progress)
            gradient += regularization * penalty_gradient(v, beta)
        mean += (1 - DECAY[0]) * (gradient - mean)
        square += (1 - DECAY[1]) * (gradient**2 - square)
        first, second = (1 - decay ** (step + 1) for decay in DECAY)
        v -= rate * (mean / first) / (np.sqrt(square / second) + 1e-8)
    codes = np.where(rectified(v) >= 0.5, high, low)
    before = output_error(weight - start.real, hessian)
    after = output_error(weight - start._replace(codes=codes).real, hessian)
    kept = np.where((after < before)[:, :, None], codes, start.codes)
    return replace(begun, codes=from_groups(kept, layer.qtype))


def bounds(real: Array, codes: Array, layer: Layer) -> tuple[Array, Array]:
    """The codes below and above each weight; equal where there is no choice."""
    qtype = layer.qtype
    low, high = (np.clip(f(real), qtype.qmin, qtype.qmax) for f in (np.floor, np.ceil))
    if layer.pair_limit is not None:
        free = ~(breaks(low, layer.pair_limit) | breaks(high, layer.pair_limit))
        low, high = np.where(free, low, codes), np.where(free, high, codes)
    return low.astype(np.float32), high.astype(np.float32)


def breaks(codes: Array, limit: int) -> np.ndarray:
    """Which codes (groups, rows, in) are of a pair beyond |c_2i + c_2i+1| ≤ limit."""
    even = codes.shape[2] // 2 * 2
    broken = np.zeros(codes.shape, bool)
    broken[:, :, 0:even:2] = np.abs(codes[:, :, 0:even:2] + codes[:, :, 1:even:2]) > limit
    broken[:, :, 1:even:2] = broken[:, :, 0:even:2]
    return broken


def rectified(v: Array) -> Array:
    """h(V)."""
    return np.clip(STRETCH / (1 + np.exp(-v)) + SHIFT, 0, 1)


def logit(fraction: Array) -> Array:
    """V of h(V) = fraction."""
    return -np.log(STRETCH / (fraction - SHIFT) - 1)


def slope(v: Array) -> Array:
    """h′(V)."""
    sigmoid = 1 / (1 + np.exp(-v))
    h = STRETCH * sigmoid + SHIFT
    return STRETCH * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))


def error_gradient(
    v: Array, real: Array, low: Array, high: Array, scale: Array, hessian: Array
) -> Array:
    """∂/∂V of Σ dHdᵀ in units of each weight's scale; where low = high nothing moves."""
    difference = (real - low - (high - low) * rectified(v)) * scale
    return -2 * (difference @ hessian) / scale * (high - low) * slope(v)


def penalty_gradient(v: Array, beta: float) -> Array:
    """∂/∂V of Σ (1 − |2h − 1|^β)."""
    centred = 2 * rectified(v) - 1
    return -2 * beta * np.abs(centred) ** (beta - 1) * np.sign(centred) * slope(v)
