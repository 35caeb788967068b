"""Arrays of integers without bounds.

NumPy's int64 wraps around silently. Here every operation first bounds its result by its operands'
largest magnitudes, and computes with Python's integers where 64 bits might not hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import ArrayLike, NDArray

_SAFE = 2**63  # int64 holds what is below


class Integers(NDArrayOperatorsMixin):
    """An array that computes like NumPy's, `+ - * // % << >> abs` and comparisons, broadcasting
    too, with results that are always exact.

    `//` and `>>` round down, as Python's do. Comparisons give arrays of bool.
    Raises TypeError for numbers that are not integers.
    """

    def __init__(self, values: ArrayLike | Integers) -> None:
        array = values.values if isinstance(values, Integers) else np.asarray(values)
        if array.dtype.kind not in "iubO":
            raise TypeError(f"integers are computed with integers, not with {array.dtype}")
        wide = array.dtype.kind == "O" or array.dtype == np.uint64
        self.values: NDArray[Any] = array.astype(object if wide else np.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    def bound(self) -> int:
        """The largest magnitude."""
        if not self.size:
            return 0
        return max(int(self.values.max()), -int(self.values.min()))

    def as_type(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The numbers as an array of that type. Raises OverflowError where it does not hold one."""
        limits = np.iinfo(dtype)
        if self.size and not limits.min <= self.values.min() <= self.values.max() <= limits.max:
            raise OverflowError(f"{self.values.min()} … {self.values.max()} in {dtype}")
        return self.values.astype(dtype)

    def sum(self, axis: tuple[int, ...], keepdims: bool) -> Integers:
        safe = self.bound() * self.size < _SAFE
        return Integers(np.sum(self._as(safe), axis=axis, keepdims=keepdims))

    def max(self, axis: tuple[int, ...], keepdims: bool) -> Integers:
        return Integers(np.max(self.values, axis=axis, keepdims=keepdims))

    def at_least(self, low: ArrayLike | Integers) -> Integers:
        return self.where(np.asarray(self >= Integers(low)), low)

    def at_most(self, high: ArrayLike | Integers) -> Integers:
        return self.where(np.asarray(self <= Integers(high)), high)

    def where(self, condition: NDArray[np.bool_], otherwise: ArrayLike | Integers) -> Integers:
        """These numbers where the condition holds, `otherwise` elsewhere."""
        return Integers(np.where(condition, self.values, Integers(otherwise).values))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any) -> Any:
        operands = [Integers(x) for x in inputs]
        bounds = [operand.bound() for operand in operands]
        most = _BOUNDS.get(ufunc.__name__, max)(*bounds) if len(bounds) > 1 else bounds[0]
        safe = max(most, *bounds) < _SAFE
        result = getattr(ufunc, method)(*(operand._as(safe) for operand in operands))
        result = np.asarray(result)
        return result if result.dtype == bool else Integers(result)

    def _as(self, safe: bool) -> NDArray[Any]:
        return self.values.astype(np.int64 if safe else object, copy=False)


_BOUNDS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "left_shift": lambda a, b: a << b,
}  # the largest magnitude of a result; that of other operations is not above their operands'
