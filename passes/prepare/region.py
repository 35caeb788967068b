"""All that changes when a set of channels is scaled; `channels` finds it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnxq.passes.prepare import affine
from onnxq.passes.prepare.affine import Vector

from onnxq import graph as g
from onnxq.graph import Node

Index = NDArray[np.int64]
NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


@dataclass
class Region:
    """All that changes when channels are scaled; see `channels`."""

    channels: int
    tensors: dict[str, Index] = field(default_factory=dict)
    makers: list[tuple[Node, Index]] = field(default_factory=list)
    constants: list[tuple[Node, int, Index]] = field(default_factory=list)  # slot of each
    readers: list[tuple[Node, Index]] = field(default_factory=list)
    clips: list[Node] = field(default_factory=list)

    def divide(self, s: Vector, namer: g.Namer) -> None:
        """Divide the channels by s (channels,) and multiply the readers' columns by it."""
        for node, index in self.makers:
            _divide_maker(node, s[index], namer)
        for node, slot, index in self.constants:
            old = node.inputs[slot]
            values = (g.values(old) / s[index]).astype(old.dtype)
            node.inputs[slot] = g.constant(namer(f"{old.name}_scaled"), values)
        for node, index in self.readers:
            affine.scale_columns(node, s[index], namer)


def maker_channels(node: Node) -> int | None:
    """How many channels a node makes that can be scaled by its constants; None for others."""
    if node.op in NORMS and (g.is_standard(node) or node.domain == "com.microsoft"):
        last = node.attrs.get("axis", -1) == -1
        fixed = all(g.is_constant(t) or not t.name for t in node.inputs[1:])
        vector = len(node.inputs) > 1 and len(node.inputs[1].shape or ()) == 1
        return int(node.inputs[1].shape[0]) if last and fixed and vector else None
    if not is_scalable(node):
        return None
    channels = affine.out_channels(node)
    return None if affine.bias(node, channels) is None else channels


def is_scalable(node: Node) -> bool:
    """A linear operator whose weight is its own and one matrix."""
    view = g.weight_view(node)
    if view is None or node.op not in affine.LINEAR or view.batched:
        return False
    return len(view.tensor.outputs) == 1


def _divide_maker(node: Node, s: Vector, namer: g.Namer) -> None:
    if node.op in NORMS:
        for slot in (1, 2)[: len(node.inputs) - 1]:
            old = node.inputs[slot]
            if old.name:
                values = (g.values(old) / s).astype(old.dtype)
                node.inputs[slot] = g.constant(namer(f"{old.name}_scaled"), values)
        return
    bias = affine.bias(node, len(s))
    assert bias is not None
    affine.scale_rows(node, 1 / s, namer)
    if bias.any():
        affine.set_bias(node, bias / s, namer)
