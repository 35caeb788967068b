"""exp, softmax, GELU and SiLU of integers.

Kim et al. 2021, "I-BERT: Integer-only BERT Quantization", §3.3-3.5: polynomials of second degree on
a short interval, evaluated in fixed point. Qn below is a fixed-point number of n fraction bits.

exp: x s = -p ln 2 with p >= 0; its integer part z is a right shift, its fraction f goes through
a (b - f)² + c ≈ 2^-f. The paper's 0.3585 (r + 1.353)² + 0.344, r = -f ln 2, errs by 0.00213 and
jumps up where z changes. Here b and c follow from a by asking for 1 at f = 0 and 1/2 at f = 1,
which makes exp continuous and monotonic, and a is the one that then errs least, by 0.00191.
"""

from __future__ import annotations

from onnxq.ops.fixed_point import UNIT_BITS
from onnxq.ops.function import INT64, UINT64, function

EXP_FRACTION = 20  # bits of p, and of the coefficients a and b
EXP_BITS = 30  # of exp: 1 is 2^30
_A = 0.17214
EXP_A = round(_A * 2**EXP_FRACTION)
EXP_B = round((1 / (4 * _A) + 1 / 2) * 2**EXP_FRACTION)
EXP_DROP = 3 * EXP_FRACTION - EXP_BITS  # fraction bits of a (b - f)² beyond those of exp
EXP_C = 2**EXP_BITS - (EXP_A * EXP_B**2 >> EXP_DROP)
_MOST_P = (EXP_BITS + 2) * 2**EXP_FRACTION - 1  # from where exp is 0

ERF_A = round(0.2888 * 2**UNIT_BITS)
ERF_B = round(1.769 * 2**UNIT_BITS)

INTEGER_EXP = function(
    f"""
    y = exp(x s) in Q{EXP_BITS}, x <= 0: with p = ⌊-x multiplier / 2^shift + 1/2⌋ in
    Q{EXP_FRACTION}, z and f its integer and fraction part,
    y = (({EXP_A} ({EXP_B} - f)²) >> {EXP_DROP}) + {EXP_C}) >> z. I-BERT §3.5, error below 0.002.
    multiplier 2^-shift = s / ln 2 · 2^{EXP_FRACTION}.
    x, y, multiplier: int64; shift: uint64. Domain: x <= 0, |x multiplier| + 2^shift / 2 < 2^62.
    """,
    f"""
    IntegerExp (x, multiplier, shift) => (y) {{
        most = Constant <value = uint64 {{{_MOST_P}}}> ()
        fraction_bits = Constant <value = uint64 {{{EXP_FRACTION}}}> ()
        one = Constant <value_int = {2**EXP_FRACTION}> ()
        a = Constant <value_int = {EXP_A}> ()
        b = Constant <value_int = {EXP_B}> ()
        c = Constant <value_int = {EXP_C}> ()
        drop = Constant <value = uint64 {{{EXP_DROP}}}> ()
        size = Neg (x)
        scaled = Mul (size, multiplier)
        rounded = ai.onnxq.RoundingRightShift (scaled, shift)
        unsigned = Cast <to = {UINT64}> (rounded)
        unsigned_p = Min (unsigned, most)
        p = Cast <to = {INT64}> (unsigned_p)
        z = BitShift <direction = "RIGHT"> (unsigned_p, fraction_bits)
        integer_part = Cast <to = {INT64}> (z)
        integer_p = Mul (integer_part, one)
        f = Sub (p, integer_p)
        distance = Sub (b, f)
        square = Mul (distance, distance)
        curve = Mul (a, square)
        unsigned_curve = Cast <to = {UINT64}> (curve)
        dropped = BitShift <direction = "RIGHT"> (unsigned_curve, drop)
        term = Cast <to = {INT64}> (dropped)
        power = Add (term, c)
        unsigned_power = Cast <to = {UINT64}> (power)
        shifted = BitShift <direction = "RIGHT"> (unsigned_power, z)
        y = Cast <to = {INT64}> (shifted)
    }}
    """,
)

INTEGER_SOFTMAX = function(
    """
    y = clip(y_zero + ⌊e levels / Σ e + 1/2⌋, low, high), e = IntegerExp(x - max x), maximum and
    sum along `axis`.
    x: codes (their zero point cancels); multiplier, shift: IntegerExp's; levels: int64 scalar,
    1 / s_y; y, y_zero: codes; low, high: int64.
    Domain: |(x - max x) multiplier| + 2^shift / 2 < 2^62, levels < 2^31, at most 2^22 summed.
    """,
    f"""
    IntegerSoftmax <axis: int = -1> (x, multiplier, shift, levels, y_zero, low, high) => (y) {{
        axis = Constant <value_int: int = @axis> ()
        list = Constant <value_ints = [1]> ()
        axes = Reshape (axis, list)
        code = Cast <to = {INT64}> (x)
        largest = ReduceMax <keepdims = 1> (code, axes)
        below = Sub (code, largest)
        e = ai.onnxq.IntegerExp (below, multiplier, shift)
        sum = ReduceSum <keepdims = 1> (e, axes)
        scaled = Mul (e, levels)
        share = ai.onnxq.RoundingDivide (scaled, sum)
        y = ai.onnxq.Saturate (share, y_zero, low, high)
    }}
    """,
)

