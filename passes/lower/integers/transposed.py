"""ConvTranspose as a convolution of what it reads with zeros in between.

    y = Wᵀ x with stride s  =  W' ∗ (x with s − 1 zeros behind each value),

W' the kernel mirrored, its input and output channels exchanged (Dumoulin & Visin 2016, "A guide to
convolution arithmetic for deep learning", §4). Zeros are written as the zero point of x.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnxq.passes.lower.integers.grid import Codes, Refusal
from onnxq.passes.lower.integers.group import Group
from onnxq.passes.lower.integers.products import Weight, finish, quantized_weight

from onnxq import graph as g


def conv_transpose(group: Group) -> gs.Variable:
    node, x = group.node, group.codes(0)
    if (
        node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        or "output_shape" in node.attrs
    ):
        raise Refusal("its padding follows from the size of its result")
    weight, scale = quantized_weight(group)
    groups, kernel = int(node.attrs.get("group", 1)), weight.stored.shape[2:]
    ones = [1] * len(kernel)
    strides = list(node.attrs.get("strides", ones))
    dilations = list(node.attrs.get("dilations", ones))
    pads = list(node.attrs.get("pads", [0] * 2 * len(kernel)))
    more = list(node.attrs.get("output_padding", [0] * len(kernel)))
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    before = [r - p for r, p in zip(reach, pads[: len(kernel)], strict=True)]
    after = [
        r - p + o - (s - 1)  # a value's zeros stand behind it, those of the last one too
        for r, p, o, s in zip(reach, pads[len(kernel) :], more, strides, strict=True)
    ]
    data = _with_zeros_between(group, x, strides)
    if any(before) or any(after):
        data = _padded(group, x, data, [0, 0, *before, 0, 0, *after])
    mirrored = _mirrored(weight.stored, groups)
    turned = Weight(mirrored.reshape(len(mirrored), -1), mirrored, weight.name)
    attrs = {"dilations": dilations, "group": groups, "kernel_shape": list(kernel)}
    sums = group.emit("ConvInteger", [data, *turned.operands(x, group)], **attrs)
    # Rows of the weight are the channels of one group; all groups have their scales.
    unit = np.tile(scale, groups) if scale.ndim else scale
    bias = None
    if len(node.inputs) > 2 and node.inputs[2].name:
        if not g.is_constant(node.inputs[2]):
            raise Refusal("its bias is computed, not constant")
        bias = np.asarray(g.values(node.inputs[2]), np.float64)
    channels = (-1, *(1,) * len(kernel))
    return finish(group, sums, x.grid.scale * unit, None, turned.reach(x), channels, bias)


def _mirrored(stored: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """(in, out / groups, *kernel) → (out, in / groups, *kernel), the kernel turned around."""
    inputs, outputs, *kernel = stored.shape
    split = stored.reshape(groups, inputs // groups, outputs, *kernel)
    turned = np.flip(np.swapaxes(split, 1, 2), tuple(range(3, split.ndim)))
    return np.ascontiguousarray(turned.reshape(groups * outputs, inputs // groups, *kernel))


def _with_zeros_between(group: Group, x: Codes, strides: list[int]) -> gs.Tensor:
    """s − 1 zeros behind each value, along the last axis, which each axis is for a while."""
    data, rank = x.tensor, len(strides) + 2
    end = group.constant(np.array([rank]), np.int64, "axis")
    for axis, stride in enumerate(strides, 2):
        if stride == 1:
            continue
        swapped = list(range(rank))
        swapped[axis], swapped[-1] = swapped[-1], swapped[axis]
        data = group.emit("Transpose", [data], perm=swapped)
        data = group.emit("Unsqueeze", [data, end])
        data = _padded(group, x, data, [0] * (2 * rank + 1) + [stride - 1])
        joined = group.constant(np.array([0] * (rank - 1) + [-1]), np.int64, "shape")
        data = group.emit("Reshape", [data, joined])
        data = group.emit("Transpose", [data], perm=swapped)
    return data


def _padded(group: Group, x: Codes, data: gs.Tensor, pads: list[int]) -> gs.Variable:
    return group.emit(
        "Pad", [data, group.constant(np.array(pads), np.int64, "pads"), group.zero(x)]
    )


LOWERINGS = {"ConvTranspose": conv_transpose}
