"""Weight scales by the error that the layer's output sees: min over s of Σ_rows dHdᵀ, d = w − ŵ(s).

Rounding to nearest under the range's own scale spends codes on a few large weights. Tried are
shares of the range, cut or widened (a bound on pairs holds better under a wider one); each tensor,
channel or block takes the one of least error. H = E[xxᵀ] is the true one of the samples, of which
blocks see the part of their own columns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnxq.passes.solve.blocks import range_scales
from onnxq.passes.solve.round_to_nearest import POWERS, hold_pairs

from onnxq.qtype import Floats, QTensor, QType, quantize_weight, spread, weight_scale
from onnxq.solver import Layer
from onnxq.super_blocks import on_steps, row_steps

STEPS = 40  # shares of the range that are tried, evenly spaced; some that are wider are luckier
LOWEST = {2: 0.3, 4: 0.4}  # of them, by bits; other formats gain from no cut below 0.8
WIDEST = 127 / 64  # at which all pairs hold


def search_weight_scale(layer: Layer) -> QTensor:
    best: QTensor | None = None
    best_error = np.array(np.inf)
    step = None
    if layer.qtype.scale_bits < 16:
        step = row_steps(range_scales(layer.weight, layer.qtype), layer.qtype)
    for share in shares(layer.qtype, layer.pair_limit):
        scale, zero = weight_scale(layer.weight * np.float32(share), layer.qtype)
        scale = scale if step is None else on_steps(scale, step[:, None])
        tried = replace(rounded(layer, scale, zero), step=step)
        error = error_by_scale(layer.weight - tried.dequantize(), layer.hessian, layer.qtype)
        better = error < best_error
        best = tried if best is None else _where(better, tried, best)
        best_error = np.where(better, error, best_error)
    assert best is not None
    return best


def shares(qtype: QType, pair_limit: int | None) -> NDArray[np.float64]:
    """Of the range, the whole early: it stays where all are equal."""
    if qtype.power_of_two:
        return np.array(POWERS)
    low, high = LOWEST.get(qtype.bits, 0.8), WIDEST if pair_limit else 1.25
    return np.append(1.0, np.linspace(low, high, STEPS))


def rounded(layer: Layer, scale: Floats, zero: NDArray[np.generic]) -> QTensor:
    """Nearest codes under a scale, within the bound on pairs."""
    qtype, limit = layer.qtype, layer.pair_limit
    tried = quantize_weight(layer.weight, scale, zero, qtype)
    if limit is None:
        return tried
    square = np.diagonal(layer.hessian, axis1=1, axis2=2)
    square = np.repeat(square, len(layer.weight) // len(square), axis=0)
    square = square + 1e-6 * square.mean() + np.finfo(np.float32).tiny
    real = layer.weight / spread(scale, layer.weight.shape)
    held = hold_pairs(tried.codes.astype(np.float32), real, square, limit)
    return QTensor(held.astype(qtype.dtype), scale, zero, qtype)


def error_by_scale(difference: Floats, hessian: Floats, qtype: QType) -> NDArray[np.float64]:
    """dHdᵀ of W − Ŵ (out, in), summed over what shares a scale: (), (out,) or (out, blocks)."""
    out, columns = difference.shape
    block = columns if qtype.group in (None, -1) else int(qtype.group or 0)
    error = []
    for first in range(0, columns, block):
        part = slice(first, first + block)
        d = difference[:, part].reshape(len(hessian), out // len(hessian), -1)
        error.append(np.sum((d @ hessian[:, part, part]) * d, axis=2, dtype=np.float64).ravel())
    if qtype.group is None:
        return np.asarray(np.sum(error))
    return error[0] if qtype.group == -1 else np.stack(error, axis=1)


def _where(better: NDArray[np.bool_], tried: QTensor, best: QTensor) -> QTensor:
    codes = np.where(spread(better, tried.codes.shape, tried.qtype.group), tried.codes, best.codes)
    scale, zero = (
        np.where(better, getattr(tried, part), getattr(best, part)) for part in ("scale", "zero")
    )
    return replace(tried, codes=codes, scale=scale, zero=zero)
