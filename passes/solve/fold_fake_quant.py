"""Weights of quantization-aware training become the integers that training made of them.

    W ─▶ QuantizeLinear ─▶ [Clip] ─▶ DequantizeLinear    becomes    codes ─▶ DequantizeLinear

1. Codes are what QuantizeLinear gives; scales and zero points are the trained ones, to the bit.
2. A Transpose of a dequantized weight is done now, on the codes. An embedding table is looked up
   as codes.
3. A float bias of Conv and Gemm between dequantized inputs becomes int32 in units of s_x · s_w, as
   integer kernels want it (see `quantize_bias`). Where s_w is so small that 32 bits do not hold it,
   that channel's scale is widened: ONNX Runtime would make it int32 by itself, and overflow.
4. Where the target's kernel cannot add a pair of neighbouring int8 weights without saturation, the
   same values are stored as uint8 around 128, which takes another kernel.

The pairs around activations stay as they are. Nothing but biases is rounded: they move by half a
unit of the accumulator at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.lower.embedding import lower_embedding
from onnxq.passes.solve.assign import HEAVY
from onnxq.passes.solve.fake_quant import (
    Array,
    Grid,
    dequantize_linear,
    fake_codes,
    grid,
    is_dequantizer,
    is_quantizer,
    quantize_linear,
    read,
    stored,
    twin,
)
from onnxq.passes.solve.quantize_bias import LIMIT
from onnxq.passes.solve.round_to_nearest import pair_sums

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, NodePlan, Pass
from onnxq.qtype import QTensor

UNTRAINED = "its weight was not trained for quantization"


@dataclass(frozen=True)
class FoldFakeQuant(Pass):
    """Fake-quantized weights to integers with the trained scales, their biases to int32."""

    name: ClassVar[str] = "fold-fake-quant"

    def apply(self, graph: Graph, ctx: Context) -> int:
        if ctx.plan:
            return 0
        before = g.copy(graph)
        folder = _Folder(graph, ctx)
        for body in g.subgraphs(graph):
            folder.weights(body)
        if not folder.changes:
            raise OnnxqError(_nothing_to_fold(graph))
        ctx.float_form = before
        for body in g.subgraphs(graph):
            folder.layers(body)
        g.tidy(graph)
        folder.report()
        return folder.changes


def _nothing_to_fold(graph: Graph) -> str:
    if any(is_dequantizer(n) and g.is_constant(n.inputs[0]) for n in g.walk(graph)):
        return "this model is quantized already: its weights are integers"
    return (
        "no weight of this model is fake-quantized (a float weight behind QuantizeLinear and "
        "DequantizeLinear); for a float model use another preset, such as int8-static"
    )


class _Folder:
    def __init__(self, graph: Graph, ctx: Context) -> None:
        self.graph, self.ctx, self.namer = graph, ctx, g.Namer(graph)
        self.changes = 0
        self.folded: dict[int, gs.Constant] = {}  # id of a tensor with codes → their constant
        self.shifted: list[str] = []
        self.widened: list[str] = []
        self.float_biases: list[str] = []

    # ── codes ────────────────────────────────────────────────────────────────────────────────────

    def weights(self, body: Graph) -> None:
        for node in list(body.nodes):
            if is_dequantizer(node):
                self._fold(node)
        for node in list(body.nodes):
            maker = g.producer(node.inputs[0]) if node.op == "Transpose" else None
            if maker is not None and is_dequantizer(maker) and g.is_constant(maker.inputs[0]):
                self._transpose(body, node, maker)

    def _fold(self, node: Node) -> None:
        found = fake_codes(node)
        if found is None or grid(node) is None:
            return
        source, codes = found
        key = id(node.inputs[0])  # two bodies may use one name
        if key not in self.folded:
            self.folded[key] = g.constant(self.namer(f"{source.name}_quantized"), codes)
        node.inputs[0] = self.folded[key]
        self.changes += 1

    def _transpose(self, body: Graph, node: Node, maker: Node) -> None:
        by = grid(maker)
        if by is None or g.is_output(body, node.outputs[0]):
            return
        codes = read(maker.inputs[0])
        perm = list(node.attrs.get("perm", range(codes.ndim)[::-1]))
        scale, zero, attrs = maker.inputs[1], maker.inputs[2:3], dict(maker.attrs)
        if not by.per_tensor:
            attrs["axis"] = perm.index(by.axis % codes.ndim)
        if by.block:
            scale = g.constant(self.namer(f"{scale.name}_transposed"), by.scale.transpose(perm))
            zero = [g.constant(self.namer(f"{scale.name}_zero"), by.zero.transpose(perm))]
        name = maker.inputs[0].name
        moved = g.constant(self.namer(f"{name}_transposed"), codes.transpose(perm))
        outputs = list(node.outputs)
        node.outputs.clear()
        node.inputs.clear()
        body.nodes.remove(node)
        body.nodes.append(
            gs.Node(maker.op, node.name, attrs, [moved, scale, *zero], outputs, domain=maker.domain)
        )
        self.changes += 1

    # ── layers ───────────────────────────────────────────────────────────────────────────────────

    def layers(self, body: Graph) -> None:
        for node in [n for n in body.nodes if n.op in HEAVY and g.is_standard(n)]:
            slot = next((k for k in _weight_slots(node) if self._is_weight(node.inputs[k])), None)
            if slot is not None:
                self._weighted(body, node, slot)
                continue
            inputs = [k for k in (0, 1) if _activation(node, k) is not None]
            first = _activation(node, 0)
            if node.op == "MatMul" and len(inputs) == 2 and first is not None:
                self.ctx.plan[node.name] = NodePlan(activation=first.qtype, inputs=(0, 1))
            elif g.weight_view(node) is not None:
                self.ctx.report.skip(node.name, node.op, UNTRAINED)

    def _is_weight(self, tensor: gs.Tensor) -> bool:
        maker = g.producer(tensor)
        return (
            maker is not None
            and is_dequantizer(maker)
            and g.is_constant(maker.inputs[0])
            and grid(maker) is not None
        )

    def _weighted(self, body: Graph, node: Node, slot: int) -> None:
        maker = node.inputs[slot].inputs[0]
        x = _activation(node, 1 - slot) if node.op != "Gather" else None
        if x is not None and slot == 1:
            self._keep_pairs(node, maker, x)
        by = grid(maker)
        assert by is not None
        output = any(is_quantizer(reader) for t in node.outputs for reader in t.outputs)
        self.ctx.plan[node.name] = NodePlan(
            weight=by.qtype,
            activation=x.qtype if x else None,
            inputs=(1 - slot,) if x else (),
            output=output,
        )
        if node.op == "Gather":
            self._embed(body, node, by)
        elif x is not None and slot == 1:
            self._bias(body, node, by, x)

    def _embed(self, body: Graph, node: Node, by: Grid) -> None:
        table = node.inputs[0].inputs[0].inputs[0]
        rows = by.per_tensor or (by.axis % len(table.shape) == 0 and not by.block)
        if node.attrs.get("axis", 0) != 0 or not rows or len(table.shape) < 2:
            return
        codes = read(table)
        reals = gs.Constant(table.name, dequantize_linear(codes, by).astype(by.scale.dtype))
        scale, zero = (a.reshape(() if by.per_tensor else -1) for a in (by.scale, by.zero))
        node.inputs[0] = reals  # for its name, shape and type
        flat = codes.reshape(len(codes), -1)
        lower_embedding(body, node, QTensor(flat, scale, zero, by.qtype), self.namer)

    def _keep_pairs(self, node: Node, maker: Node, x: Grid) -> None:
        """int8 weights whose neighbours would saturate, as uint8."""
        by = grid(maker)
        if by is None or by.qtype.bits != 8 or not by.qtype.signed or x.qtype.bits != 8:
            return
        codes = read(maker.inputs[0])
        alone = twin(node, {1: codes.astype(np.float32)})
        view = g.weight_view(alone)
        rule = self.ctx.target.rule(alone, "static")
        if view is None or rule is None or rule.pair_limit is None:
            return
        if pair_sums(view.matrix()).max(initial=0) <= rule.pair_limit:
            return
        name = maker.inputs[0].name
        shifted, zero = ((a.astype(np.int16) + 128).astype(np.uint8) for a in (codes, by.zero))
        stored_as = g.constant(self.namer(f"{name}_around_128"), shifted)
        point = g.constant(self.namer(f"{name}_zero_point"), zero)
        maker.inputs = [stored_as, maker.inputs[1], point]
        self.shifted.append(node.name)
        self.changes += 1

    def _bias(self, body: Graph, node: Node, by: Grid, x: Grid) -> None:
        if node.op not in ("Conv", "Gemm") or len(node.inputs) < 3 or not node.inputs[2].name:
            return
        old = node.inputs[2]
        maker = g.producer(old)
        if is_dequantizer(maker) and maker is not None:
            known = grid(maker)
            if known is not None and known.zero.dtype == np.int32:
                return
        bias = stored(old)
        unit = accumulator_unit(twin(node), bias, by, x) if self.graph.opset >= 13 else None
        if unit is None or bias is None:
            self.float_biases.append(node.name)
            return
        values = np.broadcast_to(bias.astype(np.float64), unit.shape)
        widening = np.maximum(np.abs(values) / np.abs(unit) / LIMIT, 1)
        if widening.max(initial=1) > 1:
            if by.per_tensor or len(node.inputs[1].outputs) > 1:
                self.float_biases.append(node.name)
                return
            self._widen(node, by, widening)
            unit = unit * widening
        codes, unit = np.rint(values / unit).astype(np.int32), unit.astype(np.float32)
        name = old.name
        inputs = [
            g.constant(self.namer(f"{name}_quantized"), codes),
            g.constant(self.namer(f"{name}_scale"), unit),
            g.constant(self.namer(f"{name}_zero_point"), np.zeros(codes.shape, np.int32)),
        ]
        out = gs.Variable(self.namer(f"{name}_dequantized"), dtype=np.dtype(np.float32))
        body.nodes.append(
            gs.Node(
                "DequantizeLinear",
                self.namer(f"{name}_DequantizeLinear"),
                {"axis": 0},
                inputs,
                [out],
            )
        )
        node.inputs[2] = out
        self.changes += 1

    def _widen(self, node: Node, by: Grid, factors: Array) -> None:
        """Scales (out,) times their factors; the codes of those channels rounded again."""
        maker = node.inputs[1].inputs[0]
        codes = read(maker.inputs[0])
        scale = by.scale * factors.astype(by.scale.dtype)
        touched = np.moveaxis(codes.copy(), by.axis, 0)
        reals = np.moveaxis(dequantize_linear(codes, by), by.axis, 0)
        for row in np.flatnonzero(factors > 1):
            alone = Grid(scale[row], by.zero[row], 0, 0)
            touched[row] = quantize_linear(reals[row], alone)
        name = maker.inputs[0].name
        stored_as = g.constant(self.namer(f"{name}_widened"), np.moveaxis(touched, 0, by.axis))
        wider = g.constant(self.namer(f"{maker.inputs[1].name}_widened"), scale)
        maker.inputs = [stored_as, wider, *maker.inputs[2:]]
        self.widened.append(node.name)

    def report(self) -> None:
        if self.shifted:
            self.ctx.report.warn(
                f"{_named(self.shifted)}: stored as uint8 around 128, for neighbouring int8 "
                f"weights would saturate on {self.ctx.target.name}; exact, by a slower kernel"
            )
        if self.widened:
            self.ctx.report.warn(
                f"{_named(self.widened)}: channels of nearly no weight got wider scales than "
                "trained: their biases would not fit into int32"
            )
        if self.float_biases:
            self.ctx.report.warn(
                f"{_named(self.float_biases)}: the bias cannot be put into int32 and stays float"
            )


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


def _weight_slots(node: Node) -> tuple[int, ...]:
    slots = {"Gather": (0,), "MatMul": (1, 0)}.get(node.op, (1,))
    return tuple(slot for slot in slots if slot < len(node.inputs))


def _activation(node: Node, slot: int) -> Grid | None:
    """What a DequantizeLinear before an input says of it, where the input is no constant."""
    maker = g.producer(node.inputs[slot])
    if maker is None or not is_dequantizer(maker) or g.is_constant(maker.inputs[0]):
        return None
    return grid(maker)


def _named(names: list[str]) -> str:
    few = ", ".join(repr(name) for name in names[:3])
    return few + (f" and {len(names) - 3} more" if len(names) > 3 else "")
