"""The best scales for given codes, as the layer's output sees them.

With centred codes c = code − zero, a row is ŵ = s c per tensor or channel, and its error dHdᵀ,
d = w − ŵ, H = E[xxᵀ], least at

    s = (w H c) / (c H c).

Blocks share the row's error. They are refitted one after another: with c the codes of one block,
and 0 elsewhere, its scale moves by

    (d H c) / (c H c),

d being what the blocks before it left. Rounding it to float16, or to a multiple of the row's step
(see `super_blocks`), is part of what the blocks after it make up for. No error rises.
"""

from __future__ import annotations

import numpy as np
from onnxq.passes.solve.hessian import Array, Codes

from onnxq.super_blocks import on_steps

TINY = np.finfo(np.float32).tiny


def refit_scales(
    weight: Array, now: Codes, hessian: Array, scale: Array, size: int, step: Array | None = None
) -> Array:
    """Scales (), (out,) or (out, blocks), as `scale` is; `size` is that of a block.

    `weight` and `now` are (groups, rows, in), `hessian` (groups, in, in). Scales that float16 holds
    stay such; with `step` (out,) they are multiples of it.
    """
    if scale.ndim > 1:
        return _of_blocks(weight, now, hessian, scale, size, step)
    codes = now.codes - now.zero
    seen = codes @ hessian
    product, square = (np.sum(seen * a, axis=2, dtype=np.float64).ravel() for a in (weight, codes))
    if scale.ndim == 0:
        product, square = product.sum(), square.sum()
    better = np.where(square > 0, product / np.where(square > 0, square, 1), scale)
    return np.where(better > TINY, better, scale).astype(np.float32)


def _of_blocks(
    weight: Array, now: Codes, hessian: Array, scale: Array, size: int, step: Array | None
) -> Array:
    half = np.array_equal(scale, _half(scale))
    scales = scale.reshape(*now.codes.shape[:2], -1).copy()
    steps = None if step is None else step.reshape(scales.shape[:2])
    codes = now.codes - now.zero
    gradient = (weight - now.real) @ hessian
    for block in range(scales.shape[2]):
        part = slice(block * size, (block + 1) * size)
        c, before = codes[:, :, part], scales[:, :, block].copy()
        product = np.sum(gradient[:, :, part] * c, axis=2)
        square = np.sum((c @ hessian[:, part, part]) * c, axis=2)
        after = before + product / np.where(square > 0, square, np.inf)
        if steps is not None:
            after = on_steps(after, steps)
        elif half:
            after = _half(after)
        move = after - before
        usable = np.isfinite(after) & (np.abs(after) > TINY)
        usable &= move * (2 * product - move * square) > 0
        scales[:, :, block] = np.where(usable, after, before)
        change = (scales[:, :, block] - before)[:, :, None] * c
        later = slice(part.stop, None)
        gradient[:, :, later] -= change @ hessian[:, part, later]
    return scales.reshape(scale.shape)


def _half(scale: Array) -> Array:
    with np.errstate(over="ignore"):
        return scale.astype(np.float16).astype(np.float32)
