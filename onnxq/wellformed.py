"""What must hold of a model before anything can be done with it.

Less than ONNX's checker asks: runtimes accept operators that it does not know, and nodes in any
order. What is refused here breaks every tool, and is said in words that name the place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from onnxq.errors import OnnxqError
from onnxq.tensors import (
    bodies,
    every_node,
    graphs,
    initializers,
    is_external,
    nbytes,
    other_tensors,
)

_STANDARD = ("", "ai.onnx")
_COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
_KINDS = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
}  # of attributes that survive a change of the graph, and the field that holds each
_MOST_NODES = 1_000_000


def check(model: ModelProto) -> None:
    """Raises OnnxqError, naming tensor or node, for a model that cannot mean anything.

    The model has no functions of its own any more, and no sparse tensors.
    """
    if not model.graph.output:
        raise OnnxqError("the model has no outputs, so nothing can be computed; export it again")
    domains = {entry.domain for entry in model.opset_import}
    if not domains & set(_STANDARD) and any(n.domain in _STANDARD for n in model.graph.node):
        raise OnnxqError("the model does not say which opset it uses; export it again")
    for value in (*model.graph.input, *model.graph.output):
        _check_type(value, required=True)
    for graph in graphs(model):
        for value in chain(graph.input, graph.output, graph.value_info):
            _check_type(value, required=False)
    for node in every_node(model.graph.node):
        _check_attributes(node)
    for tensor in chain(initializers(model), other_tensors(model)):
        _check_size(tensor)
    for name, reader in _check_graph(model.graph, ()).items():
        raise OnnxqError(f"{reader} reads {name!r}, which nothing makes; export the model again")


def check_functions(model: ModelProto) -> None:
    """Raises OnnxqError where functions cannot be written out in the graph: one calls itself, at
    whatever depth, or what comes out has no bounds."""
    sizes: dict[tuple[str, str], int] = {}
    waiting = {
        (f.domain, f.name): [(n.domain, n.op_type) for n in every_node(f.node)]
        for f in model.functions
    }
    while ready := [key for key, calls in waiting.items() if not any(c in waiting for c in calls)]:
        for key in ready:
            sizes[key] = sum(sizes.get(called, 1) for called in waiting.pop(key))
    if waiting:
        domain, name = next(iter(waiting))
        raise OnnxqError(f"the model's function {domain}:{name} calls itself; export it again")
    whole = sum(sizes.get((n.domain, n.op_type), 1) for n in every_node(model.graph.node))
    if whole > _MOST_NODES:
        raise OnnxqError(f"the model's functions stand for {whole} nodes, more than anything runs")


def check_text(message: Message) -> None:
    """That names and texts are UTF-8; where they are not, protobuf hands on bytes."""
    if isinstance(message, TensorProto):  # whose numbers are many, and no text
        message = TensorProto(
            name=message.name, doc_string=message.doc_string, external_data=message.external_data
        )
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            for text in value if field.is_repeated else (value,):
                if not isinstance(text, str):
                    raise OnnxqError(
                        f"the model holds the {field.name} {text[:40]!r}, which is not UTF-8 text; "
                        "the file is damaged, or wrongly exported"
                    )
        elif field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else (value,):
                check_text(part)


def _check_type(value: ValueInfoProto, required: bool) -> None:
    """That a value is a tensor, or a sequence of tensors, of a type that ONNX knows."""
    kind = value.type.WhichOneof("value")
    if not required and not value.type.ByteSize():
        return
    if kind not in ("tensor_type", "sequence_type", "sparse_tensor_type"):
        what = "of no type" if kind is None else f"of the type {kind.removesuffix('_type')}"
        raise OnnxqError(f"the model's {value.name!r} is {what}, which cannot be quantized")
    inner = value.type.sequence_type.elem_type if kind == "sequence_type" else value.type
    number = getattr(inner, inner.WhichOneof("value") or "tensor_type").elem_type
    if number not in TensorProto.DataType.values() or (required and not number):
        raise OnnxqError(
            f"the model's {value.name!r} has the unknown type {number}; export it again"
        )


def _check_attributes(node: NodeProto) -> None:
    """That the attributes of a node can be kept as they are."""
    for attribute in node.attribute:
        where = f"{_label(node)} has an attribute {attribute.name!r}"
        field = _KINDS.get(attribute.type)
        if field is None:
            raise OnnxqError(f"{where} of a kind that onnxq cannot keep; export without it")
        if field in ("t", "g") and not attribute.HasField(field):
            raise OnnxqError(f"{where} without a value; export the model again")
        if field[-1] == "s" and len(field) > 1 and not getattr(attribute, field):
            raise OnnxqError(f"{where} that is an empty list, which onnxq cannot keep")
        for text in (attribute.s, *attribute.strings):
            try:
                text.decode()
            except UnicodeDecodeError:
                raise OnnxqError(
                    f"{where} whose text is not UTF-8, which onnxq cannot keep"
                ) from None


def _check_size(tensor: TensorProto) -> None:
    """That a tensor has as many numbers as its dimensions say."""
    if is_external(tensor):
        return  # its extent is checked where its file is found
    wanted, found, unit = nbytes(tensor), len(tensor.raw_data), "bytes"
    if not found:
        numbers = math.prod(tensor.dims) * (1 + (tensor.data_type in _COMPLEX))
        wanted = min(wanted, numbers)  # types of less than a byte are packed here too
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        found, unit = len(getattr(tensor, field)), "values"
    if found != wanted:
        raise OnnxqError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} holds {found} {unit} where it "
            f"needs {wanted}; export the model again"
        )


def _check_graph(graph: GraphProto, around: tuple[str, ...]) -> dict[str, str]:
    stored = [t.name for t in graph.initializer]
    stored += [t.values.name for t in graph.sparse_initializer]
    inputs, outputs = ([v.name for v in values] for values in (graph.input, graph.output))
    return _check_scope(graph.node, inputs, stored, outputs, around)


def _check_scope(
    nodes: Sequence[NodeProto],
    inputs: Iterable[str],
    stored: Iterable[str],
    outputs: Iterable[str],
    around: tuple[str, ...],
) -> dict[str, str]:
    """Checks a graph and the bodies in it; `around` names the nodes whose bodies it stands in.

    Returns what it reads without making it: name → reader.
    """
    made = Counter(stored)
    for name, times in Counter(inputs).items():
        made[name] = max(made[name], times)  # an input's default is the initializer of its name
    made.update(name for node in nodes for name in node.output if name)
    for name, times in made.items():
        if times > 1:
            raise OnnxqError(
                f"the tensor name {name!r} is given {times} times; names must be unique, so "
                "export the model again"
            )
    reads = [_reads(node, around) for node in nodes]
    unknown: dict[str, str] = {}
    for of_node in reads:
        unknown |= {n: r for n, r in of_node.items() if n not in made and n not in unknown}
    for name in outputs:
        if name not in made:
            unknown.setdefault(name, around[-1] if around else "an output")
    _check_acyclic(nodes, reads)
    return unknown


def _reads(node: NodeProto, around: tuple[str, ...]) -> dict[str, str]:
    """The tensors that a node reads, itself or in its bodies: name → reader, for a message."""
    label = _label(node)
    reads = {name: label for name in node.input if name}
    for attribute in node.attribute:
        for body in bodies(attribute):
            reads = _check_graph(body, (*around, label)) | reads
    return reads


def _check_acyclic(nodes: Sequence[NodeProto], reads: list[dict[str, str]]) -> None:
    """That nodes can be put in an order in which each finds what it reads."""
    maker = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    waits = [{maker[name] for name in names if name in maker} for names in reads]
    readers: dict[int, list[int]] = {}
    for number, before in enumerate(waits):
        for other in before:
            readers.setdefault(other, []).append(number)
    missing = [len(before) for before in waits]
    ready = [number for number, count in enumerate(missing) if not count]
    for number in ready:  # which grows meanwhile
        for reader in readers.get(number, ()):
            missing[reader] -= 1
            if not missing[reader]:
                ready.append(reader)
    if len(ready) < len(waits):
        stuck = next(nodes[k] for k, count in enumerate(missing) if count)
        raise OnnxqError(
            f"the graph has a cycle: {_label(stuck)} waits for its own result; export it again"
        )


def _label(node: NodeProto) -> str:
    return f"node {node.name or ','.join(node.output)!r} ({node.op_type})"
