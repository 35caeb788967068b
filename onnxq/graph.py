"""The graph: `onnx_graphsurgeon.Graph`, with what it lacks. Only this file knows weight layouts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from copy import copy as shallow_copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.logger import G_LOGGER

from onnxq.errors import OnnxqError
from onnxq.spool import LARGE, spooled
from onnxq.storage import ExternalValues, load_proto, save_proto

Array = NDArray[Any]
Graph: TypeAlias = gs.Graph
Node: TypeAlias = gs.Node

_LARGE = 1 << 16  # numbers in an initializer that is worth leaving out of a ModelProto
_MAPPED = 1 << 30  # bytes of external weights; more are read by a session from their files
_CARRIED = "onnxq_carried"  # what graphsurgeon drops: kept on the graph as a ModelProto shell
G_LOGGER.severity = G_LOGGER.ERROR  # its warnings are of no use to whoever reads ours
_STANDARD_DOMAINS = (None, "", "ai.onnx")


# ── load, save, copy ─────────────────────────────────────────────────────────────────────────────


def load(source: str | Path | onnx.ModelProto) -> Graph:
    """A graph from a file or a ModelProto; external weights are read only when somebody asks.

    Local functions are inlined; nodes and the tensors of bodies get names of their own.
    """
    model = source if isinstance(source, onnx.ModelProto) else load_proto(source)
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        graph = gs.import_onnx(model)
    except Exception as error:
        text = " ".join(str(error).split())
        raise OnnxqError(f"this model cannot be read: {text}; check it with onnx.checker") from None
    if not isinstance(source, onnx.ModelProto):
        folder = Path(source).parent
        for constant in constants(graph):
            values = constant._values
            if isinstance(values, gs.ir.tensor.LazyValues) and values.tensor.external_data:
                constant._values = ExternalValues(values.tensor, folder)
                constant.data_location = None  # new values of the constant are in no file
    graph.__dict__[_CARRIED] = onnx.ModelProto(
        ir_version=model.ir_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        metadata_props=model.metadata_props,
    )
    name_tensors(graph)
    name_nodes(graph)
    return graph


def to_proto(graph: Graph) -> onnx.ModelProto:
    """The ModelProto of a graph, metadata and doc string included."""
    model = gs.export_onnx(graph, do_type_check=False)
    _hoist(model.graph, graph)
    shell = graph.__dict__.get(_CARRIED, onnx.ModelProto())
    model.MergeFrom(shell)
    # A newer opset, and the types it brings, need a newer format.
    # Before format 4 initializers had to be inputs as well.
    model.ir_version = max(minimum_ir_version(graph.opset), shell.ir_version, 4)
    model.producer_name, model.producer_version = "onnxq", ""
    return model


def to_proto_without_weights(graph: Graph) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The ModelProto with large initializers left out, and those by name.

    A session takes them from memory (`Session(initializers=…)`), so that they need not be
    serialized. It copies them: where they are many, they stay in their files, which it maps.
    """
    outside = {c.name: c._values for c in constants(graph) if isinstance(c._values, ExternalValues)}
    if sum(values.nbytes for values in outside.values()) > _MAPPED:
        return to_proto(graph), {}
    light, stubs = copy(graph), dict[str, gs.ir.tensor.LazyValues]()
    weights: dict[str, Array] = {}
    unambiguous = _same_everywhere(light)
    for tensor in constants(light):
        name = tensor.name
        large = name in unambiguous and math.prod(tensor.shape) >= _LARGE
        kind = dtype(tensor)
        if kind is None or kind.kind not in "fiu" or not large:
            if isinstance(tensor._values, ExternalValues):  # a session looks in no other folder
                tensor._values = constant(name, values(tensor))._values
            continue
        if name not in stubs:
            weights[name] = np.ascontiguousarray(values(tensor))
            stubs[name] = _stub(tensor)
        tensor._values = stubs[name]
    return to_proto(light), weights


