"""Whether a row of a target's `[[supports]]` is for a node."""

from __future__ import annotations

from collections.abc import Mapping

from onnxq import graph as g
from onnxq.devices.units import Unit
from onnxq.graph import Node
from onnxq.target import Support

Shape = tuple[int | str | None, ...]


def fits(row: Support, node: Node, shapes: Mapping[str, Shape]) -> bool:
    """Whether a row is for a node of such shapes and attributes; its types are not asked for."""
    data = shapes.get(node.inputs[0].name) if node.inputs else None
    second = shapes.get(node.inputs[1].name) if len(node.inputs) > 1 else None
    return (
        _has_ranks(row, node, shapes)
        and (not row.operand_ranks or second is None or _within(len(second), row.operand_ranks))
        and _has_attributes(row, node)
        and (not row.after or _follows(node, row.after))
        and (not row.depthwise or _is_depthwise(node, second))
        and (not row.whole_blocks or _has_whole_blocks(node, data))
    )


def _has_ranks(row: Support, node: Node, shapes: Mapping[str, Shape]) -> bool:
    data = shapes.get(node.inputs[0].name) if node.inputs else None
    if not row.ranks or data is None:
        return True
    made = [len(shapes.get(tensor.name) or ()) for tensor in node.outputs]
    return row.ranks[0] <= len(data) and max(len(data), *made) <= row.ranks[-1]


def _within(rank: int, bounds: tuple[int, ...]) -> bool:
    return bounds[0] <= rank <= bounds[-1]


def _has_attributes(row: Support, node: Node) -> bool:
    """What an attribute is by default, runs."""
    return all(
        _plain_value(node.attrs[key]) in allowed if key in node.attrs else not row.fails
        for key, allowed in row.attributes.items()
    )


def _follows(node: Node, ops: tuple[str, ...]) -> bool:
    makers = [g.producer(tensor) for tensor in node.inputs]
    return any(maker is not None and maker.op in ops for maker in makers)


def takes(row: Support, around: Unit, kind: str) -> bool:
    """Whether a kernel on codes takes what stands around a node."""
    if row.codes:
        if around.activation not in row.codes or around.reads_float:
            return False
    elif not row.weights or around.activation or kind not in row.types:
        return False
    if around.weight and around.weight not in (row.weights or row.codes):
        return False
    if row.output == "float":
        return True
    return row.output == "any" or around.result == around.activation


def is_plain(row: Support) -> bool:
    """Whether a row is of operators as they stand."""
    return bool(row.types) and not row.weights


def _has_whole_blocks(node: Node, shape: Shape | None) -> bool:
    """Whether the blocks that share a scale divide the axis, first or second, of their tensor."""
    block = node.attrs.get("block_size", 0)
    if not block or shape is None:
        return True
    axis = node.attrs.get("axis", 1) % max(len(shape), 1)
    size = node.attrs["K"] if "K" in node.attrs else shape[axis] if axis < 2 else None
    return size is not None and (not isinstance(size, int) or size % block == 0)


def _is_depthwise(node: Node, weight: Shape | None) -> bool:
    """Of one channel each; also where there is but one."""
    return weight is not None and weight[:2] == (node.attrs.get("group", 1), 1)


def _plain_value(value: object) -> object:
    return [*value] if isinstance(value, tuple) else value
