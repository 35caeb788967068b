"""Between files, ModelProtos and graphs: weights stay where they are until somebody reads them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.errors import OnnxqError, one_line
from onnxq.graph.contrib import use_stand_ins
from onnxq.graph.edit import constant, name_nodes, name_tensors, tidy
from onnxq.graph.walk import (
    Array,
    Graph,
    constants,
    dtype,
    is_constant,
    subgraphs,
    tensors,
    values,
)
from onnxq.storage import ExternalValues, load_proto, save_proto
from onnxq.tensors import graphs

LARGE_NUMBERS = 1 << 16  # in an initializer that is worth leaving out of a ModelProto
CARRIED = "onnxq_carried"  # what graphsurgeon drops: kept on the graph as a ModelProto shell
_MAPPED = 1 << 30  # bytes of external weights; more are read by a session from their files


def load(
    source: str | Path | onnx.ModelProto, folder: Path | None = None, *, operators: bool = True
) -> Graph:
    """A graph from a file or a ModelProto; external weights are read only when somebody asks.

    `folder` is where a ModelProto that was read from a file has its external weights. Local
    functions are inlined, without `operators` those for which onnxq has kernels as well; nodes and
    the tensors of bodies get names of their own.
    """
    keep = ops.WITH_KERNELS if operators else ()
    model = source if isinstance(source, onnx.ModelProto) else load_proto(source, keep)
    try:
        if model.functions:
            model = onnx.inliner.inline_selected_functions(model, list(keep), exclude=True)
            del model.functions[:]  # those kept come again with the nodes that name them
        graph = gs.import_onnx(model)
    except Exception as error:
        text = one_line(error)
        raise OnnxqError(f"this model cannot be read: {text}; check it with onnx.checker") from None
    if not isinstance(source, onnx.ModelProto):
        folder = Path(source).parent
    if folder is not None:
        for constant in constants(graph):
            values = constant._values
            if isinstance(values, gs.ir.tensor.LazyValues) and values.tensor.external_data:
                constant._values = ExternalValues(values.tensor, folder)
                constant.data_location = None  # new values of the constant are in no file
    graph.__dict__[CARRIED] = onnx.ModelProto(
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
    _hoist(model, graph)
    named = _add_functions(model)
    shell = graph.__dict__.get(CARRIED, onnx.ModelProto())
    model.MergeFrom(shell)
    _name_operators(model, named)
    # A newer opset, and the types it brings, need a newer format.
    # Before format 4 initializers had to be inputs as well.
    model.ir_version = max(minimum_ir_version(graph.opset), shell.ir_version, 4)
    model.producer_name, model.producer_version = "onnxq", ""
    return model


def _add_functions(model: onnx.ModelProto) -> list[str]:
    """The functions of the project's own domain that the nodes name, with all that those call."""
    named = sorted(
        {n.op_type for proto in graphs(model) for n in proto.node if n.domain == ops.DOMAIN}
    )
    if not named:
        return []
    standard = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    model.functions.extend(ops.closure(named, standard))
    if not any(o.domain == ops.DOMAIN for o in model.opset_import):
        model.opset_import.add(domain=ops.DOMAIN, version=ops.VERSION)
    return named


def _name_operators(model: onnx.ModelProto, named: list[str]) -> None:
    """Say in the metadata which operators have kernels: a runtime may register their library."""
    text = ", ".join(name for name in named if name in ops.OPERATORS)
    known = {entry.key: entry.value for entry in model.metadata_props}
    if known.pop(ops.METADATA, "") != text:
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, known | ({ops.METADATA: text} if text else {}))


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
    unambiguous = same_everywhere(light)
    for tensor in constants(light):
        name = tensor.name
        large = name in unambiguous and math.prod(tensor.shape) >= LARGE_NUMBERS
        kind = dtype(tensor)
        if kind is None or kind.kind not in "fiu" or not large:
            if isinstance(tensor._values, ExternalValues):  # a session looks in no other folder
                tensor._values = constant(name, values(tensor))._values
            continue
        if name not in stubs:
            weights[name] = np.ascontiguousarray(values(tensor))
            stubs[name] = stub(tensor)
        tensor._values = stubs[name]
    return to_proto(light), weights


