"""The square root of integers, and the normalizations that divide by one.

Kim et al. 2021, "I-BERT: Integer-only BERT Quantization", §3.6 (Algorithm 4): Newton's iteration
s ← ⌊(s + ⌊x / s⌋) / 2⌋ gives ⌊√x⌋. Here it is unrolled, without a test for its end:

    2^k with 2^(2k-1) <= x < 2^(2k+1) is within a factor √2 of √x. A step from s = ρ √x gives
    (ρ + 1/ρ) / 2 √x, so 1 + e becomes at most 1 + e² / (2 (1 + e)): after one step e <= 0.0607,
    after two 0.00174, three 1.51e-6, four 1.14e-12. As √x < 2^31, s is then less than √x + 1.
    No step falls below ⌊√x⌋, and from ⌊√x⌋ one leads at most to ⌊√x⌋ + 1. So four steps end at
    ⌊√x⌋ or one above it, which a comparison tells.

A normalization needs no mean in fixed point: with N the length of a row, d = N x - Σx and
V = N Σx² - (Σx)², (x - μ) / σ = d / √V exactly.
"""

from __future__ import annotations

from onnxq.ops.fixed_point import UNIT_BITS
from onnxq.ops.function import INT64, UINT64, function

L2_BITS = 8  # fraction bits of a norm
ROOT_BITS = 15  # fraction bits of the root of a small V
_SMALL = 2 ** (62 - 2 * ROOT_BITS)
_THRESHOLDS = [2 ** (2 * k + 1) for k in range(31)]

SQRT_STEP = function(
    "One step of Newton's iteration for √x: y = ⌊(s + ⌊x / s⌋) / 2⌋. x >= 0, s > 0, y: int64.",
    """
    SqrtStep (x, s) => (y) {
        two = Constant <value_int = 2> ()
        quotient = Div (x, s)
        sum = Add (s, quotient)
        y = Div (sum, two)
    }
    """,
)

INTEGER_SQRT = function(
    "y = ⌊√x⌋, exactly. x, y: int64. Domain: 0 <= x < 2^62.",
    f"""
    IntegerSqrt (x) => (y) {{
        thresholds = Constant <value_ints = {_THRESHOLDS}> ()
        last = Constant <value_ints = [-1]> ()
        zero = Constant <value_int = 0> ()
        unsigned_unit = Constant <value = uint64 {{1}}> ()
        columns = Unsqueeze (x, last)
        reached = GreaterOrEqual (columns, thresholds)
        ones = Cast <to = {INT64}> (reached)
        count = ReduceSum <keepdims = 0> (ones, last)
        k = Cast <to = {UINT64}> (count)
        power = BitShift <direction = "LEFT"> (unsigned_unit, k)
        s0 = Cast <to = {INT64}> (power)
        is_zero = Equal (x, zero)
        zero_as_one = Cast <to = {INT64}> (is_zero)
        positive = Add (x, zero_as_one)
        s1 = ai.onnxq.SqrtStep (positive, s0)
        s2 = ai.onnxq.SqrtStep (positive, s1)
        s3 = ai.onnxq.SqrtStep (positive, s2)
        s4 = ai.onnxq.SqrtStep (positive, s3)
        square = Mul (s4, s4)
        is_above = Greater (square, x)
        excess = Cast <to = {INT64}> (is_above)
        y = Sub (s4, excess)
    }}
    """,
)

DIVIDE_BY_ROOT = function(
    f"""
    y = ⌊d / √V + 1/2⌋ in Q{UNIT_BITS}, with √V of {ROOT_BITS} fraction bits where V < 2^32 and of
    none above, so that it is good to 2^-{ROOT_BITS}.
    d, V, y: int64, broadcast.
    Domain: 1 <= V < 2^62; |d| < 2^46, and below 2^31 where V < 2^32.
    """,
    f"""
    DivideByRoot (d, V) => (y) {{
        small = Constant <value_int = {_SMALL}> ()
        unit = Constant <value_int = 1> ()
        raise = Constant <value_int = {2**ROOT_BITS}> ()
        one = Constant <value_int = {2**UNIT_BITS}> ()
        is_small = Less (V, small)
        factor = Where (is_small, raise, unit)
        square = Mul (factor, factor)
        raised = Mul (V, square)
        root = ai.onnxq.IntegerSqrt (raised)
        numerator_factor = Mul (factor, one)
        numerator = Mul (d, numerator_factor)
        y = ai.onnxq.RoundingDivide (numerator, root)
    }}
    """,
)

