"""Mixes of formats: what each layer loses and takes in each, and the mixes on the way to the best.

A knapsack over measured losses and times gives every trade-off of their sums. Losses do not simply
add, so the sums say in which order to try, and the model as a whole decides: bisection along the
front finds the last mix that holds its bound when it is built and measured on held-out samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxq import cache
from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.knapsack import Choice, front
from onnxq.metrics import metric as metric_of
from onnxq.pipeline import Progress
from onnxq.tuning.bounds import Bounds
from onnxq.tuning.candidates import Candidate, FormatSensitivity, Workshop, mixed
from onnxq.tuning.meter import Meter
from onnxq.tuning.timing import layer_times
from onnxq.tuning.variants import Variants, assign_of, variants, with_format

WEIGHED_ON = 32  # calibration samples that layers are measured on
TRIED = 48  # entries of the front that bisection runs over
NOISE = 0.03  # of a time: differences below it say nothing
FLOAT = "float"


class Mixer:
    """Mixes on a base recipe. `weighed` counts layers that were measured, not known; what is known
    of them is in `sensitivities`, by format.
    """

    def __init__(
        self,
        shop: Workshop,
        base: Candidate,
        bounds: Bounds,
        formats: Sequence[str],
        progress: Progress,
    ) -> None:
        """`formats` are those to choose from beside the base's own and float."""
        self.shop, self.base, self.bounds, self.progress = shop, base, bounds, progress
        self.weighed = 0
        own = assign_of(base.recipe).format
        wanted = formats or (("w4a8",) if bounds.size is not None else ())
        self.solved: dict[str, Variants] = {}
        for format in (own, *(f for f in wanted if f not in (own, FLOAT))):
            progress(f"solve {base.name} as {format}", 0, 1)
            try:
                self.solved[format] = self._variants(format, own)
            except OnnxqError:  # of what the user did not ask for
                if formats or format == own:
                    raise
        self.base_variants = self.solved[own]
        self.names = [node.name for node in self.base_variants.layers]
        self.options = {
            name: [
                *(f for f, v in self.solved.items() if any(n.name == name for n in v.layers)),
                FLOAT,
            ]
            for name in self.names
        }
        self.tried: dict[tuple[int, ...], Candidate] = {}
        self.sensitivities = {f: FormatSensitivity(base.name, f) for f in self.solved}

    def _variants(self, format: str, own: str) -> Variants:
        shop, recipe = self.shop, self.base.recipe
        recipe = recipe if format == own else with_format(recipe, format)
        return variants(recipe, shop.graph, shop.calibration, shop.target, threads=shop.threads)

    def mixes(self) -> list[Candidate]:
        """The candidates that were tried on the way."""
        losses = self._table(self._losses)
        by_time = front(losses, self._table(self._times))
        if self.bounds.drop is not None or self.bounds.cosine is not None:
            last_that(_thinned(by_time), lambda c: c is None or c.accurate(self.bounds), self.build)
        elif self.bounds.latency is not None:
            last_that(_thinned(by_time[::-1]), self._fast, self.build)
        if self.bounds.size is not None:
            by_size = front(losses, self._table(self._bytes))
            last_that(
                _thinned(by_size[::-1]), lambda c: self.shop.small(c, self.bounds), self.build
            )
        return list(self.tried.values())

    def build(self, choice: Choice) -> Candidate | None:
        """The mix, measured; None for the float model, which is no candidate."""
        chosen = {
            name: self.options[name][option]
            for name, option in zip(self.names, choice.options, strict=True)
            if option
        }
        if len(chosen) == len(self.names) and set(chosen.values()) == {FLOAT}:
            return None
        if not chosen:
            return self.base
        if choice.options not in self.tried:
            counts = ", ".join(f"{n} {f}" for f, n in Counter(chosen.values()).items())
            name = f"{self.base.name}, of {len(self.names)} layers {counts}"
            recipe = mixed(self.base.recipe, chosen)
            made = Candidate(name, recipe, chosen, solved=self.base_variants)
            self.progress(name, len(self.tried), 2 * TRIED.bit_length())
            self.tried[choice.options] = self.shop.measure(made)
        return self.tried[choice.options]

    def _fast(self, candidate: Candidate | None) -> bool:
        limit = self.bounds.latency
        if candidate is None:
            return limit is None or (limit.relative and limit.holds(1.0, 1.0))
        reference = self.shop.time([candidate])
        return candidate.fast(self.bounds, reference)

    def _table(self, measure: Callable[[str], dict[str, float]]) -> list[list[float]]:
        """By layer and option; `measure` gives a format's figures by layer, float's are 0."""
        figures = {format: measure(format) for format in self.solved}
        return [
            [figures[f][name] if f != FLOAT else 0.0 for f in self.options[name]]
            for name in self.names
        ]

    def _losses(self, format: str) -> dict[str, float]:
        """What each layer does to the outputs when it alone is quantized."""
        shop = self.shop
        few = shop.calibration.slice(0, WEIGHED_ON)
        first = next(iter(few))
        weighing = metric_of("auto", first, shop.reference().run(first))
        identity = (*shop.identity, self.base.recipe.text, format)
        meter = Meter(
            shop.model, self.solved[format], weighing, few, identity, shop.threads, self.progress
        )
        found = meter.distances("alone", [node.name for node in self.solved[format].layers])
        self.weighed += meter.evaluations
        seen = self.sensitivities[format]
        seen.title, seen.unit, seen.losses = weighing.title, weighing.unit, found
        return found

    def _times(self, format: str) -> dict[str, float]:
        """ms beyond float's, negative for a gain. Where noise hides it, or a layer could not be
        timed, quantizing is taken to gain a little.
        """
        shop, solved = self.shop, self.solved[format]
        text = self.base.recipe.text
        key = cache.key("layer times", shop.identity, text, format, str(shop.threads))
        times: Any = cache.get(key)
        if times is None:
            self.progress(f"time layers as {format}", 0, 1)
            times = layer_times(solved, next(iter(shop.held_out)), shop.threads)
            self.weighed += len(times)
            cache.put(key, times)
        self.sensitivities[format].times = times
        little = min((min(pair) for pair in times.values()), default=1.0) * NOISE
        found: dict[str, float] = {}
        for node in solved.layers:
            in_float, quantized = times.get(node.name, (little, 0.0))
            more = quantized - in_float
            found[node.name] = more if more > NOISE * in_float else min(more, -little)
        return found

    def _bytes(self, format: str) -> dict[str, float]:
        """Bytes of each layer's weights beyond those of its floats: negative."""
        solved, found = self.solved[format], dict[str, float]()
        for node in solved.layers:
            weight = solved.context.plan[node.name].weight
            found[node.name] = 0.0
            for view in g.weight_views(node) if weight else ():
                width = (g.dtype(view.tensor) or np.dtype(np.float32)).itemsize
                saved = (weight.bits / 8 if weight else width) - width
                found[node.name] += float(np.prod(view.tensor.shape)) * saved
        return found


def _thinned(choices: list[Choice]) -> list[Choice]:
    if len(choices) <= TRIED:
        return choices
    kept = np.linspace(0, len(choices) - 1, TRIED).round().astype(int)
    return [choices[k] for k in kept]


def last_that(
    choices: Sequence[Choice],
    holds: Callable[[Candidate | None], bool],
    build: Callable[[Choice], Candidate | None],
) -> int:
    """By bisection, the last of the choices that holds; -1 where the first does not.

    The further, the less likely it is to hold. Where that is not so, one that holds is found still.
    """
    if holds(build(choices[-1])):
        return len(choices) - 1
    low, high = -1, len(choices) - 1  # the last that is known to hold, the first known not to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(build(choices[middle])) else (low, middle)
    return low
