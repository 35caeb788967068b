"""A plan for devices that want the whole graph in integers.

On a processor of its own a float operator is slow, or leaves it and comes back. So nothing stays
float that has a rule, and each operator reads and makes codes:

1. Layers with weights are planned as everywhere; what they make is codes.
2. Every other operator between floats gets codes for all its operands, constants among them, and
   makes codes.
3. What only moves values (its rule `keeps_grid`, or it is one of MOVERS) hands on the scale that
   it was given; a table of which rows are looked up moves values too.
4. A Relu or Clip is part of the layer before it where its bounds are where the codes end, as those
   of asymmetric codes are: it then needs no operator.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs
from onnxq.passes.solve.planner import HEAVY, MOVERS, Planner

from onnxq import graph as g
from onnxq.graph import Node
from onnxq.pipeline import NodePlan
from onnxq.target import OpRule

LOOKUP = "Gather"
_FIRST_ALONE = ("Clip", "Resize", "Pad", "Upsample")  # their other operands are no data


class WholePlanner(Planner):
    """Plans one graph; a body by itself, for codes do not cross its border."""

    def _plan(self, node: Node) -> NodePlan | None:
        if not g.is_standard(node):
            return None
        if node.op in HEAVY and node.op != LOOKUP:
            return self._heavy(node)
        return self._between(node)

    def _between(self, node: Node) -> NodePlan | None:
        """An operator without weights of its own."""
        operands = self._operands(node)
        if not operands or not all(map(g.is_float, node.outputs)):
            return None
        maker = g.producer(node.inputs[0])
        if maker is not None and (rule := self._fusing_rule(node, maker)) is not None:
            return NodePlan(activation=rule.activation, output=True, rule=rule)
        rule = None if self.wishes.why_float(node) else self._of_target(node)
        if rule is None or rule.activation is None or self._unseen(rule, node):
            return NodePlan(reason=self._refusal(node))
        codes = rule.activation
        if node.op in MOVERS or rule.keeps_grid:  # moved as they are
            codes = self.coded.get(node.inputs[0].name, codes)
        alone = self._fused(node, rule) is None
        return NodePlan(activation=codes, inputs=operands, output=alone, rule=rule)

    def _fused(self, node: Node, rule: OpRule) -> Node | None:
        """A bound that the ends of the codes are; one that stays would cost its layer a kernel."""
        reader = super()._fused(node, rule)
        codes = rule.activation
        if reader is None or codes is None or codes.symmetric:
            return None
        return reader if reader.op == "Relu" or not codes.power_of_two else None

    def _operands(self, node: Node) -> tuple[int, ...]:
        """The slots of the floats that it computes on."""
        slots = range(1 if node.op in _FIRST_ALONE else len(node.inputs))
        return tuple(slot for slot in slots if slot < len(node.inputs) and _is_data(node, slot))


def _is_data(node: Node, slot: int) -> bool:
    tensor: gs.Tensor = node.inputs[slot]
    return bool(tensor.name) and g.is_float(tensor)
