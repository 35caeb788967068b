"""Where one scale per channel can move from activations into the weights that read them.

A site is a group of layers that read the same channels: x is divided by s, the layers' columns are
multiplied by it. The division is free where it folds into what makes x (see `channels`); elsewhere
it is a Mul of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.prepare import affine
from onnxq.passes.prepare.affine import Vector
from onnxq.passes.prepare.channels import region_of
from onnxq.passes.prepare.region import Index, Region

from onnxq import graph as g
from onnxq.graph import Graph, Node


@dataclass(frozen=True)
class Site:
    """Layers that read the same channels; the index of each says which channel a column is.

    Without a region, `source` is divided by a Mul.
    """

    body: Graph
    readers: list[tuple[Node, Index]]
    channels: int
    region: Region | None = None
    source: gs.Tensor | None = None

    def divide(self, s: Vector, maker: g.Maker) -> None:
        """Divide the channels by s (channels,) and multiply the readers' columns by it."""
        if self.region is not None:
            self.region.divide(s, maker.name)
            return
        assert self.source is not None
        first = self.readers[0][0]  # in two bodies, one tensor is divided by two things
        factor = maker.constant(f"{first.name}_smoothing", (1 / s).astype(first.inputs[1].dtype))
        divided = maker.emit(
            self.body, "Mul", [self.source, factor], f"{self.source.name}_smoothed"
        )
        divided.dtype = self.source.dtype
        for node, index in self.readers:
            node.inputs[0] = divided
            affine.scale_columns(node, s[index], maker.name)


def sites(graph: Graph) -> Iterator[Site]:
    """Every group of layers that read the same channels: those that fold, then the others."""
    shapes = g.shapes(graph)
    hidden = {id(body) for body in g.hidden(graph)}
    for body in g.subgraphs(graph):
        if id(body) in hidden:
            continue
        folded: set[int] = set()
        made: set[int] = set()
        for node in body.nodes:
            region = None if id(node) in made else region_of(body, node, shapes)
            if region is None:
                continue
            made |= {id(maker) for maker, _ in region.makers}
            made |= {id(other) for other, _, _ in region.constants}
            if all(_is_row_by_row(reader) for reader, _ in region.readers):
                folded |= {id(reader) for reader, _ in region.readers}
                yield Site(body, region.readers, region.channels, region)
        yield from _left_over(body, folded)


def _left_over(body: Graph, folded: set[int]) -> Iterator[Site]:
    """Readers of one tensor that nothing folds before; convolutions stay fused as they are."""
    groups: dict[str, list[Node]] = {}
    for node in body.nodes:
        own = node.op in ("MatMul", "Gemm") and _is_row_by_row(node)
        if own and id(node) not in folded and len(node.inputs[1].outputs) == 1:
            groups.setdefault(node.inputs[0].name, []).append(node)
    for nodes in groups.values():
        channels = affine.in_channels(nodes[0])
        index = np.arange(channels)
        yield Site(body, [(n, index) for n in nodes], channels, source=nodes[0].inputs[0])


def _is_row_by_row(node: Node) -> bool:
    """Whether a layer multiplies rows of channels with a matrix: not a kernel over neighbours."""
    view = g.weight_view(node)
    if view is None or view.batched or view.groups != 1 or node.attrs.get("transA", 0):
        return False
    pointwise = node.op == "Conv" and all(size == 1 for size in view.tensor.shape[2:])
    return (node.op in ("MatMul", "Gemm") or pointwise) and not g.is_constant(node.inputs[0])
