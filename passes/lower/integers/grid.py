"""Codes of real numbers as integer hardware holds them, and the arithmetic that moves them.

A narrow tensor is uint8, a wide one 16 bits around zero, held in int32. Signed 8-bit formats are
written as uint8 as well, 128 higher: real = scale · (code − zero) says the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import ArrayLike, NDArray

from onnxq.qtype import QParams

_LARGE_ENOUGH = 2.0**20  # one step of a finer grid fills a coarser one, whatever else is added


class Refusal(Exception):
    """Why an operator stays float, in words for the report."""


@dataclass(frozen=True)
class Grid:
    """real = scale · (code − zero), code from `low` to `high`."""

    scale: float
    zero: int
    low: int
    high: int

    @classmethod
    def of(cls, params: QParams) -> Grid:
        qtype = params.qtype
        raised = 128 if qtype.signed and qtype.bits <= 8 else 0
        scale, zero = float(params.scale), int(params.zero)
        return cls(scale, zero + raised, qtype.qmin + raised, qtype.qmax + raised)

    @property
    def narrow(self) -> bool:
        return self.low >= 0 and self.high < 256

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if self.narrow else np.int32)

    @property
    def reach(self) -> int:
        """The largest |code − zero|."""
        return max(self.high - self.zero, self.zero - self.low)

    def quantize(self, real: ArrayLike) -> NDArray[Any]:
        """The nearest codes of real numbers, infinite ones too."""
        steps = np.rint(np.asarray(real, np.float64) / self.scale) + self.zero
        return np.clip(steps, self.low, self.high).astype(self.dtype)

    def dequantize(self, codes: ArrayLike) -> NDArray[np.float64]:
        return (np.asarray(codes, np.float64) - self.zero) * self.scale

    def bounded(self, bounds: tuple[float, float] | None) -> Grid:
        """The codes of it that lie within real bounds, as a Relu or Clip leaves them."""
        if bounds is None:
            return self
        low, high = bounds
        first, last = self.low, self.high
        if math.isfinite(low):
            first = int(self.quantize(low))
            if low > 0:  # a bound above zero keeps something from being divided by zero
                first = min(max(first, self.zero + 1), self.high)
        if math.isfinite(high):
            last = int(self.quantize(high))
        return Grid(self.scale, self.zero, min(first, last), last)


@dataclass(frozen=True)
class Codes:
    """A tensor of codes and what they stand for."""

    tensor: gs.Tensor
    grid: Grid


def factor(real: ArrayLike) -> NDArray[np.float64]:
    """Ratios of scales, each no larger than saturates whatever it multiplies."""
    return np.clip(np.asarray(real, np.float64), -_LARGE_ENOUGH, _LARGE_ENOUGH)


def terms(real: ArrayLike) -> NDArray[np.float64]:
    """Ratios of scales of what is added up, all made smaller alike if one is that large."""
    ratios = np.asarray(real, np.float64)
    return ratios * min(1.0, _LARGE_ENOUGH / max(np.abs(ratios).max(initial=0), 1e-300))


def bits_above(number: float) -> int:
    """The least b with |number| < 2^b."""
    return max(0, math.frexp(number)[1])
