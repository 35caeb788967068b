"""A rule on one operator: the integer form that onnxq writes by it, from codes to codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxq import graph as g
from onnxq.devices.single import OPSET, Single
from onnxq.errors import OnnxqError
from onnxq.feeds import input_specs
from onnxq.graph import Array
from onnxq.passes import (
    Assign,
    Calibrate,
    Dynamic,
    Expand,
    InsertQDQ,
    IntegerOnly,
    MatMulNBits,
    Normalize,
    QuantizeBias,
    RoundToNearest,
)
from onnxq.passes.solve.regions import between_codes
from onnxq.pipeline import Pass, Pipeline, Result
from onnxq.qtype import QType, quantize
from onnxq.samples import open_samples
from onnxq.target import Form as FormName
from onnxq.target import Format, OpRule, Target

Feed = Mapping[str, Array]
_LOWER: dict[str, tuple[Pass, ...]] = {
    "static": (Calibrate(method="minmax"), RoundToNearest(), QuantizeBias(), InsertQDQ()),
    "dynamic": (RoundToNearest(), Dynamic()),
    "weights": (RoundToNearest(), Expand(), MatMulNBits()),
    "integer": (Calibrate(method="minmax"), RoundToNearest(), QuantizeBias(), IntegerOnly()),
}


@dataclass(frozen=True)
class Form:
    """A model and what it is fed."""

    model: onnx.ModelProto
    feed: Feed


def format_of(rule: OpRule, block: int | None = None) -> Format:
    weight = rule.weight.bits if rule.weight else None
    return Format(weight, rule.activation.bits if rule.activation else None, block)


def whole_form(single: Single, rule: OpRule, block: int | None = None) -> Form:
    """From floats to floats. Raises OnnxqError where the operator is not quantized by the rule."""
    target = _target({single.op: (rule,)})
    format = format_of(rule, block)
    return Form(_quantized(single, rule.form, target, format).to_proto(), single.feed)


def integer_form(single: Single, target: Target) -> Form:
    """In integers alone, by all the rules of a target. Raises OnnxqError as `whole_form` does."""
    ops = {
        op: tuple(rule for rule in rules if rule.form == "integer")
        for op, rules in target.ops.items()
    }
    result = _quantized(single, "integer", _target(ops), Format(8, 8))
    return Form(result.to_proto(), single.feed)


def coded_form(single: Single, rule: OpRule, block: int | None = None) -> Form:
    """From codes to codes, where the kernel takes and makes them: as in the midst of others."""
    target = _target({single.op: (rule,)})
    result = _quantized(single, rule.form, target, format_of(rule, block))
    graph, feed = between_codes(result.graph, single.feed, result.context.activations)
    for tensor in graph.inputs:  # providers that compile a graph want to know its shapes
        tensor.shape = feed[tensor.name].shape
    return Form(onnx.shape_inference.infer_shapes(g.to_proto(graph)), feed)


def _target(ops: dict[str, tuple[OpRule, ...]]) -> Target:
    return Target("probed", "", ("CPUExecutionProvider",), OPSET, ops)


def _quantized(single: Single, form: FormName, target: Target, format: Format) -> Result:
    plan = Assign(form=form, format=str(format))
    opset = OPSET if form == "integer" else None
    normalize = Normalize(opset) if opset else Normalize()
    samples = open_samples([single.feed], input_specs(single.model))
    steps = [normalize, plan, *_LOWER[form]]
    result = Pipeline(steps).run(g.load(single.model), samples, target, threads=1)
    if not result.context.plan.quantized(g.walk(result.prepared)):
        raise OnnxqError(f"{single.op} is not quantized")
    return result


def between(single: Single, qtype: QType) -> Form:
    """An operator without weights between codes: DequantizeLinear, it, QuantizeLinear.

    The codes of what comes in and goes out use the whole of their type; where the operator only
    moves them both are the same, as `calibrate` makes them.
    """
    dtype = np.dtype(f"{'i' if qtype.signed else 'u'}{max(8, qtype.bits) // 8}")
    zero = np.asarray(qtype.middle, dtype)
    scale = np.asarray(2 / (2**qtype.bits - 1), np.float32)
    model = onnx.ModelProto()
    model.CopyFrom(single.model)
    graph = model.graph
    node = graph.node[0]
    floats = {v.name for v in graph.input if v.type.tensor_type.elem_type == 1}
    codes = {n: quantize(single.feed[n], scale, zero, qtype).astype(dtype) for n in floats}
    parameters = [numpy_helper.from_array(a, n) for a, n in ((scale, "scale"), (zero, "zero"))]
    before = [
        helper.make_node("DequantizeLinear", [name, "scale", "zero"], [f"{name}_real"])
        for name in sorted(floats)
    ]
    after = [
        helper.make_node("QuantizeLinear", [f"{name}_real", "scale", "zero"], [name])
        for name in node.output
    ]
    renamed = [f"{name}_real" if name in floats else name for name in node.input]
    outputs = [f"{name}_real" for name in node.output]
    middle = helper.make_node(node.op_type, renamed, outputs, name=node.name)
    middle.attribute.extend(node.attribute)
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    for value in (*graph.input, *graph.output):
        if value.name in floats or value in graph.output:
            value.type.tensor_type.elem_type = kind
    constants = [*graph.initializer, *parameters]
    made = helper.make_graph(
        [*before, middle, *after], "single", graph.input, graph.output, constants
    )
    feed: dict[str, Any] = {**single.feed, **codes}
    return Form(
        helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version), feed
    )