INTEGER_LAYER_NORMALIZATION = function(
    f"""
    y = clip(y_zero + ⌊(n multiplier + offset) / 2^shift + 1/2⌋, low, high),
    n = ⌊d / √V + 1/2⌋ in Q{UNIT_BITS}, d = N x - Σx, V = N Σx² - (Σx)² + epsilon, over the last
    axis, whose length is N.
    x: codes, of which zero point and scale cancel; epsilon: int64 >= 1, in units of s_x² / N²;
    multiplier (γ), offset (β), low, high: int64 and shift: uint64, broadcast; y, y_zero: codes.
    Domain: N <= 2^16, Σx² < 2^53, V < 2^62 (N² max x² + epsilon < 2^62 suffices),
    |n| <= 2^{UNIT_BITS} √N, |n multiplier + offset| + 2^shift / 2 < 2^62.
    """,
    f"""
    IntegerLayerNormalization (x, epsilon, multiplier, offset, shift, y_zero, low, high)
    => (y) {{
        last = Constant <value_ints = [-1]> ()
        code = Cast <to = {INT64}> (x)
        N = Shape <start = -1> (x)
        sum = ReduceSum <keepdims = 1> (code, last)
        multiple = Mul (code, N)
        d = Sub (multiple, sum)
        square = Mul (code, code)
        sum_of_squares = ReduceSum <keepdims = 1> (square, last)
        first_term = Mul (sum_of_squares, N)
        second_term = Mul (sum, sum)
        variance = Sub (first_term, second_term)
        V = Add (variance, epsilon)
        n = ai.onnxq.DivideByRoot (d, V)
        product = Mul (n, multiplier)
        affine = Add (product, offset)
        rounded = ai.onnxq.RoundingRightShift (affine, shift)
        y = ai.onnxq.Saturate (rounded, y_zero, low, high)
    }}
    """,
)

INTEGER_RMS_NORMALIZATION = function(
    f"""
    y = clip(y_zero + ⌊n multiplier / 2^shift + 1/2⌋, low, high), n = ⌊d / √V + 1/2⌋ in
    Q{UNIT_BITS}, d = N (x - x_zero), V = N Σ(x - x_zero)² + epsilon, over the last axis, whose
    length is N.
    Types and domain as of IntegerLayerNormalization.
    """,
    """
    IntegerRMSNormalization (x, x_zero, epsilon, multiplier, shift, y_zero, low, high)
    => (y) {
        last = Constant <value_ints = [-1]> ()
        centered = ai.onnxq.Center (x, x_zero)
        N = Shape <start = -1> (x)
        d = Mul (centered, N)
        square = Mul (centered, centered)
        sum_of_squares = ReduceSum <keepdims = 1> (square, last)
        variance = Mul (sum_of_squares, N)
        V = Add (variance, epsilon)
        n = ai.onnxq.DivideByRoot (d, V)
        product = Mul (n, multiplier)
        rounded = ai.onnxq.RoundingRightShift (product, shift)
        y = ai.onnxq.Saturate (rounded, y_zero, low, high)
    }
    """,
)

INTEGER_L2_NORM = function(
    f"""
    y = clip(y_zero + ⌊r multiplier / 2^shift + 1/2⌋, low, high), r = √Σ(x - x_zero)² over `axes`,
    rounded down in Q{L2_BITS}. multiplier 2^-shift = s_x / s_y · 2^-{L2_BITS}.
    x: codes, x_zero: of their type; axes: int64 (1-D); multiplier, low, high: int64 and shift:
    uint64, broadcast with the result; y, y_zero: codes.
    Domain: Σ(x - x_zero)² < 2^{62 - 2 * L2_BITS}, |r multiplier| + 2^shift / 2 < 2^62.
    """,
    f"""
    IntegerL2Norm <keepdims: int = 1> (x, x_zero, axes, multiplier, shift, y_zero, low, high)
    => (y) {{
        raise = Constant <value_int = {4**L2_BITS}> ()
        centered = ai.onnxq.Center (x, x_zero)
        square = Mul (centered, centered)
        sum = ReduceSum <keepdims: int = @keepdims> (square, axes)
        raised = Mul (sum, raise)
        root = ai.onnxq.IntegerSqrt (raised)
        product = Mul (root, multiplier)
        rounded = ai.onnxq.RoundingRightShift (product, shift)
        y = ai.onnxq.Saturate (rounded, y_zero, low, high)
    }}
    """,
)

NORMALIZATION = (
    SQRT_STEP,
    INTEGER_SQRT,
    DIVIDE_BY_ROOT,
    INTEGER_LAYER_NORMALIZATION,
    INTEGER_RMS_NORMALIZATION,
    INTEGER_L2_NORM,
)
