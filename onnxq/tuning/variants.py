"""One quantized model, some of whose layers are left float: for any choice of them, at no solving.

Weights are solved and activations calibrated once, for all layers. A variant is lowered from these
codes and ranges as the recipe would lower it, had it left the same layers float.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from onnxq import graph as g
from onnxq.choose import settle
from onnxq.errors import OnnxqError
from onnxq.passes import Assign, FuseInteger
from onnxq.passes.solve.assign import HEAVY
from onnxq.passes.solve.spare_slow import SpareSlow
from onnxq.pipeline import Context, NodePlan, Pass, Pipeline, Plan, Progress
from onnxq.recipe import Recipe
from onnxq.report import Report
from onnxq.samples import Samples
from onnxq.storage import ExternalValues
from onnxq.target import Target

FLOAT = NodePlan()
_PLAIN = (np.float32, np.float64, np.float16, np.int32, np.int64)


@dataclass(frozen=True)
class _Capture(Pass):
    """Keeps the graph as it is before it is lowered."""

    keep: Callable[[g.Graph], None]
    name: ClassVar[str] = "capture"

    def apply(self, graph: g.Graph, ctx: Context) -> int:
        self.keep(g.copy(graph))
        return 0


@dataclass
class Variants:
    """`graph` is float, and as it is when it is lowered; `context` holds its codes and ranges."""

    graph: g.Graph
    context: Context
    assign: Assign
    lowering: tuple[Pass, ...]
    spelling: tuple[Pass, ...]  # what puts the lowered model as a whole into other operators
    layers: list[g.Node] = field(init=False)  # those that are quantized, in order

    def __post_init__(self) -> None:
        for tensor in g.constants(self.graph):  # unpacked once, not for every variant
            if not isinstance(tensor._values, ExternalValues) and tensor.dtype in _PLAIN:
                tensor._values = g.values(tensor)
        planned = self.context.plan.quantized(g.walk(self.graph))
        self.layers = [node for node, _ in planned if node.op in HEAVY]
        assigned = self._assigned(())
        final = self.context.plan
        # What later passes made of the plan holds for every variant.
        self._changed = {name: plan for name, plan in final.items() if plan != assigned.get(name)}

    def plan(self, left_float: Collection[str]) -> Plan:
        """As the recipe would plan, had it left these layers float."""
        if len(left_float) == len(self.layers):
            return Plan()
        plan = self._assigned(left_float)
        for name, changed in self._changed.items():
            if name in plan and plan[name].quantized:
                plan[name] = changed
        return plan

    def lowered(self, part: g.Graph, plan: Plan) -> g.Graph:
        """A copy of some of the graph, rewritten to what the plan makes of it."""
        trial = replace(
            self.context,
            report=Report(),
            plan=plan,
            weights=self.context.weights.copy(),
            activations=dict(self.context.activations),
            progress=lambda what, done, total: None,
        )
        for step in self.lowering if plan.quantized(g.walk(part)) else ():
            step.apply(part, trial)
            g.sort(part)
        return part

    def whole(self, left_float: Collection[str]) -> g.Graph:
        """The model with these layers float, as the recipe would write it."""
        lowered = self.lowered(g.copy(self.graph), self.plan(left_float))
        for step in self.spelling:
            step.apply(lowered, replace(self.context, report=Report()))
            g.sort(lowered)
        return lowered

    def _assigned(self, left_float: Collection[str]) -> Plan:
        step = with_layers(self.assign, dict.fromkeys(sorted(left_float), "float"))
        trial = replace(self.context, report=Report(), plan=Plan())
        step.apply(self.graph, trial)  # weights have been told apart already: nothing is rewritten
        return trial.plan


def differing(one: Plan, other: Plan) -> set[str]:
    """The nodes of which two plans make different things."""
    return {
        name
        for name in {*one, *other}
        if (a := one.get(name, FLOAT)) != (b := other.get(name, FLOAT))
        and (a.quantized or b.quantized)
    }


def with_layers(assign: Assign, formats: Mapping[str, str]) -> Assign:
    """The pass with these nodes in formats of their own."""
    return replace(assign, layers=(*assign.layers, *(f"{n}={f}" for n, f in formats.items())))


def with_format(recipe: Recipe, format: str) -> Recipe:
    """The recipe with another format for all layers."""
    assign = assign_of(recipe)
    steps = (replace(s, format=format) if s is assign else s for s in recipe.passes)
    return replace(recipe, passes=tuple(steps))


def assign_of(recipe: Recipe) -> Assign:
    """The pass of a recipe that decides. Raises OnnxqError for a recipe without it."""
    for step in recipe.passes:
        if isinstance(step, Assign):
            return step
    raise OnnxqError(
        f"the recipe {recipe.name!r} has no pass 'assign', which is where layers are left float; "
        "take another preset"
    )


def decided(
    recipe: Recipe,
    graph: g.Graph,
    samples: Samples,
    target: Target,
    report: Report,
    options: Mapping[str, Any],
    progress: Progress,
) -> Recipe:
    """The recipe with nothing in it left open or left to timing: it gives the same every time."""
    if recipe.optional:
        recipe = settle(recipe, graph, samples, target, report, options, progress)
    return recipe.without(SpareSlow.name)


def variants(
    recipe: Recipe, graph: g.Graph, samples: Samples | None, target: Target, **options: Any
) -> Variants:
    """Run a recipe, and keep what its lowering starts from."""
    assign = assign_of(recipe)
    lowering = tuple(s for s in recipe.passes if s.lowers and not isinstance(s, FuseInteger))
    spelling = tuple(s for s in recipe.passes if isinstance(s, FuseInteger))
    captured: list[g.Graph] = []
    first = next(k for k, step in enumerate(recipe.passes) if step.lowers)
    steps = [*recipe.passes[:first], _Capture(captured.append), *recipe.passes[first:]]
    result = Pipeline(steps).run(graph, samples, target, **options)
    return Variants(captured[0], result.context, assign, lowering, spelling)
