"""What to remember of a tensor while samples stream by. Memory does not grow with the samples.

An observer is updated with one tensor at a time, of any shape, and two observers of the same
tensor can be merged, so that runs can be split. `update` raises FloatingPointError for NaN or Inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BINS = 2048
_SUBSAMPLE = 1 << 15  # values counted per tensor and sample: a histogram of more costs more than
# the inference itself, and its tails, which decide, are kept exactly by the minimum and maximum
_SMALLEST = 2.0**-100  # limit of a histogram: the reciprocal of less overflows float32


@runtime_checkable
class Observer(Protocol):
    def update(self, x: Array) -> None: ...
    def merge(self, other: Self) -> None: ...
    def result(self) -> Any: ...


class _LowHigh(NamedTuple):
    low: float
    high: float


class Extremes(_LowHigh):
    """The smallest and the largest value: `low, high = extremes`.

    `loudest` is the sample with the largest magnitude, `others` the largest in any other sample,
    None where there were fewer than four.
    """

    loudest: int = 0
    others: float | None = None


@dataclass
class MinMax:
    """The smallest and the largest value, and the two samples with the largest magnitudes."""

    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    loudest: list[tuple[float, int]] = field(default_factory=list)

    def update(self, x: Array) -> None:
        if not x.size:
            return
        low, high = float(x.min()), float(x.max())
        if not math.isfinite(high - low):
            raise FloatingPointError("NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._note([(max(-low, high), self.count)])
        self.count += 1

    def _note(self, magnitudes: list[tuple[float, int]]) -> None:
        self.loudest = sorted([*self.loudest, *magnitudes], reverse=True)[:2]

    def merge(self, other: MinMax) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._note([(magnitude, self.count + n) for magnitude, n in other.loudest])
        self.count += other.count

    def result(self) -> Extremes:
        if not self.count:
            return Extremes(0.0, 0.0)
        found = Extremes(self.low, self.high)
        found.loudest = self.loudest[0][1]
        found.others = self.loudest[1][0] if self.count >= 4 else None
        return found


@dataclass
class HistogramResult:
    """Counts (BINS,) over [-limit, limit], and the exact minimum and maximum."""

    counts: NDArray[np.int64]
    limit: float
    extremes: Extremes

    @property
    def low(self) -> float:
        return self.extremes.low

    @property
    def high(self) -> float:
        return self.extremes.high

    @property
    def centers(self) -> NDArray[np.float64]:
        width = 2 * self.limit / len(self.counts)
        return np.arange(len(self.counts), dtype=np.float64) * width + (width / 2 - self.limit)


@dataclass
class Histogram:
    """A histogram over a range that doubles when a value falls outside: two bins become one.

    Of large tensors a strided subsample is counted; minimum and maximum are exact.
    """

    limit: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    extremes: MinMax = field(default_factory=MinMax)

    def update(self, x: Array) -> None:
        if not x.size:
            return
        self.extremes.update(x)
        largest = max(-self.extremes.low, self.extremes.high, _SMALLEST)
        self._widen(largest)
        flat = x.reshape(-1)
        # An odd stride visits every channel of a tensor whose sizes are powers of two.
        stride = max(1, flat.size // _SUBSAMPLE) | 1
        flat = flat[::stride].astype(np.float32)
        flat *= np.float32(BINS / 2 / self.limit)
        bins = (flat + np.float32(BINS / 2)).astype(np.int32)
        np.clip(bins, 0, BINS - 1, out=bins)
        self.counts += np.bincount(bins, minlength=BINS)

    def _widen(self, largest: float) -> None:
        if self.limit == 0:  # a power of two, so that two histograms can be merged exactly
            self.limit = float(2.0 ** np.ceil(np.log2(largest)))
        while self.limit < largest:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[BINS // 4 : BINS // 4 * 3] = pairs
            self.limit *= 2

    def merge(self, other: Histogram) -> None:
        if other.limit == 0:
            return
        if self.limit == 0:
            self.limit = other.limit
        self._widen(other.limit)
        twin = Histogram(other.limit, other.counts.copy())
        twin._widen(self.limit)
        self.counts += twin.counts
        self.extremes.merge(other.extremes)

    def result(self) -> HistogramResult:
        return HistogramResult(self.counts, self.limit or 1.0, self.extremes.result())


class ChannelMoments(NamedTuple):
    """Mean and variance of each channel, (channels,)."""

    mean: NDArray[np.floating[Any]]
    variance: NDArray[np.floating[Any]]


@dataclass
class Moments:
    """Mean and variance of each channel along `axis`; of large tensors a strided subsample."""

    axis: int
    total: NDArray[np.float64] | float = 0.0
    squares: NDArray[np.float64] | float = 0.0
    count: int = 0

    def update(self, x: Array) -> None:
        if not x.size:
            return
        axis = self.axis % x.ndim
        rows = x.shape[axis]
        view = x.reshape(math.prod(x.shape[:axis]), rows, -1)  # (before, channels, after)
        stride = max(1, x.size // _SUBSAMPLE)
        view = view[:, :, ::stride] if view.shape[2] > stride else view[::stride]
        view = np.ascontiguousarray(view)
        self.total = self.total + view.sum(axis=(0, 2), dtype=np.float64)
        self.squares = self.squares + np.square(view).sum(axis=(0, 2), dtype=np.float64)
        self.count += view.size // rows

    def merge(self, other: Moments) -> None:
        self.total, self.squares = self.total + other.total, self.squares + other.squares
        self.count += other.count

    def result(self) -> ChannelMoments:
        mean = np.atleast_1d(self.total) / max(self.count, 1)
        square = np.atleast_1d(self.squares) / max(self.count, 1)
        return ChannelMoments(mean, np.maximum(square - mean**2, 0))


@dataclass
class Loudness:
    """Median and mean over samples of the mean square, to a tenth of a decibel; 0 for silence."""

    counts: dict[int, int] = field(default_factory=dict)  # samples by tenths of a decibel

    def update(self, x: Array) -> None:
        flat = x.reshape(-1)[:: max(1, x.size // _SUBSAMPLE) | 1].astype(np.float64)
        # No BLAS: its threads would keep spinning beside those of the runtime.
        square = float(np.square(flat, out=flat).sum()) / max(flat.size, 1)
        if not math.isfinite(square):
            raise FloatingPointError("NaN or infinite")
        if square:  # silence needs no signal to noise
            level = round(100 * math.log10(square))
            self.counts[level] = self.counts.get(level, 0) + 1

    def merge(self, other: Loudness) -> None:
        for level, count in other.counts.items():
            self.counts[level] = self.counts.get(level, 0) + count

    def result(self) -> tuple[float, float]:
        if not self.counts:
            return 0.0, 0.0
        levels = sorted(self.counts)
        counts = np.array([self.counts[level] for level in levels])
        squares = 10.0 ** (np.array(levels) / 100)
        middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
        return float(squares[middle]), float(squares @ counts / counts.sum())
