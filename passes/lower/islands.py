"""What stays float32 in a float16 model, and why.

float16 has 11 bits of precision, its largest number is 65504 and its smallest 6·10⁻⁸. Float32 stays

- what the target says loses too much: exponentials and sums of squares, scales of codes;
- normalizations and softmax with their masks, written out as they may be;
- angles, from the integers that they are made of to the sine: 2047.3 in float16 is 2048;
- where activations were seen to grow beyond 2¹⁵, and what joins quantized layers;
- operators that take no float16, control flow, and what is excluded by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.graph.attention import MASKS
from onnxq.graph.patterns import find, inside
from onnxq.target import Target

FLOAT, HALF = np.dtype(np.float32), np.dtype(np.float16)
MOST = 2.0**15  # half of float16's range: the next sample may be louder
_NORMS = ("layernorm", "rmsnorm")
_SOFTMAX, _ANGLES = ("Softmax", "LogSoftmax"), ("Sin", "Cos", "Tan")


def islands(
    graph: Graph, target: Target, excluded: Callable[[Node], bool], largest: Mapping[str, float]
) -> dict[int, str]:
    """id of a node → why it stays float32, of all nodes that have to do with float32.

    `largest` is the largest finite magnitude seen of each tensor, where it was measured.
    """
    kinds = inside(find(graph))
    angles = _upstream(graph, _ANGLES, lambda node: not _mixes_channels(node))
    masks = _upstream(graph, _SOFTMAX, lambda node: node.op in MASKS)
    kept: dict[int, str] = {}
    for node in g.walk(graph):
        if not any(is_float32(t) for t in (*node.inputs, *node.outputs)):
            continue
        tensors = [t for t in (*node.inputs, *node.outputs) if t.name]
        loudest = max((largest.get(t.name, 0.0) for t in tensors), default=0.0)
        if g.bodies(node):
            kept[id(node)] = "states of control flow stay float32"
        elif excluded(node):
            kept[id(node)] = "excluded by the user"
        elif (slots := half_slots(node, graph.opset, target)) is None:
            kept[id(node)] = "a custom operator, of which no float16 form is known"
        elif not any((*slots[0], *slots[1])):
            kept[id(node)] = f"{node.op} takes no float16"
        elif any(g.dtype(t) is None for t in tensors):
            kept[id(node)] = "reads or makes a tensor of unknown type"
        elif loudest > MOST:
            kept[id(node)] = f"values up to {loudest:.3g} would overflow float16"
        elif node.op in target.float32:
            kept[id(node)] = target.float32[node.op]
        elif kinds.get(node.name) in _NORMS and not _is_fused(node):
            kept[id(node)] = "part of a normalization, whose squares overflow float16"
        elif id(node) in masks:
            kept[id(node)] = "scales or masks what a softmax reads, and may overflow float16"
        elif id(node) in angles:
            kept[id(node)] = "makes the angle of a sine, which float16 is too coarse for"
        elif _joins_codes(node):
            kept[id(node)] = "joins quantized layers, which are fused in float32"
    _weights_of_islands(graph, kept)
    return kept


def infer_types(graph: Graph, target: Target) -> None:
    """Types of all tensors, through the provider's own operators too: these make what they read."""
    g.infer_types(graph)
    found = True
    while found:
        found = False
        for node in g.walk(graph):
            if not _is_own(node, target):
                continue
            floats = [t.dtype for t in node.inputs if g.is_float(t)]
            for tensor in node.outputs:
                if tensor.name and tensor.dtype is None and floats:
                    tensor.dtype, found = floats[0], True
        if found:
            g.infer_types(graph)


def _is_own(node: Node, target: Target) -> bool:
    return node.domain == "com.microsoft" and node.op in target.float16_operators


def half_slots(node: Node, opset: int, target: Target) -> tuple[list[bool], list[bool]] | None:
    """Whether each input and each output may be float16; None where no schema says so."""
    inputs, outputs = len(node.inputs), len(node.outputs)
    if _is_own(node, target):
        return [True] * inputs, [True] * outputs
    if not g.is_standard(node):
        return None
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return None
    return _allowed(schema.inputs, inputs), _allowed(schema.outputs, outputs)


def _allowed(formals: Sequence[onnx.defs.OpSchema.FormalParameter], count: int) -> list[bool]:
    """The last formal parameter may stand for many."""
    return [
        bool(formals) and "tensor(float16)" in formals[min(k, len(formals) - 1)].types
        for k in range(count)
    ]


def _is_fused(node: Node) -> bool:
    """A normalization in one operator, which by ONNX computes its statistics in float32."""
    return node.op.endswith("LayerNormalization") or node.op == "RMSNormalization"


def _upstream(graph: Graph, ops: tuple[str, ...], through: Callable[[Node], bool]) -> set[int]:
    """ids of the nodes that float32 tensors lead from to operators of some kind, those included."""
    pending = [n for n in g.walk(graph) if n.op in ops and g.is_standard(n)]
    found: set[int] = set()
    while pending:
        node = pending.pop()
        found.add(id(node))
        makers = [g.producer(t) for t in node.inputs if is_float32(t)]
        pending += [m for m in makers if m is not None and id(m) not in found and through(m)]
    return found


def _mixes_channels(node: Node) -> bool:
    """A layer with weights; the product of positions and rates is none, for it adds nothing up."""
    view = g.weight_view(node)
    return view is not None and math.prod(view.tensor.shape) > view.rows


def _joins_codes(node: Node) -> bool:
    """Whether a node stands between DequantizeLinear of activations and QuantizeLinear."""
    makers = [g.producer(t) for t in node.inputs]
    reads = any(
        m is not None and m.op == "DequantizeLinear" and not g.is_constant(m.inputs[0])
        for m in makers
    )
    return reads or any(r.op == "QuantizeLinear" for t in node.outputs for r in t.outputs)


def _weights_of_islands(graph: Graph, kept: dict[int, str]) -> None:
    """DequantizeLinear of a weight, and a Cast, go by who reads what they make."""
    ends = {id(t) for body in g.subgraphs(graph) for t in body.outputs}
    waiting = [
        node for node in g.walk(graph)
        if (node.op == "DequantizeLinear" and g.is_constant(node.inputs[0])) or _is_cast(node)
    ]  # fmt: skip
    for node in reversed(waiting):
        readers = [reader for t in node.outputs for reader in t.outputs]
        wide = [id(r) in kept and not is_typeless(r) for r in readers]
        is_end = any(id(t) in ends for t in node.outputs)
        if id(node) not in kept and all(wide) and (readers or is_end):
            kept[id(node)] = "is read in float32 alone"


def is_typeless(node: Node) -> bool:
    """Whether an operator takes any type and makes another, or a tensor's shape."""
    return g.is_standard(node) and node.op in ("Cast", "Shape", "Size")


def _is_cast(node: Node) -> bool:
    return node.op == "Cast" and g.is_standard(node) and g.dtype(node.outputs[0]) == FLOAT


def is_float32(tensor: gs.Tensor) -> bool:
    return g.dtype(tensor) == FLOAT
