"""Which axes of a tensor become which when it is reshaped, sizes unknown included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

Shape = Sequence[int | str | None]
Index = NDArray[np.int64]


def reshaped(index: Index, before: Shape, after: Shape) -> Index | None:
    """What becomes of an array that broadcasts against a tensor's last axes; None if it is unclear.

    (heads, 1, size) of a tensor (batch, heads, tokens, size) that is reshaped to (batch, tokens,
    channels) is unclear; (heads, size) of (batch, tokens, heads, size) becomes (channels,).
    """
    if index.ndim > len(before):
        return None
    index = index.reshape((1,) * (len(before) - index.ndim) + index.shape)
    shape: list[int] = []
    full: list[int] = []  # of `index`, where it varies within a group of axes
    for ours, theirs in groups(before, after):
        part = index.shape[ours]
        if math.prod(part) == 1:
            shape += [1] * len(after[theirs])
            full += part
            continue
        old, new = before[ours], after[theirs]
        if not _is_known(old) or not _is_known(new) or math.prod(old) != math.prod(new):
            return None
        shape += new
        full += old
    return np.broadcast_to(index, full).reshape(shape)


def groups(before: Shape, after: Shape) -> list[tuple[slice, slice]]:
    """Runs of axes that hold the same values, matched from the front, then from the end."""
    front = _matched(before, after)
    i, j = (front[-1][0].stop, front[-1][1].stop) if front else (0, 0)
    back = _matched(before[i:][::-1], after[j:][::-1])
    end = [
        (slice(len(before) - a.stop, len(before) - a.start),
         slice(len(after) - b.stop, len(after) - b.start)) for a, b in reversed(back)
    ]  # fmt: skip
    i_end, j_end = (end[0][0].start, end[0][1].start) if end else (len(before), len(after))
    middle = [(slice(i, i_end), slice(j, j_end))] if i < i_end or j < j_end else []
    return [*front, *middle, *end]


def _matched(before: Shape, after: Shape) -> list[tuple[slice, slice]]:
    """Groups from the front, as far as sizes or their names tell."""
    found: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        a, b = i + 1, j + 1
        while tuple(before[i:a]) != tuple(after[j:b]):
            old, new = before[i:a], after[j:b]
            if not _is_known(old) or not _is_known(new):
                return found
            if math.prod(old) == math.prod(new):
                break
            if math.prod(old) < math.prod(new):
                a += 1
            else:
                b += 1
            if a > len(before) or b > len(after):
                return found
        if before[i] is None:
            return found
        found.append((slice(i, a), slice(j, b)))
        i, j = a, b
    return found


def _is_known(shape: Shape) -> TypeGuard[Sequence[int]]:
    return all(isinstance(size, int) for size in shape)
