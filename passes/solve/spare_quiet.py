"""Layers on signals so uneven that one scale fits only the loud ones keep float activations.

A range must hold the loudest sample, and its step Δ is the same for the quietest: with rounding
noise of Δ²/12 (Widrow 1956), a sample of mean square E keeps E / (Δ²/12) of signal to noise. Audio
is full of frames of which 8 bits leave nothing. Weights have no such samples: they stay codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from onnxq.passes.solve.assign import HEAVY, MOVERS

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.observe import Loudness, Observer
from onnxq.pipeline import Context, NodePlan, Pass

UNEVEN = "its samples differ so much in loudness that 8 bits keep nothing of the quiet ones"


@dataclass(frozen=True)
class SpareQuiet(Pass):
    """Weights only, where the median sample would keep less than `least_db` of signal to noise
    and the mean sample is louder than it by `spread_db` or more, both in dB.
    """

    least_db: float = 25.0
    spread_db: float = 6.0
    name: ClassVar[str] = "spare-quiet"
    analysis: ClassVar[bool] = True

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        if ctx.target.whole:
            return {}
        return {
            f"{name}#loudness": Loudness()
            for node, plan in _readers(graph, ctx)
            for name in _signals(node, plan)
        }

    def apply(self, graph: Graph, ctx: Context) -> int:
        if ctx.target.whole:
            return 0
        spared: list[str] = []
        others_spared = 0
        for node, plan in _readers(graph, ctx):
            if not any(self._too_uneven(name, ctx) for name in _signals(node, plan)):
                continue
            if plan.weight:
                ctx.plan[node.name] = replace(plan, activation=None, inputs=(), output=False)
                spared.append(node.name)
                continue
            ctx.plan[node.name] = NodePlan(reason=UNEVEN)
            others_spared += 1
            if node.op not in MOVERS:
                ctx.report.skip(node.name, node.op, UNEVEN)
        if spared:
            others = f" and {len(spared) - 1} more" if len(spared) > 1 else ""
            ctx.report.warn(
                f"{spared[0]!r}{others}: weights only are quantized, since the samples differ so "
                "much in loudness that 8 bits of activation keep nothing of the quiet ones"
            )
        return len(spared) + others_spared

    def _too_uneven(self, name: str, ctx: Context) -> bool:
        median, mean = ctx.stats[f"{name}#loudness"]
        if name not in ctx.activations or not median:
            return False
        noise = float(ctx.activations[name].scale) ** 2 / 12
        return bool(
            10 * np.log10(median / noise) < self.least_db
            and 10 * np.log10(mean / median) >= self.spread_db
        )


def _readers(graph: Graph, ctx: Context) -> list[tuple[g.Node, NodePlan]]:
    """Layers with weights of which the activations can stay float, and what joins them: a Relu
    between two such layers would bring the codes back.
    """
    return [
        (node, plan)
        for node, plan in ctx.plan.quantized(g.walk(graph))
        if (plan.inputs or plan.output) and (plan.weight or node.op not in HEAVY)
    ]


def _signals(node: g.Node, plan: NodePlan) -> list[str]:
    return [node.inputs[i].name for i in plan.inputs] + [
        t.name for t in node.outputs if plan.output
    ]
