"""Functions of codes: tables of what a function gives for each code, I-BERT's polynomials, and sums
over axes.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnxq.passes.lower.integers.grid import Refusal, factor
from onnxq.passes.lower.integers.group import Group

from onnxq import graph as g
from onnxq.ops import EXP_FRACTION, L2_BITS, UNIT_BITS
from onnxq.ops.dyadic import dyadic
from onnxq.runtime import Session

_LN2 = math.log(2)
_ROOT_BITS = 30  # that a radicand of 17 bits is raised by
LONGEST = 1 << 15  # a row of 16-bit codes whose squares an int64 holds
# Codes whose sum is divided: 2²¹ of 2¹⁵ steps times a multiplier of 24 bits, twice, are below 2⁶²,
# and so is their number with a shift of 40 bits.
_MOST_AVERAGED = 1 << 21


def look_up(group: Group) -> gs.Variable:
    """Any function of one number: computed now for every code, 256 or 65536 of them."""
    x = group.codes(0)
    first, last = (0, 255) if x.grid.narrow else (-(2**15), 2**15 - 1)
    codes = np.arange(first, last + 1)
    real = _evaluate(group, x.grid.dequantize(codes).astype(np.float32))
    table: gs.Tensor
    if g.is_float(group.last.outputs[0]):
        table = group.codes_of(np.nan_to_num(real, nan=0.0, posinf=np.inf, neginf=-np.inf))
    else:
        table = group.constant(real, real.dtype, "table")
    return group.call("LookUp", [x.tensor, group.constant(first, np.int64, "first"), table])


def power(group: Group) -> gs.Variable:
    """x², the one power that models are full of, is a product; others are tables."""
    exponent = group.node.inputs[1]
    if not g.is_constant(exponent) or not np.all(g.values(exponent) == 2):
        return look_up(group)
    x = group.codes(0)
    scaling = group.scaling(x.grid.scale**2 / group.grid.scale, bits=28)
    twice = [x.tensor, group.zero(x), x.tensor, group.zero(x)]
    return group.call("IntegerMul", [*twice, *scaling, *group.ends()])


def square_root(group: Group) -> gs.Variable:
    """√x, with half of _ROOT_BITS as fraction bits of the root; of what is below 0, 0."""
    x = group.codes(0)
    codes, middle = group.cast(x.tensor, np.int32), group.constant(x.grid.zero, np.int32, "zero")
    at_least = group.call("Center", [group.emit("Max", [codes, middle]), middle])
    raised = group.emit("Mul", [at_least, group.constant(2**_ROOT_BITS, np.int64, "power")])
    root = group.call("IntegerSqrt", [raised])
    nothing = group.constant(0, np.int64, "zero_int64")
    unit = math.sqrt(x.grid.scale / 2**_ROOT_BITS)
    return group.requantize(root, nothing, unit, reach=2**24)


def _evaluate(group: Group, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a node of one variable input gives for values of it, (n,)."""
    node = group.node
    if any(t.name and not (g.is_constant(t) and math.prod(t.shape) == 1) for t in node.inputs[1:]):
        raise Refusal(f"its {node.op} has a second operand that is no constant number")
    graph = gs.Graph(opset=group.opset)
    inputs: list[gs.Tensor] = [gs.Variable("x", np.float32, (len(x),))]
    for number, tensor in enumerate(node.inputs[1:]):
        if not tensor.name:
            inputs.append(gs.Variable.empty())
            continue
        value = g.values(tensor).reshape(())
        kind = np.float32 if g.is_float(tensor) else value.dtype
        inputs.append(gs.Constant(f"c{number}", value.astype(kind)))
    made = group.node.outputs[0]
    kind_made = np.float32 if g.is_float(made) else g.dtype(made)
    graph.inputs, graph.outputs = inputs[:1], [gs.Variable("y", kind_made)]
    graph.nodes = [gs.Node(node.op, "f", dict(node.attrs), inputs, list(graph.outputs))]
    with np.errstate(all="ignore"):
        found: NDArray[np.float32] = Session.of(graph, threads=1).run({"x": x})["y"]
    return found


def p_relu(group: Group) -> gs.Variable:
    """x where it is positive, slope · x elsewhere; one slope for all or one by channel."""
    x, slope = group.codes(0), group.node.inputs[1]
    if not g.is_constant(slope):
        raise Refusal("its slope is computed, not constant")
    zero = group.zero(x)
    steep = np.asarray(g.values(slope), np.float64)
    above = group.requantize(x.tensor, zero, x.grid.scale)
    below = group.requantize(x.tensor, zero, x.grid.scale * steep)
    code = group.cast(x.tensor, np.int32)
    middle = group.constant(x.grid.zero, np.int32, "zero_int32")
    return group.emit("Where", [group.emit("Less", [code, middle]), below, above])


