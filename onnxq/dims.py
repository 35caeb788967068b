"""Dimensions of a model's inputs fixed to numbers, and all that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from onnxq.errors import OnnxqError, suggest
from onnxq.feeds import Feed, InputSpec, input_specs


def fix_dims(model: onnx.ModelProto, dims: Mapping[str, int]) -> onnx.ModelProto:
    """A copy in which the named dimensions have these sizes; shapes asked for become constants.

    Raises OnnxqError for a name that no input has, and a size below 1.
    """
    specs = input_specs(model)
    known = {dim for spec in specs for dim in spec.shape or () if isinstance(dim, str)}
    for name, size in dims.items():
        if name not in known:
            hint = suggest(name, known) if known else "; every dimension of its inputs is a number"
            raise OnnxqError(f"no input of the model has a dimension {name!r}{hint}")
        if size < 1:
            raise OnnxqError(f"dimension {name!r} cannot be {size}; give at least 1")
    shapes = {
        spec.name: tuple(dims.get(d, d) if isinstance(d, str) else d for d in spec.shape)
        for spec in specs
        if spec.shape is not None
    }
    return _fixed(model, shapes, dims)


def fix_shapes(model: onnx.ModelProto, feeds: Iterable[Feed]) -> onnx.ModelProto:
    """A copy in which every dimension of the inputs is that of the feeds, which all share it.

    Raises OnnxqError, with what to give instead, where they do not.
    """
    open_ = [spec for spec in input_specs(model) if not _is_fixed(spec)]
    if not open_:
        return model
    seen: dict[str, tuple[int, ...]] = {}
    for feed in feeds:
        for spec in open_:
            shape = feed[spec.name].shape
            if seen.setdefault(spec.name, shape) != shape:
                raise OnnxqError(_differ(spec, seen[spec.name], shape))
    named = {
        dim: size
        for spec in open_
        for dim, size in zip(spec.shape or (), seen[spec.name], strict=False)
        if isinstance(dim, str)
    }
    return _fixed(model, dict(seen), named)


def _is_fixed(spec: InputSpec) -> bool:
    return spec.shape is not None and all(isinstance(dim, int) for dim in spec.shape)


def _differ(spec: InputSpec, one: tuple[int, ...], other: tuple[int, ...]) -> str:
    if len(one) != len(other):
        return f"samples differ in the rank of {spec.name!r}: {len(one)} and {len(other)}"
    axis = next(k for k, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    dim = spec.shape[axis] if spec.shape else None
    label = f"dimension {dim!r}" if isinstance(dim, str) else f"axis {axis}"
    advice = "give samples of one shape"
    if isinstance(dim, str):
        size = 128 if max(one[axis], other[axis]) <= 128 else max(one[axis], other[axis])
        advice = f"fix it, as in --dim {dim}={size}: text is then padded to it, arrays must have it"
    return (
        f"the target wants every dimension to be a number, and samples differ in {label} of "
        f"{spec.name!r} ({one[axis]} and {other[axis]}); {advice}"
    )


def _fixed(
    model: onnx.ModelProto,
    shapes: Mapping[str, tuple[int | str | None, ...]],
    named: Mapping[str, int],
) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for value in made.graph.input:
        dims = shapes.get(value.name)
        if dims is not None:
            tensor = value.type.tensor_type
            del tensor.shape.dim[:]
            for dim in dims:
                added = tensor.shape.dim.add()
                if isinstance(dim, int):
                    added.dim_value = dim
                elif dim is not None:
                    added.dim_param = dim
    for value in (*made.graph.output, *made.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in named:
                dim.dim_value = named[dim.dim_param]
    del made.graph.value_info[:]
    return _without_shape_nodes(made)


def _without_shape_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Declares what follows of outputs; a Shape of a tensor of known shape becomes a constant."""
    try:
        known = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # inference is stricter than the runtime on some models that run
        return model
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*known.graph.value_info, *known.graph.input)
        if value.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }
    for output, found in zip(model.graph.output, known.graph.output, strict=True):
        output.CopyFrom(found)
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] in shapes and not node.attribute:
            value = onnx.numpy_helper.from_array(np.array(shapes[node.input[0]], np.int64))
            node.op_type = "Constant"
            del node.input[:]
            node.attribute.append(onnx.helper.make_attribute("value", value))
    return model
