"""Cross-layer equalization and bias absorption (Nagel et al. 2019, "Data-Free Quantization").

Two layers in a row, y = W2 f(W1 x + b1) + b2 with f(s·x) = s·f(x), keep their function when channel
i between them is scaled, W1 → S⁻¹ W1, b1 → S⁻¹ b1, W2 → W2 S with S = diag(s) (§4.1). With r1_i the
range of row i of W1 and r2_i that of column i of W2,

    s_i = √(r1_i / r2_i)

makes both √(r1_i·r2_i): one scale per tensor then suits all channels alike. Over a network this is
repeated until nothing changes.

Absorption (§4.1.2): where x_i ≥ c_i > 0 always, ReLU(x_i) = ReLU(x_i − c_i) + c_i, so
b1 → b1 − c, b2 → b2 + W2 c. Not before a convolution that pads: its zeros would mean c.

Clip(x, 0, h), ReLU6 for h = 6, is homogeneous where x stays below h. With p_i the largest x_i:

1. If all p_i ≤ h, the Clip is a ReLU, and s is free.
2. Otherwise a channel with p_i ≤ h stays below the bound if p_i / s_i ≤ h.
3. A channel that reaches h keeps s_i = 1. A bound of its own, h / s_i, would need an operator of
   its own between two integer ones; the bound that all share is part of the integer convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from onnxq.passes.prepare import affine
from onnxq.passes.prepare.affine import Vector
from onnxq.passes.prepare.channels import region_of
from onnxq.passes.prepare.region import NORMS, Region

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.observe import Observer
from onnxq.observe_channels import ChannelExtremes
from onnxq.pipeline import Context, Pass

ROUNDS = 200
CONVERGED = 1e-4  # |log s| in a round
WORTH_IT = 1e-2  # |log s| of a region that is rewritten
BIAS_SHARE = 2.0**-10  # of a bias that counts as a weight: a channel of next to no weights would
# otherwise be blown up until its bias overflows int32
DEVIATIONS = 6  # of a normal distribution, which hold all values of a channel


class Limits(NamedTuple):
    """The smallest and the largest s of each channel, (channels,)."""

    least: Vector
    most: Vector


@dataclass(frozen=True)
class Equalize(Pass):
    """Weight ranges of neighbouring layers made alike, channel by channel; biases absorbed.

    What a channel reaches is seen in the samples, and taken for `margin` of its range more to
    either side; without samples it follows from batch normalization.
    """

    margin: float = 0.1
    absorb: bool = True
    name: ClassVar[str] = "equalize"

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        if ctx.samples is None:
            return {}
        hidden = {id(body) for body in g.hidden(graph)}
        return {
            f"{name}#equalize": ChannelExtremes(-region.tensors[name].ndim)
            for body, region in _regions(graph)
            for name in _watched(region)
            if id(body) not in hidden
        }

    def apply(self, graph: Graph, ctx: Context) -> int:
        namer, changes = g.Namer(graph), 0
        regions = [region for _, region in _regions(graph)]
        shifts = [self._absorbable(region, ctx) for region in regions]
        limits = [self._limits(r, c, ctx) for r, c in zip(regions, shifts, strict=True)]
        for region, shift in zip(regions, shifts, strict=True):
            if shift.any():
                changes += 1
                _absorb(region, shift, namer)
        scales = equalized(regions, limits)
        for region, shift, limit, s in zip(regions, shifts, limits, scales, strict=True):
            if np.abs(np.log(s)).max() > WORTH_IT:
                changes += 1
                region.divide(s, namer)
                if np.isinf(limit.most).all():
                    _widen(region)
            else:
                s = np.ones_like(s)
            _move_statistics(region, s, shift, ctx)
        for key in [key for key in ctx.stats if key.endswith("#equalize")]:
            del ctx.stats[key]  # the tensors have other ranges now
        return changes

    def _limits(self, region: Region, shift: Vector, ctx: Context) -> Limits:
        """What the Clips in a region leave of s, once `shift` has been absorbed."""
        reach = np.zeros(region.channels)  # max p / h
        for clip in region.clips:
            bounds = g.clip_bounds(clip)
            assert bounds is not None
            _, high = self._reach(clip.inputs[0].name, region, ctx)
            reach = np.maximum(reach, (high - shift) / bounds[1])
        clipped = reach > 1
        if not clipped.any():
            return Limits(np.zeros_like(reach), np.full_like(reach, np.inf))
        return Limits(np.where(clipped, 1, reach), np.where(clipped, 1, np.inf))

    def _reach(self, name: str, region: Region, ctx: Context) -> tuple[Vector, Vector]:
        """The smallest and the largest value of each channel of a tensor, infinite if unknown."""
        seen = ctx.stats.get(f"{name}#equalize")
        if seen is not None and seen.low.size:
            more = self.margin * (seen.high - seen.low)
            ends = seen.low - more, seen.high + more
        elif ctx.samples is None and name in ctx.batch_statistics:
            mean, deviation = ctx.batch_statistics[name]
            ends = mean - DEVIATIONS * deviation, mean + DEVIATIONS * deviation
        else:
            return np.full(region.channels, -np.inf), np.full(region.channels, np.inf)
        low, high = np.full(region.channels, np.inf), np.full(region.channels, -np.inf)
        np.minimum.at(low, region.tensors[name].reshape(-1), ends[0])
        np.maximum.at(high, region.tensors[name].reshape(-1), ends[1])
        return low, high

    def _absorbable(self, region: Region, ctx: Context) -> Vector:
        """c: how far above zero each channel stays for ever, where that can move on."""
        if not self.absorb or not _absorbs(region):
            return np.zeros(region.channels)
        low, high = self._reach(region.makers[0][0].outputs[0].name, region, ctx)
        clipped = np.zeros(region.channels, bool)
        for clip in region.clips:
            bounds = g.clip_bounds(clip)
            assert bounds is not None
            clipped |= high > bounds[1]
        return np.where(clipped, 0, np.maximum(low, 0))


# ── regions ──────────────────────────────────────────────────────────────────────────────────────


def _regions(graph: Graph) -> Iterator[tuple[Graph, Region]]:
    """Channels between linear operators, each once, with the body that they are in."""
    shapes = g.shapes(graph)
    for body in g.subgraphs(graph):
        seen: set[int] = set()
        for node in body.nodes:
            if id(node) in seen or g.weight_view(node) is None or node.op not in affine.LINEAR:
                continue
            region = region_of(body, node, shapes, clips=True)
            if region is None:
                continue
            makers = [maker for maker, _ in region.makers]
            seen |= {id(maker) for maker in makers}
            both = [*makers, *(reader for reader, _ in region.readers)]
            if all(n.op not in NORMS and not _is_grouped_transpose(n) for n in both):
                yield body, region


def _is_grouped_transpose(node: Node) -> bool:
    return node.op == "ConvTranspose" and node.attrs.get("group", 1) > 1


def _absorbs(region: Region) -> bool:
    """Whether one layer's channels go through one ReLU into layers that have biases and no pads."""
    if len(region.makers) != 1 or len(region.tensors) != 2 or region.constants:
        return False
    maker = region.makers[0][0]
    activation = maker.outputs[0].outputs[0]
    return (
        maker.op in ("Conv", "Gemm")
        and activation.op in ("Relu", "Clip")
        and all(_takes_shift(node) for node, _ in region.readers)
    )


