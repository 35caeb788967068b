"""Functions that are written out become the operator that they are, where the target runs that.

    Gelu               x Φ(x) by Erf, or its approximation by Tanh (Hendrycks & Gimpel 2016)
    LpNormalization    x / max(‖x‖₂, ε) along an axis, with an ε that only keeps 0 / 0 away

Which GELU a form is, and whether it is one at all, is seen from its values: some leave the half to
the next layer, as fold-batchnorm does that comes after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.prepare.normalize import Normalize
from onnxq.passes.solve.units import Unit, units

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Pass
from onnxq.runtime import Session

SINCE = {"Gelu": 20, "LpNormalization": 1}  # the opset that has it
_AT = np.array([-3.0, -1.0, -0.25, 0.5, 1.0, 2.0])
_SAME = 1e-5  # between a form and its function, at _AT
_EPSILON = 1e-6  # a norm below it is that of nothing


class _Found(NamedTuple):
    body: Graph
    last: Node  # which makes the result
    op: str
    x: gs.Tensor
    attrs: dict[str, Any]


@dataclass(frozen=True)
class Compose(Pass):
    """One operator for a function written out, where the target has a static rule for it."""

    name: ClassVar[str] = "compose"

    def apply(self, graph: Graph, ctx: Context) -> int:
        known = [op for op in SINCE if any(r.form == "static" for r in ctx.target.ops.get(op, ()))]
        wanted = [found.op for found in _written_out(graph) if found.op in known]
        if not wanted:
            return 0
        if graph.opset < (least := max(SINCE[op] for op in wanted)):
            Normalize(least).apply(graph, ctx)
        maker = g.Maker(graph)
        for body, last, op, x, attrs in _written_out(graph):
            if op in known:
                out = last.outputs[0]
                last.outputs.clear()
                maker.emit(body, op, [x], last.name, **attrs).inputs[0].outputs[0] = out
        g.tidy(graph)
        return len(wanted)


def _written_out(graph: Graph) -> list[_Found]:
    found: list[_Found] = []
    for body in g.subgraphs(graph):
        for unit in units(graph, body):
            if unit.op == "Gelu" and len(unit.nodes) > 1 and (form := _gelu(body, unit)):
                assert unit.pattern is not None
                attrs = {} if form == "none" else {"approximate": form}
                found.append(_Found(body, unit.node, "Gelu", unit.pattern.input, attrs))
        found += _normalizations(body)
    return found


def _gelu(body: Graph, unit: Unit) -> str:
    """What Gelu calls it: `none` or `tanh`; "" where the form is neither."""
    assert unit.pattern is not None
    x, out = unit.pattern.input, unit.pattern.output
    kind = g.dtype(x) or np.dtype(np.float32)
    part = g.cut(body, {x.name: kind}, [out.name])
    said = Session.of(part, threads=1).run({x.name: _AT.astype(kind)})[out.name]
    inner = math.sqrt(2 / math.pi) * (_AT + 0.044715 * _AT**3)
    exact = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in _AT.tolist()]
    forms = {"none": np.array(exact), "tanh": _AT * (1 + np.tanh(inner)) / 2}
    errors = {name: float(np.abs(said - values).max()) for name, values in forms.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < _SAME else ""


def _normalizations(body: Graph) -> Iterator[_Found]:
    for node in body.nodes:
        if node.op != "Div" or not g.is_standard(node):
            continue
        x, norm = node.inputs[0], g.producer(node.inputs[1])
        while norm is not None and (norm.op == "Expand" or _is_floor(norm)):
            norm = g.producer(norm.inputs[0]) if g.sole_consumer(body, norm.outputs[0]) else None
        if norm is None or norm.op != "ReduceL2" or norm.inputs[0] is not x:
            continue
        axes = norm.attrs.get("axes")
        if axes is None and len(norm.inputs) > 1 and g.is_constant(norm.inputs[1]):
            axes = g.values(norm.inputs[1]).reshape(-1).tolist()
        if norm.attrs.get("keepdims", 1) and axes and len(axes) == 1:
            yield _Found(body, node, "LpNormalization", x, {"axis": int(axes[0]), "p": 2})


def _is_floor(node: Node) -> bool:
    """Whether it only keeps a norm from being 0."""
    bounds = [t for t in node.inputs[1:] if t.name]
    if node.op not in ("Clip", "Max") or len(bounds) != 1 or not g.is_constant(bounds[0]):
        return False
    lower = node.op == "Max" or node.inputs[1].name != ""
    return lower and float(np.max(g.values(bounds[0]))) <= _EPSILON
