"""Number formats: a real range becomes a scale and a zero point, values become codes.

    real ≈ scale · (code − zero)

Affine quantization as in Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference" (2018), §2.1. Codes are integers, or floating-point
numbers of 8 bits, E4M3 (± 448) and E5M2 (± 57344), whose zero is 0: Micikevicius et al., "FP8
Formats for Deep Learning" (2022), table 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]
Codes = NDArray[Any]  # ml_dtypes' 2- and 4-bit integers are no subtype of np.integer

_LEAST_HALF = 2.0**-11  # float16 is exact to 2⁻¹⁴ of itself there, to 2⁻²⁵ whatever the size

_SPEC = re.compile(
    r"(?:(?P<sign>[us])(?P<bits>\d+)(?P<asym>a)?|f8(?P<float8>e\dm\d))"
    r"(?P<power>p)?(?::(?P<group>channel|\d+))?(?P<codes>/4)?"
)
# Without infinities (and with one NaN), as hardware has E4M3; E5M2 is as in IEEE 754.
FLOAT8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"e4m3": 448, "e5m2": 57344}


@dataclass(frozen=True)
class QType:
    """A format of codes and what shares one scale.

    `group` is None for one scale per tensor, -1 for one per output channel, n for one per block of
    n neighbours along the input axis. With `power_of_two` every scale is one: hardware without a
    multiplier for scales shifts instead. `scale_bits` are those of a block's scale in the file: 16
    are a float, 4 a code under a step per row (see `super_blocks`). `float8` is `e4m3` or `e5m2`
    where codes are floating-point numbers, which are signed and symmetric and have no blocks.

        >>> QType.parse("s8:channel").scheme  # codes -127..127, a scale per output channel
        'per channel, symmetric'
        >>> str(QType(8, signed=False, symmetric=False))  # codes 0..255, a scale per tensor
        'u8a'
        >>> QType.parse("s8p").power_of_two, QType.parse("u4a:32/4").scale_bits
        (True, 4)
        >>> QType.parse("f8e4m3:channel").qmax
        448
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    group: int | None = None
    power_of_two: bool = False
    scale_bits: int = 16
    float8: str = ""

    @classmethod
    def parse(cls, text: str) -> QType:
        """Read `[u|s]BITS[a][p][:channel|:BLOCK]`: `a` is asymmetric, `p` power-of-two scales.

        `/4` after the block of an asymmetric format are scales of 4 bits. `f8e4m3` and `f8e5m2`
        stand in the place of `s8`.

        Raises ValueError for anything else.
        """
        match = _SPEC.fullmatch(text)
        bits, float8 = (match["bits"] or 8, match["float8"] or "") if match else (0, "")
        if not match or int(bits) not in (2, 3, 4, 8, 16, 32) or float8 not in ("", *FLOAT8):
            raise ValueError(
                f"{text!r} is no number format; write for example s8, u8a, s8:channel, u4a:32 or "
                "f8e4m3"
            )
        if float8 and match["group"] not in (None, "channel"):
            raise ValueError(f"{text!r}: FP8 has a scale per tensor or channel, not per block")
        group = {None: None, "channel": -1}.get(match["group"], match["group"])
        takes_codes = group not in (None, -1) and match["asym"] and not match["power"]
        if match["codes"] and not takes_codes:
            raise ValueError(
                f"{text!r}: scales of 4 bits are for asymmetric blocks, as in u4a:32/4"
            )
        return cls(
            bits=int(bits),
            signed=match["sign"] != "u",
            symmetric=match["asym"] is None,
            group=None if group is None else int(group),
            power_of_two=match["power"] is not None,
            scale_bits=4 if match["codes"] else 16,
            float8=float8,
        )

    def __str__(self) -> str:
        group = {None: "", -1: ":channel"}.get(self.group, f":{self.group}")
        marks = ("" if self.symmetric else "a") + ("p" if self.power_of_two else "")
        scales = "" if self.scale_bits == 16 else f"/{self.scale_bits}"
        kind = "f" if self.float8 else "s" if self.signed else "u"
        return f"{kind}{self.bits}{self.float8}{marks}{group}{scales}"

    @property
    def scheme(self) -> str:
        """In words, for a report: `per channel, symmetric`."""
        groups = {None: "per tensor", -1: "per channel"}
        granularity = groups.get(self.group, f"per block of {self.group}")
        scales = ", scales powers of two" if self.power_of_two else ""
        scales += "" if self.scale_bits == 16 else f", scales of {self.scale_bits} bits"
        return f"{granularity}, {'symmetric' if self.symmetric else 'asymmetric'}{scales}"

    @property
    def qmax(self) -> int:
        if self.float8:
            return LARGEST[self.float8]
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def qmin(self) -> int:
        """Symmetric formats give up their lowest code, so that ±x are equally far from zero.

        Those with blocks do not: the scale of a block may be negative, and the lowest code is for
        the weight that is farthest from zero.
        """
        if self.float8:
            return -self.qmax
        lowest = -(1 << (self.bits - 1)) if self.signed else 0
        return lowest + 1 if self.symmetric and not self.blocked else lowest

    @property
    def blocked(self) -> bool:
        return self.group is not None and self.group > 0

    @property
    def middle(self) -> int:
        """The zero point of a symmetric range."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.float8:
            return np.dtype(FLOAT8[self.float8])
        small = {2: (ml_dtypes.uint2, ml_dtypes.int2), 4: (ml_dtypes.uint4, ml_dtypes.int4)}
        if self.bits in small:
            return np.dtype(small[self.bits][self.signed])
        if self.bits == 3:  # of which there is no packed type
            return np.dtype(np.int8 if self.signed else np.uint8)
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits // 8}")

    @property
    def byte(self) -> np.dtype[Any]:
        """The type of NumPy's own that holds a code: arithmetic on `dtype` below it is slow."""
        return np.dtype(f"{'i' if self.signed else 'u'}{max(8, self.bits) // 8}")


