"""SmoothQuant (Xiao et al. 2023): outliers move from activations into weights.

    Y = X W = (X diag(s)⁻¹) · (diag(s) W),        s_j = max|X_j|^α / max|W_j|^(1−α)    (eq. 3, 4)

X (tokens, in), W (in, out), j an input channel. Activations have one scale for all channels, and a
few channels with values a hundred times the rest leave those no codes; weights are even and have
codes to spare. α says how much of the difficulty moves: 0 evens out weights, 1 activations.

The division is free where it folds into what makes X: gain and bias of a normalization, rows and
bias of a linear operator, through all that commutes with it. All readers of X multiply, so one s is
found for all of them. Where something else reads X too, a Mul before the readers divides; it is
worth its time only where it saves much of the error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from onnxq.observe_channels import ChannelRows, Halves, Rows
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QParams, QType, quantize, quantize_weight, weight_scale

Floats = NDArray[np.float32]
ALPHAS = tuple(round(0.1 * k, 1) for k in range(11))
LEAST_GAIN = 0.02  # share of the error that a fold must save
ACTIVATION, WEIGHT = QType.parse("u8a"), QType.parse("s8:channel")


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Per-channel scales of activations folded into the weights before and after them.

    `alpha` holds for all layers; None finds the best for each by the error of its output on rows
    seen in the samples, no smoothing among the candidates. `explicit` is the share of the error
    that a Mul of its own must save; 1 makes none.
    """

    alpha: float | None = None
    explicit: float = 0.5
    name: ClassVar[str] = "smoothquant"
    needs_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise OnnxqError(f"smoothquant.alpha is in [0, 1], not {self.alpha}")

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        wanted: dict[str, Observer] = {}
        for site in sites(graph):
            for node, _ in site.readers:
                name, axis = node.inputs[0].name, g.input_channel_axis(node)
                wanted[f"{name}#smoothquant"] = Halves(Rows(axis), Rows(axis))
        return wanted

    def apply(self, graph: Graph, ctx: Context) -> int:
        maker, changes = g.Maker(graph), 0
        for site in sites(graph):
            if not all(f"{n.inputs[0].name}#smoothquant" in ctx.stats for n, _ in site.readers):
                continue
            s = self._scale(site, ctx)
            if s is None:
                continue
            changes += 1
            site.divide(s, maker)
        for key in [k for k in ctx.stats if k.endswith("#smoothquant")]:
            del ctx.stats[key]  # the tensors have other ranges now
        g.sort(graph)
        return changes

    def _scale(self, site: Site, ctx: Context) -> Vector | None:
        """The best s (channels,) for a site; None where smoothing saves too little."""
        layers = [Layer.seen(node, index, ctx) for node, index in site.readers]
        if not all(half.rows.size for layer in layers for half in layer.halves):
            return None
        ones = np.ones(site.channels)
        plain = sum(layer.error(ones, half) for layer in layers for half in (0, 1))
        best, best_alpha = np.inf, 0.0
        for alpha in ALPHAS if self.alpha is None else (self.alpha,):
            error = 0.0
            for half in (0, 1):
                s = site_scale(layers, site.channels, alpha, (half,))
                error += sum(layer.error(s, half) for layer in layers)
            if error < best:
                best, best_alpha = error, alpha
        least = self.explicit if site.region is None else LEAST_GAIN
        chosen = self.alpha is not None and site.region is not None
        if not chosen and best >= (1 - least) * plain:
            return None
        return site_scale(layers, site.channels, best_alpha, (0, 1))


# ── the formula ──────────────────────────────────────────────────────────────────────────────────


def smoothing_scale(activations: Vector, weights: Vector, alpha: float) -> Vector:
    """s = max|X|^α / max|W|^(1−α) per channel (equation 4); 1 for channels of nothing but zeros."""
    alive = (activations > 0) & (weights > 0)
    x, w = np.where(alive, activations, 1), np.where(alive, weights, 1)
    return x**alpha / w ** (1 - alpha)


@dataclass(frozen=True)
class Layer:
    """One reader: its weight (out, in), and what was seen of its input in two halves of samples.

    `index` says which of the site's channels each column is.
    """

    weight: Floats
    halves: tuple[ChannelRows, ChannelRows]
    index: Index
    activation: QType = ACTIVATION
    format: QType = WEIGHT

    @classmethod
    def seen(cls, node: Node, index: Index, ctx: Context) -> Layer:
        view, halves = g.weight_view(node), ctx.stats[f"{node.inputs[0].name}#smoothquant"]
        assert view is not None
        rule = ctx.target.rule(node, "static")
        types = (rule.activation, rule.weight) if rule else (None, None)
        return cls(view.matrix(), halves, index, types[0] or ACTIVATION, types[1] or WEIGHT)

    def error(self, s: Vector, half: int) -> float:
        """Mean over rows of ‖x Wᵀ − Q(x / s) Q(W s)ᵀ‖² / ‖x Wᵀ‖² for a scale per channel.

        The range of Q is that of one half of the samples, the rows are the other half's: what fits
        the largest values too tightly clips them in the next sample. Of each row by itself: a
        normalization follows, which makes the loud no louder.
        """
        s = s[self.index]
        seen, rows = self.halves[half], self.halves[1 - half].rows
        low, high = (seen.low / s).min(), (seen.high / s).max()
        params = QParams.from_range(float(low), float(high), self.activation)
        codes = quantize(rows / s, params.scale, params.zero, self.activation)
        x = (codes.astype(np.float32) - np.float32(params.zero)) * params.scale
        smoothed = (self.weight * s).astype(np.float32)
        w = quantize_weight(smoothed, *weight_scale(smoothed, self.format), self.format)
        exact = rows @ self.weight.T
        noise = np.square(x @ w.dequantize().T - exact).sum(axis=1, dtype=np.float64)
        signal = np.square(exact).sum(axis=1, dtype=np.float64)
        return float((noise[signal > 0] / signal[signal > 0]).mean()) if signal.any() else 0.0


def site_scale(
    layers: Sequence[Layer], channels: int, alpha: float, halves: Sequence[int]
) -> Vector:
    """s (channels,) from what all layers of a site saw in the given halves.

    A channel that stays below the median is taken to reach it: s is to tame outliers, and a channel
    that was blown up because it seldom fires would be clipped where it does.
    """
    highest, weights = np.zeros(channels), np.zeros(channels)
    for layer in layers:
        for seen in (layer.halves[half] for half in halves):
            np.maximum.at(highest, layer.index, np.maximum(-seen.low, seen.high))
        np.maximum.at(weights, layer.index, np.abs(layer.weight).max(axis=0))
    alive = highest > 0
    if alive.any():
        highest[alive] = np.maximum(highest[alive], np.median(highest[alive]))
    return smoothing_scale(highest, weights, alpha)
