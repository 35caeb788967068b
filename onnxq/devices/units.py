"""What stands around a node of a quantized model: the codes that it reads, holds and hands on.

A layer in QDQ form is an operator that reads DequantizeLinear and is read by QuantizeLinear. A
runtime takes the whole for one operation on codes, if it has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node

CODES = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16")
MOVED = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
"""Operators past which the runtime moves quantizers: DequantizeLinear down, QuantizeLinear up."""
_TO_FLOAT = ("DequantizeLinear", "MatMulIntegerToFloat")
_DATA = {"Where": 1, "OneHot": 2}  # the input that is data, where it is not the first


@dataclass(frozen=True)
class Unit:
    """Element types of codes: of data that a node reads, of constants, of what it hands on.

    Empty where there are none. `reads_float` says that some of its data are floats, `last` is the
    node that hands on: the layer's own, or a Relu or Clip that is one with it.
    """

    activation: str
    weight: str
    result: str
    reads_float: bool
    last: Node

    @property
    def quantized(self) -> bool:
        return bool(self.activation or self.weight)


def unit(graph: Graph, node: Node, fixed: frozenset[int], own: frozenset[int]) -> Unit:
    """The codes around a node of a graph or body.

    `fixed` are the ids of the tensors that do not change. `own` are those of the graph's nodes: no
    kernel is made of nodes of two graphs.
    """
    activation, weight, reads_float = "", "", False
    for tensor in node.inputs:
        maker = _source(tensor)
        if maker is None or maker.op != "DequantizeLinear" or id(maker) not in own:
            reads_float |= g.is_float(tensor) and bool(tensor.name) and id(tensor) not in fixed
        elif id(maker.inputs[0]) in fixed:
            kind = type_name(maker.inputs[0])
            weight = weight or ("" if kind == "int32" else kind)
        else:
            activation = activation or type_name(maker.inputs[0])
    outputs = [tensor for tensor in node.outputs if tensor.name]
    result, last = _result(graph, outputs), node
    reader = g.sole_consumer(graph, outputs[0]) if len(outputs) == 1 else None
    if reader is not None and reader.op in ("Relu", "Clip") and reader.inputs[0] is outputs[0]:
        after = _quantizers(graph, reader.outputs)
        if after and all(_says_the_same(quantizer, reader) for quantizer in after):
            result, last = type_name(after[0].outputs[0]), reader
    if any(_is_foreign(tensor, own) for tensor in node.inputs):
        activation = weight = ""  # measured: then the runtime fuses neither
    return Unit(activation, weight, result, reads_float, last)


def _is_foreign(tensor: gs.Tensor, own: frozenset[int]) -> bool:
    """Whether a DequantizeLinear of an enclosing graph makes a tensor."""
    maker = g.producer(tensor)
    return maker is not None and maker.op == "DequantizeLinear" and id(maker) not in own


def own_nodes(graph: Graph) -> frozenset[int]:
    """Ids of the nodes that stand in this very graph."""
    return frozenset(map(id, graph.nodes))


def _source(tensor: gs.Tensor) -> Node | None:
    """What makes a tensor, the operators that quantizers are moved past left out."""
    maker = g.producer(tensor)
    while maker is not None and maker.op in MOVED:
        maker = g.producer(maker.inputs[0])
    return maker


def _result(graph: Graph, outputs: list[gs.Tensor]) -> str:
    """The type of the codes that all readers of these tensors turn them into."""
    found = _quantizers(graph, outputs)
    return type_name(found[0].outputs[0]) if found else ""


def _quantizers(graph: Graph, outputs: list[gs.Tensor]) -> list[Node]:
    """The QuantizeLinear that read these tensors; none where anything else does."""
    found = []
    for tensor in outputs:
        reader = g.sole_consumer(graph, tensor)
        while reader is not None and reader.op in MOVED:
            tensor = reader.outputs[0]
            reader = g.sole_consumer(graph, tensor)
        readers = tensor.outputs
        if g.is_output(graph, tensor) or any(r.op != "QuantizeLinear" for r in readers):
            return []
        found += readers
    return found


def _says_the_same(quantizer: Node, activation: Node) -> bool:
    """Whether codes cannot say what a Relu or Clip takes away: the runtime then drops it."""
    known = [tensor for tensor in quantizer.inputs[1:] if g.is_constant(tensor)]
    if not known or not type_name(quantizer.outputs[0]):
        return False
    scale = g.values(known[0]).astype(np.float64)
    zero = g.values(known[1]).astype(np.float64) if len(known) > 1 else 0.0
    kind: Any = np.dtype(g.dtype(quantizer.outputs[0]))
    limits: Any = ml_dtypes.iinfo(kind)  # type: ignore[no-untyped-call]
    low, high = scale * (int(limits.min) - zero), scale * (int(limits.max) - zero)
    bounds = g.clip_bounds(activation)
    if bounds is None:
        return False
    least, most = bounds
    slack = 1e-3 * scale
    return bool(np.all(low >= least - slack) and np.all(high <= most + slack))


def fixed_tensors(graph: Graph) -> frozenset[int]:
    """Ids of the tensors that a runtime knows when it loads a model: constants and what follows.

    It leaves DequantizeLinear for the kernels that fuse it, and knows the shape of what has one.
    """
    shapes, fixed = g.shapes(graph), set[int]()
    for body in g.subgraphs(graph):
        for node in body.nodes:
            fixed |= {id(tensor) for tensor in node.inputs if g.is_constant(tensor)}
            if is_folded(node, fixed, shapes):
                fixed |= {id(tensor) for tensor in node.outputs}
    return frozenset(fixed)


def is_folded(
    node: Node, fixed: set[int] | frozenset[int], shapes: dict[str, tuple[int | str | None, ...]]
) -> bool:
    """Whether a runtime computes a node when it loads the model."""
    if node.op in ("Shape", "Size"):
        shape = shapes.get(node.inputs[0].name)
        return shape is not None and all(isinstance(size, int) for size in shape)
    if node.op in (*g.RANDOM, "DequantizeLinear") or g.bodies(node):
        return False
    return all(id(tensor) in fixed for tensor in node.inputs if tensor.name)


def first(nodes: list[Node]) -> Node:
    """The one that onnxruntime visits first of some nodes in their order: what the last of those
    that nobody reads depends on, by the last of its inputs' makers, and so forth."""
    place = {id(node): number for number, node in enumerate(nodes)}

    def beside(tensors: list[gs.Tensor], side: str) -> list[int]:
        found = (node for tensor in tensors for node in getattr(tensor, side))
        return [place[id(node)] for node in found if id(node) in place]

    at = max(k for k, node in enumerate(nodes) if not beside(node.outputs, "outputs"))
    while makers := beside(nodes[at].inputs, "inputs"):
        at = max(makers)
    return nodes[at]


