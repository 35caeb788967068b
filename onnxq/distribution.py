"""How numbers are spread, small enough for a report: a histogram of a few bins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHOWN_BINS = 64


@dataclass
class Distribution:
    """`counts` of the values in equal bins from `low` to `high`, at most SHOWN_BINS."""

    low: float
    high: float
    counts: list[int] = field(default_factory=list)


def distribution(values: NDArray[Any]) -> Distribution:
    """Of finite values, of any shape.

    >>> distribution(np.repeat([0.0, 1.0], [3, 5])).counts[::63]
    [3, 5]
    """
    counts, edges = np.histogram(values.reshape(-1).astype(np.float64), bins=SHOWN_BINS)
    return Distribution(float(edges[0]), float(edges[-1]), counts.tolist())


def coarser(counts: NDArray[np.integer[Any]], low: float, high: float) -> Distribution:
    """A histogram of many bins from `low` to `high`, cut to where it counts anything.

    >>> coarser(np.array([0, 0, 1, 2, 0, 4, 0, 0]), -4, 4)
    Distribution(low=-2.0, high=2.0, counts=[1, 2, 0, 4])
    """
    filled = np.flatnonzero(counts)
    if not filled.size:
        return Distribution(low, high, [])
    width = (high - low) / len(counts)
    first, last = int(filled[0]), int(filled[-1])
    together = -(-(last - first + 1) // SHOWN_BINS)
    kept = counts[first : last + 1]
    kept = np.pad(kept, (0, -len(kept) % together)).reshape(-1, together).sum(axis=1)
    start = low + first * width
    return Distribution(start, start + len(kept) * together * width, kept.tolist())


@dataclass
class WeightRecord:
    """One float weight of a layer and the codes it got; of a large one, every n-th output channel.

    `low` to `high` are the lowest and the highest value that codes hold in any channel, `clipped`
    the share of weights more than half a step outside the codes of their own channel; None where
    codes are places in a table. `scales` are those of the `channels` output channels in order, the
    largest of a channel that has several; of more than SHOWN_BINS channels, the largest of as many
    neighbours as give so many.
    """

    name: str
    values: Distribution
    channels: int
    scales: list[float] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    clipped: float | None = None
