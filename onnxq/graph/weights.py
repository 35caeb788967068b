"""Weights as matrices: only this file knows how operators lay them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graph.walk import Array, Node, is_constant, is_float, is_standard, values

RECURRENT = ("LSTM", "GRU", "RNN")
_WEIGHT_SLOTS = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (1,), "Gather": (0,),
    "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class WeightView:
    """A node's weight seen as a matrix W (out, in), whatever layout the operator stores.

    Columns stand in the order in which integer kernels add their products, which is also the order
    of rows in an unfolded input: for Conv, kernel positions outermost, input channels fastest. The
    rows of a MatMul weight with batches are those of every batch, (batch · out, in); those of a
    recurrent weight are all gates of all directions, (direction · gates · hidden, in).
    """

    node: Node
    slot: int = 1

    @property
    def tensor(self) -> gs.Constant:
        return self.node.inputs[self.slot]

    @property
    def rank(self) -> int:
        return len(self.tensor.shape)

    @property
    def axis(self) -> int:
        """The axis of the stored tensor that holds output channels."""
        match self.node.op:
            case "MatMul":
                return self.rank - 1
            case "ConvTranspose":
                return 1
            case "Gemm":
                return 0 if self.node.attrs.get("transB", 0) else 1
        return 1 if self.node.op in RECURRENT else 0

    @property
    def batches(self) -> int:
        """Matrices stacked in the weight: a batched MatMul's, or the directions of a recurrence."""
        stacked = self.node.op in ("MatMul", *RECURRENT)
        return math.prod(self.tensor.shape[:-2]) if stacked else 1

    @property
    def batched(self) -> bool:
        """Whether the weight is more than a matrix to the operator."""
        return self.batches > 1 or (self.node.op == "MatMul" and self.rank > 2)

    @property
    def rows(self) -> int:
        """Rows of the matrix, and scales where each output channel has one."""
        if self.node.op in ("MatMul", *RECURRENT):
            return math.prod(self.tensor.shape) // self.tensor.shape[self.block_axis]
        return int(self.tensor.shape[self.axis])

    @property
    def groups(self) -> int:
        return int(self.node.attrs.get("group", 1))

    def matrix(self) -> NDArray[np.float32]:
        """W (out, in), float32; read now and kept by nobody."""
        return self.to_matrix(values(self.tensor)).astype(np.float32, copy=False)

    def to_matrix(self, stored: Array) -> Array:
        match self.node.op:
            case "Conv":  # (out, in/groups, *kernel)
                return np.moveaxis(stored, 1, -1).reshape(stored.shape[0], -1)
            case "ConvTranspose":  # (in, out/groups, *kernel); a scale belongs to axis 1
                return np.moveaxis(stored, (1, 0), (0, -1)).reshape(stored.shape[1], -1)
            case "MatMul":  # (*batch, in, out)
                return np.swapaxes(stored, -1, -2).reshape(-1, stored.shape[-2])
            case "Gemm" if self.axis == 1:  # (in, out)
                return stored.T
            case "LSTM" | "GRU" | "RNN":  # (directions, gates · hidden, in)
                return stored.reshape(-1, stored.shape[-1])
        return stored.reshape(stored.shape[0], -1)

    def from_matrix(self, matrix: Array) -> Array:
        """Inverse of `to_matrix`: a matrix (out, in) in the stored layout."""
        shape = tuple(self.tensor.shape)
        match self.node.op:
            case "Conv":
                moved = matrix.reshape(shape[0], *shape[2:], shape[1])
                return np.ascontiguousarray(np.moveaxis(moved, -1, 1))
            case "ConvTranspose":
                moved = matrix.reshape(shape[1], *shape[2:], shape[0])
                return np.ascontiguousarray(np.moveaxis(moved, (0, -1), (1, 0)))
            case "MatMul":
                by_batch = matrix.reshape(*shape[:-2], shape[-1], shape[-2])
                return np.ascontiguousarray(np.swapaxes(by_batch, -1, -2))
            case "Gemm" if self.axis == 1:
                return np.ascontiguousarray(matrix.T)
        return np.ascontiguousarray(matrix.reshape(shape))

    @property
    def block_axis(self) -> int:
        """The stored axis along which blocks of input columns lie."""
        return self.rank - 1 if self.node.op in RECURRENT else abs(self.axis - 1)

    @property
    def input_slot(self) -> int | None:
        """The slot of the tensor that the columns are multiplied with; None for inner states."""
        if self.node.op == "Gather":
            return None
        return 0 if self.slot == 1 else None

    def column_statistic(self, per_channel: Array) -> Array:
        """A statistic per input channel (channels,) as one value per weight, (out or 1, in).

        Grouped convolutions see a slice of the channels each.
        """
        if self.node.op == "ConvTranspose":  # a row holds the input channels of every group
            return np.tile(per_channel, math.prod(self.tensor.shape[2:]))[None, :]
        if self.node.op != "Conv":
            return per_channel[None, :]
        out, per_group, *kernel = self.tensor.shape
        by_group = per_channel.reshape(self.groups, 1, per_group)
        rows = np.repeat(by_group, out // self.groups, axis=1).reshape(out, per_group)
        return np.tile(rows, (1, math.prod(kernel)))


def weight_views(node: Node) -> list[WeightView]:
    """The matrix views of a node's constant float weights; none where one of them is not to see.

    Recurrent operators have two, the input's W and the hidden state's R.
    """
    if not is_standard(node):
        return []
    views = [WeightView(node, slot) for slot in _WEIGHT_SLOTS.get(node.op, ())]
    return views if all(map(_is_weight, views)) else []


def weight_view(node: Node) -> WeightView | None:
    """The first of a node's weight views, the only one but for recurrent operators; else None."""
    return next(iter(weight_views(node)), None)


def _is_weight(view: WeightView) -> bool:
    node = view.node
    if len(node.inputs) <= view.slot or not is_constant(view.tensor):
        return False
    if not is_float(view.tensor) or 0 in view.tensor.shape:
        return False
    if node.op == "Gemm":
        return view.rank == 2
    return view.rank >= 2 and (node.op != "Gather" or node.attrs.get("axis", 0) == 0)


def products_of_batch(node: Node, x: Sequence[int | str | None] | None) -> str:
    """How a MatMul with several matrices in its weight (…, in, out) is products with one each.

    `x` is the shape of its input. "all" of the input with each matrix, "slices" of it, one for
    each, or "" where it is neither, or not known to be.
    """
    weight = tuple(node.inputs[1].shape)
    if x is None or len(x) < 2:
        return ""
    if math.prod(weight[:-2]) == 1:
        return "all"
    if len(weight) != 3 or len(x) > 3:
        return ""
    if len(x) == 2 or x[0] == 1:
        return "all"
    return "slices" if x[0] == weight[0] else ""


def is_depthwise(node: Node) -> bool:
    """A Conv in which every output channel reads one input channel."""
    view = weight_view(node)
    return view is not None and node.op == "Conv" and view.groups > 1 and view.tensor.shape[1] == 1


def clip_bounds(node: Node) -> tuple[float, float] | None:
    """The constant bounds of a Relu or Clip, infinite where open; None for any other node."""
    if node.op == "Relu" and is_standard(node):
        return 0.0, math.inf
    if node.op != "Clip" or not is_standard(node):
        return None
    bounds = [-math.inf, math.inf]
    for slot, tensor in enumerate(node.inputs[1:3]):
        if tensor.name and not is_constant(tensor):
            return None
        if tensor.name:
            bounds[slot] = float(values(tensor))
    return bounds[0], bounds[1]


def input_channel_axis(node: Node) -> int:
    """The axis of a node's data input, from the end, that its weight's columns run over."""
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        return -2
    if node.op in ("Conv", "ConvTranspose"):
        return 1 - len(node.inputs[1].shape)
    return -1