# ── activation functions ─────────────────────────────────────────────────────────────────────────


def gelu(group: Group) -> gs.Variable:
    """x Φ(x). Spelled out, the last half may be in the weights of the next layer."""
    if group.node.op == "QuickGelu":
        return _silu(group, float(group.node.attrs.get("alpha", 1.702)))
    x, times = group.codes(0), 1.0
    if group.unit.pattern is not None and len(group.unit.nodes) > 1:
        at_one, at_two = _values_of_pattern(group, [1.0, 2.0])
        if abs(at_one - 2 * 0.8413) < 0.01:
            times = 2.0
        elif abs(at_one - 0.8458) < 0.003 and abs(at_two - 1.9357) < 0.003:  # x σ(1.702 x)
            return _silu(group, 1.702)
    inner = x.grid.scale / math.sqrt(2) * 2**UNIT_BITS
    outer = times * x.grid.scale / 2 / group.grid.scale / 2**UNIT_BITS
    operands = [x.tensor, group.zero(x), *group.scaling(inner), *group.scaling(outer, bits=30)]
    return group.call("IntegerGelu", [*operands, *group.ends()])


def swish(group: Group) -> gs.Variable:
    return _silu(group, float(group.node.attrs.get("alpha", 1.0)))


def _silu(group: Group, alpha: float) -> gs.Variable:
    """x σ(α x)."""
    x = group.codes(0)
    if alpha <= 0:
        raise Refusal("its α is not positive")
    inner = alpha * x.grid.scale / _LN2 * 2**EXP_FRACTION
    outer = x.grid.scale / group.grid.scale / 2**UNIT_BITS
    operands = [x.tensor, group.zero(x), *group.scaling(inner), *group.scaling(outer)]
    return group.call("IntegerSilu", [*operands, *group.ends()])


def _values_of_pattern(group: Group, at: list[float]) -> list[float]:
    """What a spelled-out function gives for some numbers."""
    pattern = group.unit.pattern
    assert pattern is not None
    kind = g.dtype(pattern.input) or np.dtype(np.float32)
    part = g.cut(group.writer.body, {pattern.input.name: kind}, [pattern.output.name])
    said = Session.of(part, threads=1).run({pattern.input.name: np.asarray(at, kind)})
    return [float(value) for value in said[pattern.output.name]]


def softmax(group: Group) -> gs.Variable:
    x, grid = group.codes(0), group.grid
    levels = round(1 / grid.scale)
    axis = group.node.attrs.get("axis", -1)
    inner = x.grid.scale / _LN2 * 2**EXP_FRACTION
    operands = [x.tensor, *group.scaling(inner), group.constant(levels, np.int64, "levels")]
    return group.call("IntegerSoftmax", [*operands, *group.ends()], axis=axis)


# ── sums over axes ───────────────────────────────────────────────────────────────────────────────


def reduce_mean(group: Group) -> gs.Variable:
    """The mean, divided and rounded once; of everything where no axes are named."""
    x = group.codes(0)
    axes = _axes_operand(group)
    _count(group, axes, _MOST_AVERAGED)
    scaling = group.scaling(x.grid.scale / group.grid.scale, bits=24, most_shift=40)
    keep = group.node.attrs.get("keepdims", 1)
    operands = [x.tensor, group.zero(x), axes, *scaling]
    return group.call("IntegerMean", [*operands, *group.ends()], keepdims=keep)


def reduce_sum(group: Group) -> gs.Variable:
    x = group.codes(0)
    centered = group.call("Center", [x.tensor, group.zero(x)])
    keep, axes = group.node.attrs.get("keepdims", 1), _axes_operand(group)
    _count(group, axes, _MOST_AVERAGED)
    added = group.emit("ReduceSum", [centered, axes], keepdims=keep)
    nothing = group.constant(0, np.int64, "zero_int64")
    return group.requantize(added, nothing, x.grid.scale, reach=_MOST_AVERAGED << 15)


def reduce_l2(group: Group) -> gs.Variable:
    x = group.codes(0)
    scaling = group.scaling(x.grid.scale / group.grid.scale / 2**L2_BITS, bits=28)
    keep, axes = group.node.attrs.get("keepdims", 1), _axes_operand(group)
    if _count(group, axes, LONGEST) is None:
        raise Refusal("how many squares it adds up is not known")
    operands = [x.tensor, group.zero(x), axes, *scaling]
    return group.call("IntegerL2Norm", [*operands, *group.ends()], keepdims=keep)


