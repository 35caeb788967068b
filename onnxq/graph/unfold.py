"""Inputs as rows: whatever the operator, y = X Wᵀ for a weight seen as a matrix W (out, in)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from onnxq.graph.walk import Array
from onnxq.graph.weights import WeightView, input_channel_axis


@dataclass(frozen=True)
class Unfolding:
    """x → X (groups, rows, in), columns in the order of a WeightView's.

    Rows of the weight belong to groups in turn, out / groups to each: those of a grouped
    convolution, or the matrices of a batched MatMul, whose weight is (*batch, in, out). `kernel` is
    empty for matrix products, of which `axis` holds the columns.

    >>> depthwise = Unfolding(groups=2, kernel=(3,), strides=(1,), dilations=(1,), pads=(1, 1))
    >>> depthwise(np.ones((1, 2, 5), np.float32)).shape       # 5 positions, 3 taps each
    (2, 5, 3)
    """

    groups: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    batch: tuple[int, ...] = ()
    axis: int = -1

    def __call__(self, x: Array, limit: int | None = None) -> Array:
        """X, of which `limit` rows at most are taken, evenly spread."""
        return self._patches(x, limit) if self.kernel else self._matrices(x, limit)

    def _matrices(self, x: Array, limit: int | None) -> Array:
        x = np.swapaxes(x, self.axis, -1)
        lead = np.broadcast_shapes(x.shape[:-2], self.batch)
        x = np.broadcast_to(x, (*lead, *x.shape[-2:]))
        batch = (1,) * (len(lead) - len(self.batch)) + self.batch
        own = [axis for axis, size in enumerate(batch) if size > 1]  # a matrix for each of these
        x = np.moveaxis(x, own, range(len(own))).reshape(self.groups, -1, x.shape[-1])
        return x[:, _spread(x.shape[1], limit)]

    def _patches(self, x: Array, limit: int | None) -> Array:
        channels, *size = x.shape[1:]
        spatial = range(2, x.ndim)
        x = np.pad(x, [(0, 0), (0, 0), *self._padding(size)])
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(spatial))
        stepped = tuple(slice(None, None, step) for step in (*self.strides, *self.dilations))
        windows = np.moveaxis(windows[:, :, *stepped], 1, -1)  # (n, *positions, *kernel, channels)
        places = windows.shape[: 1 + len(size)]
        chosen = np.unravel_index(_spread(math.prod(places), limit), places)
        rows = windows[chosen].reshape(len(chosen[0]), -1, self.groups, channels // self.groups)
        return np.moveaxis(rows, 2, 0).reshape(self.groups, len(rows), -1)

    def _padding(self, size: list[int]) -> list[tuple[int, int]]:
        if self.auto_pad == "VALID":
            return [(0, 0)] * len(size)
        if self.auto_pad == "NOTSET":
            return list(zip(self.pads[: len(size)], self.pads[len(size) :], strict=True))
        padding = []
        for n, k, s, d in zip(size, self.kernel, self.strides, self.dilations, strict=True):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            small, large = total // 2, total - total // 2
            padding.append((small, large) if self.auto_pad == "SAME_UPPER" else (large, small))
        return padding


def unfolding(view: WeightView) -> Unfolding | None:
    """How a weight's input becomes rows.

    None where none is seen (tables, inner states) and for ConvTranspose, of which one row of the
    weight meets the inputs of every group.
    """
    node = view.node
    if view.input_slot is None or node.op == "ConvTranspose":
        return None
    if node.op != "Conv":
        batch = tuple(view.tensor.shape[:-2]) if node.op == "MatMul" else ()
        return Unfolding(math.prod(batch), batch=batch, axis=input_channel_axis(node))
    kernel = tuple(view.tensor.shape[2:])
    ones = [1] * len(kernel)
    return Unfolding(
        groups=view.groups,
        kernel=kernel,
        strides=tuple(node.attrs.get("strides", ones)),
        dilations=tuple(node.attrs.get("dilations", ones)),
        pads=tuple(node.attrs.get("pads", [0, 0] * len(kernel))),
        auto_pad=str(node.attrs.get("auto_pad", "NOTSET")),
    )


def _spread(count: int, limit: int | None) -> Array:
    """Indices of `limit` of so many rows, evenly spread."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.arange(limit) * count // limit
