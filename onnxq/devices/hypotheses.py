"""Why a provider's codes are not the exact ones: what may have been done, one function each.

A hypothesis is a pure function from a layer's exact result to codes; it holds if it gives the
provider's. Symbols are those of Jacob et al. 2018, §2.2: an integer sum a of products and bias, the
multiplier M = s_x s_w / s_y that makes steps of the output of it, the zero point z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Exact:
    """A layer's result before it is rounded, in steps of its output, and what codes there are.

    `sums` are int64, and `multiplier` broadcasts with them; only of layers with weights.
    """

    steps: Array
    zero: int
    low: int
    high: int
    sums: Array | None = None
    multiplier: Array | None = None

    def with_sums(self, sums: Array) -> Exact:
        """The result that other sums would make."""
        assert self.multiplier is not None
        return replace(self, sums=sums, steps=sums * self.multiplier)

    def codes(self, rounded: Array) -> Array:
        return np.clip(rounded + self.zero, self.low, self.high).astype(np.int64)


Codes = Callable[[Exact], Array]


def half_to_even(x: Exact) -> Array:
    """What QuantizeLinear says."""
    return x.codes(np.rint(x.steps))


def half_up(x: Exact) -> Array:
    return x.codes(np.floor(x.steps + 0.5))


def half_away(x: Exact) -> Array:
    return x.codes(np.copysign(np.floor(np.abs(x.steps) + 0.5), x.steps))


def down(x: Exact) -> Array:
    return x.codes(np.floor(x.steps))


def toward_zero(x: Exact) -> Array:
    return x.codes(np.trunc(x.steps))


def in_type(dtype: Any) -> Codes:
    """Results are rounded to a narrow float type before they become codes."""

    def codes(x: Exact) -> Array:
        with np.errstate(over="ignore"):
            return x.codes(np.rint(x.steps.astype(dtype).astype(np.float64)))

    return codes


def wrapped(x: Exact) -> Array:
    """Codes past the end begin again at the other."""
    count = x.high - x.low + 1
    return ((np.rint(x.steps) + x.zero - x.low) % count + x.low).astype(np.int64)


def fixed_point(bits: int) -> Codes:
    """⌊a m + 1/2⌋, with M rounded to m of so many bits."""

    def codes(x: Exact) -> Array:
        assert x.sums is not None
        assert x.multiplier is not None
        return x.codes(np.floor(x.sums * to_bits(x.multiplier, bits) + 0.5))

    return codes


def shifted(bits: int, fraction: int) -> Codes:
    """⌊(⌊(a + z / M) / 2ⁿ⌋) m + 1/2⌋: the sum, with the zero point in it, loses n bits before it is
    multiplied by m ≈ 2ⁿ M of so many bits; n leaves a step `fraction` binary places at least.
    """

    def codes(x: Exact) -> Array:
        assert x.sums is not None
        assert x.multiplier is not None
        exponent = np.floor(np.log2(x.multiplier)).astype(np.int64)
        shift = np.clip(-fraction - exponent, 0, 62)
        multiplier = to_bits(x.multiplier * 2.0**shift, bits)
        kept = (x.sums + np.rint(x.zero / x.multiplier).astype(np.int64)) >> shift
        rounded = np.floor(kept * multiplier + 0.5)
        return np.clip(rounded, x.low, x.high).astype(np.int64)

    return codes


def to_bits(x: Array, bits: int) -> Array:
    """Positive numbers rounded to so many significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.asarray(np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits))


_ANY: tuple[tuple[str, Codes], ...] = (
    ("rounds halves up, not to even", half_up),
    ("rounds halves away from zero, not to even", half_away),
    ("rounds down", down),
    ("rounds toward zero", toward_zero),
    ("requantizes in float16", in_type(np.float16)),
    ("requantizes in bfloat16", in_type(ml_dtypes.bfloat16)),
    ("wraps around where codes end", wrapped),
)
_OF_SUMS: tuple[tuple[str, Codes], ...] = (
    *((f"requantizes with a multiplier of {n} bits", fixed_point(n)) for n in range(7, 17)),
    *(
        (
            f"cuts the sum to {places} binary places of a step, zero point included, then "
            f"multiplies it by {bits} bits",
            shifted(bits, places),
        )
        for bits in (8, 11, 15)
        for places in (2, 3, 4, 8)
    ),
)


def requantizations(x: Exact) -> Iterator[tuple[str, Array]]:
    """What each way to make codes of an exact result gives, and what to say of it."""
    for what, codes in (*_ANY, *(_OF_SUMS if x.sums is not None else ())):
        yield what, codes(x)