def is_fused_padding(graph: Graph, node: Node) -> bool:
    """Whether a Pad of zeros becomes the padding of the convolutions that alone read it."""
    readers = node.outputs[0].outputs
    constant = node.attrs.get("mode", "constant") == "constant" and len(node.inputs) < 3
    only = bool(readers) and all(reader.op == "Conv" for reader in readers)
    return constant and only and not g.is_output(graph, node.outputs[0])


def reads_codes(node: Node) -> bool:
    """Whether a node computes on codes: some input is of their types.

    The same can be asked of the graph that a runtime made of a model.
    """
    if node.op in g.QUANTIZERS or node.op in ("Cast", "CastLike", "If", "Loop", "Scan"):
        return False
    if node.op.startswith("DynamicQuantize"):
        return True
    return any(type_name(tensor) in CODES for tensor in node.inputs)


def data_type(node: Node) -> str:
    """The element type of the data that a node computes on; empty where it is not known."""
    place = _DATA.get(node.op, 0)
    if node.op == "DequantizeLinear" or place < len(node.inputs):
        return type_name(node.inputs[place])
    return type_name(node.outputs[0]) if node.outputs else ""


def type_name(tensor: gs.Tensor) -> str:
    """As NumPy and ml_dtypes call it; empty where it is not known."""
    kind = g.dtype(tensor)
    return "" if kind is None else kind.name


def give_types(graph: Graph) -> None:
    """Infer element types, also behind the runtime's own operators, of which ONNX knows nothing."""
    g.infer_types(graph)
    for node in g.walk(graph):
        codes = next((t.dtype for t in node.inputs if type_name(t) in CODES), None)
        kind = np.float32 if node.op in _TO_FLOAT else node.inputs[0].dtype if node.inputs else None
        if codes is not None and node.op.startswith("QLinear"):
            kind = codes
        if node.op == "GatherBlockQuantized":
            kind = node.inputs[2].dtype  # of the scales
        for tensor in node.outputs:
            if tensor.dtype is None:
                tensor.dtype = kind
