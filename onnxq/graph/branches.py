"""Which branch of an If a runtime takes when it loads a model, where that is known by then.

It computes what follows from constants and from shapes that are numbers; where the condition of an
If does, one branch takes the If's place and the other is gone. That may make more shapes known.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxq.graph.edit import replace_input
from onnxq.graph.proto import copy, shapes, to_proto_without_weights
from onnxq.graph.walk import (
    QUANTIZERS,
    RANDOM,
    Array,
    Graph,
    Node,
    bodies,
    dtype,
    is_constant,
    is_output,
    is_standard,
    subgraphs,
    tensors,
    values,
)

_SMALL = 1024  # elements: shapes and what is made of them, no weights
Shapes = dict[str, tuple[int | str | None, ...]]


def resolved(graph: Graph, kinds: str = "fiub") -> Graph:
    """A copy with the branches that will be taken in place of their Ifs, and small tensors that are
    known as constants; the graph itself where there is neither If nor Constant.

    `kinds` are NumPy's of the tensors that are computed: without "f" every output stays the same to
    the last bit.
    """
    if not any(node.op in ("If", "Constant") for node in graph.nodes):
        return graph
    made = copy(graph)
    while True:
        _fold(made, kinds)
        decided = [
            node for node in made.nodes if node.op == "If" and _is_known(node.inputs[0], "b")
        ]
        for node in decided:
            condition = bool(np.all(values(node.inputs[0])))
            _take(made, node, node.attrs["then_branch" if condition else "else_branch"])
        if not decided:
            return made


def _fold(graph: Graph, kinds: str) -> None:
    """Make constants of what can be computed from small ones and from shapes."""
    for tensor in tensors(graph).values():  # sizes that had but names may be known by now
        inner = tensor.inputs and not is_output(graph, tensor)
        if inner and any(not isinstance(size, int) for size in tensor.shape or ()):
            tensor.shape = None
    known = shapes(graph)
    protos = {node.name: node for node in to_proto_without_weights(graph)[0].graph.node}
    left = []
    for node in graph.nodes:
        made = _computed(graph, node, protos, known, kinds)
        for tensor, value in zip(list(node.outputs), made, strict=False):
            _replace(graph, tensor, gs.Constant(tensor.name, value))
            known[tensor.name] = value.shape
        if made:
            node.inputs.clear()
        else:
            left.append(node)
    graph.nodes = left


def _computed(
    graph: Graph, node: Node, protos: dict[str, onnx.NodeProto], shapes: Shapes, kinds: str
) -> list[Array]:
    """The outputs of a node, if they are known and no outputs of the graph; else none."""
    if not is_standard(node) or bodies(node) or node.op in (*QUANTIZERS, *RANDOM):
        return []
    if any(is_output(graph, tensor) for tensor in node.outputs):
        return []
    if node.op in ("Shape", "Size"):
        shape = shapes.get(node.inputs[0].name)
        sizes = [size for size in shape or () if isinstance(size, int)]
        if shape is None or len(sizes) < len(shape):
            return []
        known = np.empty(sizes, np.bool_)  # of no element of which anything is read
        return _run(protos[node.name], [known], graph.opset)
    read = [tensor for tensor in node.inputs if tensor.name]
    if not all(_is_known(tensor, kinds) for tensor in read):
        return []
    made = [shapes.get(tensor.name, ()) for tensor in node.outputs]
    if any(math.prod(size for size in shape if isinstance(size, int)) > _SMALL for shape in made):
        return []
    return _run(protos[node.name], [values(tensor) for tensor in read], graph.opset)


def _run(node: onnx.NodeProto, inputs: list[Array], opset: int) -> list[Array]:
    names = list(dict.fromkeys(name for name in node.input if name))
    infos = [helper.make_value_info(name, onnx.TypeProto()) for name in (*names, *node.output)]
    graph = helper.make_graph([node], "node", infos[: len(names)], infos[len(names) :])
    fed = dict(zip((name for name in node.input if name), inputs, strict=True))
    evaluator = ReferenceEvaluator(graph, opsets={"": opset})
    return [np.asarray(value) for value in evaluator.run(None, fed)]


def _is_known(tensor: gs.Tensor, kinds: str) -> bool:
    kind = dtype(tensor) if is_constant(tensor) else None
    return kind is not None and kind.kind in kinds and math.prod(tensor.shape) <= _SMALL


def _take(graph: Graph, node: Node, body: Graph) -> None:
    """Put a branch in the place of its If."""
    place = next(k for k, own in enumerate(graph.nodes) if own is node)
    graph.nodes[place : place + 1] = body.nodes
    node.inputs.clear()
    for tensor, made in zip(list(node.outputs), list(body.outputs), strict=True):
        if is_output(graph, tensor):  # keeps its name
            tensor.inputs.clear()
            name = f"{node.name}/{tensor.name}"
            graph.nodes.append(gs.Node("Identity", name, {}, [made], [tensor]))
        else:
            _replace(graph, tensor, made)


def _replace(graph: Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make everything read `new` that read `old`, bodies' outputs too."""
    for reader in list(old.outputs):
        replace_input(reader, old, new)
    for body in subgraphs(graph):
        body.outputs = [new if tensor is old else tensor for tensor in body.outputs]
    old.inputs.clear()
