"""Standard operators on integers, exactly: what overflows its type is an error, not a wrong number.

Each takes its node's attributes and arrays, None for what is left out, as the ONNX standard has
them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from onnxq.ops.integers import Integers

Array = NDArray[Any]
Attributes = dict[str, Any]
Kernel = Callable[..., Array]
_DOUBLE = 2**53  # below it float64 holds every integer


def _matmul(a: Integers, b: Integers) -> Integers:
    """The matrix product, over all other axes as NumPy has it."""
    if a.bound() * b.bound() * a.shape[-1] < _DOUBLE:
        product = np.matmul(a.values.astype(np.float64), b.values.astype(np.float64))
        return Integers(product.astype(np.int64))
    return Integers(np.matmul(a.values.astype(object), b.values.astype(object)))


# ── products ─────────────────────────────────────────────────────────────────────────────────────


def mat_mul(_: Attributes, a: Array, b: Array) -> Array:
    return _matmul(Integers(a), Integers(b)).as_type(a.dtype)


def mat_mul_integer(
    _: Attributes, a: Array, b: Array, a_zero: Array | None = None, b_zero: Array | None = None
) -> Array:
    """Zero points are scalars, or one for each row of `a` and each column of `b`."""
    rows = 0 if a_zero is None else a_zero[:, None] if a_zero.ndim == 1 else a_zero
    columns = 0 if b_zero is None else b_zero
    product = _matmul(Integers(a) - Integers(rows), Integers(b) - Integers(columns))
    return product.as_type(np.dtype(np.int32))


def conv_integer(
    attributes: Attributes,
    x: Array,
    w: Array,
    x_zero: Array | None = None,
    w_zero: Array | None = None,
) -> Array:
    """x: (N, C, *spatial); w: (M, C / group, *kernel); w_zero: scalar or (M,)."""
    group, kernel = attributes.get("group", 1), w.shape[2:]
    zeros = np.asarray(0 if w_zero is None else w_zero).reshape((-1,) + (1,) * (w.ndim - 1))
    weights = (Integers(w) - Integers(zeros)).values.reshape(group, len(w) // group, -1)
    centered = (Integers(x) - Integers(0 if x_zero is None else x_zero)).values
    made = []
    for image in centered:  # one by one, as windows take as many times the memory as a kernel has
        windows = _windows(image[None], kernel, attributes, 0)[0]
        axes = (0, *range(len(kernel) + 1, windows.ndim), *range(1, len(kernel) + 1))
        columns = windows.transpose(axes).reshape(group, weights.shape[2], -1)
        product = _matmul(Integers(weights), Integers(columns))
        made.append(product.values.reshape(len(w), *windows.shape[1 : len(kernel) + 1]))
    return Integers(np.stack(made)).as_type(np.dtype(np.int32))


def max_pool(attributes: Attributes, x: Array) -> Array:
    kernel = tuple(attributes["kernel_shape"])
    windows = _windows(x, kernel, attributes, int(np.iinfo(x.dtype).min))
    return windows.max(axis=tuple(range(-len(kernel), 0)))


def _windows(x: Array, kernel: tuple[int, ...], attributes: Attributes, fill: int) -> Array:
    """x (N, C, *spatial) padded and cut: a view of shape (N, C, *out, *kernel)."""
    ones = [1] * len(kernel)
    strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = [_pads(x.shape[2 + k], reach[k], strides[k], k, attributes) for k in range(len(kernel))]
    padded = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=fill)
    spatial = tuple(range(2, x.ndim))
    windows = sliding_window_view(padded, tuple(reach), axis=spatial)
    steps = [slice(None, None, step) for step in (*strides, *dilations)]
    return windows[:, :, *steps]


def _pads(
    length: int, reach: int, stride: int, axis: int, attributes: Attributes
) -> tuple[int, int]:
    """How many elements are added before and after one spatial axis."""
    auto = attributes.get("auto_pad", b"NOTSET")
    if auto == b"VALID":
        return 0, 0
    if auto != b"NOTSET":
        total = max((-(-length // stride) - 1) * stride + reach - length, 0)
        less, more = total // 2, total - total // 2
        return (less, more) if auto == b"SAME_UPPER" else (more, less)
    pads = attributes.get("pads") or [0] * (2 * (axis + 1))
    before, after = pads[axis], pads[axis + len(pads) // 2]
    if attributes.get("ceil_mode"):
        steps = -(-(length + before + after - reach) // stride)
        if steps * stride >= length + before:  # a window that would begin in the padding
            steps -= 1
        after = max(after, steps * stride + reach - length - before)
    return before, after


# ── element by element ───────────────────────────────────────────────────────────────────────────


def _exact(function: Callable[..., Integers]) -> Kernel:
    """An operator whose result has the type of its first input."""

    def kernel(_: Attributes, *inputs: Array) -> Array:
        return function(*map(Integers, inputs)).as_type(inputs[0].dtype)

    return kernel


def _quotient(a: Integers, b: Integers) -> Integers:
    """Rounded towards zero."""
    size = abs(a) // abs(b)
    return size.where((a < 0) == (b < 0), -size)


def bit_shift(attributes: Attributes, x: Array, n: Array) -> Array:
    """Shifts to the left lose their high bits, as those of hardware do."""
    if attributes["direction"] == b"RIGHT":
        return (Integers(x) >> Integers(n)).as_type(x.dtype)
    modulus = int(np.iinfo(x.dtype).max) + 1
    return ((Integers(x) << Integers(n)) % modulus).as_type(x.dtype)


def _reduction(over: Callable[[Integers, tuple[int, ...], bool], Integers]) -> Kernel:
    def kernel(attributes: Attributes, x: Array, axes: Array | None = None) -> Array:
        wanted = attributes.get("axes", [] if axes is None else axes.tolist())
        if not wanted and attributes.get("noop_with_empty_axes"):
            return x
        over_axes = tuple(wanted or range(x.ndim))
        return over(Integers(x), over_axes, bool(attributes.get("keepdims", 1))).as_type(x.dtype)

    return kernel


def _product(x: Integers, axes: tuple[int, ...], keepdims: bool) -> Integers:
    return Integers(np.prod(x.values.astype(object), axis=axes, keepdims=keepdims))


# ── the table ────────────────────────────────────────────────────────────────────────────────────

KERNELS: dict[str, Kernel] = {
    "MatMul": mat_mul,
    "MatMulInteger": mat_mul_integer,
    "ConvInteger": conv_integer,
    "MaxPool": max_pool,
    "Add": _exact(operator.add),
    "Sub": _exact(operator.sub),
    "Mul": _exact(operator.mul),
    "Div": _exact(_quotient),
    "Neg": _exact(operator.neg),
    "Abs": _exact(abs),
    "BitShift": bit_shift,
    "ReduceSum": _reduction(Integers.sum),
    "ReduceMax": _reduction(Integers.max),
    "ReduceProd": _reduction(_product),
}  # which of those that compute could overflow, or are slow or wrong in `onnx.reference`
