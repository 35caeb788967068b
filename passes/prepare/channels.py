"""Where the channels that a layer makes go, and what it takes to scale them.

Divide a layer's output y by s > 0, one value per channel. The function stays if all that carry
these channels on commute with the division, f(y/s) = f(y)/s, and if who reads them in the end
multiplies its columns by s: V (s · f(y/s)) = V f(y). Four roles, then, in the region of tensors
that carry the channels:

- makers divide: rows and bias of a linear operator, gain and bias of a normalization;
- constants that are added, compared or multiplied on the way divide too;
- readers multiply: the columns of a linear operator;
- the rest carries: positively homogeneous activations, pooling, what moves values, a product with
  something else, attention's sum over the values V of all tokens, Add of two such tensors.

Where the channels are in a tensor, an index array says: it holds numbers of channels and
broadcasts against the tensor's last axes. A Conv's output (n, c, h, w) has indices (c, 1, 1); that
of heads in attention (batch, heads, tokens, size) has (heads, 1, size).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.prepare import affine
from onnxq.passes.prepare.region import NORMS, Index, Region, is_scalable, maker_channels
from onnxq.passes.prepare.reshape import reshaped

from onnxq import graph as g
from onnxq.graph import Graph, Node

Shapes = dict[str, tuple[int | str | None, ...]]
_POINTWISE = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Neg", "Abs")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_SAME_PLACE = ("Slice", "Pad", "Expand", "Split")  # channels stay where they are on their axes
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_JOINT = ("Add", "Sub", "Sum", "Max", "Min", "Concat")


class Blocked(Exception):
    """Something carries the channels that does not commute with a scale."""


def region_of(body: Graph, node: Node, shapes: Shapes, clips: bool = False) -> Region | None:
    """What carries the channels that a linear operator, a normalization or a gain makes.

    None where they cannot be scaled: something else reads them, a weight is shared, or the model
    gives them out. `clips` takes Clip(0, high) for homogeneous: its bounds are the caller's.
    """
    index = _index_made(node)
    if index is None:
        return None
    flood = _Flood(body, shapes, Region(index.size), clips)
    try:
        flood.run(node.outputs[0], index)
    except Blocked:
        return None
    return flood.region if flood.region.readers else None


def _index_made(node: Node) -> Index | None:
    """Where a node puts the channels that it makes; None if it makes none that can be scaled."""
    if node.op == "Mul" and g.is_standard(node):
        gains = [t for t in node.inputs if g.is_constant(t) and g.is_float(t)]
        shape = tuple(gains[0].shape) if len(gains) == 1 else ()
        size = max(shape, default=1)
        vector = size > 1 and np.prod(shape) == size
        return np.arange(size).reshape(shape) if vector else None
    channels = maker_channels(node)
    if channels is None:
        return None
    axis = -1 if node.op in NORMS else affine.channel_axis_from_end(node)
    return np.arange(channels).reshape(-1, *(1,) * (-axis - 1))


def _along(index: Index, axis: int, channels: int) -> Index:
    """An index array that varies along one axis alone (from the end), as (channels,)."""
    shape = (1,) * (-axis - index.ndim) + index.shape
    if shape[axis] != channels or index.size != channels:
        raise Blocked
    return index.reshape(-1)


class _Flood:
    """Follows channels from tensor to tensor, downwards to readers and upwards to makers."""

    def __init__(self, body: Graph, shapes: Shapes, region: Region, clips: bool) -> None:
        self.body, self.shapes, self.region, self.clips = body, shapes, region, clips
        self.own = {id(node) for node in body.nodes}
        self.ends = {t.name for inner in g.subgraphs(body) for t in inner.outputs}
        self.done: set[int] = set()  # nodes that carry the channels on
        self.products: list[Node] = []
        self.unscaled: set[str] = set()  # factors of a constant that is scaled
        self.pending: list[tuple[gs.Tensor, Index]] = []

    def run(self, tensor: gs.Tensor, index: Index) -> None:
        self.pending = [(tensor, index)]
        while self.pending:
            tensor, index = self.pending.pop()
            while index.ndim > 1 and index.shape[0] == 1:
                index = index[0]
            known = self.region.tensors.get(tensor.name)
            if known is not None:
                if not np.array_equal(known, index):
                    raise Blocked
                continue
            self._visit(tensor, index)
        inside = self.region.tensors
        squares = any(sum(t.name in inside for t in node.inputs) != 1 for node in self.products)
        if squares or self.unscaled & inside.keys():
            raise Blocked

    def _visit(self, tensor: gs.Tensor, index: Index) -> None:
        maker = g.producer(tensor)
        if maker is None or tensor.name in self.ends:
            raise Blocked
        self.region.tensors[tensor.name] = index
        for node in [maker, *{id(n): n for n in tensor.outputs}.values()]:
            if id(node) not in self.own:
                raise Blocked
        self._up(maker, tensor, index)
        for node in {id(n): n for n in tensor.outputs}.values():
            self._down(node, tensor, index)

    def _up(self, node: Node, tensor: gs.Tensor, index: Index) -> None:
        channels = maker_channels(node)
        if channels is not None:
            if tensor is not node.outputs[0]:
                raise Blocked
            axis = -1 if node.op in NORMS else affine.channel_axis_from_end(node)
            self.region.makers.append((node, _along(index, axis, channels)))
        elif id(node) not in self.done:
            self._carry(node, tensor, index)

    def _down(self, node: Node, tensor: gs.Tensor, index: Index) -> None:
        if node.op in ("Shape", "Size") and g.is_standard(node):
            return
        if g.weight_view(node) is not None and node.op in affine.LINEAR:
            alone = [t is tensor for t in node.inputs] == [True] + [False] * (len(node.inputs) - 1)
            if not alone or not is_scalable(node) or node.attrs.get("transA", 0):
                raise Blocked
            axis = g.input_channel_axis(node)
            self.region.readers.append((node, _along(index, axis, affine.in_channels(node))))
        elif id(node) not in self.done:
            self._carry(node, tensor, index)

    def _carry(self, node: Node, tensor: gs.Tensor, index: Index) -> None:
        """Let all tensors of a node that carry the channels with this one join the region."""
        if not g.is_standard(node):
            raise Blocked
        self.done.add(id(node))
        downwards = any(t is tensor for t in node.inputs)
        if node.op in _JOINT:
            self._join(node, tensor, index)
        elif node.op in ("Mul", "Div"):
            self._product(node, tensor, index, downwards)
        elif node.op == "MatMul":
            if not downwards or node.inputs[1] is not tensor or node.inputs[0] is tensor:
                raise Blocked
            if index.ndim > 1 and index.shape[-2] != 1:
                raise Blocked
            self.pending.append((node.outputs[0], index))
        elif downwards and node.inputs[0] is not tensor:
            raise Blocked
        else:
            self._single(node, tensor, index, downwards)

    def _single(self, node: Node, tensor: gs.Tensor, index: Index, downwards: bool) -> None:
        """Operators that carry their first input on."""
        if node.op != "Split" and any(t.outputs for t in node.outputs[1:]):
            raise Blocked
        ends = node.outputs if downwards else [node.inputs[0]]
        if node.op == "Split" and not downwards:
            ends = [*node.outputs, node.inputs[0]]
        before, after = (self.shapes.get(t.name) for t in (tensor, ends[0]))
        if node.op in _POINTWISE:
            self._check_pointwise(node)
        elif node.op == "Clip":
            bounds = g.clip_bounds(node)
            if not self.clips or bounds is None or bounds[0] != 0:
                raise Blocked
            self.region.clips.append(node)
        elif node.op in _POOLS:
            if before is None or index.ndim != len(before) - 1 or index.size != index.shape[0]:
                raise Blocked
        elif node.op == "Transpose":
            perm = node.attrs.get("perm")
            if perm is None or index.ndim > len(perm):
                raise Blocked
            order = perm if downwards else np.argsort(perm)
            index = index.reshape((1,) * (len(perm) - index.ndim) + index.shape).transpose(order)
        elif node.op in _SAME_PLACE:
            if not (_fits(before, index) and _fits(after, index)) or not _adds_zeros(node):
                raise Blocked
        elif node.op in _RESHAPES and before is not None and after is not None:
            moved = reshaped(index, before, after)
            if moved is None:
                raise Blocked
            index = moved
        else:
            raise Blocked
        self.pending.extend((end, index) for end in ends)

    def _check_pointwise(self, node: Node) -> None:
        fixed = all(g.is_constant(t) or not t.name for t in node.inputs[1:])
        if not fixed or (node.op == "Dropout" and len(node.inputs) > 2):
            raise Blocked

    def _join(self, node: Node, tensor: gs.Tensor, index: Index) -> None:
        """Sums and their like: all their inputs are scaled together, constants too."""
        if node.op == "Concat":
            shape = self.shapes.get(tensor.name)
            axis = node.attrs["axis"]
            if shape is None or not all(_fits(self.shapes.get(t.name), index) for t in node.inputs):
                raise Blocked
            axis -= len(shape) if axis >= 0 else 0
            if -axis <= index.ndim and index.shape[axis] != 1:
                raise Blocked
        for slot, other in enumerate(node.inputs):
            if g.is_constant(other):
                if not g.is_float(other):
                    raise Blocked
                self.region.constants.append((node, slot, index))
            elif other is not tensor:
                if not _fits(self.shapes.get(other.name), index):
                    raise Blocked
                self.pending.append((other, index))
        if node.outputs[0] is not tensor:
            self.pending.append((node.outputs[0], index))

    def _product(self, node: Node, tensor: gs.Tensor, index: Index, downwards: bool) -> None:
        """One factor is scaled: the one that came, or on the way up a constant."""
        if downwards:
            if node.op == "Div" and node.inputs[0] is not tensor:
                raise Blocked
            self.products.append(node)
            self.pending.append((node.outputs[0], index))
            return
        slots = [k for k, t in enumerate(node.inputs) if g.is_constant(t) and g.is_float(t)]
        if node.op != "Mul" or len(slots) != 1 or len(node.inputs) != 2:
            raise Blocked
        self.region.constants.append((node, slots[0], index))
        other = node.inputs[1 - slots[0]]
        self.unscaled.add(other.name)


def _fits(shape: tuple[int | str | None, ...] | None, index: Index) -> bool:
    """Whether a tensor has every axis that the channels lie on, at their size."""
    if shape is None or len(shape) < index.ndim:
        return False
    pairs = zip(reversed(shape), reversed(index.shape), strict=False)
    return all(size in (1, there) for there, size in pairs)


def _adds_zeros(node: Node) -> bool:
    """Of a Pad, whether it pads with zeros; scaled, they are still zeros."""
    if node.op != "Pad" or node.attrs.get("mode", "constant") != "constant":
        return True
    value = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    return value is None or (g.is_constant(value) and not g.values(value).any())
