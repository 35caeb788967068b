"""A GELU that is written out becomes one operator, for targets that run it and not its parts.

x Φ(x) by Erf (Hendrycks & Gimpel 2016) or its approximation by Tanh, in the forms of
`onnxq.graph.patterns`. Which of the two a form is, and whether it is one of them at all, is seen
from its values: some leave the half to the next layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnxq.passes.prepare.normalize import Normalize
from onnxq.passes.solve.units import Unit, units

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.pipeline import Context, Pass
from onnxq.runtime import Session

GELU = "Gelu"
SINCE = 20  # the opset that has it
_AT = np.array([-3.0, -1.0, -0.25, 0.5, 1.0, 2.0])
_SAME = 1e-5


@dataclass(frozen=True)
class ComposeGelu(Pass):
    """Gelu, where the target has a static rule for it."""

    name: ClassVar[str] = "compose-gelu"

    def apply(self, graph: Graph, ctx: Context) -> int:
        if not any(rule.form == "static" for rule in ctx.target.ops.get(GELU, ())):
            return 0
        found = _written_out(graph)
        if not found:
            return 0
        if graph.opset < SINCE:
            Normalize(SINCE).apply(graph, ctx)
            found = _written_out(graph)
        for body, unit, approximation in found:
            assert unit.pattern is not None
            x, out = unit.pattern.input, unit.pattern.output
            unit.node.outputs.clear()
            attrs = {} if approximation == "none" else {"approximate": approximation}
            made = g.Maker(graph).emit(body, GELU, [x], unit.node.name, **attrs)
            made.inputs[0].outputs[0] = out
        g.tidy(graph)
        return len(found)


def _written_out(graph: Graph) -> list[tuple[Graph, Unit, str]]:
    found = []
    for body in g.subgraphs(graph):
        for unit in units(graph, body):
            if unit.op == GELU and len(unit.nodes) > 1 and (kind := _approximation(body, unit)):
                found.append((body, unit, kind))
    return found


def _approximation(body: Graph, unit: Unit) -> str:
    """What Gelu calls it: `none` or `tanh`; "" where the form is neither."""
    assert unit.pattern is not None
    x, out = unit.pattern.input, unit.pattern.output
    kind = g.dtype(x) or np.dtype(np.float32)
    if kind != np.float32:
        return ""
    part = g.cut(body, {x.name: kind}, [out.name])
    said = Session.of(part, threads=1).run({x.name: _AT.astype(kind)})[out.name]
    inner = math.sqrt(2 / math.pi) * (_AT + 0.044715 * _AT**3)
    exact = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in _AT.tolist()]
    forms = {"none": np.array(exact), "tanh": _AT * (1 + np.tanh(inner)) / 2}
    errors = {name: float(np.abs(said - values).max()) for name, values in forms.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < _SAME else ""
