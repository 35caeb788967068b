"""A plan that leaves nothing float: every tensor gets a grid, and every operator a rule for it.

Two formats are enough, those of the target's rules of form `integer`. What is multiplied, pooled or
looked up has the narrow one, 8 bits. What is added up over many layers, normalized or put into an
exponential has the wide one, 16 bits: a rounding there would be seen in all that follows. Operators
that take both, as Add does, have the one that is wanted of their result:

    wide(t) = t is an output of the model, or some reader of t takes the wide format alone, or takes
              both and makes a tensor that is wide

A reader of the narrow format gets a copy of a wide tensor. Where a float tensor enters, at an input
or behind an operator that stays float, an Identity stands for its quantization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs
from onnxq.passes.solve.planner import HEAVY, HIDDEN, MOVERS, SHORTEST_ROW, Wishes
from onnxq.passes.solve.units import Unit, units

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, NodePlan
from onnxq.qtype import QType
from onnxq.target import Form, Format, OpRule

FORM: Form = "integer"
NARROW, WIDE = 8, 16
KEEP_GRID = (*MOVERS, "Cast")  # hand on the codes that they are given
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SIZES = ("Shape", "Size")  # which read no values
_LEAST_RANK = {"Gemm": 2, "MatMul": 1}  # of their results
_COMPUTED_WEIGHT = "its weights are computed, not constant"


@dataclass(frozen=True)
class _Planned:
    """A unit with what is computed behind it before anything is rounded."""

    unit: Unit
    tail: tuple[Node, ...]
    rules: dict[int, OpRule]  # by bits of activations

    @property
    def last(self) -> Node:
        return self.tail[-1] if self.tail else self.unit.node


class IntegerPlanner:
    """Plans one graph or body; tensors from outside of a body are float to it."""

    hidden = False

    def __init__(self, graph: Graph, body: Graph, ctx: Context, wishes: Wishes) -> None:
        self.graph, self.body, self.ctx, self.wishes = graph, body, ctx, wishes
        self.maker = g.Maker(graph)
        self.readers: dict[str, list[_Planned]] = {}
        self.formats: dict[str, QType] = {}  # of every tensor that is handed on as codes
        self.own = {id(node) for node in body.nodes}
        self.planned: set[int] = set()  # ids of nodes
        self._wide: dict[str, bool] = {}
        found = {
            rule.activation.bits: rule.activation
            for rules in ctx.target.ops.values()
            for rule in rules
            if rule.form == FORM and rule.activation is not None
        }
        if found.keys() < {NARROW, WIDE}:
            raise OnnxqError(
                f"target {ctx.target.name} has no rules of form {FORM} for activations of "
                f"{NARROW} and {WIDE} bits; use --target cpu"
            )
        self.of_bits = {bits: wishes.scheme.format(found[bits]) for bits in (NARROW, WIDE)}

    def run(self) -> None:
        planned = self._group()
        for each in planned:
            for tensor in each.unit.inputs:
                self.readers.setdefault(tensor.name, []).append(each)
        for each in reversed(planned):  # readers first, so that no way through the graph recurses
            for tensor in each.last.outputs:
                self._is_wide(tensor)
        for each in planned:
            for tensor in each.unit.inputs:
                self._enter(tensor)
            self._plan(each)

    def _group(self) -> list[_Planned]:
        """The units that some rule takes, each with its tail."""
        planned: list[_Planned] = []
        taken: set[int] = set()
        for unit in units(self.graph, self.body):
            if id(unit.node) in taken or not _is_about_floats(unit):
                continue
            rules = self._rules(unit)
            if not rules:
                reason = self._refusal(unit)
                self.ctx.plan[unit.node.name] = NodePlan(reason=reason)
                self.ctx.report.skip(unit.node.name, unit.node.op, reason)
                continue
            tail = tuple(self._tail(unit))
            taken |= {id(node) for node in tail}
            self.planned |= {id(node) for node in (*unit.nodes, *tail)}
            planned.append(_Planned(unit, tail, rules))
        return planned

    def _rules(self, unit: Unit) -> dict[int, OpRule]:
        """The target's rules by the width of activations, in the recipe's scheme."""
        if self.hidden or any(self.wishes.why_float(node) for node in unit.nodes):
            return {}
        named = unit.node if unit.pattern is None else gs.Node(unit.op)
        if not g.is_standard(named):
            return {}
        weight_bits = self.wishes.format(unit.node).weight_bits
        found: dict[int, OpRule] = {}
        for bits in (NARROW, WIDE):
            rule = self.ctx.target.rule(named, FORM, Format(weight_bits, bits))
            if rule is not None and rule.activation is not None:
                found[bits] = self.wishes.scheme.of(rule)
        if (
            unit.op in HEAVY
            and unit.op not in ("MatMul", "Gather")
            and not g.weight_view(unit.node)
        ):
            return {}
        return found

    def _refusal(self, unit: Unit) -> str:
        if self.hidden:
            return HIDDEN
        for node in unit.nodes:
            if why := self.wishes.why_float(node):
                return why
        if unit.op in HEAVY and unit.op in self.ctx.target.ops and not g.weight_view(unit.node):
            return _COMPUTED_WEIGHT
        return self.ctx.target.why_float(unit.node, FORM)

    def _tail(self, unit: Unit) -> list[Node]:
        """What follows an operator and is part of its own requantization.

        Products take a constant vector, factors and a bound, in this order; others a bound.
        """
        if unit.op in KEEP_GRID or len(unit.node.outputs) > 1:
            return []
        tail: list[Node] = []
        node = unit.node
        while (reader := g.sole_consumer(self.body, node.outputs[0])) is not None:
            if id(reader) not in self.own or self.wishes.why_float(reader):
                break
            if g.clip_bounds(reader) is not None and reader.inputs[0] is node.outputs[0]:
                return [*tail, reader]
            if unit.op not in PRODUCTS:
                break
            if not is_factor(reader) and (tail or not is_vector(reader, unit.node)):
                break
            tail.append(reader)
            node = reader
        return tail

    def _plan(self, each: _Planned) -> None:
        unit, rules = each.unit, each.rules
        narrow_alone = WIDE not in rules
        rule = rules[NARROW] if NARROW in rules else rules[WIDE]
        view = g.weight_view(unit.node) if unit.pattern is None else None
        weight = rule.weight if view else None
        if unit.op == "Gather" and view and math.prod(view.tensor.shape[1:]) < SHORTEST_ROW:
            weight = None  # its rows become codes of the result
        slots = range(len(unit.node.inputs)) if unit.pattern is None else ()
        inputs = tuple(
            slot for slot in slots if narrow_alone and _is_quantized(unit.node.inputs[slot])
        )
        outputs = [t for t in each.last.outputs if t.name]
        made = g.is_float(outputs[0]) if outputs else False
        result = None
        if made:
            result = self._format_of(each, narrow_alone)
            self.formats |= {t.name: result for t in outputs if g.is_float(t)}
        common = NodePlan(activation=rule.activation, rule=rule)
        for node in (unit.node, *each.tail):
            self.ctx.plan[node.name] = common
        head = self.ctx.plan[unit.node.name]
        self.ctx.plan[unit.node.name] = replace(head, weight=weight, inputs=inputs)
        last = self.ctx.plan[each.last.name]
        self.ctx.plan[each.last.name] = replace(last, output=made, result=result)

    def _format_of(self, each: _Planned, narrow_alone: bool) -> QType:
        """The format of a result; what only moves codes has that of its input."""
        if each.unit.op in KEEP_GRID:
            source = each.unit.node.inputs[0].name
            if source in self.formats:
                return self.of_bits[NARROW] if narrow_alone else self.formats[source]
        wide = any(self._is_wide(t) for t in each.last.outputs)
        return self.of_bits[WIDE if wide else NARROW]

    def _is_wide(self, tensor: gs.Tensor) -> bool:
        if tensor.name not in self._wide:
            stays_float = g.is_output(self.body, tensor) or any(
                id(node) not in self.planned and node.op not in SIZES for node in tensor.outputs
            )
            readers = self.readers.get(tensor.name, [])
            self._wide[tensor.name] = stays_float or any(map(self._wants_wide, readers))
        return self._wide[tensor.name]

    def _wants_wide(self, reader: _Planned) -> bool:
        if NARROW not in reader.rules:
            return True
        return WIDE in reader.rules and any(self._is_wide(t) for t in reader.last.outputs)

    def _enter(self, tensor: gs.Tensor) -> None:
        """An Identity on a float tensor that no planned unit of this body makes."""
        if tensor.name in self.formats or tensor.name not in self.readers or not g.is_float(tensor):
            return
        wide = self._is_wide(tensor)
        entered = self.maker.emit(self.body, "Identity", [tensor], tensor.name)
        entered.dtype, entered.shape = tensor.dtype, tensor.shape
        readers = self.readers.pop(tensor.name)
        for reader in readers:
            for node in reader.unit.nodes:
                g.replace_input(node, tensor, entered)
        self.readers[entered.name] = readers
        self.formats[entered.name] = self.of_bits[WIDE if wide else NARROW]
        self.ctx.plan[entered.inputs[0].name] = NodePlan(
            activation=self.of_bits[NARROW],
            output=True,
            result=self.formats[entered.name],
        )


def is_factor(node: Node) -> bool:
    """Whether it multiplies or divides by one constant number."""
    if node.op == "Div":
        return _is_number(node.inputs[1])
    return node.op == "Mul" and any(map(_is_number, node.inputs))


def is_vector(node: Node, product: Node) -> bool:
    """Whether it adds a constant along the channels of a product, as its bias is added."""
    if node.op != "Add":
        return False
    weight = product.inputs[1]
    rank = _LEAST_RANK.get(product.op, len(weight.shape))
    behind = 0 if product.op in _LEAST_RANK else rank - 2  # axes behind that of the channels

    def is_along_channels(shape: Sequence[int]) -> bool:
        aligned = [1] * (rank - len(shape)) + [*shape]
        del aligned[rank - 1 - behind]
        return len(shape) <= rank and all(size == 1 for size in aligned)

    return any(g.is_constant(t) and is_along_channels(t.shape) for t in node.inputs)


def _is_number(tensor: gs.Tensor) -> bool:
    """Of no more axes than any result has, so that multiplying by it changes no shape."""
    return g.is_constant(tensor) and math.prod(tensor.shape) == 1 and len(tensor.shape) < 2


def _is_quantized(tensor: gs.Tensor) -> bool:
    return bool(tensor.name) and not g.is_constant(tensor) and g.is_float(tensor)


def _is_about_floats(unit: Unit) -> bool:
    """Whether a unit makes floats, or reads some that are not constant."""
    reads = unit.op not in SIZES and any(map(g.is_float, unit.inputs))
    return reads or any(map(g.is_float, unit.node.outputs))
