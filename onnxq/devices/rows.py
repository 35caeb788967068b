"""Whether a row of a target's `[[supports]]` is for a node."""

from __future__ import annotations

from onnxq.devices.units import Unit
from onnxq.graph import Node
from onnxq.target import Support


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


def has_whole_blocks(node: Node, shape: tuple[int | str | None, ...] | None) -> bool:
    block = node.attrs.get("block_size", 0)
    if not block or shape is None:
        return True
    size = shape[node.attrs.get("axis", 1)]
    return not isinstance(size, int) or size % block == 0


def is_depthwise(node: Node, weight: tuple[int | str | None, ...] | None) -> bool:
    """Of one channel each; also where there is but one."""
    return weight is not None and weight[:2] == (node.attrs.get("group", 1), 1)


def plain_value(value: object) -> object:
    return [*value] if isinstance(value, tuple) else value
