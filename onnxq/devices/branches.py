"""Which branch of an If a runtime takes when it loads a model, where that is known by then.

It computes what follows from constants and from shapes that are numbers; where the condition of an
If does, one branch takes the If's place and the other is gone. That may make more shapes known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxq import graph as g
from onnxq.devices import units
from onnxq.graph import Graph, Node

_SMALL = 1024  # elements: shapes and what is made of them, no weights
Shapes = dict[str, tuple[int | str | None, ...]]


def resolved(graph: Graph) -> Graph:
    """A copy with the branches that will be taken in place of their Ifs, and small tensors that are
    known as constants; the graph itself where there is neither If nor Constant."""
    if not any(node.op in ("If", "Constant") for node in graph.nodes):
        return graph
    made = g.copy(graph)
    while True:
        _fold(made)
        decided = [node for node in made.nodes if node.op == "If" and _is_known(node.inputs[0])]
        for node in decided:
            condition = bool(np.all(g.values(node.inputs[0])))
            _take(made, node, node.attrs["then_branch" if condition else "else_branch"])
        if not decided:
            return made


def _fold(graph: Graph) -> None:
    """Make constants of what can be computed from small ones and from shapes."""
    for tensor in g.tensors(graph).values():  # sizes that had but names may be known by now
        if tensor.inputs and any(not isinstance(size, int) for size in tensor.shape or ()):
            tensor.shape = None
    shapes = g.shapes(graph)
    protos = {node.name: node for node in g.to_proto_without_weights(graph)[0].graph.node}
    left = []
    for node in graph.nodes:
        values = _computed(graph, node, protos, shapes)
        for tensor, value in zip(list(node.outputs), values, strict=False):
            _replace(graph, tensor, gs.Constant(tensor.name, value))
            shapes[tensor.name] = value.shape
        if values:
            node.inputs.clear()
        else:
            left.append(node)
    graph.nodes = left


def _computed(
    graph: Graph, node: Node, protos: dict[str, onnx.NodeProto], shapes: Shapes
) -> list[NDArray[Any]]:
    """The outputs of a node, if they are known and no outputs of the graph; else none."""
    if not g.is_standard(node) or g.bodies(node) or node.op in (*units.QUANTIZERS, *units.RANDOM):
        return []
    if any(g.is_output(graph, tensor) for tensor in node.outputs):
        return []
    if node.op in ("Shape", "Size"):
        shape = shapes.get(node.inputs[0].name)
        sizes = [size for size in shape or () if isinstance(size, int)]
        if shape is None or len(sizes) < len(shape):
            return []
        known = np.empty(sizes, np.bool_)  # of no element of which anything is read
        return _run(protos[node.name], [known], graph.opset)
    if not all(_is_known(tensor) for tensor in node.inputs if tensor.name):
        return []
    made = [shapes.get(tensor.name, ()) for tensor in node.outputs]
    if any(isinstance(size, int) and size > _SMALL for shape in made for size in shape):
        return []
    return _run(protos[node.name], [g.values(t) for t in node.inputs if t.name], graph.opset)


def _run(node: onnx.NodeProto, inputs: list[NDArray[Any]], opset: int) -> list[NDArray[Any]]:
    names = list(dict.fromkeys(name for name in node.input if name))
    infos = [helper.make_value_info(name, onnx.TypeProto()) for name in (*names, *node.output)]
    graph = helper.make_graph([node], "node", infos[: len(names)], infos[len(names) :])
    fed = dict(zip((name for name in node.input if name), inputs, strict=True))
    evaluator = ReferenceEvaluator(graph, opsets={"": opset})
    return [np.asarray(value) for value in evaluator.run(None, fed)]


def _is_known(tensor: gs.Tensor) -> bool:
    kind = g.dtype(tensor) if g.is_constant(tensor) else None
    return kind is not None and kind.kind in "fiub" and int(np.prod(tensor.shape)) <= _SMALL


def _take(graph: Graph, node: Node, body: Graph) -> None:
    """Put a branch in the place of its If."""
    for inner in body.nodes:
        for tensor in inner.outputs:  # other branches may have others of that name
            tensor.name = f"{node.name}/{tensor.name}"
    place = next(k for k, own in enumerate(graph.nodes) if own is node)
    graph.nodes[place : place + 1] = body.nodes
    for tensor, made in zip(list(node.outputs), list(body.outputs), strict=True):
        _replace(graph, tensor, made)
    node.inputs.clear()


def _replace(graph: Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make everything read `new` that read `old`, bodies and outputs too."""
    for reader in list(old.outputs):
        g.replace_input(reader, old, new)
    for body in g.subgraphs(graph):
        body.outputs = [new if tensor is old else tensor for tensor in body.outputs]
    old.inputs.clear()
