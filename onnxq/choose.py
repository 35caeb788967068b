"""Of the passes that a recipe leaves open, those that make the result better.

What helps one model harms another. Each optional pass is tried in its turn: the whole recipe runs
on some of the samples, with it and without it, both results are compared with the float model on
the other samples, and the pass is kept if it brings the outputs closer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onnxq import graph as g
from onnxq import verify
from onnxq.errors import OnnxqError
from onnxq.passes.solve.spare_slow import SpareSlow
from onnxq.pipeline import Pipeline, Progress
from onnxq.recipe import Recipe
from onnxq.report import Report, TrialRecord
from onnxq.runtime import Session
from onnxq.samples import Samples
from onnxq.target import Target

JUDGES = 16  # samples that are compared on, at most
LEAST_GAIN = 0.1  # dB


def settle(
    recipe: Recipe,
    graph: g.Graph,
    samples: Samples,
    target: Target,
    report: Report,
    options: Mapping[str, Any],
    progress: Progress,
) -> Recipe:
    """The recipe with every optional pass decided on; what was measured is in the report.

    `options` are those of `Pipeline.run`.
    """
    judges = min(JUDGES, max(1, len(samples) // 4))
    known = max(1, len(samples) - judges)  # all of them, where there is only one
    fitted = samples.slice(0, known)
    judging = verify.take(samples.slice(len(samples) - judges, None), judges)
    reference = verify.Recorded(Session.of(graph, threads=options.get("threads")), judging)
    names = [step.name for step in recipe.passes if step.name in recipe.optional]
    kept = set[str]()

    def quality(chosen: set[str]) -> float:
        """Signal to noise of the outputs, dB."""
        steps = [
            step
            for step in recipe.passes
            if step.name not in recipe.optional or step.name in chosen
            if step.name != SpareSlow.name  # which changes speed alone
        ]
        result = Pipeline(steps).run(graph, fitted, target, **options)
        made = Session.of(
            result.graph,
            providers=target.stand_in,
            threads=options.get("threads"),
            config=target.session,
        )
        compared = verify.compare(reference, made, judging)
        noises = [
            c.error_energy / c.reference_energy for c in compared.values() if c.reference_energy
        ]
        return verify.sqnr_db(len(noises), math.fsum(noises))

    progress("try passes", 0, len(names))
    best = quality(kept)
    for number, name in enumerate(names, 1):
        progress(f"try {name}", number, len(names))
        try:
            tried = quality(kept | {name})
        except OnnxqError as error:
            report.trials.append(TrialRecord(name, False, best, None, str(error)))
            continue
        better = tried >= best + LEAST_GAIN
        report.trials.append(TrialRecord(name, better, best, tried))
        if better:
            kept.add(name)
            best = tried
    steps = tuple(s for s in recipe.passes if s.name not in recipe.optional or s.name in kept)
    return replace(recipe, passes=steps, optional=frozenset())
