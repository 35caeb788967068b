"""Codes of a weight in blocks: one scale and zero point for each few neighbours along the input.

Within a block ŵ = s (c − z). The range of its weights gives

    asymmetric    s = (max w − min w) / (2ᵇ − 1),   z = round(qmin − min w / s)
    symmetric     s = w* / (−2ᵇ⁻¹),                 w* the weight of largest magnitude,

so that of a symmetric block w* takes the lowest code, and s its sign or the other.

Clipping. A block is better off where its few large weights give way for the many small. With
q_k = E[x_k²] of the inputs, or 1 where they are unknown, the best is the one of least

    E = Σ_k q_k (w_k − s (c_k − z))²

among scales shrunk by `SHRINKS`, for symmetric formats of both signs, and then the scale that is
best for the codes of the best so far, `FITS` times (Lloyd 1982, "Least squares quantization in
PCM": codes and levels in turn):

    s = Σ q w (c − z) / Σ q (c − z)².

Every candidate is rounded as files hold it before its E is taken, and the plain range is the first:
E never exceeds that of rounding without clipping.

Scales that are codes under a step per row (see `super_blocks`) are far apart. The step is that of
the row's widest range. Tried are also the scale itself and its neighbours, k − 1 and k + 1, with
zero points by which the levels lie around the middle of the range.

A weight is worked on in tiles (blocks, group, rows) that stay in the cache, with rows innermost: a
minimum or sum over a block is then elementwise over rows, which vector instructions do best.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxq.qtype import (
    Codes,
    Floats,
    QTensor,
    QType,
    as_codes,
    block_range,
    fits_half,
    stored_scale,
)
from onnxq.super_blocks import covering, on_steps, row_steps

TILE = 1 << 16  # weights of a tile: three arrays of it fit the second-level cache
ROWS = 496  # of a tile; a power of two would have its rows share few lines of the cache
STRIP = 16  # rows transposed at a time, a line of the cache: NumPy is slow at more
SHRINKS = (0.95, 0.9, 0.85, 0.8)
FLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)  # with the other sign, symmetric formats only
FITS = 2

Tile = NDArray[np.float32]
Stored = Callable[[Tile], Tile]  # scales (blocks, 1, rows) as files hold them
# Scales and zero points of a tile (place, x, those of its ranges, E[x²]).
Choose = Callable[["Where", Tile, Tile, Tile, Tile | None], tuple[Tile, Tile]]


class Where(NamedTuple):
    """A tile's place: rows and columns of the weight, columns of its scales, weights of a block."""

    rows: slice
    columns: slice
    blocks: slice
    group: int

    def read(self, array: Floats) -> Tile:
        """The part of an array (out or 1, in) as (blocks, group, rows or 1)."""
        part = array[self.rows if len(array) > 1 else slice(1), self.columns]
        tile = np.empty(part.shape[::-1], np.float32)
        strip = STRIP if part.strides[1] < part.strides[0] else len(part)
        for top in range(0, len(part), strip):
            tile[:, top : top + strip] = part[top : top + strip].T
        return tile.reshape(-1, self.group, len(part))

    def read_blocks(self, array: Floats) -> Tile:
        """The part of an array (out, blocks) as (blocks, 1, rows)."""
        return np.ascontiguousarray(array[self.rows, self.blocks].T, np.float32)[:, None]

    def write(self, array: Codes, tile: Tile) -> None:
        part = array[self.rows, self.columns]
        np.copyto(part, tile.reshape(-1, tile.shape[2]).T, casting="unsafe")

    def write_blocks(self, array: Codes, tile: Tile) -> None:
        array[self.rows, self.blocks] = tile[:, 0].T


