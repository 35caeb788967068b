"""The sums of products of a layer with weights: exact integers, and as they might be added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.devices.exact import attribute, operands

Array = NDArray[Any]
_AT_ONCE = 1 << 22  # products in memory
_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Products:
    """A Conv, Gemm or MatMul of codes by weights, as its sums of products.

    `x` are codes (rows, K) less their zero point and `w` weights (K, N), a pair of each for every
    group; `sums`, products and bias, have the shape of the layer's result, and `multiplier`, the
    real number that 1 in them stands for, broadcasts with it.
    """

    pairs: list[tuple[Array, Array]]
    zero: int
    sums: Array
    multiplier: Array

    def others(self) -> Iterator[tuple[str, Array]]:
        """The sums as hardware might add them, and what to say of each."""
        plain = self._added(lambda x, w: x @ w)
        for what, add in (
            ("adds products in pairs that end at the bounds of int16", self._in_pairs),
            ("adds products in float16", lambda x, w: adding_in(np.float16, x, w)),
            ("adds products in bfloat16", lambda x, w: adding_in(ml_dtypes.bfloat16, x, w)),
        ):
            yield what, self.sums + (self._added(add) - plain)

    def _in_pairs(self, x: Array, w: Array) -> Array:
        return saturating_pairs(x + self.zero, w) - self.zero * w.sum(0)

    def _added(self, add: Callable[[Array, Array], Array]) -> Array:
        """The results of all groups and rows in the layer's layout: channels behind the batch of a
        Conv, last elsewhere.
        """
        groups = []
        for x, w in self.pairs:
            step = max(1, _AT_ONCE // max(1, w.size))
            groups.append(np.concatenate([add(x[k : k + step], w) for k in range(0, len(x), step)]))
        rows = np.concatenate(groups, axis=1)
        if self.multiplier.ndim != self.sums.ndim or self.multiplier.shape[-1] != 1:
            return rows.reshape(self.sums.shape)
        shape = (self.sums.shape[0], *self.sums.shape[2:], self.sums.shape[1])
        return np.moveaxis(rows.reshape(shape), -1, 1)


def products(model: onnx.ModelProto, values: Mapping[str, Array]) -> Products | None:
    """Those of the one layer with weights in a model; None where it is no plain one.

    `values` are all its tensors, computed exactly.
    """
    layers = [node for node in model.graph.node if node.op_type in _LAYERS]
    makers = {name: node for node in model.graph.node for name in node.output}
    if len(layers) != 1 or not all(
        name in makers and makers[name].op_type == "DequantizeLinear"
        for name in layers[0].input[:2]
    ):
        return None
    node = layers[0]
    x, x_scale, x_zero = operands(makers[node.input[0]], values)
    w, w_scale, w_zero = operands(makers[node.input[1]], values)
    plain = x_scale.size == 1 and not np.any(w_zero) and _is_plain(node, w)
    if not plain:
        return None
    by_channel = w_scale.reshape(-1)
    x = x.astype(np.int64) - int(x_zero)
    w = w.astype(np.int64)
    result = values[node.output[0]]
    if node.op_type == "Conv":
        pairs = columns(node, x, w)
        along = [1, -1] + [1] * (result.ndim - 2)
    else:
        w = w.T if attribute(node, "transB") else w
        pairs, along = [(x.reshape(-1, x.shape[-1]), w)], [1] * (result.ndim - 1) + [-1]
    multiplier = float(x_scale) * by_channel.reshape(along)
    sums = np.rint(result / multiplier).astype(np.int64)
    return Products(pairs, int(x_zero), sums, multiplier)


def _is_plain(node: onnx.NodeProto, w: Array) -> bool:
    if node.op_type == "Conv":
        return not any(a.name == "auto_pad" and a.s not in (b"", b"NOTSET") for a in node.attribute)
    factors = [a.f for a in node.attribute if a.name in ("alpha", "beta")]
    return w.ndim == 2 and all(f == 1 for f in factors) and not attribute(node, "transA")


def columns(node: onnx.NodeProto, x: Array, w: Array) -> list[tuple[Array, Array]]:
    """A convolution as products of matrices, one of each group: x (rows, K), w (K, N).

    Along K the input channels run fastest, then the places of the kernel.
    """
    places = x.ndim - 2
    given = {a.name: list(a.ints) for a in node.attribute if a.ints}
    pads = given.get("pads", [0] * 2 * places)
    strides, dilations = (given.get(key, [1] * places) for key in ("strides", "dilations"))
    groups = attribute(node, "group", 1)
    around = [(0, 0), (0, 0), *zip(pads[:places], pads[places:], strict=True)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, w.shape[2:], strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, around), reach, tuple(range(2, x.ndim))
    )
    steps = [slice(None, None, s) for s in (*strides, *dilations)]
    seen = seen[(slice(None), slice(None), *steps)]  # (batch, channel, place..., kernel...)
    seen = np.moveaxis(seen, 1, -1)
    made = []
    for part, weights in zip(np.split(seen, groups, -1), np.split(w, groups, 0), strict=True):
        kernels = np.moveaxis(weights, 1, -1).reshape(len(weights), -1)
        made.append((part.reshape(-1, kernels.shape[1]), kernels.T))
    return made


def saturating_pairs(x: Array, w: Array) -> Array:
    """Σ_k of codes x (rows, K) · w (K, N), neighbours along K added in int16, which ends at
    ±32767: x86 without VNNI.
    """
    odd = x.shape[1] % 2
    x, w = np.pad(x, ((0, 0), (0, odd))), np.pad(w, ((0, odd), (0, 0)))
    total = np.zeros((len(x), w.shape[1]), np.int64)
    for k in range(0, x.shape[1], 2):
        pair = x[:, k, None] * w[k] + x[:, k + 1, None] * w[k + 1]
        total += np.clip(pair, -(2**15), 2**15 - 1)
    return total


def adding_in(dtype: Any, x: Array, w: Array) -> Array:
    """Σ_k of codes x (rows, K) · w (K, N), one after the other in a narrow float type."""
    total = np.zeros((len(x), w.shape[1]), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(x.shape[1]):
            total = (total + np.outer(x[:, k], w[k]).astype(dtype)).astype(dtype)
    return np.nan_to_num(total.astype(np.float64))
