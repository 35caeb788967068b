"""Changes to a graph: fresh names, new nodes and constants, order."""

from __future__ import annotations

import hashlib
import heapq
from copy import copy as shallow_copy

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.graph.walk import (
    Array,
    Graph,
    Node,
    bodies,
    is_constant,
    is_output,
    owns,
    producer,
    subgraphs,
    walk,
)
from onnxq.spool import LARGE, spooled


class Namer:
    """Fresh tensor and node names for one graph."""

    def __init__(self, graph: Graph) -> None:
        self.taken = {t for g in subgraphs(graph) for t in g.tensors()}
        self.taken |= {node.name for node in walk(graph)}

    def __call__(self, base: str) -> str:
        name, number = base, 1
        while name in self.taken:
            number, name = number + 1, f"{base}_{number}"
        self.taken.add(name)
        return name


class Maker:
    """New constants and nodes for a graph and its bodies, under fresh names."""

    def __init__(self, graph: Graph) -> None:
        self.name = Namer(graph)
        self._constants: dict[str, gs.Constant] = {}

    def constant(self, key: str, values: Array) -> gs.Constant:
        """An initializer; the same key gives the same one, in whichever body it is asked for."""
        if key not in self._constants:
            self._constants[key] = constant(self.name(key), values)
        return self._constants[key]

    def shared(self, name: str, values: Array) -> gs.Constant:
        """An initializer, the same one for equal values of one type: tied weights stay tied."""
        digest = hashlib.blake2b(
            np.ascontiguousarray(values).view(np.uint8).data, digest_size=16
        ).hexdigest()
        key = f"{values.dtype}{values.shape}{digest}"
        if key not in self._constants:
            self._constants[key] = constant(self.name(name), values)
        return self._constants[key]

    def emit(
        self, body: Graph, op: str, inputs: list[gs.Tensor], base: str, **attrs: object
    ) -> gs.Variable:
        """Append a node to a graph or body, named after `base`; its one output."""
        out = gs.Variable(self.name(f"{base}_{op}_out"))
        body.nodes.append(gs.Node(op, self.name(f"{base}_{op}"), attrs, inputs, [out]))
        return out


def constant(name: str, values: Array) -> gs.Constant:
    """An initializer; large values wait on disk.

    2- and 4-bit values are packed, which graphsurgeon alone cannot export.
    """
    if values.nbytes >= LARGE and values.dtype.kind in "fiu":
        return gs.Constant(name, spooled(name, values))
    if values.dtype.kind not in "fiubcUSO":
        proto = onnx.numpy_helper.from_array(values, name)
        return gs.Constant(name, gs.ir.tensor.LazyValues(proto))
    return gs.Constant(name, np.asarray(values, order="C"))


def renamed(tensor: gs.Constant, name: str) -> gs.Constant:
    """The same values under another name, which a lazy tensor carries in a proto of its own."""
    values = tensor._values
    if isinstance(values, gs.ir.tensor.LazyValues):
        values = shallow_copy(values)
        proto = onnx.TensorProto()
        proto.CopyFrom(values.tensor)
        values.tensor = proto
    return gs.Constant(name, values)


def set_values(tensor: gs.Constant, values: Array) -> None:
    """Give an initializer other values, of another type if need be."""
    tensor._values = constant(tensor.name, values)._values
    tensor.export_dtype = tensor.data_location = None


def share_values(tensor: gs.Constant, other: gs.Constant) -> None:
    """Give an initializer the values of another, which are kept once."""
    tensor._values = other._values
    tensor.export_dtype = tensor.data_location = None


def replace_node(body: Graph, node: Node, result: gs.Variable) -> None:
    """Take a node out; the node that makes `result` makes its output instead."""
    out, maker = node.outputs[0], result.inputs[0]
    node.inputs.clear()
    node.outputs.clear()
    body.nodes.remove(node)
    maker.outputs[maker.outputs.index(result)] = out


