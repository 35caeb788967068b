"""Arithmetic of codes, element by element, and their mean: exact, rounded once at the end."""

from __future__ import annotations

from onnxq.ops.function import INT64, UINT64, function

INTEGER_AFFINE = function(
    """
    y = clip(y_zero + ⌊((x - x_zero) multiplier + offset) / 2^shift + 1/2⌋, low, high).
    Types as of Requantize; offset: int64, broadcast.
    Domain: |(x - x_zero) multiplier + offset| + 2^shift / 2 < 2^62.
    """,
    """
    IntegerAffine (x, x_zero, multiplier, offset, shift, y_zero, low, high) => (y) {
        centered = ai.onnxq.Center (x, x_zero)
        product = Mul (centered, multiplier)
        sum = Add (product, offset)
        rounded = ai.onnxq.RoundingRightShift (sum, shift)
        y = ai.onnxq.Saturate (rounded, y_zero, low, high)
    }
    """,
)

INTEGER_ADD = function(
    """
    The sum of two tensors of codes, rounded once:
    y = clip(y_zero + ⌊((a - a_zero) a_multiplier + (b - b_zero) b_multiplier) / 2^shift + 1/2⌋,
             low, high).
    a, b: codes, broadcast; a_zero, b_zero: of their types; multipliers, low, high: int64;
    shift: uint64; y, y_zero: codes. Domain: |the sum| + 2^shift / 2 < 2^62.
    """,
    """
    IntegerAdd (a, a_zero, a_multiplier, b, b_zero, b_multiplier, shift, y_zero, low, high)
    => (y) {
        a_centered = ai.onnxq.Center (a, a_zero)
        b_centered = ai.onnxq.Center (b, b_zero)
        a_scaled = Mul (a_centered, a_multiplier)
        b_scaled = Mul (b_centered, b_multiplier)
        sum = Add (a_scaled, b_scaled)
        rounded = ai.onnxq.RoundingRightShift (sum, shift)
        y = ai.onnxq.Saturate (rounded, y_zero, low, high)
    }
    """,
)

INTEGER_MUL = function(
    """
    y = clip(y_zero + ⌊(a - a_zero) (b - b_zero) multiplier / 2^shift + 1/2⌋, low, high).
    Types as of IntegerAdd. Domain: |the product| + 2^shift / 2 < 2^62: of codes of 16 bits, a
    multiplier of 29.
    """,
    """
    IntegerMul (a, a_zero, b, b_zero, multiplier, shift, y_zero, low, high) => (y) {
        a_centered = ai.onnxq.Center (a, a_zero)
        b_centered = ai.onnxq.Center (b, b_zero)
        product = Mul (a_centered, b_centered)
        scaled = Mul (product, multiplier)
        rounded = ai.onnxq.RoundingRightShift (scaled, shift)
        y = ai.onnxq.Saturate (rounded, y_zero, low, high)
    }
    """,
)

INTEGER_DIV = function(
    """
    y = clip(y_zero + round(n / d), low, high), n = (a - a_zero) multiplier,
    d = (b - b_zero) 2^shift, halves rounded away from zero; b - b_zero = 0 counts as 1.
    Types as of IntegerAdd. Domain: 2 |n| + |d| < 2^63, |d| < 2^62.
    """,
    f"""
    IntegerDiv (a, a_zero, b, b_zero, multiplier, shift, y_zero, low, high) => (y) {{
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        a_centered = ai.onnxq.Center (a, a_zero)
        b_centered = ai.onnxq.Center (b, b_zero)
        is_zero = Equal (b_centered, zero)
        divisor = Where (is_zero, one, b_centered)
        numerator = Mul (a_centered, multiplier)
        n_negative = Less (numerator, zero)
        d_negative = Less (divisor, zero)
        negative = Xor (n_negative, d_negative)
        n_size = Abs (numerator)
        d_size = Abs (divisor)
        unsigned = Cast <to = {UINT64}> (d_size)
        raised = BitShift <direction = "LEFT"> (unsigned, shift)
        d = Cast <to = {INT64}> (raised)
        size = ai.onnxq.RoundingDivide (n_size, d)
        opposite = Neg (size)
        quotient = Where (negative, opposite, size)
        y = ai.onnxq.Saturate (quotient, y_zero, low, high)
    }}
    """,
)

INTEGER_MEAN = function(
    """
    y = clip(y_zero + ⌊S multiplier / (N 2^shift) + 1/2⌋, low, high), S the sum of x - x_zero over
    `axes` and N how many elements that sums; multiplier 1 and shift 0 round the mean itself.
    x: codes, x_zero: of their type; axes: int64 (1-D); multiplier, low, high: int64 and shift:
    uint64, broadcast with the result; y, y_zero: codes.
    Domain: |S| < 2^53, 2 |S multiplier| + N 2^shift < 2^63, N 2^shift < 2^62.
    """,
    f"""
    IntegerMean <keepdims: int = 1> (x, x_zero, axes, multiplier, shift, y_zero, low, high)
    => (y) {{
        centered = ai.onnxq.Center (x, x_zero)
        sum = ReduceSum <keepdims: int = @keepdims> (centered, axes)
        shape = Shape (x)
        lengths = Gather (shape, axes)
        count = ReduceProd <keepdims = 0> (lengths)
        unsigned = Cast <to = {UINT64}> (count)
        raised = BitShift <direction = "LEFT"> (unsigned, shift)
        divisor = Cast <to = {INT64}> (raised)
        product = Mul (sum, multiplier)
        mean = ai.onnxq.RoundingDivide (product, divisor)
        y = ai.onnxq.Saturate (mean, y_zero, low, high)
    }}
    """,
)

LOOK_UP = function(
    """
    y = table[x - first]: any function of one code.
    x: codes; first: int64 scalar, the code of the table's first entry; table: 1-D of any type,
    which y has too. Domain: first <= x < first + the table's length.
    """,
    f"""
    LookUp (x, first, table) => (y) {{
        code = Cast <to = {INT64}> (x)
        position = Sub (code, first)
        y = Gather (table, position)
    }}
    """,
)

ELEMENTWISE = (
    INTEGER_AFFINE,
    INTEGER_ADD,
    INTEGER_MUL,
    INTEGER_DIV,
    INTEGER_MEAN,
    LOOK_UP,
)