INTEGER_GELU = function(
    f"""
    y = clip(y_zero + ⌊(x - x_zero) (2^{UNIT_BITS} + erf) multiplier / 2^shift + 1/2⌋, low, high),
    erf = sign(x) (1 - 0.2888 (u - 1.769)²) in Q{UNIT_BITS} with
    u = min(⌊|x - x_zero| in_multiplier / 2^in_shift + 1/2⌋, 1.769). I-BERT §3.4, error at most
    0.0182. in_multiplier 2^-in_shift = s_x / √2 · 2^{UNIT_BITS};
    multiplier 2^-shift = s_x / (2 s_y) · 2^-{UNIT_BITS}.
    x: codes, x_zero: of their type; multipliers, low, high: int64; shifts: uint64; y, y_zero:
    codes. Domain: |(x - x_zero) in_multiplier| + 2^in_shift / 2 < 2^62 and
    |(x - x_zero) multiplier| 2^16 + 2^shift / 2 < 2^62.
    """,
    f"""
    IntegerGelu (x, x_zero, in_multiplier, in_shift, multiplier, shift, y_zero, low, high)
    => (y) {{
        one = Constant <value_int = {2**UNIT_BITS}> ()
        a = Constant <value_int = {ERF_A}> ()
        zero = Constant <value_int = 0> ()
        b = Constant <value_int = {ERF_B}> ()
        unsigned_b = Cast <to = {UINT64}> (b)
        bits = Constant <value = uint64 {{{2 * UNIT_BITS}}}> ()
        centered = ai.onnxq.Center (x, x_zero)
        size = Abs (centered)
        scaled = Mul (size, in_multiplier)
        rounded = ai.onnxq.RoundingRightShift (scaled, in_shift)
        unsigned = Cast <to = {UINT64}> (rounded)
        unsigned_u = Min (unsigned, unsigned_b)
        u = Cast <to = {INT64}> (unsigned_u)
        distance = Sub (b, u)
        square = Mul (distance, distance)
        curve = Mul (a, square)
        missing = ai.onnxq.RoundingRightShift (curve, bits)
        erf_size = Sub (one, missing)
        opposite = Neg (erf_size)
        negative = Less (centered, zero)
        erf = Where (negative, opposite, erf_size)
        gate = Add (one, erf)
        gated = Mul (centered, gate)
        product = Mul (gated, multiplier)
        result = ai.onnxq.RoundingRightShift (product, shift)
        y = ai.onnxq.Saturate (result, y_zero, low, high)
    }}
    """,
)

INTEGER_SILU = function(
    f"""
    y = clip(y_zero + ⌊(x - x_zero) σ multiplier / 2^shift + 1/2⌋, low, high), σ the sigmoid in
    Q{UNIT_BITS}: ⌊1 / (1 + e) + 1/2⌋ with e = IntegerExp(-|x - x_zero|) for x >= x_zero, and
    1 less that below. in_multiplier, in_shift: IntegerExp's;
    multiplier 2^-shift = s_x / s_y · 2^-{UNIT_BITS}.
    Types as of IntegerGelu. Domain: |(x - x_zero) in_multiplier| + 2^in_shift / 2 < 2^62 and
    |(x - x_zero) multiplier| 2^{UNIT_BITS} + 2^shift / 2 < 2^62.
    """,
    f"""
    IntegerSilu (x, x_zero, in_multiplier, in_shift, multiplier, shift, y_zero, low, high)
    => (y) {{
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = {2**UNIT_BITS}> ()
        exp_one = Constant <value_int = {2**EXP_BITS}> ()
        both_ones = Constant <value_int = {2 ** (UNIT_BITS + EXP_BITS)}> ()
        centered = ai.onnxq.Center (x, x_zero)
        size = Abs (centered)
        below = Neg (size)
        e = ai.onnxq.IntegerExp (below, in_multiplier, in_shift)
        denominator = Add (exp_one, e)
        upper = ai.onnxq.RoundingDivide (both_ones, denominator)
        lower = Sub (one, upper)
        negative = Less (centered, zero)
        sigmoid = Where (negative, lower, upper)
        gated = Mul (centered, sigmoid)
        product = Mul (gated, multiplier)
        result = ai.onnxq.RoundingRightShift (product, shift)
        y = ai.onnxq.Saturate (result, y_zero, low, high)
    }}
    """,
)

TRANSCENDENTAL = (INTEGER_EXP, INTEGER_SOFTMAX, INTEGER_GELU, INTEGER_SILU)
