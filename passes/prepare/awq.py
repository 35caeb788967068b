"""AWQ (Lin et al. 2023): weights that see large activations are rounded more finely.

    Y = X W = (X diag(s)⁻¹) · Q(diag(s) W),   s = s_X^r,   s_X = mean|X|,   r ∈ [0, 1]    (eq. 4, 5)

X (tokens, in), W (in, out), one s per input channel. A block of weights has one scale, set by the
largest of them; to multiply a channel by s > 1 and divide its activations by it makes its error s
times smaller, at the expense of its neighbours when it widens their block. Which weights matter is
told by the activations. r is found on a grid, for all layers together that read the same channels,
by the error of their outputs; r = 0 changes nothing. s is divided by √(max s · min s), which no
block notices and which keeps activations near the size that they had.

It follows `assign`, so that the error is that of the format of each layer, and comes before codes
are made. The division folds into what makes X as SmoothQuant's does. The paper's second step, to
search for the range of each block, is rounding's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from onnxq.passes.prepare.affine import Vector
from onnxq.passes.prepare.region import Index
from onnxq.passes.prepare.sites import Site, sites

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.observe import Observer
from onnxq.observe_channels import Rows
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QType, quantize_weight, weight_scale

Floats = NDArray[np.float32]
ROWS = 256  # of a layer's inputs, to try each r on
LEAST = 1e-4  # of the largest s_X: a channel that seldom fires keeps weights for when it does
_KEY = "#awq"


@dataclass(frozen=True)
class AWQ(Pass):
    """Per-channel scales of activations folded into weights, so that those that matter err less.

    `grid` is the number of steps from r = 0 to 1. `explicit` is the share of the error that a Mul
    of its own must save where nothing folds; 1 makes none.
    """

    grid: int = 20
    explicit: float = 1.0
    name: ClassVar[str] = "awq"
    needs_samples: ClassVar[bool] = True
    prepares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise OnnxqError(f"awq.grid is 1 step or more, not {self.grid}")

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        return {
            f"{node.inputs[0].name}{_KEY}": Rows(g.input_channel_axis(node), ROWS)
            for site in self._sites(graph, ctx)
            for node, _ in site.readers
        }

    def apply(self, graph: Graph, ctx: Context) -> int:
        maker, changes = g.Maker(graph), 0
        for site in self._sites(graph, ctx):
            if all(f"{node.inputs[0].name}{_KEY}" in ctx.stats for node, _ in site.readers):
                s = self._scale(site, ctx)
                if s is not None:
                    site.divide(s, maker)
                    changes += 1
        for key in [key for key in ctx.stats if key.endswith(_KEY)]:
            del ctx.stats[key]  # the tensors have other values now
        g.sort(graph)
        return changes

    def _sites(self, graph: Graph, ctx: Context) -> list[Site]:
        """Those with a weight to round, and, unless a Mul is to be made, with a place to fold."""
        return [
            site
            for site in sites(graph)
            if (site.region is not None or self.explicit < 1)
            and any(_is_rounded(node, ctx) for node, _ in site.readers)
        ]

    def _scale(self, site: Site, ctx: Context) -> Vector | None:
        """The best s (channels,) of a site; None where r = 0 is the best."""
        layers = []
        for node, index in site.readers:
            view, plan = g.weight_view(node), ctx.plan.get(node.name)
            rows = ctx.stats[f"{node.inputs[0].name}{_KEY}"].rows
            if rows.size and view and plan and plan.weight:
                layers.append(Layer(view.matrix(), rows, index, plan.weight))
        if not layers:
            return None
        magnitude = mean_magnitude(layers, site.channels)
        tried = [salience_scale(magnitude, k / self.grid) for k in range(self.grid + 1)]
        errors = [sum(layer.error(s) for layer in layers) for s in tried]
        best = int(np.argmin(errors))
        least = 0.0 if site.region is not None else self.explicit
        return tried[best] if errors[best] < (1 - least) * errors[0] else None


def _is_rounded(node: Node, ctx: Context) -> bool:
    return node.name in ctx.plan and ctx.plan[node.name].weight is not None


# ── the formula ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Layer:
    """One reader: its weight (out, in), rows of its input (n, in), and the format of its codes.

    `index` (in,) says which of the site's channels each column is.
    """

    weight: Floats
    rows: Floats
    index: Index
    qtype: QType

    @cached_property
    def signal(self) -> float:
        """‖x Wᵀ‖² over the rows; 1 for silence."""
        outputs = self.rows @ self.weight.T
        return float(np.vdot(outputs, outputs)) or 1.0

    def error(self, s: Vector) -> float:
        """‖x W′ᵀ − x Wᵀ‖² / ‖x Wᵀ‖² over the rows, for W′ = Q(W · s) / s."""
        columns = s[self.index].astype(np.float32)
        scaled = self.weight * columns
        rounded = quantize_weight(scaled, *weight_scale(scaled, self.qtype), self.qtype)
        noise = self.rows @ (rounded.dequantize() / columns - self.weight).T
        return float(np.vdot(noise, noise)) / self.signal


def mean_magnitude(layers: Sequence[Layer], channels: int) -> Vector:
    """s_X = mean|X| (channels,) over what all layers of a site saw."""
    total, count = np.zeros(channels), np.zeros(channels)
    for layer in layers:
        np.add.at(total, layer.index, np.abs(layer.rows).mean(axis=0, dtype=np.float64))
        np.add.at(count, layer.index, 1)
    return total / np.maximum(count, 1)


def salience_scale(magnitude: Vector, r: float) -> Vector:
    """s = s_X^r / √(max s · min s), (channels,); ones where all of s_X is zero."""
    largest = magnitude.max(initial=0)
    if largest == 0:
        return np.ones(len(magnitude))
    s = np.maximum(magnitude, LEAST * largest) ** r
    return s / np.sqrt(s.max() * s.min())
