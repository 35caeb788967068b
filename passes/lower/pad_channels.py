"""Channels of zeros beside those of a convolution, up to a number that its kernel takes at once.

A kernel for 16 channels at a time works through the rest one by one: on x86-64 a 3×3 depthwise
QLinearConv of 24 channels takes 1.7 times as long as one of 32. The codes of a weight's new
channels are its zero point, so that they add nothing to any sum, and results are the same bits:

1. dense → depthwise → … → dense: the first makes more channels, the last multiplies them by zero.
   Each is read by the next alone. So too dense → dense.
2. What no convolution before it makes, as an image: a Pad of its codes.

Where products are added in pairs in 16 bits (`pair_limit`), neighbours along the input channels are
others after 2. A pair (a, b) that is too large is parted: the new channel repeats the one of b, and
b = b' + b'' is multiplied with both.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Array, Graph, Node
from onnxq.target import Target

_X, _ZERO, _WEIGHT, _WEIGHT_SCALE, _WEIGHT_ZERO, _BIAS = 0, 2, 3, 4, 5, 8  # QLinearConv's inputs
_PADS_CODES = 13  # the opset since which Pad takes any integers and reflects them
_SMALL_WINDOW = 9  # taps; larger ones are worth it only for a third more channels


def pad_channels(graph: Graph, target: Target) -> int:
    """Pad where the target says that it pays; the number of convolutions that grew."""
    maker, changes = g.Maker(graph), 0
    for body in g.subgraphs(graph):
        for conv in [n for n in body.nodes if _is_dense(n)]:
            chain = _chain(body, conv)
            changes += _pad_chain(chain, target, maker) if chain else 0
        for conv in [n for n in body.nodes if _is_dense(n)]:
            changes += _pad_input(body, conv, target, graph.opset, maker)
    return changes


def _is_conv(node: Node) -> bool:
    """A QLinearConv whose weight, scales, zero point and bias are all at hand."""
    return (
        node.op == "QLinearConv"
        and g.is_standard(node)
        and all(g.is_constant(t) for t in node.inputs[_WEIGHT : _WEIGHT_ZERO + 1])
        and all(g.is_constant(t) for t in node.inputs[_BIAS:])
    )


def _is_dense(node: Node) -> bool:
    return _is_conv(node) and int(node.attrs.get("group", 1)) == 1


def _is_depthwise(node: Node) -> bool:
    if not _is_conv(node):
        return False
    out, per_group, *_ = node.inputs[_WEIGHT].shape
    return int(node.attrs.get("group", 1)) == out and per_group == 1


# ── between convolutions ─────────────────────────────────────────────────────────────────────────


def _chain(body: Graph, first: Node) -> list[Node]:
    """[dense, depthwise, …, dense], each the one reader of the one before; or nothing."""
    chain = [first]
    while (reader := g.sole_consumer(body, chain[-1].outputs[0])) is not None:
        if not g.owns(body, reader) or reader.inputs[_X] is not chain[-1].outputs[0]:
            return []
        chain.append(reader)
        if _is_dense(reader):
            return chain
        if not _is_depthwise(reader):
            return []
    return []


def _pad_chain(chain: list[Node], target: Target, maker: g.Maker) -> int:
    first, *between, last = chain
    at_once = target.depthwise_channels if between else target.dense_channels
    more = -first.inputs[_WEIGHT].shape[0] % at_once
    if not more or not (between or _pays(last, more)):
        return 0
    wide = _with_zeros(last.inputs[_WEIGHT], 1, more, _zero(last))
    if _largest_pair(wide) > _bound(last, target):
        return 0
    for conv in (first, *between):
        _grow(conv, 0, more, maker)
    for conv in between:
        conv.attrs["group"] = conv.inputs[_WEIGHT].shape[0]
    _grow(last, 1, more, maker)
    for conv in chain[:-1]:
        shape = conv.outputs[0].shape
        if shape is not None and isinstance(shape[1], int):
            conv.outputs[0].shape = [shape[0], shape[1] + more, *shape[2:]]
    return len(chain)


# ── before the first ─────────────────────────────────────────────────────────────────────────────


def _pad_input(body: Graph, conv: Node, target: Target, opset: int, maker: g.Maker) -> int:
    x, weight = conv.inputs[_X], conv.inputs[_WEIGHT]
    more = -weight.shape[1] % target.dense_channels
    if not more or not _pays(conv, more) or len(weight.shape) != 4 or opset < _PADS_CODES:
        return 0
    bound = _bound(conv, target)
    wide, repeats = _with_zeros(weight, 1, more, _zero(conv)), False
    if _largest_pair(wide) > bound:
        if more > 1 or _largest_pair(_parted(wide, int(bound))) > bound:
            return 0
        wide, repeats = _parted(wide, int(bound)), True
    pads = maker.constant(f"pads_of_{more}_channels", np.array([0, 0, 0, 0, 0, more, 0, 0]))
    # Reflection repeats the last channel but one, constants are the code of zero.
    mode = {"mode": "reflect"} if repeats else {}
    inputs = [x, pads] if repeats else [x, pads, conv.inputs[_ZERO]]
    padded = maker.emit(body, "Pad", inputs, conv.name, **mode)
    padded.dtype = x.dtype
    conv.inputs[_X] = padded
    conv.inputs[_WEIGHT] = maker.shared(f"{weight.name}_padded", wide)
    return 1


def _pays(conv: Node, more: int) -> bool:
    """Large windows are worth it only where the channels grow by a third at most."""
    _, channels, *window = conv.inputs[_WEIGHT].shape
    return math.prod(window) <= _SMALL_WINDOW or 3 * more <= channels


def _bound(conv: Node, target: Target) -> float:
    """What pairs of neighbouring weights may add up to, or do already."""
    rules = [r for r in target.ops.get("Conv", ()) if r.form == "static" and not r.depthwise]
    limits = [r.pair_limit for r in rules if r.pair_limit is not None]
    weight = g.values(conv.inputs[_WEIGHT])
    if not limits or weight.dtype != np.int8:
        return math.inf
    return max(min(limits), _largest_pair(weight))


def _largest_pair(weight: Array) -> int:
    """max |w_2i + w_2i+1| of a weight (out, in, h, w), input channels fastest, as kernels add."""
    rows = np.moveaxis(weight, 1, -1).reshape(len(weight), -1).astype(np.int32)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return int(np.abs(rows[:, 0::2] + rows[:, 1::2]).max(initial=0))


def _parted(weight: Array, limit: int) -> Array:
    """(…, a, b, c, 0) → (…, a, b', c, b'') along the input channels, |a + b'| ≤ limit."""
    wide = weight.astype(np.int32)
    a, b = wide[:, -4], wide[:, -3]
    kept = np.clip(a + b, -limit, limit) - a
    wide[:, -3], wide[:, -1] = kept, b - kept
    return wide.astype(weight.dtype)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────


def _grow(conv: Node, axis: int, more: int, maker: g.Maker) -> None:
    """Zeros along an axis of the weight; along its outputs also a scale and a bias for each."""
    fills = {_WEIGHT: _zero(conv)}
    if axis == 0:
        fills |= {_WEIGHT_SCALE: 1, _WEIGHT_ZERO: _zero(conv), _BIAS: 0}
    for slot, fill in fills.items():
        if slot < len(conv.inputs) and not _is_for_all(conv, slot):
            old = conv.inputs[slot]
            wide = _with_zeros(old, axis, more, fill)
            conv.inputs[slot] = maker.shared(f"{old.name}_padded", wide)


def _is_for_all(conv: Node, slot: int) -> bool:
    """Whether a scale or zero point is one for all channels, however many."""
    return slot in (_WEIGHT_SCALE, _WEIGHT_ZERO) and math.prod(conv.inputs[slot].shape) == 1


def _zero(conv: Node) -> int:
    return int(np.ravel(g.values(conv.inputs[_WEIGHT_ZERO]))[0])


def _with_zeros(tensor: gs.Constant, axis: int, more: int, fill: int) -> Array:
    old = g.values(tensor)
    ends = [(0, more if k == axis else 0) for k in range(old.ndim)]
    return np.pad(old, ends, constant_values=fill)
