"""Biases of trained layers to int32 in units of the accumulator, s_b = s_x · s_w.

The maths is that of `quantize_bias`. A channel whose s_w is so small that 32 bits do not hold its
bias gets a wider scale than it was trained with: left float, ONNX Runtime would make the bias int32
by itself, and overflow. That channel's products are below 2⁻¹⁵ of the bias.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.solve.fake_quant import (
    Array,
    Grid,
    dequantize_linear,
    grid,
    is_dequantizer,
    quantize_linear,
    read,
    stored,
    twin,
)
from onnxq.passes.solve.quantize_bias import LIMIT

from onnxq import graph as g
from onnxq.graph import Graph, Node

LARGEST = 1.5 * LIMIT  # in units of s_b; a bias at LIMIT was made for it, and fits
Outcome = Literal["none", "integer", "widened", "float"]


def integer_bias(body: Graph, node: Node, weight: Grid, x: Grid, namer: g.Namer) -> Outcome:
    """Give a Conv or Gemm an int32 bias behind a DequantizeLinear; say what came of it.

    `none`: there is no bias, or it is int32 already. `float`: it varies along more than the output
    channels, or depends on the input.
    """
    if node.op not in ("Conv", "Gemm") or len(node.inputs) < 3 or not node.inputs[2].name:
        return "none"
    old = node.inputs[2]
    maker = g.producer(old)
    known = grid(maker) if maker is not None and is_dequantizer(maker) else None
    if known is not None and known.zero.dtype == np.int32:
        return "none"
    bias = stored(old)
    unit = accumulator_unit(twin(node), bias, weight, x)
    if unit is None or bias is None:
        return "float"
    values = np.broadcast_to(bias.astype(np.float64), unit.shape)
    widening = np.maximum(np.abs(values) / np.abs(unit) / LIMIT, 1)
    too_large = bool(np.any(np.abs(values) > LARGEST * np.abs(unit)))
    if too_large:
        widening = np.full_like(widening, widening.max()) if weight.per_tensor else widening
        _widen(body, node, weight, widening, namer)
        unit = unit * widening
    codes = np.rint(values / unit).astype(np.int32)
    scale, zero = unit.astype(np.float32), np.zeros(codes.shape, np.int32)
    node.inputs[2] = _dequantized(body, old.name, (codes, scale, zero), {"axis": 0}, namer)
    return "widened" if too_large else "integer"


def accumulator_unit(node: Node, bias: Array | None, weight: Grid, x: Grid) -> Array | None:
    """s_x · s_w (· α/β for Gemm) per output channel, (out,) float64.

    None where bias or scales do not vary along the output channels alone.
    """
    channels = 0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1
    along = weight.per_tensor or (weight.axis % len(node.inputs[1].shape) == channels)
    beta = float(node.attrs.get("beta", 1.0))
    if bias is None or bias.ndim > 1 or bias.dtype != np.float32 or not along or not beta:
        return None
    if weight.block or not x.per_tensor:
        return None
    unit = float(x.scale.reshape(())) * weight.scale.astype(np.float64).reshape(-1)
    if node.op == "Gemm":
        unit = unit * float(node.attrs.get("alpha", 1.0)) / beta
    if np.any(np.abs(unit) < np.finfo(np.float32).tiny):
        return None
    return np.broadcast_to(unit, (int(node.inputs[1].shape[channels]),))


def _widen(body: Graph, node: Node, weight: Grid, factors: Array, namer: g.Namer) -> None:
    """This node's weight with scales (out,) times their factors, its codes rounded again.

    Other readers keep what they have.
    """
    maker = node.inputs[1].inputs[0]
    codes = read(maker.inputs[0])
    if weight.per_tensor:
        wider = Grid(weight.scale * np.float32(factors[0]), weight.zero, weight.axis, 0)
        coarser = quantize_linear(dequantize_linear(codes, weight), wider)
    else:
        wider = Grid(weight.scale * factors.astype(np.float32), weight.zero, weight.axis, 0)
        coarser = np.moveaxis(codes.copy(), weight.axis, 0)  # a view: trained rows stay
        again = quantize_linear(dequantize_linear(codes, weight), wider)
        rows = np.flatnonzero(factors > 1)
        coarser[rows] = np.moveaxis(again, weight.axis, 0)[rows]
        coarser = np.moveaxis(coarser, 0, weight.axis)
    name = f"{node.inputs[1].name}_widened"
    arrays = (np.ascontiguousarray(coarser), wider.scale, wider.zero)
    node.inputs[1] = _dequantized(body, name, arrays, dict(maker.attrs), namer)


def _dequantized(
    body: Graph,
    name: str,
    arrays: tuple[Array, Array, Array],
    attrs: dict[str, object],
    namer: g.Namer,
) -> gs.Variable:
    parts = zip(("quantized", "scale", "zero_point"), arrays, strict=True)
    inputs = [g.constant(namer(f"{name}_{part}"), values) for part, values in parts]
    out = gs.Variable(namer(f"{name}_dequantized"), dtype=np.dtype(np.float32))
    node = gs.Node("DequantizeLinear", namer(f"{name}_DequantizeLinear"), attrs, inputs, [out])
    body.nodes.append(node)
    return out
