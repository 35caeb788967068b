"""Distances to the float model of a model that is quantized but for some layers, many at a time.

The float model and the quantized one are each built once, as a chain of segments; a variant costs
its own segment, and running what comes after it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from onnxq import cache
from onnxq import graph as g
from onnxq.digest import digests
from onnxq.errors import OnnxqError
from onnxq.metrics import Distance, Metric
from onnxq.passes import Widen
from onnxq.pipeline import Pipeline, Plan, Progress
from onnxq.runtime import Session
from onnxq.samples import Feed, Samples
from onnxq.target import load_target
from onnxq.tuning.segments import QUIET, Chain, cuts
from onnxq.tuning.variants import Variants, differing

Mode = Literal["alone", "spared"]
AT_ONCE = 24  # variants measured in one run over the samples: so many segments are in memory


def float_session(model: str | Path, graph: g.Graph, threads: int | None = None) -> Session:
    """The float model; where the runtime has no kernels for its types, `graph` in float32."""
    try:
        return Session(model, threads=threads, config=QUIET)
    except OnnxqError:
        wide = Pipeline([Widen()]).run(graph, None, load_target("cpu")).graph
        return Session.of(wide, threads=threads, config=QUIET)


class Meter:
    """Measures variants of a model against the float model on samples.

    `seconds` is what one run of the float model over the samples took, `evaluations` how many
    variants were run, not counting what the cache knew.
    """

    def __init__(
        self,
        model: str | Path,
        variants: Variants,
        metric: Metric,
        samples: Samples,
        identity: Sequence[str],
        threads: int | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        """`identity` is what the codes and ranges depend on beside the graph: recipe, samples."""
        self.model, self.variants, self.metric, self.samples = model, variants, metric, samples
        self.threads, self.progress = threads, progress
        self.names = [node.name for node in variants.layers]
        self.evaluations, self.done = 0, 0
        self._spent: list[float] = []
        self._reference: Session | None = None
        self._chains: dict[Mode, Chain] = {}
        origins = digests(variants.graph)
        outputs = [origins[t.name] for t in variants.graph.outputs if t.name in origins]
        self.identity = (*identity, *outputs, metric.name, samples.identity())

    def distances(self, mode: Mode, layers: Sequence[str]) -> dict[str, float]:
        """By layer; "" stands for the whole model quantized and is among the results of `spared`.

        What is measured is in the cache at once, so that an interrupted run goes on where it was.
        """
        found: dict[str, float] = {}
        wanted = [*([""] if mode == "spared" else []), *layers]
        for start in range(0, len(wanted), AT_ONCE):
            group = wanted[start : start + AT_ONCE]
            keys = {name: cache.key("distance", self.identity, mode, name) for name in group}
            known = {name: cache.get(key) for name, key in keys.items() if self.metric.lasting}
            missing = [name for name in group if known.get(name) is None]
            known |= self._measure(mode, missing) if missing else {}
            for name in missing if self.metric.lasting else ():
                cache.put(keys[name], known[name])
            found |= known
            self.done += len(group)
            self.progress("layers", self.done, 2 * len(self.names) + 1)
        return {name: found[name] for name in wanted}

    @property
    def seconds(self) -> float:
        return sum(self._spent) / len(self._spent) if self._spent else 0.0

    def _measure(self, mode: Mode, layers: Sequence[str]) -> dict[str, float]:
        every = set(self.names)
        base = Plan() if mode == "alone" else self.variants.plan(())
        plans = {
            name: self.variants.plan(every - {name} if mode == "alone" else {name})
            if name
            else base
            for name in layers
        }
        first = next(iter(self.samples))
        reference, chain = self._float(first), self._chain(mode, base, first)
        states = chain.run(first)
        built = {
            name: chain.variant(
                differing(plan, base),
                lambda part, plan=plan: self.variants.lowered(part, plan),  # type: ignore[misc]
                states,
            )
            for name, plan in plans.items()
        }
        seen: dict[str, Distance] = {name: self.metric.start() for name in layers}
        spent = 0.0
        for feed in self.samples:
            began = time.perf_counter()
            said = reference.run(feed)
            spent += time.perf_counter() - began
            states = chain.run(feed)
            for name, distance in seen.items():
                distance.update(feed, said, built[name].run(states))
        self._spent.append(spent)
        self.evaluations += len(layers)
        return {name: distance.value() for name, distance in seen.items()}

    def _float(self, feed: Feed) -> Session:
        if self._reference is None:
            self._reference = float_session(self.model, self.variants.graph, self.threads)
            self._reference.run(feed)  # the first run is slower
        return self._reference

    def _chain(self, mode: Mode, base: Plan, feed: Feed) -> Chain:
        if mode not in self._chains:
            graph = self.variants.graph
            self._chains[mode] = Chain(
                graph,
                cuts(graph, self.names),
                lambda part: self.variants.lowered(part, base),
                feed,
                self.threads,
            )
        return self._chains[mode]
