"""The fast integer form: operators between DequantizeLinear and QuantizeLinear become integer ones.

Runs after a pass that wrote QDQ form, and only rewrites what that form says: codes, scales and zero
points stay those of the solvers. It spells out in the file what ONNX Runtime makes of the QDQ form
when it loads it, for runtimes that fuse nothing, and then goes further where that is faster.

1. Conv, Gemm, MatMul, Add, Mul, Concat, pooling and activation functions become QLinear operators.
2. A Relu or Clip before QuantizeLinear goes where saturation does the same.
3. What only moves values moves codes. A QuantizeLinear behind a Reshape or Transpose goes before
   it, where it meets the product that makes the values: Q(move(x)) = move(Q(x)). A DequantizeLinear
   before one goes behind it in the same way.
4. Scalars and biases after a product go into it, GELU becomes one operator (`epilogues`).
5. Channels are padded to what the kernels take at once (`pad_channels`).
6. Whatever has no integer operator, or not of this kind, stays as it is, with a reason, and so does
   each DequantizeLinear that is left between operators.

Bodies of If, Loop and Scan are rewritten each by itself; codes from outside are read as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.lower.epilogues import fuse_epilogues
from onnxq.passes.lower.integer_operators import (
    LOWERINGS,
    MOVERS,
    PRODUCTS,
    RESHAPERS,
    Group,
    Integer,
    Real,
    Refusal,
)
from onnxq.passes.lower.pad_channels import pad_channels

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Pass

NAMED = 3  # layers named in a warning


@dataclass(frozen=True)
class FuseInteger(Pass):
    """QLinearConv, QLinearMatMul, QGemm, … for operators between DequantizeLinear and Quantize."""

    name: ClassVar[str] = "fuse-integer"
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        if not ctx.target.integer_operators:
            raise OnnxqError(
                f"target {ctx.target.name} lists no integer_operators; use --preset int8-static"
            )
        if ctx.qdq_form is None:
            ctx.qdq_form = g.copy(graph)  # still has the float tensors, to compare layers by
        writer = _Writer(graph, ctx)
        changes = sum(writer.body(body) for body in g.subgraphs(graph))
        g.tidy(graph)
        changes += fuse_epilogues(graph, ctx.target) + pad_channels(graph, ctx.target)
        g.tidy(graph)
        _report(ctx, writer.refused)
        _report_dequantized(graph, ctx)
        return changes


class _Writer:
    def __init__(self, graph: Graph, ctx: Context) -> None:
        self.opset, self.ctx, self.namer = graph.opset, ctx, g.Namer(graph)
        self.refused: dict[str, list[Node]] = {}  # reason → nodes

    def body(self, body: Graph) -> int:
        changes = sum(self._quantize_before(body, node) for node in list(body.nodes))
        changes += sum(self._dequantize_after(body, node) for node in list(body.nodes))
        for node in list(body.nodes):
            if node.op not in LOWERINGS or not g.is_standard(node):
                continue
            group, between = self._group(body, node)
            if not any(group.reals):
                continue
            if node.op in MOVERS and group.result is None:
                continue  # moves floats, between layers that stay float
            try:
                integer = self._lower(group)
            except Refusal as refusal:
                if self._was_meant(group):
                    self.refused.setdefault(str(refusal), []).append(node)
                continue
            _replace(body, node, between, integer)
            changes += 1
        return changes

    def _was_meant(self, group: Group) -> bool:
        """Whether the plan wanted codes here, or, where it is silent, the QDQ form itself."""
        plan = self.ctx.plan.get(group.node.name)
        if plan is not None:
            return plan.quantized
        product = group.node.op in PRODUCTS and all(group.reals[:2])
        return group.reals[0] is not None and (product or group.result is not None)

    def _lower(self, group: Group) -> Integer:
        integer = LOWERINGS[group.node.op](group)
        if integer.op != group.node.op and integer.op not in self.ctx.target.integer_operators:
            raise Refusal(f"{self.ctx.target.name} has no {integer.op}")
        return integer

    # ── what stands around an operator ───────────────────────────────────────────────────────────

    def _group(self, body: Graph, node: Node) -> tuple[Group, list[list[Node]]]:
        """The operator's group, and for each output the nodes that its integer form replaces."""
        reals = tuple(self._dequantized(t) for t in node.inputs)
        ends = [self._quantizer(body, t) for t in node.outputs]
        results = [self._quantized(chain[-1]) if chain else None for chain in ends]
        first = results[0] if results else None
        whole = first is not None and all(r is not None and first.same_grid(r) for r in results)
        return Group(node, self.opset, reals, first if whole else None), ends if whole else []

    def _quantizer(self, body: Graph, tensor: gs.Tensor) -> list[Node]:
        """The QuantizeLinear that alone reads a tensor, a needless Relu or Clip before it."""
        reader = g.sole_consumer(body, tensor)
        chain = [] if reader is None else [reader]
        if reader is not None and g.clip_bounds(reader) is not None:
            if reader.inputs[0] is not tensor:
                return []
            follower = g.sole_consumer(body, reader.outputs[0])
            chain = [reader] if follower is None else [reader, follower]
        if not chain or not _is_quantizer(chain[-1]) or not _all_in(chain, body):
            return []
        real = self._quantized(chain[-1])
        if real is None or (len(chain) == 2 and not _saturates(chain[0], real)):
            return []
        return chain

    def _dequantized(self, tensor: gs.Tensor) -> Real | None:
        maker = g.producer(tensor)
        if maker is None or maker.op != "DequantizeLinear" or not g.is_standard(maker):
            return None
        codes = maker.inputs[0]
        return self._real(maker, codes, np.dtype(codes.dtype or np.uint8))

    def _quantized(self, node: Node) -> Real | None:
        return self._real(node, node.outputs[0], np.dtype(np.uint8))

    def _real(self, node: Node, codes: gs.Tensor, dtype: np.dtype[np.generic]) -> Real | None:
        scale = node.inputs[1]
        zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        if zero is None and not node.attrs.get("output_dtype") and g.is_constant(scale):
            values = np.zeros(np.shape(scale.values), dtype)
            zero = g.constant(self.namer(f"{codes.name}_zero_point"), values)
        if zero is None or not g.is_constant(scale) or not g.is_constant(zero):
            return None
        axis, block = (int(node.attrs.get(k, d)) for k, d in (("axis", 1), ("block_size", 0)))
        return Real(codes, scale, zero, axis, block)

    # ── movers before a QuantizeLinear ───────────────────────────────────────────────────────────

    def _quantize_before(self, body: Graph, quantizer: Node) -> bool:
        """Q(move(x)) → move(Q(x)), where x comes from an operator that could hand on codes.

        Codes have the shape of what they stand for: a Shape that reads x reads them instead.
        """
        if not _is_quantizer(quantizer):
            return False
        real = self._quantized(quantizer)
        mover = g.producer(quantizer.inputs[0])
        if real is None or not real.per_tensor or mover is None or mover.op not in RESHAPERS:
            return False
        if not g.is_standard(mover) or not _all_in([mover], body):
            return False
        source, moved = mover.inputs[0], quantizer.inputs[0]
        maker = g.producer(source)
        measured = [_measurers(body, source, mover), _measurers(body, moved, quantizer)]
        if maker is None or None in measured:
            return False
        coded = any(self._dequantized(t) for t in maker.inputs)
        if not (maker.op in LOWERINGS and coded) and maker.op not in RESHAPERS:
            return False
        codes = quantizer.outputs[0]
        inner = gs.Variable(self.namer(f"{source.name}_quantized"), dtype=real.dtype)
        quantizer.outputs.clear()
        mover.outputs.clear()
        g.replace_input(mover, source, inner)
        g.replace_input(quantizer, moved, source)
        quantizer.outputs.append(inner)
        mover.outputs.append(codes)
        for old, new, readers in zip((source, moved), (inner, codes), measured, strict=True):
            for reader in readers or ():
                g.replace_input(reader, old, new)
        self._quantize_before(body, quantizer)
        return True

    def _dequantize_after(self, body: Graph, mover: Node) -> bool:
        """move(DQ(x)) → DQ(move(x)), where an operator that could take codes reads the result."""
        if mover.op not in RESHAPERS or not g.is_standard(mover):
            return False
        real, moved = self._dequantized(mover.inputs[0]), mover.outputs[0]
        if real is None or not real.per_tensor or g.is_constant(real.codes):
            return False
        if not any(reader.op in LOWERINGS for reader in moved.outputs):
            return False
        codes = gs.Variable(self.namer(f"{moved.name}_quantized"), dtype=real.dtype)
        mover.outputs = [codes]
        g.replace_input(mover, mover.inputs[0], real.codes)
        name = self.namer(f"{moved.name}_DequantizeLinear")
        body.nodes.append(gs.Node("DequantizeLinear", name, {}, [codes, *real.grid], [moved]))
        return True