def _takes_shift(node: Node) -> bool:
    if node.op not in ("Conv", "Gemm") or affine.bias(node, affine.out_channels(node)) is None:
        return False
    padded = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET") in (
        "SAME_UPPER", "SAME_LOWER",
    )  # fmt: skip
    return not padded


def _watched(region: Region) -> set[str]:
    """Tensors before activations whose reach decides something."""
    names = {clip.inputs[0].name for clip in region.clips}
    names |= {region.makers[0][0].outputs[0].name} if _absorbs(region) else set()
    on_one_axis = {name for name, index in region.tensors.items() if index.size == len(index)}
    return names & on_one_axis


# ── equalization ─────────────────────────────────────────────────────────────────────────────────


class _Ranges:
    """Magnitudes of a layer's weights and biases, as they are scaled."""

    def __init__(self, node: Node) -> None:
        view, bias = g.weight_view(node), affine.bias(node, affine.out_channels(node))
        assert view is not None
        columns = affine.in_channels(node) // view.groups
        matrix = np.abs(view.matrix()).astype(np.float64)
        over_kernel = matrix.reshape(len(matrix), -1, columns).max(axis=1)
        self.weights = over_kernel.reshape(view.groups, -1, columns)  # (groups, out, in) of a group
        self.bias = np.abs(bias if bias is not None else np.zeros(len(matrix)))

    def rows(self) -> Vector:
        """(out,)"""
        return np.maximum(self.weights.max(axis=2).reshape(-1), self.bias * BIAS_SHARE)

    def columns(self) -> Vector:
        """(in,)"""
        return self.weights.max(axis=1).reshape(-1)

    def divide_rows(self, s: Vector) -> None:
        self.weights /= s.reshape(len(self.weights), -1, 1)
        self.bias /= s

    def multiply_columns(self, s: Vector) -> None:
        self.weights *= s.reshape(len(self.weights), 1, -1)


