"""Integers alone: no floating-point arithmetic between a model's inputs and its outputs.

Every operator becomes integer arithmetic on codes in standard ONNX operators, grouped in functions
of the domain `ai.onnxq` (`Requantize`, `IntegerSoftmax`, …; see `onnxq.ops`), so that any runtime
gives the same bits and a compiler sees what is meant:

- products of uint8 codes are added in int32, with a bias in the same unit;
- a real factor M is an integer multiplier and a rounding right shift, M ≈ m · 2⁻ⁿ, m below 2³¹
  (Jacob et al. 2018, §2.2), one per output channel; of powers of two only the shift is left;
- Relu and Clip are the ends of the range of codes, functions of one number are tables;
- exp, erf, normalizations and roots are polynomials and Newton steps of integers (Kim et al. 2021,
  I-BERT).

The plan is that of `assign` with `form = "integer"`. What has no integer form stays float between a
DequantizeLinear and a QuantizeLinear, and is reported; `strict` makes it an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxq.passes.lower.insert_qdq import InsertQDQ
from onnxq.passes.lower.integers import (
    elementwise,
    functions,
    movers,
    normalizations,
    products,
    transposed,
)
from onnxq.passes.lower.integers.borders import give_codes
from onnxq.passes.lower.integers.writer import Lower, Writer

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.float_operators import float_operators
from onnxq.graph import Graph
from onnxq.pipeline import Context, Pass
from onnxq.report import FloatOperatorRecord

NAMED = 3  # operators in an error

LOWERINGS: dict[str, Lower] = {
    **products.LOWERINGS,
    **transposed.LOWERINGS,
    **elementwise.LOWERINGS,
    **movers.LOWERINGS,
    **functions.LOWERINGS,
    **normalizations.LOWERINGS,
}


@dataclass(frozen=True)
class IntegerOnly(Pass):
    """Integer arithmetic for everything in the plan.

    `io` says whether inputs and outputs are `float`, between a QuantizeLinear and a
    DequantizeLinear, or `codes`, of which the model's metadata tells scale and zero point. `strict`
    refuses a model that keeps a float operator.
    """

    io: Literal["float", "codes"] = "float"
    strict: bool = False
    name: ClassVar[str] = "integer-only"
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        if not any(plan.result for plan in ctx.plan.values()):
            raise OnnxqError(
                'integer-only follows a plan of assign with form = "integer", as the preset '
                "integer-only has it"
            )
        if ctx.qdq_form is None:
            ctx.qdq_form = _qdq_form(graph, ctx)
        maker, shapes = g.Maker(graph), g.shapes(graph)
        changes, left = 0, dict[str, str]()
        for body in list(g.subgraphs(graph)):
            writer = Writer(graph, body, ctx, maker, LOWERINGS, shapes)
            changes += writer.run()
            left |= writer.left
        g.tidy(graph)
        if self.io == "codes":
            give_codes(graph)
        operators = {node.name: node.op for node in g.walk(graph)}
        for name, reason in left.items():
            ctx.report.skip(name, operators.get(name, ""), reason)
        ctx.report.float_operators = _float_operators(graph, ctx, left)
        if self.strict and ctx.report.float_operators:
            raise _refusal(ctx.report.float_operators)
        return changes


def _float_operators(
    graph: Graph, ctx: Context, left: Mapping[str, str]
) -> list[FloatOperatorRecord]:
    """What still computes with floats, with the reason of the plan or of the lowering."""
    model, _ = g.to_proto_without_weights(graph)
    found: list[FloatOperatorRecord] = []
    for operator in float_operators(model):
        plan = ctx.plan.get(operator.name)
        reason = left.get(operator.name) or (plan.reason if plan else "")
        if not reason and operator.op in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            reason = "between codes and a float operator"
        found.append(FloatOperatorRecord(operator.name, operator.op, reason))
    return found


def _refusal(left: list[FloatOperatorRecord]) -> OnnxqError:
    telling = [record for record in left if record.op not in ("QuantizeLinear", "DequantizeLinear")]
    named = "; ".join(f"{r.name!r} ({r.op}): {r.reason}" for r in telling[:NAMED])
    more = f"; and {len(telling) - NAMED} more" if len(telling) > NAMED else ""
    return OnnxqError(f"{len(left)} operators stay float: {named}{more}; without --strict they may")


def _qdq_form(graph: Graph, ctx: Context) -> Graph:
    """The same plan with floats between quantizers: what the integers stand for."""
    twin = g.copy(graph)
    InsertQDQ().apply(twin, ctx)
    return twin
