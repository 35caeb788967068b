"""What quantizing each layer does to the model's outputs, and what leaving it float would save.

Two questions about every layer l, answered end to end on samples:

    alone(l)    distance to the float model when l alone is quantized
    spared(l)   distance to the float model when all layers but l are

Codes and ranges are those of the whole model, solved once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxq import graph as g
from onnxq.api.inputs import Source, check_inputs, check_weights, environment, with_custom_ops
from onnxq.errors import OnnxqError
from onnxq.layers import REFUSED
from onnxq.metrics import metric as metric_of
from onnxq.passes.solve.assign import HEAVY
from onnxq.passes.solve.selectors import Selector
from onnxq.pipeline import Progress
from onnxq.recipe import Recipe, check_target, load_recipe
from onnxq.report import Report
from onnxq.samples import Preprocessing
from onnxq.sampling import Sampling
from onnxq.storage import load_proto
from onnxq.target import Target, load_target
from onnxq.text import MAX_TOKENS
from onnxq.tuning.meter import Meter, float_session
from onnxq.tuning.variants import decided, variants


@dataclass
class LayerEffect:
    """Distances to the float model; None where they were not measured, which `reason` explains."""

    name: str
    op: str
    alone: float | None = None
    spared: float | None = None
    reason: str = ""


@dataclass
class Sensitivity:
    """Every layer's effect, in the model's order. `all_quantized` is the whole model's distance.

    `evaluations` is the number of variants measured, `evaluation_seconds` what one run of the float
    model over the same samples took, `seconds` what all took, calibration included.
    """

    model: str
    preset: str
    target: str
    metric: str
    title: str
    unit: str
    samples: str
    measured_on: int
    all_quantized: float
    layers: list[LayerEffect]
    evaluations: int = 0
    evaluation_seconds: float = 0.0
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def ranked(self) -> list[LayerEffect]:
        """The layer that does most alone first."""
        measured = [layer for layer in self.layers if layer.alone is not None]
        return sorted(measured, key=lambda layer: (-(layer.alone or 0.0), layer.name))

    @property
    def ratio(self) -> float:
        """Wall time over that of as many runs of the float model."""
        plain = self.evaluations * self.evaluation_seconds
        return self.seconds / plain if plain else 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"ratio": self.ratio}, indent=2)


@with_custom_ops
def sensitivity(
    model: str | Path,
    preset: str = "int8-static",
    *,
    samples: Source,
    preprocess: Preprocessing = None,
    states: Mapping[str, str] | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Sequence[str] = (),
    target: str | Target = "cpu",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Sequence[str] = (),
    metric: str = "auto",
    limit: int = 128,
    measure: int = 64,
    batch_size: int = 1,
    seed: int = 0,
    threads: int | None = None,
    tokenizer: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    custom_ops: Sequence[str | Path] = (),
    progress: Progress = lambda what, done, total: None,
) -> Sensitivity:
    """What each layer does to the outputs when it alone is quantized, and when it alone is not.

    `samples`, `preprocess`, `states`, `limit`, `include` and `exclude` are as for `quantize`: the
    layers that it would quantize are measured, of them those that match a pattern of `layers`,
    where it has any. The first `measure` samples are measured on. `metric` is a name of
    `onnxq.metrics`, `auto`, or `module:function`, which is called with the outputs of all
    samples in order, a list of {output: array}, and returns a number that is higher for a better
    model.

    Raises OnnxqError for bad input.
    """
    began = time.perf_counter()
    if samples is None:
        raise OnnxqError("effects are measured on samples, and there are none; give some")
    path = Path(model)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe or preset), settings)
    device = target if isinstance(target, Target) else load_target(target)
    check_target(chosen, device)
    proto = load_proto(path)
    original = g.load(proto, path.parent)
    check_inputs(proto)
    check_weights(original)
    progress("samples", 0, 1)
    sampling = Sampling(
        path, proto, preprocess, states, batch_size, seed, threads, tokenizer, max_tokens
    )
    drawn = sampling.given(samples, limit)
    calibration, measured = sampling.carry(drawn), sampling.carry(drawn.slice(0, measure))
    first = next(iter(measured))
    chosen_metric = metric_of(metric, first, float_session(path, original, threads).run(first))
    report = Report()
    shared: dict[str, Any] = {"include": tuple(include), "exclude": tuple(exclude)}
    shared["threads"] = threads
    chosen = decided(chosen, original, calibration, device, report, shared, progress)
    built = variants(
        chosen, original, calibration, device, report=report, progress=progress, **shared
    )
    identity = (chosen.text, repr(device), repr((include, exclude)), calibration.identity())
    meter = Meter(path, built, chosen_metric, measured, identity, threads, progress)
    asked = Selector(tuple(layers), built.graph)
    wanted = [node.name for node in built.layers if not asked or asked(node)]
    alone = meter.distances("alone", wanted)
    spared = meter.distances("spared", wanted)
    reasons = {record.name: record.reason for record in report.layers}
    return Sensitivity(
        model=str(path),
        preset=chosen.name,
        target=device.name,
        metric=chosen_metric.name,
        title=chosen_metric.title,
        unit=chosen_metric.unit,
        samples=calibration.description,
        measured_on=len(measured),
        all_quantized=spared[""],
        layers=[
            LayerEffect(n.name, n.op, alone[n.name], spared[n.name])
            if n.name in alone
            else LayerEffect(n.name, n.op, reason=reasons.get(n.name, REFUSED))
            for n in g.walk(built.graph)
            if n.op in HEAVY and (n.name in reasons or n.name in alone)
        ],
        evaluations=meter.evaluations,
        evaluation_seconds=meter.seconds,
        seconds=time.perf_counter() - began,
        environment=environment(path, seed),
        warnings=report.warnings,
    )
