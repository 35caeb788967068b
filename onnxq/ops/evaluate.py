"""Runs a model of integers in exact arithmetic, with no runtime: what decides whether one is right.

Functions of `ai.onnxq` are their references, arithmetic is that of integers without bounds, and
what computes nothing (Reshape, Gather, ...) is `onnx.reference`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxq.errors import OnnxqError, one_line
from onnxq.ops.function import DOMAIN
from onnxq.ops.integers import Integers
from onnxq.ops.kernels import KERNELS, Attributes
from onnxq.ops.reference import REFERENCES

Array = NDArray[Any]
_WHOLE = "iub"  # kinds of NumPy's types


def evaluate(model: ModelProto, feed: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a model by name, for one array for each of its inputs.

    Raises OnnxqError, naming the node, where an integer does not fit the type of its tensor, or a
    node cannot be computed.
    """
    values = {name: np.asarray(array) for name, array in feed.items()}
    results = _evaluate(model.graph, values, model)
    return {value.name: x for value, x in zip(model.graph.output, results, strict=True)}


def _evaluate(graph: GraphProto, known: Mapping[str, Any], model: ModelProto) -> list[Any]:
    """The outputs of a graph or a body, `known` being its inputs and what is around it."""
    values: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    values |= known
    wanted = [value.name for value in graph.output]
    uses = Counter(name for node in graph.node for name in _reads(node)) + Counter(wanted)
    for node in graph.node:
        try:
            results = _run(node, values, model)
        except OnnxqError:
            raise  # a node in a body, which has its name already
        except Exception as error:
            label = f"node {node.name or ','.join(node.output)!r} ({node.op_type})"
            raise OnnxqError(f"{label} cannot be computed exactly: {one_line(error)}") from error
        values |= {name: x for name, x in zip(node.output, results, strict=False) if name}
        for name in _reads(node):
            uses[name] -= 1
            if not uses[name]:
                del values[name]
    return [values[name] for name in wanted]


def _run(node: NodeProto, values: Mapping[str, Any], model: ModelProto) -> list[Any]:
    inputs: list[Any] = [values[name] if name else None for name in node.input]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.domain == DOMAIN:
        return [REFERENCES[node.op_type](*inputs, **attributes)]
    if node.domain in ("", "ai.onnx"):
        if node.op_type == "If":
            body = attributes["then_branch" if inputs[0].item() else "else_branch"]
            return _evaluate(body, values, model)
        if node.op_type == "Loop":
            return _loop(attributes["body"], inputs, values, model)
        if node.op_type in _BORDER:
            return [_BORDER[node.op_type](attributes, *inputs)]
        if node.op_type in KERNELS and len(node.output) == 1 and _are_whole(inputs):
            return [np.asarray(KERNELS[node.op_type](attributes, *inputs))]
        if node.op_type == "Cast" and _are_whole(inputs) and attributes["to"] in _INTEGERS:
            target = helper.tensor_dtype_to_np_dtype(attributes["to"])
            return [Integers(inputs[0]).as_type(target)]
    return _by_onnx(node, values, model)


def _loop(
    body: GraphProto, inputs: list[Any], values: Mapping[str, Any], model: ModelProto
) -> list[Any]:
    """What a loop carries at its end, then what each turn hands out, stacked."""
    most, proceed, *carried = inputs
    names = [value.name for value in body.input]
    turns: list[list[Any]] = []
    while (most is None or len(turns) < most.item()) and (proceed is None or proceed.item()):
        start = [np.array(len(turns)), np.array(True) if proceed is None else proceed, *carried]
        known = dict(values) | dict(zip(names, start, strict=True))
        proceed, *made = _evaluate(body, known, model)
        carried, handed_out = made[: len(carried)], made[len(carried) :]
        turns.append(handed_out)
    return [*carried, *(np.stack(column) for column in zip(*turns, strict=True))]


def _are_whole(inputs: list[Any]) -> bool:
    return all(x is None or x.dtype.kind in _WHOLE for x in inputs)


def _by_onnx(node: NodeProto, values: Mapping[str, Any], model: ModelProto) -> list[Any]:
    """What ONNX's own evaluator makes of one node."""
    reads = sorted(_reads(node))
    infos = [helper.make_value_info(name, onnx.TypeProto()) for name in (*reads, *node.output)]
    alone = helper.make_model(
        helper.make_graph([node], "node", infos[: len(reads)], infos[len(reads) :]),
        opset_imports=model.opset_import,
        functions=model.functions,
    )
    return list(ReferenceEvaluator(alone).run(None, {name: values[name] for name in reads}))


def _reads(node: NodeProto) -> set[str]:
    """The tensors that a node reads, itself or in its bodies."""
    reads = {name for name in node.input if name}
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            made = {t.name for t in body.initializer} | {v.name for v in body.input}
            made |= {name for inner in body.node for name in inner.output}
            reads |= {name for inner in body.node for name in _reads(inner)} - made
            reads |= {value.name for value in body.output} - made
    return reads


# ── where floats become integers, and back ───────────────────────────────────────────────────────

_INTEGERS = {
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
}


def quantize_linear(
    attributes: Attributes, x: Array, scale: Array, zero: Array | None = None
) -> Array:
    """saturate(round(x / scale) + zero), the quotient in x's type, halves to even."""
    if zero is None:
        kind = helper.tensor_dtype_to_np_dtype(attributes.get("output_dtype") or TensorProto.UINT8)
        zero = np.zeros((), kind)
    limits = np.iinfo(zero.dtype)
    quotient = x / _along(scale.astype(x.dtype), x, attributes)
    codes = np.rint(quotient).astype(np.float64) + _along(zero, x, attributes)
    return np.clip(codes, limits.min, limits.max).astype(zero.dtype)


def dequantize_linear(
    attributes: Attributes, x: Array, scale: Array, zero: Array | None = None
) -> Array:
    """(x - zero) · scale, the product in the scale's type."""
    centered = Integers(x) - Integers(0 if zero is None else _along(zero, x, attributes))
    return centered.values.astype(scale.dtype) * _along(scale, x, attributes)


def _along(parameter: Array, x: Array, attributes: Attributes) -> Array:
    """A scalar as it is, one number for each channel along x's axis of them."""
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[attributes.get("axis", 1)] = parameter.size
    return parameter.reshape(shape)


_BORDER = {"QuantizeLinear": quantize_linear, "DequantizeLinear": dequantize_linear}