def _axes_operand(group: Group) -> gs.Tensor:
    node = group.node
    if len(node.inputs) > 1 and node.inputs[1].name:
        return node.inputs[1]
    axes, shape = tuple(node.attrs.get("axes", ())), group.shape(node.inputs[0])
    if not axes:
        if shape is None:
            raise Refusal("the rank of its input is not known")
        if node.attrs.get("noop_with_empty_axes", 0):
            raise Refusal("it reduces nothing")
        axes = tuple(range(len(shape)))
    return group.constant(np.asarray(axes), np.int64, "axes")


def _count(group: Group, axes: gs.Tensor, most: int) -> int | None:
    """How many numbers are reduced to one, if that is known. Raises Refusal for more than `most`.

    Sizes that are not known before the model runs are taken to stay below it.
    """
    shape = group.shape(group.node.inputs[0])
    if shape is None or not g.is_constant(axes):
        return None
    sizes = [shape[int(axis)] for axis in g.values(axes).reshape(-1)]
    known = math.prod(size for size in sizes if isinstance(size, int))
    if known > most:
        raise Refusal(f"it adds up more than {most} numbers")
    return known if all(isinstance(size, int) for size in sizes) else None


def global_average_pool(group: Group) -> gs.Variable:
    x, shape = group.codes(0), group.shape(group.node.inputs[0])
    if shape is None:
        raise Refusal("the rank of its input is not known")
    axes = group.constant(np.arange(2, len(shape)), np.int64, "axes")
    _count(group, axes, _MOST_AVERAGED)
    scaling = group.scaling(x.grid.scale / group.grid.scale, bits=24, most_shift=40)
    operands = [x.tensor, group.zero(x), axes, *scaling]
    return group.call("IntegerMean", [*operands, *group.ends()], keepdims=1)


def average_pool(group: Group) -> gs.Variable:
    """Sums over windows by ConvInteger with a kernel of ones, divided once by what they hold."""
    node, x = group.node, group.codes(0)
    shape = group.shape(node.inputs[0])
    if shape is None or not isinstance(shape[1], int):
        raise Refusal("the number of its channels is not known")
    if node.attrs.get("ceil_mode", 0):
        raise Refusal("its last windows reach beyond the padding (ceil_mode)")
    kernel = list(node.attrs["kernel_shape"])
    channels = shape[1]
    names = ("auto_pad", "dilations", "pads", "strides")
    attrs = {n: node.attrs[n] for n in names if n in node.attrs} | {"kernel_shape": kernel}
    ones = group.constant(np.ones((channels, 1, *kernel)), np.uint8, "ones")
    no_zero = group.constant(0, np.uint8, "zero_uint8")
    sums = group.emit(
        "ConvInteger", [x.tensor, ones, group.zero(x), no_zero], group=channels, **attrs
    )
    automatic = attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    padded = automatic or any(attrs.get("pads", ()))
    if padded and not node.attrs.get("count_include_pad", 0):
        # How many values each window holds: the same sum of ones, padded with zeros.
        sizes = group.emit("Shape", [x.tensor])
        one = group.constant(np.ones(1), np.uint8, "one")
        full = group.emit("Expand", [one, sizes])
        held = group.emit("ConvInteger", [full, ones, no_zero, no_zero], group=channels, **attrs)
        count: gs.Tensor = group.cast(held, np.int64)
    else:
        count = group.constant(math.prod(kernel), np.int64, "count")
    ratio = x.grid.scale / group.grid.scale
    multiplier, shift = dyadic(factor(ratio), bits=24, most_shift=40)
    wide = group.cast(sums, np.int64)
    scaled = group.emit("Mul", [wide, group.constant(multiplier, np.int64, "multiplier")])
    power = group.constant(1 << int(shift), np.int64, "power")
    divisor = group.emit("Mul", [count, power])
    mean = group.call("RoundingDivide", [scaled, divisor])
    return group.call("Saturate", [mean, *group.ends()])


_TABLES = (
    "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Celu", "LeakyRelu", "Mish",
    "Softplus", "Softsign", "Erf", "ThresholdedRelu", "Shrink", "Exp", "Log", "Reciprocal",
    "Sin", "Cos", "Tan", "Sinh", "Cosh", "Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", "Floor",
    "Ceil", "Round", "Sign", "IsNaN", "IsInf",
)  # fmt: skip
LOWERINGS = {
    **dict.fromkeys(_TABLES, look_up),
    "Pow": power, "Sqrt": square_root,
    "PRelu": p_relu, "Gelu": gelu, "Swish": swish, "Softmax": softmax,
    "ReduceMean": reduce_mean,
    "ReduceSum": reduce_sum, "ReduceL2": reduce_l2, "GlobalAveragePool": global_average_pool,
    "AveragePool": average_pool,
}  # fmt: skip
