"""Normalizations by an integer square root; see `onnxq.ops.normalization`."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnxq.passes.lower.integers.elementwise import line_operands
from onnxq.passes.lower.integers.functions import LONGEST
from onnxq.passes.lower.integers.grid import Codes, Refusal
from onnxq.passes.lower.integers.group import Group

from onnxq import graph as g
from onnxq.ops import UNIT_BITS


def layer_norm(group: Group) -> gs.Variable:
    """γ (x − E x) / √(Var x + ε) + β over the last axes; the scale of x cancels but for ε."""
    x, (gain, bias, epsilon) = group.codes(0), _normalization(group)
    length = _row(group)
    rows, gain, bias = _rows(group, x.tensor, gain, bias)
    normal = _normalized(group, rows, _under_root(epsilon, length, x), length, gain, bias)
    return normal if rows is x.tensor else _reshaped(group, normal, x)


def instance_norm(group: Group) -> gs.Variable:
    """The normalization of each channel by itself: of rows, once its places are one axis."""
    node, shape = group.node, group.shape(group.node.inputs[0])
    if shape is None or not all(isinstance(size, int) for size in shape[2:]):
        raise Refusal("the size of what it normalizes is not known")
    if not all(map(g.is_constant, node.inputs[1:])):
        raise Refusal("its gain or bias is computed, not constant")
    x, length = group.codes(0), math.prod(int(size) for size in shape[2:] if size)
    if length > LONGEST:
        raise Refusal(f"it normalizes rows longer than {LONGEST}")
    gain, bias = (np.asarray(g.values(t), np.float64).reshape(-1, 1) for t in node.inputs[1:])
    under_root = _under_root(float(node.attrs.get("epsilon", 1e-5)), length, x)
    flat = group.constant(np.array([0, 0, -1]), np.int64, "rows")
    rows = group.emit("Reshape", [x.tensor, flat])
    normal = _normalized(group, rows, under_root, length, gain, bias)
    return _reshaped(group, normal, x)


def _normalized(
    group: Group,
    rows: gs.Tensor,
    under_root: int,
    length: int,
    gain: NDArray[np.float64],
    bias: NDArray[np.float64],
) -> gs.Variable:
    """γ n + β of rows; n = (x − E x) / √(Var x + ε) is below √`length`."""
    line = line_operands(group, gain / 2**UNIT_BITS, bias, 2**UNIT_BITS * math.sqrt(length))
    epsilon = group.constant(under_root, np.int64, "epsilon")
    return group.call("IntegerLayerNormalization", [rows, epsilon, *line, *group.ends()])


def rms_norm(group: Group) -> gs.Variable:
    x, (gain, _, epsilon) = group.codes(0), _normalization(group)
    if len(_last(group)) > 1:
        raise Refusal("it normalizes more than the last axis")
    held = group.constant(_under_root(epsilon, _row(group), x), np.int64, "epsilon")
    scaling = group.scaling(gain / 2**UNIT_BITS / group.grid.scale)
    operands = [x.tensor, group.zero(x), held, *scaling]
    return group.call("IntegerRMSNormalization", [*operands, *group.ends()])


def _under_root(epsilon: float, length: int, x: Codes) -> int:
    """ε in units of s_x² / N², at least 1, which keeps a row of equal values from dividing by 0."""
    steps = epsilon * length**2 / x.grid.scale**2
    if steps >= 2.0**60:
        raise Refusal("what it normalizes is so small that nothing but its epsilon is left")
    return max(1, round(steps))


def _normalization(group: Group) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """γ, β and ε of a normalization over the last axis."""
    node, pattern = group.node, group.unit.pattern
    if pattern is None or len(pattern.nodes) == 1:
        if any(t.name for t in node.outputs[1:]):
            raise Refusal("it also gives its mean or its deviation")
        epsilon = float(node.attrs.get("epsilon", 1e-5))
    else:
        for part in pattern.nodes:
            if part.op == "ReduceMean" and set(_counted(group, _axes(part))) != set(_last(group)):
                raise Refusal("it normalizes other axes than the last ones")
        epsilon = _epsilon(pattern.nodes)
    operands = {
        "gain": node.inputs[1] if len(node.inputs) > 1 else None,
        "bias": node.inputs[2] if len(node.inputs) > 2 else None,
    }
    if pattern is not None:
        operands = {"gain": pattern.gain, "bias": pattern.bias}
        if len(pattern.nodes) == 1 and any(
            operands[key] is None and len(node.inputs) > slot and node.inputs[slot].name
            for key, slot in (("gain", 1), ("bias", 2))
        ):
            raise Refusal("its gain or bias is computed, not constant")
    gain, bias = (
        np.full(1, default) if tensor is None or not tensor.name
        else np.asarray(g.values(tensor), np.float64)
        for tensor, default in ((operands["gain"], 1.0), (operands["bias"], 0.0))
    )  # fmt: skip
    return gain, bias, epsilon


def _epsilon(nodes: tuple[g.Node, ...]) -> float:
    """The constant under the root of a normalization that is spelled out."""
    for node in nodes:
        root = [n for t in node.outputs for n in t.outputs if n.op in ("Sqrt", "Pow")]
        fixed = [t for t in node.inputs if g.is_constant(t)]
        if node.op == "Add" and root and fixed:
            return float(g.values(fixed[0]).reshape(-1)[0])
    return 0.0


def _counted(group: Group, axes: tuple[int, ...]) -> list[int]:
    """Axes as counted from behind, −1 the last."""
    shape = group.shape(group.unit.inputs[0])
    if shape is None and any(axis >= 0 for axis in axes):
        raise Refusal("the rank of what it normalizes is not known")
    return [axis if axis < 0 or shape is None else axis - len(shape) for axis in axes]


def _last(group: Group) -> list[int]:
    """The axes that are normalized, all behind the first of them."""
    pattern = group.unit.pattern
    if pattern is None or len(pattern.nodes) == 1:
        axes: tuple[int, ...] = (int(group.node.attrs.get("axis", -1)),)
    else:
        axes = next(_axes(part) for part in pattern.nodes if part.op == "ReduceMean")
    return list(range(min(_counted(group, axes), default=-1), 0))


def _rows(
    group: Group, x: gs.Tensor, gain: NDArray[np.float64], bias: NDArray[np.float64]
) -> tuple[gs.Tensor, NDArray[np.float64], NDArray[np.float64]]:
    """What is normalized as one axis, with γ and β along it."""
    axes, shape = _last(group), group.shape(group.unit.inputs[0])
    if len(axes) == 1:
        return x, gain, bias
    if shape is None:
        raise Refusal("the size of what it normalizes is not known")
    sizes = [int(size) for size in shape[-len(axes) :] if isinstance(size, int)]
    flat = group.constant(np.array([0] * (len(shape) - len(axes)) + [-1]), np.int64, "shape")
    gain, bias = (np.broadcast_to(v, sizes).reshape(-1) for v in (gain, bias))
    return group.emit("Reshape", [x, flat]), gain, bias


def _reshaped(group: Group, rows: gs.Variable, x: Codes) -> gs.Variable:
    """Rows in the shape of x again."""
    return group.emit("Reshape", [rows, group.emit("Shape", [x.tensor])])


def _axes(node: g.Node) -> tuple[int, ...]:
    """The axes of a reduction: an attribute or, later, an input."""
    if "axes" in node.attrs:
        return tuple(node.attrs["axes"])
    if len(node.inputs) > 1 and g.is_constant(node.inputs[1]):
        return tuple(int(a) for a in g.values(node.inputs[1]))
    return ()


def _row(group: Group) -> int:
    """How many numbers are normalized together. Raises Refusal where it is unknown or too much."""
    shape, axes = group.shape(group.unit.inputs[0]), _last(group)
    gain = group.unit.pattern.gain if group.unit.pattern else None
    sizes: list[int | str | None] = list(shape[-len(axes) :]) if shape else [None]
    if len(axes) == 1 and not isinstance(sizes[0], int) and gain is not None and len(gain.shape):
        sizes = [int(gain.shape[-1])]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(axes):
        raise Refusal("the length of the axis that it normalizes is not known")
    if math.prod(known) > LONGEST:
        raise Refusal(f"it normalizes rows longer than {LONGEST}")
    return math.prod(known)


LOWERINGS = {
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "InstanceNormalization": instance_norm,
}
