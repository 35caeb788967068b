"""Sums, products and choices of codes, each rounded once: exact until its requantization."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnxq.passes.lower.integers.grid import (
    Codes,
    Grid,
    Refusal,
    bits_above,
    factor,
    terms,
)
from onnxq.passes.lower.integers.group import Group

from onnxq import graph as g
from onnxq.ops.dyadic import dyadic

_BEYOND = 2.0**40  # steps, more than any code
_WIDE_BITS = 44  # the most of a multiplier for codes of 16 bits
_FAR = 2.0**8  # a sum's operand on a grid coarser by more wants a multiplier of more than 31 bits


def add(group: Group) -> gs.Variable:
    return _sum(group, 1.0)


def sub(group: Group) -> gs.Variable:
    return _sum(group, -1.0)


def _sum(group: Group, sign: float) -> gs.Variable:
    """a ± b, of two tensors of codes or of codes and a constant."""
    signs = (1.0, sign)
    fixed = [slot for slot in (0, 1) if g.is_constant(group.node.inputs[slot])]
    grid = group.grid
    if len(fixed) == 2:
        raise Refusal("both its operands are constant")
    if not fixed:
        pair = [group.codes(slot) for slot in (0, 1)]
        ratios = [s * c.grid.scale / grid.scale for s, c in zip(signs, pair, strict=True)]
        multipliers, shift = _multipliers(ratios)
        operands: list[gs.Tensor] = []
        for codes, multiplier in zip(pair, multipliers, strict=True):
            factors = group.constant(multiplier, np.int64, "multiplier")
            operands += [codes.tensor, group.zero(codes), factors]
        shifts = group.constant(shift, np.uint64, "shift")
        return group.call("IntegerAdd", [*operands, shifts, *group.ends()])
    moving = 1 - fixed[0]
    x = group.codes(moving)
    constant = signs[fixed[0]] * np.asarray(g.values(group.node.inputs[fixed[0]]), np.float64)
    return affine(group, x, np.asarray(signs[moving] * x.grid.scale), constant)


def _multipliers(ratios: list[float]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Integers for the operands of a sum, under one shift."""
    held = terms(ratios)
    bits = 31 if np.abs(held).max() < _FAR else _WIDE_BITS - len(ratios).bit_length()
    return dyadic(held, bits, common=True)


def affine(
    group: Group, x: Codes, gain: NDArray[np.float64], offset: NDArray[np.float64]
) -> gs.Variable:
    """gain · (x − z_x) + offset, both real and broadcast with x."""
    line = line_operands(group, gain, offset, x.grid.reach)
    return group.call("IntegerAffine", [x.tensor, group.zero(x), *line, *group.ends()])


def line_operands(
    group: Group, gain: NDArray[np.float64], offset: NDArray[np.float64], reach: float
) -> list[gs.Tensor]:
    """Multiplier, offset and shift of gain · x + offset, both real, |x| <= `reach`."""
    grid = group.grid
    multiplier, added, shift = straight_line(gain / grid.scale, offset / grid.scale, reach, grid)
    return [
        group.constant(multiplier, np.int64, "multiplier"),
        group.constant(added, np.int64, "offset"),
        group.constant(shift, np.uint64, "shift"),
    ]


def mul(group: Group) -> gs.Variable:
    """a · b; a constant is part of the multiplier."""
    fixed = [t for t in group.node.inputs if g.is_constant(t)]
    if fixed:
        x = group.codes(1 if g.is_constant(group.node.inputs[0]) else 0)
        constant = np.asarray(g.values(fixed[0]), np.float64)
        return group.requantize(x.tensor, group.zero(x), x.grid.scale * constant)
    a, b = group.codes(0), group.codes(1)
    real = a.grid.scale * b.grid.scale / group.grid.scale
    operands = [a.tensor, group.zero(a), b.tensor, group.zero(b), *group.scaling(real, bits=28)]
    return group.call("IntegerMul", [*operands, *group.ends()])


