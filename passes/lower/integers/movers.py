"""What only moves, copies or picks values does so with their codes."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.lower.integers.elementwise import on_one_grid
from onnxq.passes.lower.integers.functions import look_up
from onnxq.passes.lower.integers.grid import Codes, Refusal
from onnxq.passes.lower.integers.group import Group

from onnxq import graph as g

_INT32 = (-(2**31), 2**31 - 1)


def move(group: Group) -> gs.Variable | list[gs.Variable]:
    """The operator itself, on codes, which keep their grid."""
    node, x = group.node, _moved(group)
    made = group.emit(node.op, [x.tensor, *node.inputs[1:]], **node.attrs)
    for _ in node.outputs[1:]:
        more = gs.Variable(group.writer.maker.name(f"{group.base}_{node.op}_out"))
        made.inputs[0].outputs.append(more)
    return regridded(group, x, list(made.inputs[0].outputs))


def _moved(group: Group) -> Codes:
    """What is moved; of a constant, the codes that the result has."""
    tensor, grid = group.node.inputs[0], group.grid
    if not g.is_constant(tensor):
        return group.codes(0)
    return Codes(group.codes_of(g.values(tensor), grid), grid)


def regridded(group: Group, x: Codes, moved: list[gs.Variable]) -> list[gs.Variable]:
    """Codes on the grid of x as codes of the result, which may have another."""
    if x.grid == group.grid:
        return moved
    return [group.requantize(t, group.zero(x), x.grid.scale) for t in moved]


def max_pool(group: Group) -> list[gs.Variable]:
    if any(t.name for t in group.node.outputs[1:]):
        raise Refusal("it also gives the places of its maxima")
    x = group.codes(0)
    return regridded(group, x, [group.emit("MaxPool", [x.tensor], **group.node.attrs)])


def global_max_pool(group: Group) -> list[gs.Variable]:
    x, shape = group.codes(0), group.shape(group.node.inputs[0])
    if shape is None:
        raise Refusal("the rank of its input is not known")
    axes = group.constant(np.arange(2, len(shape)), np.int64, "axes")
    wide = group.cast(x.tensor, np.int32)
    largest = group.cast(group.emit("ReduceMax", [wide, axes], keepdims=1), np.uint8)
    return regridded(group, x, [largest])


def reduce_extremum(group: Group) -> list[gs.Variable]:
    """ReduceMax and ReduceMin, whose axes may be an attribute below opset 18."""
    x, node = group.codes(0), group.node
    wide = group.cast(x.tensor, np.int32)
    made = group.emit(node.op, [wide, *node.inputs[1:]], **node.attrs)
    return regridded(group, x, [group.cast(made, x.grid.dtype)])


def pad(group: Group) -> list[gs.Variable]:
    node, x = group.node, group.codes(0)
    fill = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if fill is not None and not g.is_constant(fill):
        raise Refusal("it pads with a value that is computed")
    value = x.grid.quantize(0.0 if fill is None else g.values(fill)).reshape(())
    operands = [x.tensor, node.inputs[1], group.constant(value, x.grid.dtype, "fill")]
    return regridded(group, x, [group.emit("Pad", [*operands, *node.inputs[3:]], **node.attrs)])


def cast(group: Group) -> gs.Variable | list[gs.Variable]:
    """Between float types nothing changes; integers and booleans are codes of scale 1, and what
    becomes one is looked up.
    """
    source = group.node.inputs[0]
    if g.is_float(source) and not g.is_float(group.node.outputs[0]):
        return look_up(group)
    if g.is_float(source):
        x = group.codes(0)
        return regridded(group, x, [x.tensor])
    whole = group.cast(source, np.int64)
    for beyond, end in zip(("Less", "Greater"), _INT32, strict=True):  # Clip of int64 is at fault
        limit = group.constant(end, np.int64, "code")
        whole = group.emit("Where", [group.emit(beyond, [whole, limit]), limit, whole])
    nothing = group.constant(0, np.int64, "zero_int64")
    return group.requantize(whole, nothing, 1.0, reach=2**31)


def identity(group: Group) -> gs.Variable | list[gs.Variable]:
    """Where codes begin, a QuantizeLinear; else a copy, in the other format perhaps."""
    source, writer = group.node.inputs[0], group.writer
    if source.name not in writer.made and source.name not in writer.ctx.activations:
        return writer.quantize(source, group.grid)
    x = group.codes(0)
    return regridded(group, x, [x.tensor])


def gather(group: Group) -> gs.Variable | list[gs.Variable]:
    """Rows of an embedding table, each with a multiplier of its own; otherwise a mover."""
    node, tensor = group.node, group.node.inputs[0]
    if not g.is_constant(tensor):
        return move(group)
    table = group.writer.ctx.weights.get(tensor.name)
    grid = group.grid
    if table is None or table.scale.ndim > 1:
        codes = group.codes_of(g.values(tensor))
        return group.emit("Gather", [codes, node.inputs[1]], **node.attrs)
    centered = table.codes.astype(np.int64)
    if table.zero.any():
        centered = centered - (table.zero[:, None] if table.zero.ndim else table.zero)
    stored = centered.reshape(tensor.shape)
    dtype = np.int8 if np.abs(stored).max(initial=0) < 128 else np.int16
    held = group.writer.maker.shared(f"{tensor.name}_quantized", stored.astype(dtype))
    rows = group.emit("Gather", [held, node.inputs[1]], axis=0)
    nothing = group.constant(0, dtype, f"zero_{np.dtype(dtype)}")
    if not table.scale.ndim:
        return group.requantize(rows, nothing, np.float64(table.scale))
    # One shift for all rows, so that only their multipliers are looked up.
    by_row = table.scale.astype(np.float64).reshape(-1, *(1,) * (len(tensor.shape) - 1))
    multiplier, shift = group.scaling(by_row / grid.scale, common=True)
    factors = group.emit("Gather", [multiplier, node.inputs[1]], axis=0)
    return group.call("Requantize", [rows, nothing, factors, shift, *group.ends()])


def scatter(group: Group) -> gs.Variable:
    """Codes of the result, put among others of the same grid."""
    data, updates = on_one_grid(group)
    return group.emit(group.node.op, [data, group.node.inputs[1], updates], **group.node.attrs)


def resize(group: Group) -> list[gs.Variable]:
    """The nearest value is a copy; sizes in the place of scales, which are floats."""
    node, x = group.node, group.codes(0)
    if node.attrs.get("mode", "nearest") != "nearest":
        raise Refusal("it interpolates")
    mode = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_crop_and_resize" or "axes" in node.attrs:
        raise Refusal("it resizes a part of its input")
    nothing = gs.Variable.empty()
    if len(node.inputs) > 3 and node.inputs[3].name:
        sizes: gs.Tensor = node.inputs[3]
    else:
        scales = g.values(node.inputs[2]) if g.is_constant(node.inputs[2]) else np.array([0.5])
        if not np.array_equal(scales, np.rint(scales)):
            raise Refusal("it resizes by factors that are not whole numbers")
        shape = group.emit("Shape", [x.tensor])
        sizes = group.emit("Mul", [shape, group.constant(scales, np.int64, "factors")])
    moved = group.emit("Resize", [x.tensor, nothing, nothing, sizes], **node.attrs)
    return regridded(group, x, [moved])


def constant_of_shape(group: Group) -> gs.Variable:
    value = group.node.attrs.get("value")
    number = 0.0 if value is None else float(np.asarray(value.values).reshape(()))
    code = group.grid.quantize(number).reshape(1)
    held = gs.Constant("value", code.astype(group.grid.dtype))
    return group.emit("ConstantOfShape", [group.node.inputs[0]], value=held)


def top_k(group: Group) -> list[gs.Variable]:
    """The largest or smallest codes and their places; codes that are equal keep their order."""
    x, node = group.codes(0), group.node
    wide = group.cast(x.tensor, np.int32)
    found = group.emit("TopK", [wide, node.inputs[1]], **node.attrs)
    places = gs.Variable(group.writer.maker.name(f"{group.base}_places"), np.int64)
    found.inputs[0].outputs.append(places)
    return [*regridded(group, x, [group.cast(found, x.grid.dtype)]), places]


def argument(group: Group) -> gs.Variable:
    """ArgMax and ArgMin of codes are those of what they stand for."""
    x = group.codes(0)
    return group.emit(group.node.op, [group.cast(x.tensor, np.int32)], **group.node.attrs)


LOWERINGS = {
    **dict.fromkeys(("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split",
                     "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "GatherElements", "GatherND",
                     "Compress"), move),
    "MaxPool": max_pool, "GlobalMaxPool": global_max_pool, "ReduceMax": reduce_extremum,
    "ReduceMin": reduce_extremum, "Pad": pad, "Cast": cast, "Identity": identity,
    "Gather": gather, "ArgMax": argument, "ArgMin": argument,
    "TopK": top_k, "Resize": resize, "ConstantOfShape": constant_of_shape,
    "ScatterND": scatter, "ScatterElements": scatter,
}  # fmt: skip