@dataclass(frozen=True)
class QParams:
    """Scale (float32) and zero point (the format's dtype) of an activation, one of each."""

    scale: Floats
    zero: Codes
    qtype: QType

    @classmethod
    def from_range(cls, low: float, high: float, qtype: QType) -> QParams:
        scale, zero = scale_and_zero(low, high, qtype)
        return cls(scale, zero, qtype)

    @property
    def range(self) -> tuple[float, float]:
        """The real values of the lowest and the highest code."""
        s, z = float(self.scale), int(self.zero)
        return s * (self.qtype.qmin - z), s * (self.qtype.qmax - z)


@dataclass(frozen=True)
class QTensor:
    """A quantized weight. `codes` is (out, in); `scale` and `zero` are () per tensor,
    (out,) per channel, (out, in / block) per block. `step` (out,) is there where scales are codes:
    each is an integer, 1 to 15, times the step of its row.

        >>> w = np.array([[1.0, -2.0], [0.5, 0.25]], np.float32)
        >>> s8 = QType.parse("s8:channel")
        >>> q = quantize_weight(w, *weight_scale(w, s8), s8)
        >>> q.codes.tolist(), q.scale.shape
        ([[64, -127], [127, 64]], (2,))
    """

    codes: Codes
    scale: Floats
    zero: Codes
    qtype: QType
    step: Floats | None = None

    def dequantize(self) -> NDArray[np.float32]:
        """Real values, (out, in) float32."""
        shape, group = self.codes.shape, self.qtype.group
        scale, zero = (spread(a, shape, group) for a in (self.scale, self.zero))
        return ((self.codes.astype(np.float32) - zero.astype(np.float32)) * scale).astype(
            np.float32
        )


def spread(
    per_group: NDArray[Any], shape: tuple[int, ...], group: int | None = None
) -> NDArray[Any]:
    """Repeat a scale or zero point of shape (), (out,) or (out, blocks) over (out, in).

    `group` is the size of a block, of which the last may be cut short.
    """
    if per_group.ndim == 0:
        return per_group
    if per_group.ndim == 1:
        return per_group[:, None]
    assert group is not None
    return np.repeat(per_group, group, axis=1)[:, : shape[1]]


def scale_and_zero(low: ArrayLike, high: ArrayLike, qtype: QType) -> tuple[Floats, Codes]:
    """Scale (float32) and zero point of the ranges [low, high], elementwise.

    The range is widened to hold 0, so that padding and ReLU's zeros are exact. A range of nothing
    but 0 gets scale 1. A power of two is the next above, so that nothing clips.
    """
    lo = np.minimum(np.asarray(low, np.float64), 0)
    hi = np.maximum(np.asarray(high, np.float64), 0)
    if qtype.symmetric:
        scale = _allowed(np.maximum(-lo, hi) / (qtype.qmax - qtype.middle), qtype)
        zero = np.full_like(scale, qtype.middle)
    else:
        scale = _allowed((hi - lo) / (qtype.qmax - qtype.qmin), qtype)
        safe = np.where(scale > 0, scale, 1)
        zero = np.clip(np.rint(qtype.qmin - lo / safe), qtype.qmin, qtype.qmax)
    # Below the smallest normal float32 a reciprocal overflows, in the runtime as here.
    scale = np.where(scale < np.finfo(np.float32).tiny, 1.0, scale)
    return np.asarray(scale, np.float32), np.asarray(zero).astype(qtype.dtype)


def _allowed(scale: Floats, qtype: QType) -> Floats:
    return next_power_of_two(scale) if qtype.power_of_two else scale


