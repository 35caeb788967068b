"""Outlier channel splitting (Zhao et al. 2019, "Improving Neural Network Quantization without
Retraining using Outlier Channel Splitting").

A channel is taken twice, and each copy does half of the work: the function stays and the outlier
is half as large. Of a weight column w or of an activation x,

    w x = ((w − Δ/2) / 2) x + ((w + Δ/2) / 2) x        w x = w (x/2) + w (x/2)

Δ is the step of the quantized weight: rounded, the two halves still add up to what w rounds to
(§3.3). The largest channel is split, then the largest of what there is now, until a share `ratio`
of channels has been added. After m splits of one channel its copies k hold share_k·w + offset_k·Δ,
Σ share = 1, Σ offset = 0.

The second copy of an activation costs nothing where the layer before makes it with a second row;
elsewhere a Gather makes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnxq.passes.prepare import affine
from onnxq.passes.prepare.affine import Vector
from onnxq.passes.prepare.channels import Shapes, region_of

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.observe import Observer
from onnxq.observe_channels import ChannelExtremes
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QType, spread, weight_scale

DONE = "_split"
WEIGHT = QType.parse("s8:channel")
_PASSING = ("Relu", "LeakyRelu", "Clip", "Identity")


class Split(NamedTuple):
    """Which channel each new channel is a copy of, and what it holds of it, (new channels,)."""

    source: NDArray[np.int64]
    share: Vector
    offset: Vector


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Channels with outliers, in `weights` or `activations`, become two of half the size.

    `ratio` is the share of channels that are added to every layer.
    """

    ratio: float = 0.02
    of: Literal["weights", "activations"] = "weights"
    name: ClassVar[str] = "split-outliers"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise OnnxqError(f"split-outliers.ratio is in (0, 1], not {self.ratio}")

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        if self.of == "weights":
            return {}
        hidden = {id(body) for body in g.hidden(graph)}
        return {
            f"{node.inputs[0].name}#outliers": ChannelExtremes(g.input_channel_axis(node))
            for body, node in _layers(graph)
            if id(body) not in hidden
        }

    def apply(self, graph: Graph, ctx: Context) -> int:
        maker, shapes, changes = g.Maker(graph), g.shapes(graph), 0
        for body, node in list(_layers(graph)):
            channels = affine.in_channels(node)
            sizes = self._sizes(node, ctx)
            if sizes is None or not sizes.any():
                continue
            split = split_largest(sizes, math.ceil(self.ratio * channels))
            shares = split.share if self.of == "activations" else np.ones(len(split.source))
            if not _double_rows(body, node, split.source, shares, shapes, maker):
                _gather(body, node, split.source, shares, maker)
            _double_columns(node, split, self.of, ctx, maker)
            changes += 1
        for key in [key for key in ctx.stats if key.endswith("#outliers")]:
            del ctx.stats[key]  # the tensors have other channels now
        g.sort(graph)
        return changes

    def _sizes(self, node: Node, ctx: Context) -> Vector | None:
        """How far each input channel reaches, (in,)."""
        if self.of == "activations":
            seen = ctx.stats.get(f"{node.inputs[0].name}#outliers")
            return None if seen is None or not seen.low.size else np.maximum(-seen.low, seen.high)
        view = g.weight_view(node)
        assert view is not None
        matrix = np.abs(view.matrix()).astype(np.float64)
        if (
            _format(node, ctx).group is not None
        ):  # a row with a scale of its own has its own outliers
            matrix /= np.maximum(np.sqrt(np.square(matrix).mean(axis=1, keepdims=True)), 1e-30)
        return matrix.reshape(-1, affine.in_channels(node)).max(axis=0)


def split_largest(sizes: Vector, count: int) -> Split:
    """Split the largest channel into halves, `count` times; copies stand after all channels."""
    index, share, offset = list(range(len(sizes))), [1.0] * len(sizes), [0.0] * len(sizes)
    now = list(sizes)
    for _ in range(count):
        k = int(np.argmax(now))
        now[k], share[k] = now[k] / 2, share[k] / 2
        index.append(index[k])
        now.append(now[k])
        share.append(share[k])
        offset.append(offset[k] / 2 + 0.25)
        offset[k] = offset[k] / 2 - 0.25
    return Split(np.array(index), np.array(share), np.array(offset))


def _format(node: Node, ctx: Context) -> QType:
    rule = ctx.target.rule(node, "static")
    return rule.weight if rule is not None and rule.weight is not None else WEIGHT