def _stub(tensor: gs.Constant) -> gs.ir.tensor.LazyValues:
    """A tensor's name, type and shape, with its values said to be elsewhere."""
    proto = onnx.TensorProto(
        name=tensor.name,
        dims=tensor.shape,
        data_type=gs.exporters.onnx_exporter.dtype_to_onnx(tensor.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    proto.external_data.add(key="location", value="in-memory")
    return gs.ir.tensor.LazyValues(proto)


def _same_everywhere(graph: Graph) -> set[str]:
    """Names of constants that mean one thing in the graph and in all bodies."""
    owners: dict[str, set[int]] = {}
    for body in subgraphs(graph):
        for name, tensor in body.tensors().items():
            values_of = id(tensor._values) if is_constant(tensor) else 0
            owners.setdefault(name, set()).add(values_of)
    return {name for name, owner in owners.items() if len(owner) == 1 and 0 not in owner}


def _hoist(proto: onnx.GraphProto, graph: Graph) -> None:
    """Keep a weight that bodies read once, in the outermost graph, not in every body."""
    bodies = list(_body_protos(proto))
    if not bodies:
        return
    unambiguous = _same_everywhere(graph)
    seen = [t.name for body in bodies for t in body.initializer]
    known = {t.name for t in proto.initializer}
    for body in bodies:
        kept = []
        for tensor in body.initializer:
            shared = tensor.name in known or seen.count(tensor.name) > 1
            large = math.prod(tensor.dims) >= _LARGE
            if tensor.name not in unambiguous or not (shared or large):
                kept.append(tensor)
            elif tensor.name not in known:
                proto.initializer.append(tensor)
                known.add(tensor.name)
        del body.initializer[:]
        body.initializer.extend(kept)


def _body_protos(proto: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Every body inside a graph, innermost last."""
    for node in proto.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node or body.output:
                    yield body
                    yield from _body_protos(body)


def save(graph: Graph, path: str | Path) -> int:
    """Write a graph whole or not at all. Returns the bytes written."""
    return save_proto(to_proto(graph), path)


def copy(graph: Graph) -> Graph:
    """A copy of nodes and tensors that shares the weights' values."""
    twin = graph.copy()
    if _CARRIED in graph.__dict__:
        twin.__dict__[_CARRIED] = graph.__dict__[_CARRIED]
    return twin


def set_metadata(graph: Graph, entries: dict[str, str]) -> None:
    """Add or replace metadata_props of the model that will be saved."""
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.__dict__.get(_CARRIED, shell))
    kept = [p for p in shell.metadata_props if p.key not in entries]
    old = {p.key: p.value for p in kept}
    del shell.metadata_props[:]
    onnx.helper.set_model_props(shell, old | entries)
    graph.__dict__[_CARRIED] = shell


def minimum_ir_version(opset: int) -> int:
    """The oldest IR version that may carry an opset, from ONNX's own version table."""
    rows: list[Any] = onnx.helper.VERSION_TABLE
    fitting = [row[1] for row in rows if row[2] >= opset]
    return min(fitting) if fitting else onnx.IR_VERSION


def raise_opset(graph: Graph, opset: int) -> Graph:
    """The same graph at `opset` or newer, converted by ONNX's version converter."""
    if graph.opset >= opset:
        return graph
    light = copy(graph)
    kept: dict[str, Any] = {}  # large weights stay out of the converter, which copies its input
    stubs: dict[int, gs.ir.tensor.LazyValues] = {}  # what bodies share they go on sharing
    for tensor in constants(light):
        if math.prod(tensor.shape) >= _LARGE:
            kept[tensor.name] = held = tensor._values
            tensor._values = stubs.setdefault(id(held), _stub(tensor))
    model = to_proto(light)
    try:
        converted = _converted(model, opset)
    except Exception as error:
        text = " ".join(str(error).split())
        raise OnnxqError(
            f"this model uses opset {graph.opset} and could not be raised to {opset} ({text}); "
            "export it again with a newer opset"
        ) from None
    raised = load(converted)
    for tensor in constants(raised):
        tensor._values = kept.get(tensor.name, tensor._values)
    raised.__dict__[_CARRIED] = graph.__dict__.get(_CARRIED)
    return raised


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Through the version converter, bodies each by themselves, which it would leave as they are.

    The converter wants initializers apart from inputs; what a body reads from outside is given to
    it as inputs meanwhile.
    """
    bodies = [
        (node.output[0], attribute.name, attribute.g)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
    ]
    done: dict[tuple[str, str], onnx.GraphProto] = {}
    for output, name, body in bodies:
        alone = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        alone.graph.CopyFrom(body)
        outside = sorted(_read_from_outside(body))
        alone.graph.input.extend(onnx.ValueInfoProto(name=tensor) for tensor in outside)
        converted = _converted(alone, opset).graph
        kept = [value for value in converted.input if value.name not in outside]
        del converted.input[:]
        converted.input.extend(kept)
        done[output, name] = converted
    names = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, minimum_ir_version(opset))
    result = onnx.version_converter.convert_version(model, opset)
    for node in result.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                attribute.g.CopyFrom(done[node.output[0], attribute.name])
    return result


def _read_from_outside(body: onnx.GraphProto) -> set[str]:
    made = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    read: set[str] = {value.name for value in body.output}
    for node in body.node:
        made |= set(node.output)
        read |= set(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                read |= _read_from_outside(attribute.g)
    return read - made - {""}


# ── walking ──────────────────────────────────────────────────────────────────────────────────────


def subgraphs(graph: Graph) -> Iterator[Graph]:
    """The graph and every If, Loop and Scan body inside it, outermost first."""
    yield graph
    for node in graph.nodes:
        for body in bodies(node):
            yield from subgraphs(body)


def bodies(node: Node) -> list[Graph]:
    """The graphs inside a control-flow node, one level deep."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def walk(graph: Graph) -> Iterator[Node]:
    """Every node, bodies of control flow included, in order."""
    for inner in subgraphs(graph):
        yield from inner.nodes


def constants(graph: Graph) -> Iterator[gs.Constant]:
    """Every initializer that some node reads, each once."""
    seen: set[int] = set()
    for node in walk(graph):
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def tensors(graph: Graph) -> dict[str, gs.Tensor]:
    """Every tensor by name, those of bodies included."""
    found: dict[str, gs.Tensor] = {}
    for body in subgraphs(graph):
        found = body.tensors() | found
    return found


def is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


def dtype(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """A tensor's element type; ml_dtypes' where NumPy has none, None where it is unknown."""
    if isinstance(tensor.dtype, int):
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype))
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


def infer_types(graph: Graph) -> None:
    """Give tensors whose type is not declared the one that follows from what makes them."""
    light = copy(graph)
    for tensor in constants(light):
        if math.prod(tensor.shape) >= _LARGE:
            tensor._values = _stub(tensor)
    try:
        inferred = onnx.shape_inference.infer_shapes(to_proto(light))
    except Exception:  # of a model that contradicts itself; what is not known stays unknown
        return
    types = {
        value.name: value.type.tensor_type.elem_type
        for body in (inferred.graph, *_body_protos(inferred.graph))
        for value in (*body.value_info, *body.output)
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type
    }
    for name, tensor in tensors(graph).items():
        if tensor.dtype is None and name in types:
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(types[name])


def is_float(tensor: gs.Tensor) -> bool:
    """float16, float32 or float64."""
    kind = dtype(tensor)
    return kind is not None and kind.kind == "f"


def set_values(tensor: gs.Constant, values: Array) -> None:
    """Give an initializer other values, of another type if need be."""
    tensor._values = constant(tensor.name, values)._values
    tensor.export_dtype = None


def values(tensor: gs.Constant) -> Array:
    """The values of an initializer, read now and kept by nobody."""
    lazy = isinstance(tensor._values, gs.ir.tensor.LazyValues)
    return np.asarray(tensor._values.load() if lazy else tensor.values)


def is_idle_cast(node: Node) -> bool:
    """A Cast to the type that its input has."""
    if node.op != "Cast" or not is_standard(node):
        return False
    kind = dtype(node.inputs[0])
    return kind is not None and onnx.helper.np_dtype_to_tensor_dtype(kind) == node.attrs["to"]


def is_standard(node: Node) -> bool:
    return node.domain in _STANDARD_DOMAINS


def producer(tensor: gs.Tensor) -> Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def owns(graph: Graph, node: Node) -> bool:
    """Whether a node stands in this very graph, not in a body or in what encloses it."""
    return any(node is own for own in graph.nodes)


def is_output(graph: Graph, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in graph.outputs)


def sole_consumer(graph: Graph, tensor: gs.Tensor) -> Node | None:
    """The one node that reads a tensor, or None when several do or the world does."""
    if is_output(graph, tensor) or len(tensor.outputs) != 1:
        return None
    return tensor.outputs[0]


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


# ── editing ──────────────────────────────────────────────────────────────────────────────────────


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

    def emit(
        self, body: Graph, op: str, inputs: list[gs.Tensor], base: str, **attrs: object
    ) -> gs.Variable:
        """Append a node to a graph or body, named after `base`; its one output."""
        out = gs.Variable(self.name(f"{base}_{op}_out"))
        body.nodes.append(gs.Node(op, self.name(f"{base}_{op}"), attrs, inputs, [out]))
        return out


def replace_node(body: Graph, node: Node, result: gs.Variable) -> None:
    """Take a node out; the node that makes `result` makes its output instead."""
    out, maker = node.outputs[0], result.inputs[0]
    node.inputs.clear()
    node.outputs.clear()
    body.nodes.remove(node)
    maker.outputs[maker.outputs.index(result)] = out


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


# ── weights ──────────────────────────────────────────────────────────────────────────────────────


RECURRENT = ("LSTM", "GRU", "RNN")


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


_WEIGHT_SLOTS = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (1,), "Gather": (0,),
    "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip


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