def tiles(shape: tuple[int, int], group: int) -> Iterator[Where]:
    """Tiles that cover a weight (out, in); a last block that is cut short has its own."""
    out, columns = shape
    whole = columns // group
    step = max(1, TILE // ROWS // group)
    for top in range(0, out, ROWS):
        rows = slice(top, min(top + ROWS, out))
        for first in range(0, whole, step):
            last = min(first + step, whole)
            yield Where(rows, slice(first * group, last * group), slice(first, last), group)
        if rest := columns % group:
            yield Where(rows, slice(whole * group, columns), slice(whole, whole + 1), rest)


def round_blocks(
    weight: Floats,
    qtype: QType,
    *,
    square: Floats | None = None,
    clip: bool = True,
    threads: int | None = None,
) -> QTensor:
    """Codes of a weight (out, in) in a format with blocks.

    `square` is E[x²], broadcastable to (out, in); without it all inputs count alike. The result
    does not depend on the number of threads.
    """
    square = None if square is None or not clip else relative(square)
    if qtype.scale_bits < 16:
        step = row_steps(range_scales(weight, qtype), qtype)
        found, _ = _rounded(weight, qtype, square, _steps(step, qtype, clip), threads)
        return replace(found, step=step)
    found, ranges = _rounded(weight, qtype, square, _floats(True, qtype, clip), threads)
    if not fits_half(ranges, qtype):
        found, _ = _rounded(weight, qtype, square, _floats(False, qtype, clip), threads)
    return found


def _floats(half: bool, qtype: QType, clip: bool) -> Choose:
    """Scales that are floats, float16 or not."""
    stored = partial(stored_scale, half=half)

    def choose(_: Where, x: Tile, base: Tile, z: Tile, square: Tile | None) -> tuple[Tile, Tile]:
        s = stored(base)
        return (clipped(x, s, base, z, qtype, stored, square) if clip else s), z

    return choose


def _steps(step: Floats, qtype: QType, clip: bool) -> Choose:
    """Scales that are multiples of the steps (out,) of their rows."""

    def choose(
        place: Where, x: Tile, base: Tile, z: Tile, square: Tile | None
    ) -> tuple[Tile, Tile]:
        unit = step[place.rows]
        s = covering(base, unit)
        if not clip:
            return s, z
        s = clipped(x, s, base, z, qtype, partial(on_steps, step=unit), square)
        return balanced(x, s, z, unit, qtype, square)

    return choose


def range_scales(weight: Floats, qtype: QType) -> Floats:
    """Scales (out, blocks) of the blocks' ranges, not rounded; 0 of a block of zeros."""
    starts = np.arange(0, weight.shape[1], qtype.group)
    low, high = (f.reduceat(weight, starts, axis=1) for f in (np.minimum, np.maximum))
    return block_range(low, high, qtype)[0]


def _rounded(
    weight: Floats,
    qtype: QType,
    square: Floats | None,
    choose: Choose,
    threads: int | None,
) -> tuple[QTensor, Floats]:
    """Codes, and the scales of the blocks' ranges."""
    assert qtype.group is not None
    codes = np.empty(weight.shape, qtype.byte)
    scale = np.empty((len(weight), -(-weight.shape[1] // qtype.group)), np.float32)
    zero, ranges = np.empty(scale.shape, qtype.byte), np.empty_like(scale)

    def solve(place: Where) -> None:
        x = place.read(weight)
        base, z = block_range(x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True), qtype)
        seen = None if square is None else place.read(square)
        with np.errstate(over="ignore", invalid="ignore"):  # such a candidate is never best
            s, z = choose(place, x, base, z, seen)
            place.write(codes, centered(x, s, z, qtype) + z)
        for array, tile in ((ranges, base), (scale, s), (zero, z)):
            place.write_blocks(array, tile)

    for_each_tile(solve, weight.shape, qtype, threads)
    return QTensor(as_codes(codes, qtype), scale, as_codes(zero, qtype), qtype), ranges


def for_each_tile(
    work: Callable[[Where], None], shape: tuple[int, ...], qtype: QType, threads: int | None
) -> None:
    """In threads: NumPy holds no lock while it computes."""
    assert qtype.group is not None
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        list(pool.map(work, tiles((shape[0], shape[1]), qtype.group)))


def relative(square: Floats) -> Floats:
    """E[x²] with mean 1; dead inputs count a little."""
    mean = float(square.mean())
    return (square / mean + 1e-6 if mean > 0 else np.ones_like(square)).astype(np.float32)


def centered(x: Tile, scale: Tile, zero: Tile, qtype: QType) -> Tile:
    """c − z of the nearest codes."""
    codes = x / scale
    np.rint(codes, out=codes)
    np.maximum(codes, qtype.qmin - zero, out=codes)  # np.clip is slow at bounds that are arrays
    return np.minimum(codes, qtype.qmax - zero, out=codes)


def error(x: Tile, scale: Tile, codes: Tile, square: Tile | None) -> Tile:
    """E of every block, (blocks, 1, rows); overwrites the codes c − z."""
    codes *= scale
    codes -= x
    codes *= codes
    if square is not None:
        codes *= square
    return codes.sum(axis=1, keepdims=True)


def clipped(
    x: Tile,
    first: Tile,
    base: Tile,
    zero: Tile,
    qtype: QType,
    stored: Stored,
    square: Tile | None,
) -> Tile:
    """The scales (blocks, 1, rows) of least E; `base` are those of the blocks' ranges, `first` the
    same as files hold them.
    """
    best = first
    least = error(x, best, centered(x, best, zero, qtype), square)

    def keep_better(scale: Tile) -> None:
        nonlocal best, least
        tried = error(x, scale, centered(x, scale, zero, qtype), square)
        better = tried < least
        best, least = np.where(better, scale, best), np.where(better, tried, least)

    for shrink in (*SHRINKS, *(-f for f in FLIPPED if qtype.symmetric)):
        keep_better(stored(base * np.float32(shrink)))
    for _ in range(FITS):
        codes = centered(x, best, zero, qtype)
        keep_better(stored(fitted(x, best, codes, square)))
    return best


def balanced(
    x: Tile, scale: Tile, zero: Tile, step: Floats, qtype: QType, square: Tile | None
) -> tuple[Tile, Tile]:
    """Scales and zero points of no more E, among k and its neighbours with centred levels."""
    best, least = (scale, zero), error(x, scale, centered(x, scale, zero, qtype), square)
    middle = (x.min(axis=1, keepdims=True) + x.max(axis=1, keepdims=True)) / 2
    for move in (0, -1, 1):
        s = on_steps(scale + move * step, step)
        exact = np.float32((qtype.qmin + qtype.qmax) / 2) - middle / s
        for z in (np.floor(exact), np.ceil(exact)):
            z = np.clip(z, qtype.qmin, qtype.qmax)
            tried = error(x, s, centered(x, s, z, qtype), square)
            better = tried < least
            best = np.where(better, s, best[0]), np.where(better, z, best[1])
            least = np.where(better, tried, least)
    return best


def fitted(x: Tile, scale: Tile, codes: Tile, square: Tile | None) -> Tile:
    """The scale that is best for the codes c − z; as it was where all are zero."""
    weighted = codes if square is None else codes * square
    norm = (weighted * codes).sum(axis=1, keepdims=True)
    inner = (weighted * x).sum(axis=1, keepdims=True)
    return np.where(norm > 0, inner / np.where(norm > 0, norm, 1), scale)