def div(group: Group) -> gs.Variable:
    """a / b; by a constant it is a product."""
    a, b = group.node.inputs
    if g.is_constant(b):
        x = group.codes(0)
        divisor = np.asarray(g.values(b), np.float64)
        if not divisor.all():
            raise Refusal("it divides by zero")
        return group.requantize(x.tensor, group.zero(x), x.grid.scale / divisor)
    y = group.codes(1)
    if g.is_constant(a):
        if math.prod(a.shape) != 1:
            raise Refusal("it divides a constant tensor by codes")
        number = float(g.values(a).reshape(()))
        numerator, zero = group.constant(1, np.int64, "one"), group.constant(0, np.int64, "zero")
        step, tensors = number, [numerator, zero]
    else:
        x = group.codes(0)
        step, tensors = x.grid.scale, [x.tensor, group.zero(x)]
    real = step / y.grid.scale / group.grid.scale
    if abs(real) >= 2.0**40:
        raise Refusal("its quotient has a far finer grid than what it divides by")
    # A shift of at most 44 bits: a divisor of 17 bits stays below 2⁶² when it is raised by it.
    multiplier, shift = dyadic(real, max(24, bits_above(real) + 1), most_shift=44)
    scaling = [
        group.constant(multiplier, np.int64, "multiplier"),
        group.constant(shift, np.uint64, "shift"),
    ]
    operands = [*tensors, y.tensor, group.zero(y), *scaling]
    return group.call("IntegerDiv", [*operands, *group.ends()])


def on_one_grid(group: Group) -> list[gs.Tensor]:
    """All float operands as codes of the result."""
    grid = group.grid
    made: list[gs.Tensor] = []
    for tensor in group.node.inputs:
        if not tensor.name or not g.is_float(tensor):
            continue
        if g.is_constant(tensor):
            made.append(group.codes_of(g.values(tensor), grid))
            continue
        codes = group.writer.codes(tensor)
        if codes.grid == grid:
            made.append(codes.tensor)
            continue
        made.append(group.requantize(codes.tensor, group.zero(codes), codes.grid.scale))
        made[-1].dtype = grid.dtype
    return made


def concat(group: Group) -> gs.Variable:
    return group.emit("Concat", on_one_grid(group), axis=group.node.attrs["axis"])


def where(group: Group) -> gs.Variable:
    return group.emit("Where", [group.node.inputs[0], *on_one_grid(group)])


def extremum(op: str) -> Callable[[Group], gs.Variable]:
    """Min or Max, of codes in a type that it has a kernel for."""

    def lower(group: Group) -> gs.Variable:
        operands = on_one_grid(group)
        if not group.grid.narrow:
            return group.emit(op, operands)
        chosen = group.emit(op, [group.cast(t, np.int32) for t in operands])
        return group.cast(chosen, np.uint8)

    return lower


def total(group: Group) -> gs.Variable:
    """Sum of any number of tensors, and their Mean."""
    operands = [group.writer.codes(t) for t in group.node.inputs if not g.is_constant(t)]
    if len(operands) != len(group.node.inputs):
        raise Refusal("one of its operands is constant")
    count = len(operands) if group.node.op == "Mean" else 1
    ratios = [codes.grid.scale / group.grid.scale / count for codes in operands]
    multipliers, shift = _multipliers(ratios)
    wide: list[gs.Tensor] = []
    for codes, multiplier in zip(operands, multipliers, strict=True):
        centered = group.call("Center", [codes.tensor, group.zero(codes)])
        factors = group.constant(multiplier, np.int64, "multiplier")
        wide.append(group.emit("Mul", [centered, factors]))
    added = wide[0]
    for term in wide[1:]:
        added = group.emit("Add", [added, term])
    shifts = group.constant(shift, np.uint64, "shift")
    nothing = group.constant(0, np.int64, "zero_int64")
    return group.call("ShiftRequantize", [added, nothing, shifts, *group.ends()])


