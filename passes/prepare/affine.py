"""Scales and shifts of channels, written into the weights and biases of linear operators.

For y = W x + b, with a scale per output channel a, a shift c and a scale per input channel s:

    a·y + c = (a·W) x + (a·b + c)        W (s·x) = (W·s) x
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.graph import Node

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Vector = NDArray[np.float64]


def out_channels(node: Node) -> int:
    view = g.weight_view(node)
    assert view is not None
    rows = int(view.tensor.shape[view.axis])
    return rows * (view.groups if node.op == "ConvTranspose" else 1)


def in_channels(node: Node) -> int:
    view = g.weight_view(node)
    assert view is not None
    match node.op:
        case "Conv":
            return int(view.tensor.shape[1]) * view.groups
        case "ConvTranspose":
            return int(view.tensor.shape[0])
    return int(view.tensor.shape[view.block_axis])


def channel_axis_from_end(node: Node) -> int:
    """Where the output's channels are, counted from the last axis."""
    spatial = len(node.inputs[1].shape) - 2 if node.op in ("Conv", "ConvTranspose") else 0
    return -1 - spatial


def per_channel(values: NDArray[Any], axis: int, channels: int) -> Vector | None:
    """A constant that varies along one axis alone, as (channels,), or None."""
    if values.dtype.kind != "f":
        return None
    shape = (1,) * max(0, -axis - values.ndim) + values.shape
    if values.size == 1:
        return np.full(channels, float(values.reshape(())), np.float64)
    if values.size == channels == shape[axis] and values.ndim <= 8:
        return values.reshape(-1).astype(np.float64)
    return None


def scale_rows(node: Node, a: Vector, namer: g.Namer) -> None:
    """W ← a·W along output channels; in a new initializer, for the old one may be shared."""
    weight = node.inputs[1]
    if np.all(a == 1):
        return
    if node.op == "ConvTranspose":  # (in, out/groups, *kernel), rows of one group together
        groups = int(node.attrs.get("group", 1))
        shape = weight.shape
        by_group = g.values(weight).reshape(groups, shape[0] // groups, *shape[1:])
        factor = a.reshape(groups, 1, shape[1], *(1,) * (len(shape) - 2))
        values = (by_group * factor).reshape(shape)
    elif node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        values = g.values(weight) * a.reshape(-1, *(1,) * (len(weight.shape) - 1))
    else:
        values = g.values(weight) * a
    set_weight(node, values, namer)


def scale_columns(node: Node, s: Vector, namer: g.Namer) -> None:
    """W ← W·s along input channels; in a new initializer."""
    view = g.weight_view(node)
    assert view is not None
    columns = view.matrix().astype(np.float64) * view.column_statistic(s)
    set_weight(node, view.from_matrix(columns), namer)


def set_weight(node: Node, values: NDArray[Any], namer: g.Namer) -> None:
    old = node.inputs[1]
    name = namer(f"{old.name.removesuffix('_folded')}_folded")
    node.inputs[1] = g.constant(name, values.astype(old.dtype))


def bias(node: Node, channels: int) -> Vector | None:
    """What is added per channel, or None where that is computed or varies along other axes."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return np.zeros(channels)
    if not g.is_constant(node.inputs[2]):
        return None
    values = per_channel(g.values(node.inputs[2]), -1, channels)
    return None if values is None else values * node.attrs.get("beta", 1.0)


def set_bias(node: Node, values: Vector, namer: g.Namer) -> None:
    made = g.constant(namer(f"{node.inputs[1].name}_bias"), values.astype(node.inputs[1].dtype))
    node.attrs.pop("beta", None)  # of Gemm; now in the values
    if len(node.inputs) > 2:
        node.inputs[2] = made
    else:
        node.inputs.append(made)