def _is_quantizer(node: Node) -> bool:
    return node.op == "QuantizeLinear" and g.is_standard(node)


def _measurers(body: Graph, tensor: gs.Tensor, reader: Node) -> list[Node] | None:
    """The Shapes that read a tensor beside one reader; None if others do."""
    others = [node for node in tensor.outputs if node is not reader]
    if g.is_output(body, tensor) or any(n.op != "Shape" or not g.is_standard(n) for n in others):
        return None
    return others


def _all_in(nodes: list[Node], body: Graph) -> bool:
    return all(any(node is other for other in body.nodes) for node in nodes)


def _saturates(node: Node, real: Real) -> bool:
    """Whether the codes of a result end where this Relu or Clip ends its values."""
    bounds = g.clip_bounds(node)
    if bounds is None or not real.per_tensor or real.dtype.kind not in "iu":
        return False
    scale, zero = float(np.ravel(real.scale.values)[0]), int(np.ravel(real.zero.values)[0])
    low, high = (np.rint(bound / scale) + zero for bound in bounds)
    limits = np.iinfo(real.dtype)
    return bool(low <= limits.min and high >= limits.max)


def _replace(body: Graph, node: Node, ends: list[list[Node]], integer: Integer) -> None:
    """The integer operator in the place of a node and of what follows it, under its name."""
    outputs = [chain[-1].outputs[0] for chain in ends] or list(node.outputs)
    for old in [node, *(n for chain in ends for n in chain)]:
        old.inputs.clear()
        old.outputs.clear()
        body.nodes.remove(old)
    body.nodes.append(
        gs.Node(
            integer.op,
            node.name,
            dict(integer.attrs),
            list(integer.inputs),
            outputs,
            domain=integer.domain or None,
        )
    )


def _report(ctx: Context, refused: dict[str, list[Node]]) -> None:
    """What keeps its QDQ form, by layer and, in short, as a warning for each reason."""
    for reason, nodes in refused.items():
        for node in nodes:
            ctx.report.skip(node.name, node.op, f"kept in QDQ form: {reason}")
        named = ", ".join(repr(node.name) for node in nodes[:NAMED])
        more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
        ctx.report.warn(f"kept in QDQ form: {named}{more}: {reason}")


def _report_dequantized(graph: Graph, ctx: Context) -> None:
    """Who reads what is dequantized between operators, and why it reads no codes."""
    for node in g.walk(graph):
        if node.op != "DequantizeLinear" or g.is_constant(node.inputs[0]):
            continue
        for reader in node.outputs[0].outputs:
            plan = ctx.plan.get(reader.name)
            why = plan.reason if plan and plan.reason else ctx.target.why_float(reader, "static")
            ctx.report.skip(reader.name, reader.op, f"dequantized before it: {why}")