def equalized(regions: Sequence[Region], limits: Sequence[Limits]) -> list[Vector]:
    """The scales s (channels,) of every region at the fixed point, r1 = r2 within the limits."""
    layers: dict[int, _Ranges] = {}
    for region in regions:
        for node, _ in (*region.makers, *region.readers):
            if id(node) not in layers:
                layers[id(node)] = _Ranges(node)
    scales = [np.ones(region.channels) for region in regions]
    for _ in range(ROUNDS):
        largest = 0.0
        for region, limit, s in zip(regions, limits, scales, strict=True):
            makers = [(layers[id(node)], index) for node, index in region.makers]
            readers = [(layers[id(node)], index) for node, index in region.readers]
            r1, r2 = np.zeros(region.channels), np.zeros(region.channels)
            for layer, index in makers:
                np.maximum.at(r1, index, layer.rows())
            for layer, index in readers:
                np.maximum.at(r2, index, layer.columns())
            step = np.clip(s * scale_between(r1, r2), *limit) / s
            s *= step
            for layer, index in makers:
                layer.divide_rows(step[index])
            for layer, index in readers:
                layer.multiply_columns(step[index])
            largest = max(largest, float(np.abs(np.log(step)).max()))
        if largest < CONVERGED:
            break
    return scales


def scale_between(r1: Vector, r2: Vector) -> Vector:
    """√(r1 / r2), equation 11; 1 for channels that are nothing on one side."""
    alive = (r1 > 0) & (r2 > 0)
    return np.sqrt(np.where(alive, r1, 1) / np.where(alive, r2, 1))


def _widen(region: Region) -> None:
    for clip in region.clips:
        clip.op, clip.inputs = "Relu", clip.inputs[:1]


# ── absorption ───────────────────────────────────────────────────────────────────────────────────


def _absorb(region: Region, c: Vector, namer: g.Namer) -> None:
    """b1 − c, b2 + W2 c."""
    maker, index = region.makers[0]
    bias = affine.bias(maker, len(index))
    assert bias is not None
    affine.set_bias(maker, bias - c[index], namer)
    for node, index in region.readers:
        view, bias = g.weight_view(node), affine.bias(node, affine.out_channels(node))
        assert view is not None
        assert bias is not None
        alpha = node.attrs.get("alpha", 1.0)  # of Gemm
        added = view.matrix().astype(np.float64) * view.column_statistic(c[index])
        affine.set_bias(node, bias + alpha * added.sum(axis=1), namer)


def _move_statistics(region: Region, s: Vector, c: Vector, ctx: Context) -> None:
    """What batch normalization said of the tensors, after x → (x − c) / s."""
    absorbing = region.makers[0][0].outputs[0].name
    for name in region.tensors.keys() & ctx.batch_statistics.keys():
        index = region.tensors[name].reshape(-1)
        mean, deviation = ctx.batch_statistics[name]
        shift = c[index] if name == absorbing else 0.0
        ctx.batch_statistics[name] = ((mean - shift) / s[index], deviation / s[index])