def next_power_of_two(x: ArrayLike) -> Floats:
    """The least powers of two that are no less than x ≥ 0, elementwise; 0 stays 0."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))  # x = mantissa · 2^exponent
    return np.ldexp(np.where(mantissa > 0.5, 1.0, mantissa), exponent)


def quantize(x: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], qtype: QType) -> Codes:
    """Round half to even, shift, clip: what ONNX QuantizeLinear does. Shapes broadcast."""
    codes = nearest(x / scale, qtype, zero.astype(np.float32))
    if qtype.float8:
        return codes.astype(qtype.dtype)
    return as_codes(codes.astype(qtype.byte), qtype)


def nearest(real: NDArray[Any], qtype: QType, zero: ArrayLike = 0) -> NDArray[Any]:
    """The codes, as floats, nearest to numbers in units of the scale; shapes broadcast."""
    if qtype.float8:  # clipped first: what is beyond the largest would be NaN or infinity
        return np.clip(real, qtype.qmin, qtype.qmax).astype(qtype.dtype).astype(real.dtype)
    return np.clip(np.rint(real) + zero, qtype.qmin, qtype.qmax)


def as_codes(codes: NDArray[np.integer[Any]], qtype: QType) -> Codes:
    """Codes in bytes, or what is wider, as the format's own type; small ones are not copied."""
    if qtype.signed and qtype.dtype != qtype.byte:
        codes &= (1 << qtype.bits) - 1  # nothing is kept above the bits
    return codes.view(qtype.dtype)


def weight_scale(weight: Floats, qtype: QType) -> tuple[Floats, Codes]:
    """Scale and zero point of a weight (out, in) from its smallest and largest values."""
    if qtype.group is None:
        return scale_and_zero(weight.min(initial=0), weight.max(initial=0), qtype)
    if qtype.group == -1:
        low, high = weight.min(axis=1, initial=0), weight.max(axis=1, initial=0)
        return scale_and_zero(low, high, qtype)
    blocks = in_blocks(weight, qtype.group)
    scale, zero = block_range(blocks.min(axis=2), blocks.max(axis=2), qtype)
    return block_scale(scale, qtype), zero.astype(qtype.dtype)


def block_range(
    low: Floats, high: Floats, qtype: QType
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and zero points of blocks with the ranges [low, high], elementwise.

    The scale of a block without a range is 0. Symmetric formats give the weight that is farthest
    from zero their lowest code.
    """
    if qtype.symmetric and not qtype.power_of_two:
        farthest = np.where(high > -low, high, low).astype(np.float32)
        scale = farthest / np.float32(qtype.qmin - qtype.middle)
        return scale, np.full_like(scale, qtype.middle)
    scale, zero = scale_and_zero(low, high, qtype)
    some = np.where((low < 0) | (high > 0), scale, 0)
    return some.astype(np.float32), zero.astype(np.float32)


def in_blocks(weight: Floats, group: int) -> Floats:
    """A weight (out, in) as (out, blocks, group), filled up with zeros."""
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % group)))
    return padded.reshape(len(weight), -1, group)


def block_scale(scale: Floats, qtype: QType) -> Floats:
    """Scales (out, blocks) of blocks as files hold them: rounded to float16, kept in float32.

    It moves a weight by 2⁻¹² of itself, and halves what the scales add to each weight's bits. A
    tensor so small that float16 has no digits for it keeps float32. What is too small for a scale
    becomes 1: its block is zero.
    """
    return stored_scale(scale, fits_half(scale, qtype))


def fits_half(scale: Floats, qtype: QType) -> bool:
    """Whether float16 has digits for all scales of a tensor's blocks."""
    return not qtype.power_of_two and _has_half_digits(scale)


def _has_half_digits(scale: Floats) -> bool:
    largest = float(np.abs(scale).max(initial=0))
    return _LEAST_HALF < largest < float(np.finfo(np.float16).max)


def stored_scale(scale: Floats, half: bool) -> NDArray[np.float32]:
    """Some scales of a tensor, as its file holds them: `half` is the same for all."""
    scale = np.asarray(scale, np.float32)
    if half:
        scale = scale.astype(np.float16).astype(np.float32)
    return np.where(np.abs(scale) < np.finfo(np.float32).tiny, np.float32(1), scale)


def in_float16(scale: Floats) -> NDArray[np.float32]:
    """Rounded to what float16 can say, where it has digits for the largest."""
    half = _has_half_digits(scale)
    return np.asarray(scale, np.float16 if half else np.float32).astype(np.float32)


def quantize_weight(weight: Floats, scale: Floats, zero: Codes, qtype: QType) -> QTensor:
    """Round a weight (out, in) to the nearest code under a given scale and zero point."""
    spread_scale, spread_zero = (spread(a, weight.shape, qtype.group) for a in (scale, zero))
    return QTensor(quantize(weight, spread_scale, spread_zero, qtype), scale, zero, qtype)
