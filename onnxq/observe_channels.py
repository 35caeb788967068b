"""What to remember of the channels of a tensor while samples stream by: ranges, rows, products.

Observers as in `observe`. What they keep grows with the channels, not with the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxq.observe import Array


class ChannelRange(NamedTuple):
    """Smallest and largest value of each channel, (channels,)."""

    low: NDArray[np.floating[Any]]
    high: NDArray[np.floating[Any]]


@dataclass
class ChannelExtremes:
    """The smallest and the largest value of each channel along `axis`; (0,) where none came."""

    axis: int
    low: NDArray[np.float64] | float = np.inf
    high: NDArray[np.float64] | float = -np.inf

    def update(self, x: Array) -> None:
        if not x.size:
            return
        axis = self.axis % x.ndim
        others = tuple(k for k in range(x.ndim) if k != axis)
        low, high = x.min(axis=others), x.max(axis=others)
        if not np.isfinite(high - low).all():
            raise FloatingPointError("NaN or infinite")
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def merge(self, other: ChannelExtremes) -> None:
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)

    def result(self) -> ChannelRange:
        if np.ndim(self.low) == 0:
            return ChannelRange(np.zeros(0), np.zeros(0))
        return ChannelRange(np.asarray(self.low), np.asarray(self.high))


class ChannelRows(NamedTuple):
    """Rows of channels (n, channels), and the range of each channel in all rows that came."""

    rows: NDArray[np.float32]
    low: NDArray[np.floating[Any]]
    high: NDArray[np.floating[Any]]


@dataclass
class Rows:
    """At most `keep` whole rows of channels along `axis`, at even distances, and their ranges.

    Every stride-th row is kept; when there are too many, every other one goes and the stride
    doubles. Which rows they are follows from their order alone.
    """

    axis: int
    keep: int = 128
    stride: int = 1
    count: int = 0  # rows seen
    kept: list[NDArray[np.float32]] = field(default_factory=list)
    extremes: ChannelExtremes = field(init=False)

    def __post_init__(self) -> None:
        self.extremes = ChannelExtremes(self.axis)

    def update(self, x: Array) -> None:
        if not x.size:
            return
        self.extremes.update(x)
        rows = np.moveaxis(x, self.axis, -1).reshape(-1, x.shape[self.axis])
        first = -self.count % self.stride
        self.kept += [row.astype(np.float32) for row in rows[first :: self.stride]]
        self.count += len(rows)
        self._thin()

    def _thin(self) -> None:
        while len(self.kept) > self.keep:
            self.kept, self.stride = self.kept[::2], 2 * self.stride

    def merge(self, other: Rows) -> None:
        stride = max(self.stride, other.stride)
        ours, theirs = self.kept[:: stride // self.stride], other.kept[:: stride // other.stride]
        self.kept, self.stride, self.count = [*ours, *theirs], stride, self.count + other.count
        self.extremes.merge(other.extremes)
        self._thin()

    def result(self) -> ChannelRows:
        rows = np.stack(self.kept) if self.kept else np.zeros((0, 0), np.float32)
        return ChannelRows(rows, *self.extremes.result())


@dataclass
class Halves:
    """Two observers that take turns, so that what one saw can be tried on what the other saw."""

    first: Any
    second: Any
    count: int = 0

    def update(self, x: Array) -> None:
        (self.second if self.count % 2 else self.first).update(x)
        self.count += 1

    def merge(self, other: Halves) -> None:
        pair = (other.first, other.second) if self.count % 2 == 0 else (other.second, other.first)
        self.first.merge(pair[0])
        self.second.merge(pair[1])
        self.count += other.count

    def result(self) -> tuple[Any, Any]:
        return self.first.result(), self.second.result()


class SecondMoments(NamedTuple):
    """H = E[xxᵀ] (groups, in, in) and μ = E[x] (groups, in) of a layer's inputs, float32.

    `rows` says how many inputs they are of, in each group.
    """

    product: NDArray[np.floating[Any]]
    mean: NDArray[np.floating[Any]]
    rows: int

    def shrunk(self, alike: int = 1) -> NDArray[np.floating[Any]]:
        """H with the covariances that so few rows cannot tell from chance taken back.

        C = H − μμᵀ is shrunk toward its diagonal by in / (in + rows / alike), which is little
        where rows abound, and leaves of H what inputs that vary by themselves would have where
        there are few. So many rows are taken to say as much as one.
        """
        outer = self.mean[:, :, None] * self.mean[:, None, :]
        size = self.mean.shape[1]
        spread = self.product - outer
        diagonal = np.arange(size)
        variance = np.maximum(spread[:, diagonal, diagonal], 0)
        spread *= np.float32(self.rows / (self.rows + alike * size))
        spread[:, diagonal, diagonal] = variance
        spread += outer
        return spread


@dataclass
class Hessian:
    """E[xxᵀ] of what a layer's weight is multiplied with: half the Hessian of its squared error.

    `unfold(x, limit)` gives the rows (groups, rows, in) of a tensor, `limit` at most. The product
    takes BLAS, whose threads spin beside those of the runtime: not for observers that always run.
    """

    unfold: Callable[[Array, int], Array]
    limit: int
    product: NDArray[np.float32] | float = 0.0
    total: NDArray[np.float32] | float = 0.0
    rows: int = 0

    def update(self, x: Array) -> None:
        if not x.size:
            return
        rows = np.ascontiguousarray(self.unfold(x, self.limit), np.float32)
        total = np.ones(rows.shape[1], np.float32) @ rows
        if not np.isfinite(total).all():
            raise FloatingPointError("NaN or infinite")
        self.total = self.total + total
        if len(rows) == 1:  # symmetric, of which BLAS makes half the work
            self.product = self.product + (rows[0].T @ rows[0])[None]
        else:
            self.product = self.product + rows.swapaxes(1, 2) @ rows
        self.rows += rows.shape[1]

    def merge(self, other: Hessian) -> None:
        self.product, self.total = self.product + other.product, self.total + other.total
        self.rows += other.rows

    def result(self) -> SecondMoments:
        count = np.float32(max(self.rows, 1))
        return SecondMoments(
            np.atleast_3d(self.product) / count, np.atleast_2d(self.total) / count, self.rows
        )
