"""Rounding, shifting and saturating: what every integer operator ends with.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", §2.2: a real multiplier M = m · 2⁻ⁿ is an integer product and a
rounding right shift. Halves are rounded up, ⌊v / 2ⁿ + ½⌋, as hardware does that adds 2ⁿ⁻¹ first.

ONNX shifts only unsigned integers and truncates quotients towards zero. A negative value is
therefore lifted by 2⁶², a multiple of every 2ⁿ, before its shift; a quotient is made exact by
taking off the remainder, which `Mod` gives with the sign of the divisor.

Not all that runs int64 is exact. ONNX Runtime 1.31 on a CPU with AVX-512 orders numbers wrongly
that lie 2³¹ to 2³² apart in `Max`, `Min`, `Clip` and `Sign` of int64, and adds up in float64 in
`ReduceSum`. The functions clamp in uint64 therefore, and their sums stay below 2⁵³.
"""

from __future__ import annotations

from onnxq.ops.function import INT64, UINT64, function

LIFT = 2**62  # makes what is shifted positive
MOST_SHIFT = 61  # bits
UNIT_BITS = 15  # fraction bits of erf, the sigmoid and normalized values: 1 is 2^15

ROUNDING_RIGHT_SHIFT = function(
    """
    y = ⌊x / 2^shift + 1/2⌋, that is floor((x + half) / 2^shift) with half = ⌊2^shift / 2⌋.
    x, y: int64; shift: uint64, broadcast. Domain: shift <= 61 and -2^62 <= x < 2^62 - half.
    """,
    f"""
    RoundingRightShift (x, shift) => (y) {{
        lift = Constant <value_int = {LIFT}> ()
        one = Constant <value = uint64 {{1}}> ()
        power = BitShift <direction = "LEFT"> (one, shift)
        half_power = BitShift <direction = "RIGHT"> (power, one)
        half = Cast <to = {INT64}> (half_power)
        added = Add (lift, half)
        lifted = Add (x, added)
        unsigned = Cast <to = {UINT64}> (lifted)
        shifted = BitShift <direction = "RIGHT"> (unsigned, shift)
        quotient = Cast <to = {INT64}> (shifted)
        unsigned_lift = Cast <to = {UINT64}> (lift)
        shifted_lift = BitShift <direction = "RIGHT"> (unsigned_lift, shift)
        quotient_lift = Cast <to = {INT64}> (shifted_lift)
        y = Sub (quotient, quotient_lift)
    }}
    """,
)

ROUNDING_DIVIDE = function(
    """
    y = ⌊x / divisor + 1/2⌋ = floor((2 x + divisor) / (2 divisor)).
    x, divisor, y: int64, broadcast. Domain: 0 < divisor and 2 |x| + divisor < 2^63.
    """,
    """
    RoundingDivide (x, divisor) => (y) {
        twice_x = Add (x, x)
        numerator = Add (twice_x, divisor)
        denominator = Add (divisor, divisor)
        remainder = Mod (numerator, denominator)
        multiple = Sub (numerator, remainder)
        y = Div (multiple, denominator)
    }
    """,
)

CENTER = function(
    """
    y = x - x_zero, exactly.
    x: codes (uint8, or int32 of 16 bits) or an int32 accumulator; x_zero: of the same type;
    y: int64.
    """,
    f"""
    Center (x, x_zero) => (y) {{
        wide = Cast <to = {INT64}> (x)
        zero = Cast <to = {INT64}> (x_zero)
        y = Sub (wide, zero)
    }}
    """,
)

SATURATE = function(
    """
    y = clip(y_zero + x, low, high) as codes of the type of y_zero.
    x: int64; y_zero: codes; low, high: int64 within y_zero's type. Domain: |x| < 2^62 - 2^31.
    """,
    f"""
    Saturate (x, y_zero, low, high) => (y) {{
        lift = Constant <value_int = {LIFT}> ()
        zero = Cast <to = {INT64}> (y_zero)
        lifted_zero = Add (lift, zero)
        lifted_low = Add (lift, low)
        lifted_high = Add (lift, high)
        unsigned_low = Cast <to = {UINT64}> (lifted_low)
        unsigned_high = Cast <to = {UINT64}> (lifted_high)
        lifted = Add (x, lifted_zero)
        unsigned = Cast <to = {UINT64}> (lifted)
        at_least = Max (unsigned, unsigned_low)
        clipped = Min (at_least, unsigned_high)
        signed = Cast <to = {INT64}> (clipped)
        code = Sub (signed, lift)
        y = CastLike (code, y_zero)
    }}
    """,
)

REQUANTIZE = function(
    """
    y = clip(y_zero + ⌊(x - x_zero) multiplier / 2^shift + 1/2⌋, low, high), Jacob et al. 2018.
    multiplier 2^-shift = s_x / s_y, or s_x s_w / s_y for an accumulator.
    x: codes or an int32 accumulator, x_zero: the same; multiplier, low, high: int64, shift: uint64,
    broadcast; y, y_zero: codes. Domain: |(x - x_zero) multiplier| + 2^shift / 2 < 2^62.
    """,
    """
    Requantize (x, x_zero, multiplier, shift, y_zero, low, high) => (y) {
        centered = ai.onnxq.Center (x, x_zero)
        product = Mul (centered, multiplier)
        rounded = ai.onnxq.RoundingRightShift (product, shift)
        y = ai.onnxq.Saturate (rounded, y_zero, low, high)
    }
    """,
)

SHIFT_REQUANTIZE = function(
    """
    Requantize where the scales are powers of two, which needs no multiplication:
    y = clip(y_zero + ⌊(x - x_zero) / 2^shift + 1/2⌋, low, high).
    Types as of Requantize. Domain: shift <= 61.
    """,
    """
    ShiftRequantize (x, x_zero, shift, y_zero, low, high) => (y) {
        centered = ai.onnxq.Center (x, x_zero)
        rounded = ai.onnxq.RoundingRightShift (centered, shift)
        y = ai.onnxq.Saturate (rounded, y_zero, low, high)
    }
    """,
)

FIXED_POINT = (
    ROUNDING_RIGHT_SHIFT,
    ROUNDING_DIVIDE,
    CENTER,
    SATURATE,
    REQUANTIZE,
    SHIFT_REQUANTIZE,
)
