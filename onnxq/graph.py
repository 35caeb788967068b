"""The graph: `onnx_graphsurgeon.Graph`, with what it lacks. Only this file knows weight layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy as shallow_copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.storage import ExternalValues, load_proto, save_proto

Array = NDArray[Any]
Graph: TypeAlias = gs.Graph
Node: TypeAlias = gs.Node

_LARGE = 1 << 16  # numbers in an initializer that is worth leaving out of a ModelProto
_CARRIED = "onnxq_carried"  # what graphsurgeon drops: kept on the graph as a ModelProto shell
_STANDARD_DOMAINS = (None, "", "ai.onnx")


# ── load, save, copy ─────────────────────────────────────────────────────────────────────────────


def load(source: str | Path | onnx.ModelProto) -> Graph:
    """A graph from a file or a ModelProto; external weights are read only when somebody asks."""
    model = source if isinstance(source, onnx.ModelProto) else load_proto(source)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    graph = gs.import_onnx(model)
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
    return graph


def to_proto(graph: Graph) -> onnx.ModelProto:
    """The ModelProto of a graph, metadata and doc string included."""
    model = gs.export_onnx(graph)
    shell = graph.__dict__.get(_CARRIED, onnx.ModelProto())
    model.MergeFrom(shell)
    # A newer opset, and the types it brings, need a newer format.
    model.ir_version = max(minimum_ir_version(graph.opset), shell.ir_version)
    model.producer_name, model.producer_version = "onnxq", ""
    return model


def to_proto_without_weights(graph: Graph) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The ModelProto with large initializers left out, and those by name.

    A session takes them as they are in memory (`Session(initializers=…)`), so that a model of any
    size is neither copied nor serialized to be run.
    """
    light, weights = copy(graph), {}
    for tensor in light.tensors().values():
        if not is_constant(tensor):
            continue
        if np.dtype(tensor.dtype).kind not in "fiu" or math.prod(tensor.shape) < _LARGE:
            if isinstance(tensor._values, ExternalValues):  # a session looks in no other folder
                tensor._values = constant(tensor.name, tensor.values)._values
            continue
        weights[tensor.name] = np.ascontiguousarray(tensor.values)
        stub = onnx.TensorProto(
            name=tensor.name,
            dims=tensor.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        stub.external_data.add(key="location", value="in-memory")
        tensor._values = gs.ir.tensor.LazyValues(stub)
    return to_proto(light), weights


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
    model = to_proto(graph)
    # The converter wants initializers apart from inputs, and only standard opsets to convert.
    names = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, minimum_ir_version(opset))
    try:
        converted = onnx.version_converter.convert_version(model, opset)
    except Exception as error:
        raise OnnxqError(
            f"this model uses opset {graph.opset} and could not be raised to {opset} ({error}); "
            "export it again with a newer opset"
        ) from None
    raised = load(converted)
    raised.__dict__[_CARRIED] = graph.__dict__.get(_CARRIED)
    return raised


# ── walking ──────────────────────────────────────────────────────────────────────────────────────


def subgraphs(graph: Graph) -> Iterator[Graph]:
    """The graph and every If, Loop and Scan body inside it, outermost first."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from subgraphs(value)


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


def is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


def is_standard(node: Node) -> bool:
    return node.domain in _STANDARD_DOMAINS


def producer(tensor: gs.Tensor) -> Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def is_output(graph: Graph, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in graph.outputs)


def sole_consumer(graph: Graph, tensor: gs.Tensor) -> Node | None:
    """The one node that reads a tensor, or None when several do or the world does."""
    if is_output(graph, tensor) or len(tensor.outputs) != 1:
        return None
    return tensor.outputs[0]


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


def constant(name: str, values: Array) -> gs.Constant:
    """An initializer; 2- and 4-bit values are packed, which graphsurgeon alone cannot export."""
    if values.dtype.itemsize == 1 and values.dtype.kind not in "iub":
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
        ours = maker is not None and any(maker is other for other in graph.nodes)
        if maker is None or not ours or is_output(graph, source) or is_constant(source):
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
    graph.cleanup(remove_unused_graph_inputs=False).toposort()


# ── weights ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class WeightView:
    """A node's weight seen as a matrix W (out, in), whatever layout the operator stores.

    Columns stand in the order in which integer kernels add their products, which is also the order
    of rows in an unfolded input: for Conv, kernel positions outermost, input channels fastest.
    """

    node: Node
    slot: int = 1

    @property
    def tensor(self) -> gs.Constant:
        return self.node.inputs[self.slot]

    @property
    def axis(self) -> int:
        """The axis of the stored tensor that holds output channels."""
        match self.node.op:
            case "MatMul":
                return 1
            case "ConvTranspose":
                return 1
            case "Gemm":
                return 0 if self.node.attrs.get("transB", 0) else 1
        return 0

    @property
    def groups(self) -> int:
        return int(self.node.attrs.get("group", 1))

    def matrix(self) -> NDArray[np.float32]:
        """W (out, in), float32."""
        return self.to_matrix(np.asarray(self.tensor.values)).astype(np.float32, copy=False)

    def to_matrix(self, stored: Array) -> Array:
        match self.node.op:
            case "Conv":  # (out, in/groups, *kernel)
                return np.moveaxis(stored, 1, -1).reshape(stored.shape[0], -1)
            case "ConvTranspose":  # (in, out/groups, *kernel); a scale belongs to axis 1
                return np.moveaxis(stored, (1, 0), (0, -1)).reshape(stored.shape[1], -1)
            case "Gather":
                return stored.reshape(stored.shape[0], -1)
        if self.axis == 1:  # (in, out)
            return stored.T
        return stored.reshape(stored.shape[0], -1) if stored.ndim else stored.reshape(1, 1)

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
        if self.axis == 1 and self.node.op != "Gather":
            return np.ascontiguousarray(matrix.T)
        return np.ascontiguousarray(matrix.reshape(shape))

    @property
    def block_axis(self) -> int:
        """The stored axis along which blocks of input columns lie."""
        return 1 - self.axis

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


_WEIGHT_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")


def weight_view(node: Node) -> WeightView | None:
    """The matrix view of a node's constant float weight, or None where it has none we can see."""
    if node.op not in _WEIGHT_OPS or not is_standard(node):
        return None
    slot = 0 if node.op == "Gather" else 1
    if len(node.inputs) <= slot or not is_constant(node.inputs[slot]):
        return None
    tensor = node.inputs[slot]
    rank = len(tensor.shape)
    if np.dtype(tensor.dtype).kind != "f" or 0 in tensor.shape:
        return None
    fits = rank == 2 if node.op in ("Gemm", "MatMul") else rank >= 2
    if not fits or (node.op == "Gather" and node.attrs.get("axis", 0) != 0):
        return None
    return WeightView(node, slot)


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
            bounds[slot] = float(tensor.values)
    return bounds[0], bounds[1]


def input_channel_axis(node: Node) -> int:
    """The axis of a node's data input that holds the channels its weight's columns run over."""
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        return 0
    return 1 if node.op in ("Conv", "ConvTranspose") else -1
