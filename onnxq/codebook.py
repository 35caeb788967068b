"""Number formats whose levels are not evenly spaced: a code is the place of its level in a table.

    real ≈ scale · levels[code]

Levels are integers of 8 bits, so that a kernel that multiplies 8-bit codes can compute with them
exactly. What a table asks for beyond that is in its scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.qtype import Floats, spread

SUPER_BLOCK = 256  # scales that share a scale of their own


@dataclass(frozen=True)
class ScaleCodes:
    """Scales of blocks in 8 bits: double quantization, Dettmers et al. 2023 ("QLoRA"), §3.

        s = mean + code · step,

    with one float32 step for 256 codes that follow each other. `codes` are int8 (out, blocks),
    `step` (⌈out · blocks / 256⌉,) and `mean` () float32.
    """

    codes: NDArray[np.int8]
    step: NDArray[np.float32]
    mean: NDArray[np.float32]

    @classmethod
    def of(cls, scale: Floats) -> ScaleCodes:
        """The nearest to scales (out, blocks) ≥ 0."""
        mean = np.asarray(scale.mean(dtype=np.float64), np.float32)
        shifted = in_super_blocks(scale - mean)
        step = np.abs(shifted).max(axis=1) / np.float32(127)
        step = np.where(step > np.finfo(np.float32).tiny, step, 1).astype(np.float32)
        codes = np.rint(shifted / step[:, None]).astype(np.int8)
        return cls(codes.ravel()[: scale.size].reshape(scale.shape), step, mean)

    def dequantize(self) -> NDArray[np.float32]:
        """Scales, (out, blocks) float32."""
        shifted = in_super_blocks(self.codes.astype(np.float32)) * self.step[:, None]
        return (shifted + self.mean).ravel()[: self.codes.size].reshape(self.codes.shape)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.step.nbytes + self.mean.nbytes


def in_super_blocks(scale: NDArray[Any]) -> NDArray[Any]:
    """Values (out, blocks) as (super-blocks, 256), filled up with zeros."""
    flat = scale.ravel()
    return np.pad(flat, (0, -len(flat) % SUPER_BLOCK)).reshape(-1, SUPER_BLOCK)


@dataclass(frozen=True)
class CodebookTensor:
    """A weight as places in a table of levels; the sibling of `QTensor`.

    `codes` are uint8 (out, in), below 2^bits; `levels` int8 (k,), ascending; `scale` is float32
    (out, blocks), for blocks of `group` neighbours along the input axis of which the last may be
    cut short, or those in 8 bits. `name` says how the levels came about.

        >>> levels = np.array([-2, -1, 0, 4], np.int8)
        >>> codes, scale = np.array([[0, 3, 2]], np.uint8), np.array([[0.5, 0.25]], np.float32)
        >>> CodebookTensor(codes, levels, scale, bits=2, group=2, name="mine").dequantize().tolist()
        [[-1.0, 2.0, 0.0]]
    """

    codes: NDArray[np.uint8]
    levels: NDArray[np.int8]
    scale: Floats | ScaleCodes
    bits: int
    group: int
    name: str

    @property
    def scales(self) -> Floats:
        """(out, blocks) float32."""
        return self.scale.dequantize() if isinstance(self.scale, ScaleCodes) else self.scale

    @property
    def format(self) -> str:
        """As a report names it: `nf4:64`."""
        return f"{self.name}{self.bits}:{self.group}"

    def dequantize(self) -> NDArray[np.float32]:
        """Real values, (out, in) float32."""
        real = self.levels.astype(np.float32)[self.codes]
        return real * spread(self.scales, self.codes.shape, self.group)


def nearest(x: Floats, levels: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The place of the level next to each x, of levels (k,) ascending."""
    ends = levels.astype(np.float32)
    codes = np.zeros(x.shape, np.uint8)
    for border in (ends[1:] + ends[:-1]) / 2:
        codes += x > border
    return codes
