"""`validate`: a model beside the float model that it was made from, anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxq import graph as g
from onnxq import verify
from onnxq.api.inputs import (
    Source,
    check_inputs,
    environment,
    existing,
    with_custom_ops,
)
from onnxq.devices import Place
from onnxq.devices.compare import compare_places
from onnxq.group_losses import compare_groups
from onnxq.groups import GroupBy, Grouped, Groups
from onnxq.passes.solve.assign import HEAVY
from onnxq.pipeline import Progress
from onnxq.proof import LAYER_SAMPLES, VERIFICATION_SAMPLES, warn_of_results
from onnxq.report import LayerRecord, Report
from onnxq.reported_metrics import records, shown
from onnxq.runtime import Session
from onnxq.sample_checks import ranges_of_codes
from onnxq.samples import Preprocessing
from onnxq.sampling import MADE_UP, Sampling
from onnxq.storage import load_proto, model_size
from onnxq.target import Target, load_target, target_names
from onnxq.text import MAX_TOKENS


@with_custom_ops
def validate(
    reference: str | Path,
    quantized: str | Path,
    *,
    samples: Source = None,
    preprocess: Preprocessing = None,
    states: Mapping[str, str] | None = None,
    limit: int = 64,
    batch_size: int = 1,
    target: str = "cpu",
    seed: int = 0,
    threads: int | None = None,
    group_by: GroupBy | None = None,
    metric: str = "auto",
    tokenizer: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    custom_ops: Sequence[str | Path] = (),
    ep: Sequence[str] = (),
    details: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Compare a model with the float model it was made from: outputs, layers, sizes, latency.

    `samples`, `preprocess`, `states` and `group_by` are as for `quantize`. `metric`, a name of
    `onnxq.metrics` or `module:function`, is measured beside what fits the outputs: `auto`.
    `ep` are places to run the quantized model at too (`Place.parse`), each in a process apart.
    `details` puts histograms of activations into the report.
    """
    device = load_target(target)
    places = {text: _place(text, device) for text in ep}
    report = Report(
        model=str(reference),
        output=str(quantized),
        target=device.name,
        float_bytes=model_size(existing(reference)),
        quantized_bytes=model_size(existing(quantized)),
        environment=environment(Path(reference), seed),
    )
    float_model = load_proto(reference)
    check_inputs(float_model)
    sampling = Sampling(
        Path(reference),
        float_model,
        preprocess,
        states,
        batch_size,
        seed,
        threads,
        tokenizer,
        max_tokens,
    )
    groups = Groups(group_by, samples, sampling) if group_by is not None else None
    grouped: Grouped | None = None
    if samples is None:
        given, kind = sampling.made_up(8)
        report.warn(f"no samples given: compared on {MADE_UP[kind]}")
        report.samples = f"{len(given)} × {MADE_UP[kind]}"
        drawn = sampling.carry(given)
    else:
        given = sampling.given(groups.source if groups else samples, limit)
        grouped = groups.of(given) if groups else None
        drawn = sampling.carry(given)
        report.samples = drawn.description
    progress("compare", 0, 3)
    left = Session(reference, threads=threads)
    config = device.session
    right = Session(quantized, providers=device.providers, threads=threads, config=config)
    first = next(iter(drawn))
    metrics = shown((metric,), left, first, left)
    distances = [wanted.start() for wanted in metrics]
    report.outputs = verify.output_records(verify.compare(left, right, drawn, distances))
    report.metrics = records(metrics, distances)
    report.verification_samples, report.verification_unseen = len(drawn), False
    if grouped is not None:
        progress("compare groups", 0, 3)
        report.groups = compare_groups(left, right, grouped)
    progress("compare layers", 1, 3)
    graphs = g.load(reference), g.load(quantized)
    outputs = {
        node.outputs[0].name: node
        for node in graphs[0].nodes
        if node.op in HEAVY or node.op == "BatchNormalization"
    }
    few = verify.take(drawn, VERIFICATION_SAMPLES)
    report.ranges = ranges_of_codes(*graphs, few, given.synthesised, details, threads)
    coded = {record.tensor for record in report.ranges}
    few = few[:LAYER_SAMPLES]
    for name, error in verify.layer_errors(*graphs, list(outputs), few).items():
        node = outputs[name]
        report.layers.append(
            LayerRecord(
                node.name or name, node.op, "quantized", output=name,
                sqnr_db=error.sqnr_db, contribution=error.contribution,
                inputs=[t.name for t in _read(node) if t.name in coded] if details else [],
            )
        )  # fmt: skip
    progress("time both models", 2, 3)
    report.float_latency, report.quantized_latency = verify.latency([left, right], few[0])
    if places:
        report.providers = compare_places(
            reference, quantized, list(drawn), places,
            custom_ops=custom_ops, threads=threads, progress=progress,
        )  # fmt: skip
    report.verified = True
    warn_of_results(report)
    return report


def _read(node: g.Node) -> list[Any]:
    """The tensors that a layer reads; of a BatchNormalization, the layer that it belongs to."""
    makers = node.inputs[0].inputs if node.op == "BatchNormalization" else []
    return list(makers[0].inputs if makers else node.inputs)


def _place(text: str, device: Target) -> Place:
    """A place with the options of the target, or of the first that comes with onnxq and is for
    its provider.
    """
    place = Place.parse(text)
    for target in (device, *map(load_target, target_names())):
        if place.provider in target.providers:
            return replace(place, options=target.provider_options)
    return place
