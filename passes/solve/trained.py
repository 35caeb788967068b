"""What batch normalisation still knows of the training data, for runs without samples.

A channel had mean β and deviation |γ| after BatchNormalization: normal draws with those, through
the Relu or Clip that follows, stand for the values it took (Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", §4.2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxq.graph import Graph, clip_bounds, producer, tensors
from onnxq.observe import ChannelMoments
from onnxq.pipeline import Context

DRAWS = 1 << 20  # in all channels together: enough for the tails that a percentile cuts


def trained_draws(graph: Graph, ctx: Context, name: str) -> NDArray[np.float32] | None:
    """Values (draws, channels) that a tensor took in training.

    None where no batch normalisation was folded before it, and where real samples say more.
    """
    if ctx.samples is None or not ctx.samples.synthesised:
        return None
    if not ctx.batch_statistics:
        return None
    tensor = tensors(graph)[name]
    maker = producer(tensor)
    low, high = -np.inf, np.inf
    if maker is not None and (bounds := clip_bounds(maker)) is not None:
        low, high = bounds
        tensor = maker.inputs[0]
    if tensor.name not in ctx.batch_statistics:
        return None
    mean, deviation = ctx.batch_statistics[tensor.name]
    normal = np.random.default_rng(0).standard_normal((DRAWS // len(mean) + 1, len(mean)))
    return np.clip(mean + deviation * normal, low, high).astype(np.float32)


def trained_moments(graph: Graph, ctx: Context, name: str) -> ChannelMoments | None:
    """Mean and variance of each channel in training; None as above."""
    draws = trained_draws(graph, ctx, name)
    if draws is None:
        return None
    return ChannelMoments(draws.mean(0, dtype=np.float64), draws.var(0, dtype=np.float64))
