"""Weighted k-means on a line, solved exactly: the best k levels of a grid of integers.

Kim et al. 2023, "SqueezeLLM: Dense-and-Sparse Quantization", eq. 4: a codebook serves a layer best
where Σ q (x − level(x))² is least, q the curvature of the loss in each weight. On a line each
level serves an interval, so the least error of x up to level b with b the j-th of the levels is

    D_j(b) = min over a < b of D_j−1(a) + c(a, b),    c(a, b) = error of x in [a, b] under a and b

(Wang & Song 2011, "Ckmeans.1d.dp"), at most k · grid² steps of which NumPy does grid² at a time.
That levels are integers, which kernels ask for, makes it small: x between two neighbours of the
grid goes to one of two halves, and three sums of each half (q, q x, q x²) are all that is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def best_levels(
    x: NDArray[Any], q: NDArray[Any], count: int, grid: tuple[int, int]
) -> NDArray[np.int8]:
    """`count` ascending integers within `grid`, its ends included, of least Σ q (x − level)².

    `x` and `q` ≥ 0 are of any shape, broadcastable to each other. Where the grid has fewer
    integers than `count`, all of them.
    """
    low, high = grid
    points = np.arange(low, high + 1, dtype=np.float64)
    if count >= len(points):
        return points.astype(np.int8)
    between, before, after = interval_errors(moments(x, q, grid), points)
    least, came_from = before, []
    for _ in range(count - 1):
        tried = least[:, None] + between
        came_from.append(tried.argmin(axis=0))
        least = tried.min(axis=0)
    place = int(np.argmin(least + after))
    chosen = [place]
    for origin in reversed(came_from):
        place = int(origin[place])
        chosen.append(place)
    return points[chosen[::-1]].astype(np.int8)


def moments(x: NDArray[Any], q: NDArray[Any], grid: tuple[int, int]) -> Array:
    """Σ q, Σ q x, Σ q x² over each half of each gap of the grid, (3, halves).

    What lies beyond the grid counts in its first or last half.
    """
    low, high = grid
    q = np.broadcast_to(q, x.shape).ravel()
    x = x.ravel()
    halves = 2 * (high - low)
    place = np.clip((2 * (x - low)).astype(np.int64), 0, halves - 1)
    return np.stack([np.bincount(place, w, halves) for w in (q, q * x, q * x * x)])


def interval_errors(sums: Array, points: Array) -> tuple[Array, Array, Array]:
    """c(a, b) (grid, grid), infinite where a ≥ b; errors of x below a and above b, (grid,) each."""
    total = np.concatenate([np.zeros((3, 1)), np.cumsum(sums, axis=1)], axis=1)
    place = np.arange(len(points))
    middle = place[:, None] + place  # half-gaps up to where the nearest level changes

    def error(first: NDArray[Any], last: NDArray[Any], level: Array) -> Array:
        zeroth, once, twice = (sums[last] - sums[first] for sums in total)
        return twice - 2 * level * once + level**2 * zeroth

    between = error(2 * place[:, None], middle, points[:, None])
    between = between + error(middle, 2 * place, points)
    between[place[:, None] >= place] = np.inf
    start, end = np.zeros_like(place), np.full_like(place, sums.shape[1])
    return between, error(start, 2 * place, points), error(2 * place, end, points)