def stub(tensor: gs.Constant) -> gs.ir.tensor.LazyValues:
    """A tensor's name, type and shape, with its values said to be elsewhere."""
    proto = onnx.TensorProto(
        name=tensor.name,
        dims=tensor.shape,
        data_type=gs.exporters.onnx_exporter.dtype_to_onnx(tensor.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    proto.external_data.add(key="location", value="in-memory")
    return gs.ir.tensor.LazyValues(proto)


def same_everywhere(graph: Graph) -> set[str]:
    """Names of constants that mean one thing in the graph and in all bodies."""
    owners: dict[str, set[int]] = {}
    for body in subgraphs(graph):
        for name, tensor in body.tensors().items():
            values_of = id(tensor._values) if is_constant(tensor) else 0
            owners.setdefault(name, set()).add(values_of)
    return {name for name, owner in owners.items() if len(owner) == 1 and 0 not in owner}


def _hoist(model: onnx.ModelProto, graph: Graph) -> None:
    """Keep a weight that bodies read once, in the outermost graph, not in every body."""
    proto, *bodies = graphs(model)
    if not bodies:
        return
    unambiguous = same_everywhere(graph)
    times = Counter(t.name for body in bodies for t in body.initializer)
    known = {t.name for t in proto.initializer}
    for body in bodies:
        kept = []
        for tensor in body.initializer:
            shared = tensor.name in known or times[tensor.name] > 1
            large = math.prod(tensor.dims) >= LARGE_NUMBERS
            if tensor.name not in unambiguous or not (shared or large):
                kept.append(tensor)
            elif tensor.name not in known:
                proto.initializer.append(tensor)
                known.add(tensor.name)
        del body.initializer[:]
        body.initializer.extend(kept)


def save(graph: Graph, path: str | Path) -> int:
    """Write a graph whole or not at all. Returns the bytes written."""
    return save_proto(to_proto(graph), path)


def copy(graph: Graph) -> Graph:
    """A copy of nodes and tensors that shares the weights' values."""
    twin = graph.copy()
    twin.import_domains = [*graph.import_domains] if graph.import_domains else None
    if CARRIED in graph.__dict__:
        twin.__dict__[CARRIED] = graph.__dict__[CARRIED]
    return twin


def cut(graph: Graph, inputs: Mapping[str, Any], outputs: Sequence[str]) -> Graph:
    """The part of a graph that makes `outputs` of `inputs`, as a graph of its own.

    `inputs` gives the element type of each.
    """
    part = copy(graph)
    known = part.tensors()
    for name, kind in inputs.items():
        known[name].inputs.clear()
        known[name].dtype, known[name].shape = np.dtype(kind), None
    part.inputs = [known[name] for name in inputs]
    part.outputs = [known[name] for name in outputs]
    tidy(part)
    return part


def set_metadata(graph: Graph, entries: dict[str, str]) -> None:
    """Add or replace metadata_props of the model that will be saved."""
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.__dict__.get(CARRIED, shell))
    kept = [p for p in shell.metadata_props if p.key not in entries]
    old = {p.key: p.value for p in kept}
    del shell.metadata_props[:]
    onnx.helper.set_model_props(shell, old | entries)
    graph.__dict__[CARRIED] = shell


def minimum_ir_version(opset: int) -> int:
    """The oldest IR version that may carry an opset, from ONNX's own version table."""
    rows: list[Any] = onnx.helper.VERSION_TABLE
    fitting = [row[1] for row in rows if row[2] >= opset]
    return min(fitting) if fitting else onnx.IR_VERSION


def infer_types(graph: Graph) -> None:
    """Give tensors whose type is not declared the one that follows from what makes them."""
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in _inferred(graph)
        if value.type.tensor_type.elem_type
    }
    for name, tensor in tensors(graph).items():
        if tensor.dtype is None and name in types:
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(types[name])


def shapes(graph: Graph) -> dict[str, tuple[int | str | None, ...]]:
    """The shape of every tensor of which the rank is known, those of bodies and constants too.

    Of a dimension: its size, a name that stands for one unknown size, or None.
    """
    found: dict[str, tuple[int | str | None, ...]] = {
        name: tuple(tensor.shape) for name, tensor in tensors(graph).items()
        if isinstance(tensor, gs.Constant)
    }  # fmt: skip
    for value in _inferred(graph, data_prop=True):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims
            )
    return found


def _inferred(graph: Graph, data_prop: bool = False) -> list[onnx.ValueInfoProto]:
    """What follows of tensors from what makes them; `data_prop` follows sizes through Reshape."""
    light = copy(graph)
    for tensor in constants(light):
        if math.prod(tensor.shape) >= LARGE_NUMBERS:
            tensor._values = stub(tensor)
    model = to_proto(light)
    use_stand_ins(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=data_prop)
    except Exception:  # of a model that contradicts itself; what is not known stays unknown
        return []
    return [
        value
        for body in graphs(inferred)
        for value in (*body.input, *body.value_info, *body.output)
        if value.type.HasField("tensor_type")
    ]
