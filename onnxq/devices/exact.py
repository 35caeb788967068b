"""What a piece of a quantized graph says in exact numbers: the truth that providers are held to.

Every node is computed in float64, which holds any sum of 8-bit products that int32 does, and any
product of it with a scale to a part in 10¹⁵; QuantizeLinear and DequantizeLinear as ONNX defines
them. What a provider is suspected of can be done to it: a rounding left out, a constant taken for
zero, integers cut to 32 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def evaluate(
    model: onnx.ModelProto,
    feed: Mapping[str, Array],
    *,
    unrounded: Collection[str] = (),
    zeroed: Collection[str] = (),
    uncentred: Collection[str] = (),
    narrow: bool = False,
) -> dict[str, Array]:
    """All tensors of a model on one feed, floats in float64.

    `unrounded` are outputs of QuantizeLinear that keep their fraction and are not clipped;
    `zeroed` are tensors that count as zero; `uncentred` are outputs of DequantizeLinear that do so
    with their zero point. With `narrow` integers of 64 bits have 32: constants end at their bounds,
    and results wrap around.
    Raises whatever onnx.reference raises for an operator that it does not know.
    """
    known = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    values = {name: widen(array) for name, array in {**known, **feed}.items()}
    values |= {name: np.zeros_like(values[name]) for name in zeroed if name in values}
    moving = set(feed)
    for node in model.graph.node:
        moves = not moving.isdisjoint(node.input)
        if narrow and moves:
            values |= {n: _saturated(values[n]) for n in node.input if n and n not in moving}
        if node.op_type == "QuantizeLinear":
            made = [quantize(node, values, node.output[0] not in unrounded)]
        elif node.op_type == "DequantizeLinear":
            made = [dequantize(node, values, node.output[0] not in uncentred)]
        elif node.op_type == "Cast" and attribute(node, "to") in _FLOATS:
            made = [values[node.input[0]].astype(np.float64)]
        else:
            made = _reference(node, values, model.opset_import)
        if moves:
            moving.update(node.output)
            made = list(map(_wrapped, made)) if narrow else made
        made = [0 * a if n in zeroed else a for n, a in zip(node.output, made, strict=False)]
        values |= dict(zip(node.output, map(widen, made), strict=False))
    return values


def widen(array: Array) -> Array:
    """Floats in float64; all else as it is."""
    floats = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return array.astype(np.float64) if floats else array


_HALF = {np.dtype(np.int64): np.int32, np.dtype(np.uint64): np.uint32}


def _saturated(array: Array) -> Array:
    if array.dtype not in _HALF:
        return array
    limits = np.iinfo(_HALF[array.dtype])
    return np.clip(array, *(np.asarray(end, array.dtype) for end in (limits.min, limits.max)))


def _wrapped(array: Array) -> Array:
    return array.astype(_HALF[array.dtype]).astype(array.dtype) if array.dtype in _HALF else array


def quantize(node: onnx.NodeProto, values: Mapping[str, Array], rounded: bool) -> Array:
    """y = clip(round(x / s) + z), halves to even; x / s + z where it is not `rounded`."""
    x, scale, zero = operands(node, values)
    steps = x / scale
    if not rounded:
        return np.asarray(steps + zero)
    limits = np.iinfo(zero.dtype)
    codes = np.clip(np.rint(steps) + zero, limits.min, limits.max)
    return np.asarray(codes.astype(zero.dtype))


def dequantize(node: onnx.NodeProto, values: Mapping[str, Array], centred: bool) -> Array:
    """x = s (y - z); s y where it is not `centred`."""
    codes, scale, zero = operands(node, values)
    return np.asarray((codes.astype(np.float64) - centred * zero.astype(np.float64)) * scale)


def operands(node: onnx.NodeProto, values: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Of a QuantizeLinear or DequantizeLinear: x, and scale and zero point in a shape that
    broadcasts with it.
    """
    x, scale = values[node.input[0]], values[node.input[1]]
    given = len(node.input) > 2 and node.input[2]
    kind = x.dtype if node.op_type == "DequantizeLinear" else np.dtype(np.uint8)
    zero = values[node.input[2]] if given else np.zeros(scale.shape, kind)
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    if block:
        scale, zero = (
            np.repeat(a, block, axis).take(range(x.shape[axis]), axis) for a in (scale, zero)
        )
    elif scale.size > 1:
        along = [1] * x.ndim
        along[axis] = -1
        scale, zero = scale.reshape(along), zero.reshape(along)
    elif scale.ndim:
        scale, zero = scale.reshape(()), zero.reshape(())
    return x, scale, zero


def attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _reference(node: onnx.NodeProto, values: Mapping[str, Array], opsets: Any) -> list[Array]:
    inputs = [name for name in dict.fromkeys(node.input) if name]
    function = onnx.helper.make_function(
        "onnxq.exact", "node", inputs, [n for n in node.output if n], [node], list(opsets)
    )
    feed = {name: values[name] for name in inputs}
    made: Any = ReferenceEvaluator(function).run(None, feed, attributes={})
    return [np.asarray(array) for array in made]
