"""Raise the opset of a graph, bodies too."""

from __future__ import annotations

import math
from typing import Any

import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError, one_line
from onnxq.graph.proto import CARRIED, LARGE_NUMBERS, copy, load, minimum_ir_version, stub, to_proto
from onnxq.graph.walk import Graph, constants


def raise_opset(graph: Graph, opset: int) -> Graph:
    """The same graph at `opset` or newer, converted by ONNX's version converter."""
    if graph.opset >= opset:
        return graph
    light = copy(graph)
    kept: dict[str, Any] = {}  # large weights stay out of the converter, which copies its input
    stubs: dict[int, gs.ir.tensor.LazyValues] = {}  # what bodies share they go on sharing
    for tensor in constants(light):
        if math.prod(tensor.shape) >= LARGE_NUMBERS:
            kept[tensor.name] = held = tensor._values
            tensor._values = stubs.setdefault(id(held), stub(tensor))
    model = to_proto(light)
    try:
        converted = _converted(model, opset)
    except Exception as error:
        text = one_line(error)
        raise OnnxqError(
            f"this model uses opset {graph.opset} and could not be raised to {opset} ({text}); "
            "export it again with a newer opset"
        ) from None
    raised = load(converted)
    for tensor in constants(raised):
        tensor._values = kept.get(tensor.name, tensor._values)
    raised.__dict__[CARRIED] = graph.__dict__.get(CARRIED)
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
