"""Rounding and range of each block, learned together by the sign of the gradient alone.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs". With V in [−½, ½] for each weight, α and β in [0, 1] for each scale,

    s = (α high − β low) / (qmax − qmin),    z = ⌊qmin − β low / s⌉,
    c = clip(⌊w/s + V⌉ + z, qmin, qmax),      ŵ = s (c − z),

where [low, high] is the range of the codes that are there already; symmetric formats have s = α s₀
and their zero point. All go down the gradient of Σ_rows dHdᵀ, d = w − ŵ, H = E[xxᵀ], for which a
rounding counts as the identity ("straight through"), by its sign times a rate that falls to 0. In H
the samples are summed up: a step takes one matrix product and no data. Each row keeps the best of
all steps, and the codes that it came with if there is no better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
from onnxq.passes.solve.hessian import Array, refuse_float8, started

from onnxq.errors import OnnxqError
from onnxq.qtype import QTensor, QType, block_scale, spread
from onnxq.solver import Layer, WeightSolver
from onnxq.super_blocks import on_steps


@dataclass(frozen=True)
class AutoRound(WeightSolver):
    """Better codes and scales for every weight that has some. The first rate is 1 / `steps`."""

    steps: int = 200
    name: ClassVar[str] = "autoround"

    def solve(self, layer: Layer) -> QTensor:
        refuse_float8(layer, self.name)
        return autoround(layer, self.steps)


def autoround(layer: Layer, steps: int = 200) -> QTensor:
    """A weight with learned codes, whose error is at most that of `layer.start` in every row, or
    altogether where a scale is the whole tensor's.
    """
    if layer.pair_limit is not None:
        raise OnnxqError(
            "autoround keeps no bound on pairs of 8-bit weights, which this target's kernels need: "
            "use the pass 'adaround' or 'coordinate-descent'"
        )
    best = started(layer)
    learned = Learned.beginning(layer.weight, best)
    least = _by_row(error_and_slope(layer.weight - best.dequantize(), layer.hessian)[0], best)
    for step in range(steps):
        made = forward(layer.weight, learned, best.qtype)
        error, slope = error_and_slope(layer.weight - made.real, layer.hessian)
        found = _by_row(error, best)
        best, least = _better(found < least, made, best), np.minimum(found, least)
        rate = np.float32((1 - step / steps) / steps)
        learned = learned.moved(backward(layer.weight, learned, made, slope, best.qtype), rate)
    return best


class Learned(NamedTuple):
    """V (out, in), α and β as scales are, and the range (low, high) that these are shares of.

    `step` (out, 1) is there where scales are multiples of it.
    """

    v: Array
    alpha: Array
    beta: Array
    low: Array
    high: Array
    step: Array | None = None

    @classmethod
    def beginning(cls, weight: Array, q: QTensor) -> Learned:
        zero, ones = q.zero.astype(np.float32), np.ones_like(q.scale)
        low, high = (q.scale * (edge - zero) for edge in (q.qtype.qmin, q.qtype.qmax))
        step = None if q.step is None else q.step[:, None]
        return cls(np.zeros_like(weight), ones, ones, low, high, step)

    def moved(self, gradient: tuple[Array, Array, Array], rate: np.float32) -> Learned:
        v, alpha, beta = (
            value - rate * np.sign(g) for value, g in zip(self[:3], gradient, strict=True)
        )
        return self._replace(
            v=np.clip(v, -0.5, 0.5), alpha=np.clip(alpha, 0, 1), beta=np.clip(beta, 0, 1)
        )


class Rounded(NamedTuple):
    """Scale and zero point, as in a QTensor; codes and ŵ (out, in); where codes were not cut."""

    scale: Array
    zero: Array
    codes: Array
    real: Array
    inside: Array


def forward(
    weight: Array, now: Learned, qtype: QType, nearest: Callable[[Array], Array] = np.rint
) -> Rounded:
    """ŵ of what is learned; scales that must be powers of two stay."""
    alpha, beta = (np.float32(1),) * 2 if qtype.power_of_two else (now.alpha, now.beta)
    steps = np.float32(qtype.qmax - qtype.qmin)
    if qtype.symmetric:
        scale = alpha * (now.high - now.low) / steps
        zero = np.full_like(scale, qtype.middle)
    else:
        scale = (alpha * now.high - beta * now.low) / steps
        zero = qtype.qmin - beta * now.low / np.where(scale > 0, scale, 1)
        zero = np.clip(nearest(zero), qtype.qmin, qtype.qmax)
    if qtype.blocked and nearest is np.rint:
        scale = block_scale(scale, qtype) if now.step is None else on_steps(scale, now.step)
    s, z = (spread(a, weight.shape, qtype.group) for a in (scale, zero))
    free = nearest(weight / s + now.v) + z
    codes = np.clip(free, qtype.qmin, qtype.qmax)
    return Rounded(scale, zero, codes, s * (codes - z), free == codes)


def backward(
    weight: Array, now: Learned, made: Rounded, slope: Array, qtype: QType
) -> tuple[Array, Array, Array]:
    """∂/∂V, ∂/∂α and ∂/∂β of a loss whose ∂/∂ŵ is `slope` (out, in)."""
    s, z = (spread(a, weight.shape, qtype.group) for a in (made.scale, made.zero))
    steps = qtype.qmax - qtype.qmin
    by_scale = sum_by_scale(slope * (made.codes - z - made.inside * weight / s), made.scale, qtype)
    by_v = slope * s * made.inside
    if qtype.symmetric:
        return by_v, by_scale * (now.high - now.low) / steps, np.zeros_like(by_scale)
    by_zero = sum_by_scale(slope * s * (made.inside - np.float32(1)), made.scale, qtype)
    by_scale = by_scale + by_zero * now.beta * now.low / made.scale**2
    by_alpha = by_scale * now.high / steps
    return by_v, by_alpha, -now.low * (by_scale / steps + by_zero / made.scale)


def error_and_slope(difference: Array, hessian: Array) -> tuple[Array, Array]:
    """dHdᵀ of each row of W − Ŵ (out, in), and ∂/∂ŵ of their sum."""
    by_group = difference.reshape(len(hessian), -1, difference.shape[1])
    seen = (by_group @ hessian).reshape(difference.shape)
    return np.sum(seen * difference, axis=1), -2 * seen


def sum_by_scale(values: Array, scale: Array, qtype: QType) -> Array:
    """Sums of (out, in) over what shares a scale."""
    if scale.ndim < 2:
        return np.asarray(values.sum() if scale.ndim == 0 else values.sum(axis=1))
    return np.add.reduceat(values, np.arange(0, values.shape[1], qtype.group or 0), axis=1)


def _by_row(error: Array, q: QTensor) -> Array:
    """Errors that are compared: of each row, or of all where they share a scale."""
    return error.sum(keepdims=True) if q.scale.ndim == 0 else error


def _better(better: Array, made: Rounded, best: QTensor) -> QTensor:
    """The rows of `made` that are better."""

    def choose(new: Array, old: Array) -> Array:
        rows = better.reshape(-1, *[1] * (old.ndim - 1)) if old.ndim else better.all()
        return np.where(rows, new.astype(old.dtype), old)

    return replace(
        best,
        codes=choose(made.codes, best.codes),
        scale=choose(made.scale, best.scale),
        zero=choose(made.zero, best.zero),
    )
