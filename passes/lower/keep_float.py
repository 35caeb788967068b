"""Keep onnxruntime from quantizing layers that the plan leaves float.

Between a DequantizeLinear and a QuantizeLinear, onnxruntime (since 1.21, optimizer
WeightBiasQuantization) quantizes the float weight of a Conv, ConvTranspose or Gemm by itself, with
one scale for the tensor: of MobileNet's outputs 15 dB are left. It does so where the activation has
one scale. So a float layer's input is dequantized with its scale repeated for each channel: the
same values, at the same price.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g

_AXIS_OF_CHANNELS = 1


def keep_float(body: g.Graph, maker: g.Maker) -> None:
    """Give each float layer that reads a dequantized activation a DequantizeLinear of its own."""
    for node in list(body.nodes):
        channels = _input_channels(node)
        dequantize = g.producer(node.inputs[0]) if channels else None
        if dequantize is None or dequantize.op != "DequantizeLinear":
            continue
        codes, *rest = dequantize.inputs
        if g.is_constant(codes) or not all(g.is_constant(t) and not t.shape for t in rest):
            continue
        repeated: list[gs.Tensor] = [
            maker.constant(f"{t.name}_by_channel", np.repeat(g.values(t), channels)) for t in rest
        ]
        axis = 0 if node.op == "Gemm" and node.attrs.get("transA", 0) else _AXIS_OF_CHANNELS
        real = maker.emit(body, "DequantizeLinear", [codes, *repeated], node.name, axis=axis)
        real.dtype = node.inputs[0].dtype
        node.inputs[0] = real


def _input_channels(node: g.Node) -> int:
    """Of a layer that onnxruntime would quantize, with a float weight; 0 for other nodes."""
    if node.op not in ("Conv", "ConvTranspose", "Gemm") or not g.is_standard(node):
        return 0
    weight = node.inputs[1]
    if not g.is_constant(weight):
        return 0
    if node.op == "Conv":
        return int(weight.shape[1]) * int(node.attrs.get("group", 1))
    rows = 1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0
    return int(weight.shape[rows])
