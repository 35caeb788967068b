"""Quantized models to choose from: each built when it is needed and measured once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnxq import cache, verify
from onnxq import graph as g
from onnxq.metrics import Distance, Metric, class_scores
from onnxq.metrics import metric as metric_of
from onnxq.pipeline import Progress
from onnxq.recipe import Recipe
from onnxq.report import Latency, Report
from onnxq.runtime import Session
from onnxq.samples import Samples
from onnxq.storage import model_size
from onnxq.target import Target
from onnxq.tuning.bounds import Bounds
from onnxq.tuning.meter import float_session
from onnxq.tuning.variants import Variants, assign_of, decided, with_layers

METADATA = 1024  # bytes that a model says of itself beside its recipe, at most
ROUNDS = 1000  # of a comparison, at most: tiny models want many
TIMED = 3.0  # seconds for each model in a comparison, at most


@dataclass
class Candidate:
    """One quantized model. `layers` are formats of layers unlike the recipe's own, by name.

    `drop` is the share of the float model's score that is lost, `cosine` that of the output where
    it is smallest, `agreement` the share of rows with the float model's answer, of class scores;
    all on held-out samples. `ratio` is the latency over the float model's.
    """

    name: str
    recipe: Recipe
    layers: dict[str, str] = field(default_factory=dict)
    drop: float = 0.0
    cosine: float = 1.0
    agreement: float | None = None
    bytes: int = 0
    latency: Latency | None = None
    ratio: float | None = None
    solved: Variants | None = field(default=None, repr=False, compare=False)  # to build it from

    def accurate(self, bounds: Bounds) -> bool:
        within = bounds.drop is None or self.drop <= bounds.drop
        return within and (bounds.cosine is None or self.cosine >= bounds.cosine)

    def fast(self, bounds: Bounds, of_float: Latency) -> bool:
        if bounds.latency is None or self.latency is None:
            return bounds.latency is None
        return bounds.latency.holds(self.latency.median_ms, of_float.median_ms)


@dataclass
class FormatSensitivity:
    """What each layer loses and takes in one format of a preset, by its name, in the model's order.

    `losses` are the distance to the float model in `unit`, on calibration samples, when the layer
    alone is quantized; `times` the ms of the layer in float and quantized, among its quantized
    neighbours, of the layers that could be timed.
    """

    preset: str
    format: str
    title: str = ""
    unit: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)


def mixed(base: Recipe, layers: Mapping[str, str]) -> Recipe:
    """A recipe with some layers in formats of their own."""
    assign = assign_of(base)
    steps = tuple(with_layers(s, layers) if s is assign else s for s in base.passes)
    return replace(base, passes=steps)


class Workshop:
    """Builds candidates in a folder and measures them beside the float model.

    `measured` counts what was run, not what the cache knew.
    """

    def __init__(
        self,
        model: Path,
        graph: g.Graph,
        target: Target,
        calibration: Samples,
        held_out: Samples,
        metric: Metric,
        folder: Path,
        threads: int | None,
    ) -> None:
        self.model, self.graph, self.target, self.folder = model, graph, target, folder
        self.calibration, self.held_out, self.metric = calibration, held_out, metric
        self.threads, self.measured = threads, 0
        self.float_bytes = model_size(model)
        self.identity: tuple[str, ...] = ()
        self._paths: dict[str, Path] = {}
        self._reference: Session | None = None

    def decided(self, recipe: Recipe, report: Report, progress: Progress) -> Recipe:
        options = {"threads": self.threads}
        return decided(recipe, self.graph, self.calibration, self.target, report, options, progress)

    def small(self, candidate: Candidate | None, bounds: Bounds) -> bool:
        """Whether it, or for None the float model, is within the bound on size."""
        taken = candidate.bytes if candidate else self.float_bytes
        return bounds.size is None or bounds.size.holds(taken, self.float_bytes)

    def build(self, candidate: Candidate) -> Path:
        """The candidate's file: of what was solved already, or by its whole recipe."""
        text = candidate.recipe.text
        if text not in self._paths:
            path = self.folder / f"{len(self._paths)}.onnx"
            solved = candidate.solved
            if solved is not None and set(candidate.layers.values()) <= {"float"}:
                g.save(solved.whole(list(candidate.layers)), path)
            else:
                result = candidate.recipe.pipeline.run(
                    self.graph, self.calibration, self.target, threads=self.threads
                )
                result.save(path)
            self._paths[text] = path
        return self._paths[text]

    def session(self, path: Path) -> Session:
        target = self.target
        return Session(path, providers=target.stand_in, threads=self.threads, config=target.session)

    def reference(self) -> Session:
        if self._reference is None:
            self._reference = float_session(self.model, self.graph, self.threads)
        return self._reference

    def measure(self, candidate: Candidate) -> Candidate:
        """Fill in drop, cosine and size."""
        key = cache.key("candidate", self.identity, self.metric.name, candidate.recipe.text)
        known: Any = cache.get(key) if self.metric.lasting else None
        if known is None:
            path = self.build(candidate)
            metadata = len(candidate.recipe.text.encode()) + METADATA
            known = (*self.score(path), model_size(path) + metadata)
            if self.metric.lasting:
                cache.put(key, known)
        candidate.drop, candidate.cosine, candidate.agreement, candidate.bytes = known
        return candidate

    def score(self, path: Path) -> tuple[float, float, float | None]:
        """Drop, cosine and agreement of a model on the held-out samples."""
        reference, session = self.reference(), self.session(path)
        distance, angle = self.metric.start(), metric_of("cosine", {}, {}).start()
        agreed: Distance | None = None
        for number, feed in enumerate(self.held_out):
            said, answered = reference.run(feed), session.run(feed)
            if not number and class_scores(said):
                agreed = metric_of("agreement", feed, said).start()
            for seen in filter(None, (distance, angle, agreed)):
                seen.update(feed, said, answered)
        self.measured += 1
        return distance.drop() or 0.0, 1 - angle.value(), 1 - agreed.value() if agreed else None

    def time(self, candidates: Sequence[Candidate]) -> Latency:
        """Fill in latencies, all measured in turns with the float model; the float model's."""
        texts = sorted(c.recipe.text for c in candidates)
        key = cache.key("latency", self.identity, str(self.threads), texts)
        known: Any = cache.get(key)
        if known is None:
            feed = next(iter(self.held_out))
            paths = [self.build(c) for c in candidates]
            sessions = [Session(self.model, threads=self.threads), *map(self.session, paths)]
            timed = verify.latency(sessions, feed, seconds=TIMED * len(sessions), most=ROUNDS)
            self.measured += 1
            known = [
                timed[0],
                dict(zip((c.recipe.text for c in candidates), timed[1:], strict=True)),
            ]
            cache.put(key, known)
        reference, times = known
        for candidate in candidates:
            candidate.latency = times[candidate.recipe.text]
            candidate.ratio = times[candidate.recipe.text].median_ms / reference.median_ms
        return reference
