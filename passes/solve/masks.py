"""Ranges of what a Softmax reads, where a mask writes −10000 or −∞ over what is not to be seen.

A grid that held such values would have nothing left for the scores. None of them needs its size:

    softmax(x)_i does not change by more than e⁻¹⁶ where x_i = max(x) − 16 instead of less,

so that the scores' own grid ends 16 below the least of them, and saturation writes that for every
masked one. What is added to scores needs no more than to get there from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnxq.passes.solve.integer_planner import KEEP_GRID

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.observe import Array, Extremes, MinMax

MASKED = -500.0  # what a Softmax reads below it, a mask wrote
ENOUGH = -1000.0  # to be added to a score to mask it
MARGIN = 16.0
_ADDENDS = ("Add", "Sub", "Where", "Mul", "Div", "Min", "Max", "Clip")


@dataclass
class Unmasked(MinMax):
    """Extremes of the values that no mask wrote, the lower of them `MARGIN` further down."""

    def update(self, x: Array) -> None:
        super().update(x[x > MASKED])

    def result(self) -> Extremes:
        seen = super().result()
        return Extremes(seen.low - MARGIN, seen.high)


@dataclass
class Addend(MinMax):
    """Extremes of what is added to scores, of a mask no more than is enough."""

    def update(self, x: Array) -> None:
        super().update(np.maximum(x, ENOUGH))


def masked(graph: Graph) -> dict[str, type[MinMax]]:
    """The observer of each tensor that a mask may write to, by the tensor's name."""
    found: dict[str, type[MinMax]] = {}
    for node in g.walk(graph):
        if node.op not in ("Softmax", "LogSoftmax"):
            continue
        tensor = node.inputs[0]
        found[tensor.name] = Unmasked
        while (maker := g.producer(tensor)) is not None and maker.op in KEEP_GRID:
            tensor = maker.inputs[0]
            found[tensor.name] = Unmasked
        pending = [maker]
        while pending:
            node_before = pending.pop()
            if node_before is None or node_before.op not in (*_ADDENDS, *KEEP_GRID):
                continue
            for operand in node_before.inputs:
                if operand.name and operand.name not in found and g.is_float(operand):
                    found[operand.name] = Addend
                    pending.append(g.producer(operand))
    return found
