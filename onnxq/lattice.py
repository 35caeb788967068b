"""Weights by eights, each a point of a lattice: the E8P codebook of 65,536 points.

Tseng et al. 2024, "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice
Codebooks", §4.2. D̂8 are the vectors of eight half-integers whose sum is even, and E8P is

    { σ ⊙ s ± ¼ :  s in S,  σ signs with σ ⊙ s in D̂8 },

S the 256 shortest patterns of absolute values: 227 with |s|² ≤ 10 and 29 of those with |s|² = 12
(which of them is free). As the parity of s settles the last sign, a point takes 8 bits for s, 7 for
signs and 1 for ±¼: 2 bits for each of its coordinates. All lie in E8 + ¼, the densest lattice, and
all coordinates on one grid of twelve, ±¼, ±¾ … ±2¾: k/2 + ¼ with k in -6 … 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.qtype import Floats

SIZE = 8  # coordinates of a point
SHORT = 10  # the squared length up to which all patterns are in S


@cache
def patterns() -> NDArray[np.float32]:
    """S: (256, 8), the 227 short ones first."""
    found = np.array([p for p in product((0.5, 1.5, 2.5), repeat=SIZE) if np.dot(p, p) <= 12])
    length = np.sum(found**2, axis=1)
    short, long = found[length <= SHORT], found[length > SHORT]
    spread = np.rint(np.linspace(0, len(long) - 1, 256 - len(short))).astype(int)
    return np.concatenate([short, long[spread]]).astype(np.float32)


def odd() -> NDArray[np.bool_]:
    """Which patterns need an odd number of minus signs, (256,)."""
    return patterns().sum(axis=1) % 2 == 1


@cache
def signs() -> NDArray[np.int8]:
    """±1 by the parity of minus signs and the seven bits that say those of the first coordinates,
    (2, 128, 8).
    """
    bits = np.arange(128)[:, None] >> np.arange(7) & 1
    last = (bits.sum(axis=1) + np.arange(2)[:, None]) % 2
    both = np.broadcast_to(bits, (2, 128, 7))
    return (1 - 2 * np.concatenate([both, last[:, :, None]], axis=2)).astype(np.int8)


@cache
def points() -> NDArray[np.float32]:
    """E8P in the order of its codes, (65536, 8): pattern · 256 + signs · 2 + (1 for -¼)."""
    signed = patterns()[:, None] * signs()[odd().astype(int)]
    return (signed[:, :, None] + np.array([[0.25], [-0.25]], np.float32)).reshape(-1, SIZE)


@dataclass(frozen=True)
class LatticeTensor:
    """A weight of which every eight neighbours along the input axis are a point; sibling of
    `QTensor`.

    `codes` are uint16 (out, ⌈in / 8⌉), `scale` is float32 (out,), `columns` the number of inputs.
    Kernels that compute with the codes take them in blocks of `group` weights.
    """

    codes: NDArray[Any]
    scale: Floats
    columns: int
    group: int

    @property
    def format(self) -> str:
        """As a report names it."""
        return "e8p2:channel"

    def dequantize(self) -> NDArray[np.float32]:
        """Real values, (out, in) float32."""
        whole = points()[self.codes].reshape(len(self.codes), -1)
        return np.asarray(whole[:, : self.columns] * self.scale[:, None], np.float32)
