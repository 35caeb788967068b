"""Scales of a row's blocks as codes of 4 bits: a row of blocks is a block of scales.

    s_b = k_b · step,    k_b ∈ {1, …, 15},

with one step for all blocks of a row of the weight (out, in). Like the scales of K-quants in
llama.cpp, or those of VS-Quant (Dai et al. 2021, "VS-Quant: Per-vector Scaled Quantization for
Accurate Low-Precision Neural Network Inference"), two levels. A step is a number of 7 significant
bits, so that every scale has 11 at most: it is a float16 exactly, as any other scale is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxq.qtype import Floats, QType, fits_half

LAST = 15  # the largest code of a scale
_SIGNIFICANT = 7  # bits of a step: those of a float16 less the code's
_LEAST = 2.0**-24  # float16 above 0


def row_steps(scale: Floats, qtype: QType) -> NDArray[np.float32]:
    """Steps (out,) under which the largest of scales (out, blocks) ≥ 0 is the last code.

    1 where a row has none above 0. They are float16 as long as float16 has digits for all scales
    of the tensor, float32 otherwise.
    """
    largest = scale.max(axis=1, initial=0)
    mantissa, exponent = np.frexp(largest.astype(np.float64) / LAST)
    unit = 1 << _SIGNIFICANT
    step = np.ldexp(np.rint(mantissa * unit) / unit, exponent)
    half = fits_half(2 * largest, qtype)  # rounded up, the last scale is no larger than that
    if half:
        step = np.rint(np.maximum(step, _LEAST) / _LEAST) * _LEAST
    least = _LEAST if half else float(np.finfo(np.float32).tiny)
    return np.where(largest > 0, np.maximum(step, least), 1).astype(np.float32)


def on_steps(scale: Floats, step: Floats) -> NDArray[np.float32]:
    """The nearest scales that have codes; shapes broadcast."""
    return np.asarray(np.clip(np.rint(scale / step), 1, LAST) * step, np.float32)


def covering(scale: Floats, step: Floats) -> NDArray[np.float32]:
    """The least scales that have codes and are no smaller, where there are."""
    return np.asarray(np.clip(np.ceil(scale / step), 1, LAST) * step, np.float32)


def scale_codes(scale: Floats, step: Floats) -> NDArray[np.uint8]:
    """The codes of such scales (out, blocks) under the steps (out,)."""
    return np.rint(scale / step[:, None]).astype(np.uint8)