def replace_input(node: Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make one node read `new` wherever it read `old`."""
    for slot, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[slot] = new


def bypass(graph: Graph, node: Node) -> bool:
    """Remove a node that hands on its first input; False if graph inputs and outputs forbid it."""
    source, target = node.inputs[0], node.outputs[0]
    if is_output(graph, target):
        maker = producer(source)
        if maker is None or not owns(graph, maker) or is_output(graph, source):
            return False
        # The output keeps its name: the producer writes it, other readers follow.
        maker.outputs[maker.outputs.index(source)] = target
        node.outputs.clear()
        for reader in list(source.outputs):
            replace_input(reader, source, target)
    else:
        for reader in list(target.outputs):
            replace_input(reader, target, source)
        node.outputs.clear()
    node.inputs.clear()
    graph.nodes.remove(node)
    return True


def tidy(graph: Graph) -> None:
    """Drop what nothing reads and put nodes in order."""
    graph.cleanup(remove_unused_graph_inputs=False)
    sort(graph)


def sort(graph: Graph) -> None:
    """Put nodes in topological order, bodies too; those that are in order stay as they are.

    Raises OnnxqError for a cycle and for a tensor that two nodes write.
    """
    maker: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for tensor in node.outputs:
            if tensor.name and maker.setdefault(tensor.name, index) != index:
                raise OnnxqError(f"two nodes write {tensor.name!r}")
    needs = [{maker[name] for name in _names_read(node) if name in maker} for node in graph.nodes]
    readers: list[list[int]] = [[] for _ in needs]
    for index, need in enumerate(needs):
        for source in need:
            readers[source].append(index)
    ready = [index for index, need in enumerate(needs) if not need]
    order: list[Node] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(graph.nodes[index])
        for reader in readers[index]:
            needs[reader].discard(index)
            if not needs[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(needs):
        stuck = next(node for node, need in zip(graph.nodes, needs, strict=True) if need)
        raise OnnxqError(f"the graph has a cycle through node {stuck.name or stuck.op!r}")
    graph.nodes = order
    for node in order:
        for body in bodies(node):
            sort(body)


def _names_read(node: Node) -> set[str]:
    """The tensors that a node reads, those that its bodies read from outside included."""
    names = {t.name for t in node.inputs}
    for body in bodies(node):
        inside = {t.name for t in body.inputs}
        read = {t.name for t in body.outputs}
        for inner in body.nodes:
            inside |= {t.name for t in inner.outputs}
            read |= _names_read(inner)
        names |= read - inside
    return names


def name_nodes(graph: Graph) -> int:
    """Give every node a name of its own: the plan and the report speak of nodes by name."""
    seen: set[str] = set()
    renamed = 0
    for node in walk(graph):
        if not node.name or node.name in seen:
            base = node.name or (node.outputs[0].name if node.outputs else node.op) or node.op
            number, name = 1, base
            while name in seen:
                number, name = number + 1, f"{base}_{number}"
            node.name, renamed = name, renamed + 1
        seen.add(node.name)
    return renamed


def name_tensors(graph: Graph) -> int:
    """Give every tensor of every body a name of its own: two branches may use one name twice."""
    owners: dict[str, gs.Tensor] = {}
    renamed_ones = 0
    namer: Namer | None = None
    for body in subgraphs(graph):
        for tensor in body.tensors().values():
            owner = owners.setdefault(tensor.name, tensor)
            if owner is tensor or (is_constant(tensor) and _same_values(tensor, owner)):
                continue
            namer = namer or Namer(graph)
            name = namer(f"{tensor.name}_{body.name or 'body'}")
            if is_constant(tensor):
                tensor._values = renamed(tensor, name)._values
            tensor.name = name
            owners[name], renamed_ones = tensor, renamed_ones + 1
    return renamed_ones


def _same_values(tensor: gs.Tensor, other: gs.Tensor) -> bool:
    return is_constant(other) and tensor._values is other._values