def straight_line(
    slope: NDArray[np.float64], offset: NDArray[np.float64], reach: float, grid: Grid
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """Multiplier, offset and shift of slope · x + offset in steps of `grid`, |x| <= `reach`.

    An offset beyond all that the product can make up for saturates as a smaller one does. The shift
    leaves room for it: offset and product are below 2⁶⁰ each, half of 2^shift below 2⁵⁹.
    """
    if np.abs(slope).max(initial=0) * reach >= 2.0**40:
        raise Refusal("its result has a far finer grid than what it is made of")
    largest = np.abs(slope).max(initial=0) * reach + 2.0 * (grid.high - grid.low + 1)
    room = 60 - bits_above(largest)
    bits = min(31, 60 - bits_above(reach))
    multiplier, shift = dyadic(slope, max(bits, 1), most_shift=room)
    steps = np.clip(offset, -largest, largest)
    added = np.rint(np.ldexp(steps, shift.astype(np.int64))).astype(np.int64)
    return multiplier, added, shift


def bounded(group: Group) -> gs.Variable:
    """Relu and Clip by themselves."""
    bounds = g.clip_bounds(group.node)
    if bounds is None:
        raise Refusal("its bounds are computed, not constant")
    x = group.codes(0)
    return group.requantize(x.tensor, group.zero(x), x.grid.scale, group.grid.bounded(bounds))


def negate(group: Group) -> gs.Variable:
    x = group.codes(0)
    return group.requantize(x.tensor, group.zero(x), -x.grid.scale)


def absolute(group: Group) -> gs.Variable:
    x = group.codes(0)
    centered = group.call("Center", [x.tensor, group.zero(x)])
    size = group.emit("Abs", [centered])
    return group.requantize(size, group.constant(0, np.int64, "zero_int64"), x.grid.scale)


def batch_norm(group: Group) -> gs.Variable:
    """γ (x − μ) / √(σ² + ε) + β by channel, where no convolution took it in."""
    node = group.node
    if any(not g.is_constant(t) for t in node.inputs[1:5]) or len(node.outputs) > 1:
        raise Refusal("its statistics are computed, not constant")
    x, shape = group.codes(0), group.shape(node.inputs[0])
    if shape is None:
        raise Refusal("the rank of its input is not known")
    gain, bias, mean, variance = (
        np.asarray(g.values(t), np.float64).reshape(-1, *(1,) * (len(shape) - 2))
        for t in node.inputs[1:5]
    )
    slope = gain / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
    return affine(group, x, slope * x.grid.scale, bias - slope * mean)


def compare(group: Group) -> gs.Variable:
    """a < b and its kin, of both in units that are fine enough to tell their codes apart."""
    sides: list[gs.Tensor] = []
    pair = [None if g.is_constant(t) else group.codes(i) for i, t in enumerate(group.node.inputs)]
    scales = [codes.grid.scale for codes in pair if codes is not None]
    unit = min(scales)
    multipliers, _ = dyadic(factor(np.asarray(scales) / unit), common=True)
    step = iter(multipliers)
    for slot, (codes, tensor) in enumerate(zip(pair, group.node.inputs, strict=True)):
        if codes is None:
            constant = np.asarray(g.values(tensor), np.float64)
            sides.append(
                group.constant(_bound(group.node.op, slot, constant / unit), np.int64, "bound")
            )
            continue
        centered = group.call("Center", [codes.tensor, group.zero(codes)])
        sides.append(
            group.emit("Mul", [centered, group.constant(next(step), np.int64, "multiplier")])
        )
    return group.emit(group.node.op, sides)


def _bound(op: str, slot: int, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The whole number of steps that codes compare with as they would with a constant.

    x < c is x < ⌈c⌉ and x <= c is x <= ⌊c⌋ for whole x; `slot` is that of the constant.
    What lies within a thousandth of a code is meant to be it: scales are rounded to float32. No
    code equals a half.
    """
    steps = np.clip(np.nan_to_num(steps, nan=_BEYOND), -_BEYOND, _BEYOND)
    nearest = np.rint(steps)
    is_code = np.abs(steps - nearest) < 1e-3
    if op == "Equal":
        rounded = np.where(is_code, nearest, _BEYOND)
    else:
        up = op in (("Greater", "LessOrEqual"), ("Less", "GreaterOrEqual"))[slot]
        rounded = np.where(is_code, nearest, np.ceil(steps) if up else np.floor(steps))
    return np.asarray(rounded)


LOWERINGS = {
    "Add": add, "Sub": sub, "Mul": mul, "Div": div, "Concat": concat, "Where": where,
    "Min": extremum("Min"), "Max": extremum("Max"), "Sum": total, "Mean": total,
    "Relu": bounded, "Clip": bounded, "Neg": negate, "Abs": absolute,
    "BatchNormalization": batch_norm,
    **dict.fromkeys(("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"), compare),
}  # fmt: skip