def _layers(graph: Graph) -> Iterator[tuple[Graph, Node]]:
    """Layers with a weight of their own and a matrix of channels, not split yet."""
    for body in g.subgraphs(graph):
        for node in body.nodes:
            view = g.weight_view(node)
            if view is None or node.op not in ("Conv", "Gemm", "MatMul") or view.batched:
                continue
            own = len(view.tensor.outputs) == 1 and not g.is_constant(node.inputs[0])
            plain = view.groups == 1 and not node.attrs.get("transA", 0)
            if own and plain and not _is_split(view.tensor.name):
                yield body, node


def _is_split(name: str) -> bool:
    """The name of a weight says that it has been split; a number may make it unique."""
    return re.search(rf"{DONE}(_\d+)?$", name) is not None


def _double_columns(node: Node, split: Split, of: str, ctx: Context, maker: g.Maker) -> None:
    view = g.weight_view(node)
    assert view is not None
    stored = g.values(view.tensor)
    columns = 1 if node.op == "Conv" else view.block_axis
    new = np.take(stored, split.source, axis=columns).astype(np.float64)
    if of == "weights":
        along = [1] * new.ndim
        along[columns] = -1
        new *= split.share.reshape(along)
        matrix = np.moveaxis(new, view.axis, 0).reshape(new.shape[view.axis], -1)
        qtype = _format(node, ctx)
        scale, _ = weight_scale(matrix.astype(np.float32), qtype)
        steps = np.broadcast_to(spread(scale, matrix.shape, qtype.group), matrix.shape)
        moved = np.moveaxis(new, view.axis, 0)
        moved += steps.reshape(moved.shape) * np.moveaxis(
            np.broadcast_to(split.offset.reshape(along), new.shape), view.axis, 0
        )
    name = maker.name(f"{view.tensor.name.removesuffix('_folded')}{DONE}")
    node.inputs[1] = g.constant(name, new.astype(stored.dtype))


def _double_rows(
    body: Graph,
    node: Node,
    index: NDArray[np.int64],
    shares: Vector,
    shapes: Shapes,
    maker: g.Maker,
) -> bool:
    """Let the layer before make the copies, where its channels go nowhere else."""
    steps = []
    tensor = node.inputs[0]
    while (before := g.producer(tensor)) is not None and before.op in _PASSING:
        steps.append(before)
        tensor = before.inputs[0]
    if before is None or before.op not in ("Conv", "Gemm", "MatMul"):
        return False
    if any(step.op == "Clip" for step in steps) and np.any(shares != 1):
        return False
    view, region = g.weight_view(before), region_of(body, before, shapes, clips=True)
    if view is None or view.groups != 1 or region is None:
        return False
    if [reader for reader, _ in region.readers] != [node] or len(region.tensors) > len(steps) + 1:
        return False
    stored, bias = g.values(view.tensor), affine.bias(before, affine.out_channels(before))
    assert bias is not None
    along = [1] * stored.ndim
    along[view.axis] = -1
    rows = np.take(stored, index, axis=view.axis) * shares.reshape(along)
    ending = DONE if _is_split(view.tensor.name) else ""
    name = maker.name(f"{view.tensor.name.removesuffix(DONE)}_doubled{ending}")
    before.inputs[1] = g.constant(name, rows.astype(stored.dtype))
    if bias.any():
        affine.set_bias(before, bias[index] * shares, maker.name)
    for out in (t for step in (before, *steps) for t in step.outputs):
        out.shape = None
    return True


def _gather(
    body: Graph, node: Node, index: NDArray[np.int64], shares: Vector, maker: g.Maker
) -> None:
    """The copies by Gather; halved by a Mul where activations are split."""
    source = node.inputs[0]
    axis = g.input_channel_axis(node)
    positive = 1 if node.op == "Conv" else axis
    copies = maker.constant(f"{node.name}_copies", index)
    wide = maker.emit(body, "Gather", [source, copies], f"{source.name}_split", axis=positive)
    wide.dtype = source.dtype
    if np.any(shares != 1):
        values = shares.reshape(-1, *(1,) * (-axis - 1)).astype(node.inputs[1].dtype)
        factor = maker.constant(f"{node.name}_shares", values)
        wide = maker.emit(body, "Mul", [wide, factor], f"{source.name}_halved")
        wide.dtype = source.dtype
    node.inputs[0] = wide
