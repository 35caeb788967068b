"""Weights of quantization-aware training become the integers that training made of them.

    W ─▶ QuantizeLinear ─▶ [Clip] ─▶ DequantizeLinear    becomes    codes ─▶ DequantizeLinear

1. Codes are what QuantizeLinear gives; scales and zero points are the trained ones, to the bit.
2. A Transpose of a dequantized weight is done now, on the codes. An embedding table is looked up
   as codes.
3. A bias of Conv and Gemm between dequantized inputs becomes int32, in the units that integer
   kernels want it in (`fake_quant_bias`).
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
from onnxq.passes.solve.assign import HEAVY, MOVERS
from onnxq.passes.solve.fake_quant import (
    Grid,
    dequantize_linear,
    fake_codes,
    grid,
    is_dequantizer,
    is_quantizer,
    read,
    twin,
)
from onnxq.passes.solve.fake_quant_bias import Outcome, integer_bias
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
        self.graph, self.ctx, self.maker = graph, ctx, g.Maker(graph)
        self.changes = 0
        self.folded: dict[int, gs.Constant] = {}  # id of a tensor with codes → their constant
        self.shifted: list[str] = []
        self.biases: dict[Outcome, list[str]] = {}

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
            self.folded[key] = g.constant(self.maker.name(f"{source.name}_quantized"), codes)
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
            scale = g.constant(
                self.maker.name(f"{scale.name}_transposed"), by.scale.transpose(perm)
            )
            zero = [g.constant(self.maker.name(f"{scale.name}_zero"), by.zero.transpose(perm))]
        name = maker.inputs[0].name
        moved = g.constant(self.maker.name(f"{name}_transposed"), codes.transpose(perm))
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
            outcome = integer_bias(body, node, by, x, self.maker.name)
            self.biases.setdefault(outcome, []).append(node.name)
            self.changes += outcome in ("integer", "widened")

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
        lower_embedding(body, node, QTensor(flat, scale, zero, by.qtype), self.maker)

    def _keep_pairs(self, node: Node, maker: Node, x: Grid) -> None:
        """int8 weights whose neighbours would saturate, as uint8.

        Behind int8 activations too: on x86 ONNX Runtime makes those uint8 when it loads the model.
        """
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
        stored_as = g.constant(self.maker.name(f"{name}_around_128"), shifted)
        point = g.constant(self.maker.name(f"{name}_zero_point"), zero)
        maker.inputs = [stored_as, maker.inputs[1], point]
        self.shifted.append(node.name)
        self.changes += 1

    def report(self) -> None:
        if self.shifted:
            self.ctx.report.warn(
                f"{_named(self.shifted)}: stored as uint8 around 128, for neighbouring int8 "
                f"weights would saturate on {self.ctx.target.name}; exact, by a slower kernel; "
                "a target without that bound keeps int8"
            )
        if widened := self.biases.get("widened"):
            self.ctx.report.warn(
                f"{_named(widened)}: channels of nearly no weight got wider scales than "
                "trained: their biases would not fit into int32"
            )
        if left := self.biases.get("float"):
            self.ctx.report.warn(
                f"{_named(left)}: the bias cannot be put into int32 and stays float"
            )


def _weight_slots(node: Node) -> tuple[int, ...]:
    slots = {"Gather": (0,), "MatMul": (1, 0)}.get(node.op, (1,))
    return tuple(slot for slot in slots if slot < len(node.inputs))


def _activation(node: Node, slot: int) -> Grid | None:
    """What a DequantizeLinear before an input says of it, where the input is no constant.

    What only moves values may stand between: the runtime moves it out of the way.
    """
    maker = g.producer(node.inputs[slot])
    moved = False
    while maker is not None and maker.op in MOVERS and g.is_standard(maker):
        maker, moved = g.producer(maker.inputs[0]), True
    if maker is None or not is_dequantizer(maker) or g.is_constant(maker.inputs[0]):
        return None
    found = grid(maker)
    return found if found is None or found.per_tensor or not moved else None


def _named(names: list[str]) -> str:
    few = ", ".join(repr(name) for name in names[:3])
    return few + (f" and {len(names) - 3} more" if len(names) > 3 else "")
