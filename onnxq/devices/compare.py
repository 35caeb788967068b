"""A quantized model at several places, beside the CPU: who runs it, what it says, how fast.

What a provider does not take runs on the CPU without a word, so that a model may seem to run on an
NPU that it never reaches: the kernels that ran are read back from the profile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.devices.disagreement import first_disagreement
from onnxq.devices.place import Answer, Job, Place, ask, is_emulated
from onnxq.errors import OnnxqError
from onnxq.report import Latency, OutputRecord, ProviderRecord
from onnxq.storage import load_proto
from onnxq.verify import comparisons, output_records, update

Array = NDArray[Any]
Feed = Mapping[str, Array]
Outputs = list[dict[str, Array]]


def compare_places(
    reference: str | Path,
    quantized: str | Path,
    feeds: Sequence[Feed],
    places: Mapping[str, Place],
    *,
    custom_ops: Sequence[str | Path] = (),
    threads: int | None = None,
    seconds: float = 1.0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[ProviderRecord]:
    """A record of each place, by what the user calls it.

    The float model is timed on this CPU just before each place, so that a machine that slows down
    does so for both. A place that fails has a record that says how.
    Raises OnnxqError where one of the models does not run on the CPU here.
    """
    here = Place.parse("cpu")

    def job(model: str | Path, **wanted: Any) -> Job:
        return Job(model, feeds, threads=threads, custom_ops=custom_ops, **wanted)

    float_said, said = (_run(here, job(model)).outputs for model in (reference, quantized))
    scales = output_scales(load_proto(quantized))
    records = []
    for number, (name, place) in enumerate(places.items()):
        progress(f"run on {name}", number, len(places))
        try:
            before = _run(here, job(reference, seconds=seconds))
            (answer,) = ask(place, [job(quantized, seconds=seconds, profile=True)])
        except OnnxqError as error:
            records.append(ProviderRecord(name, error=str(error)))
            continue
        record = _record(name, place, answer)
        records.append(record)
        if answer.error:
            continue
        record.outputs = _compared(float_said, answer.outputs)
        record.against_cpu = _compared(said, answer.outputs)
        off = [_farthest(*pair) for pair in zip(said, answer.outputs, strict=True)]
        record.same_bits = not any(off)
        record.steps = _steps(said, answer.outputs, scales)
        record.emulated = is_emulated(place, answer)
        if not record.emulated:
            record.latency = _latency(answer)
            record.ratio = record.latency.median_ms / _latency(before).median_ms
        if not record.same_bits:
            progress(f"find where {name} differs", number, len(places))
            record.disagreement = first_disagreement(
                quantized, feeds[int(np.argmax(off))], place, custom_ops=custom_ops
            )
    return records


def _run(place: Place, job: Job) -> Answer:
    (answer,) = ask(place, [job])
    if answer.error:
        raise OnnxqError(f"{job.model} does not run on the CPU: {answer.error}")
    return answer


def _record(name: str, place: Place, answer: Answer) -> ProviderRecord:
    """Who ran the model: the kernels of a profile say it, or where there is none the placement."""
    record = ProviderRecord(name, place.provider, answer.version, error=answer.error)
    placed = answer.placement
    ran = {k.name: (k.provider, k.op) for k in answer.kernels if k.provider}
    ran = ran or {node: (provider, "") for node, provider in placed.items()}
    strangers = [(node, op) for node, (owner, op) in ran.items() if owner != place.provider]
    own = sum(owner == place.provider for owner in placed.values())
    record.nodes = own or len(ran) - len(strangers)
    record.elsewhere = len(strangers)
    record.first_elsewhere = " ".join(
        part for node, op in strangers[:1] for part in (repr(node), f"({op})" * bool(op)) if part
    )
    return record


def _compared(expected: Outputs, got: Outputs) -> list[OutputRecord]:
    found = comparisons(name for name in expected[0] if name in got[0])
    for said, answered in zip(expected, got, strict=True):
        update(found, said, answered)
    return output_records(found)


def _farthest(said: dict[str, Array], answered: dict[str, Array]) -> float:
    """The largest difference of any output, infinite where only one is a number."""
    largest = 0.0
    for name, ours in said.items():
        if not np.array_equal(ours, answered[name], equal_nan=True):
            difference = np.abs(np.subtract(ours, answered[name], dtype=np.float64))
            largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
    return largest


def _steps(expected: Outputs, got: Outputs, scales: Mapping[str, float]) -> float | None:
    """The largest difference of an output that stands for codes, in steps of them."""
    differences = [
        float(np.abs(np.subtract(said[name], answered[name], dtype=np.float64)).max(initial=0))
        / scale
        for said, answered in zip(expected, got, strict=True)
        for name, scale in scales.items()
    ]
    return max(differences, default=None)


def output_scales(model: onnx.ModelProto) -> dict[str, float]:
    """The steps of outputs that codes are dequantized to, of one scale for all."""
    stored = {t.name: t for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    scales = {}
    for value in model.graph.output:
        maker = makers.get(value.name)
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[1] in stored:
            scale = onnx.numpy_helper.to_array(stored[maker.input[1]])
            if scale.size == 1:
                scales[value.name] = float(scale.reshape(()))
    return scales


def _latency(answer: Answer) -> Latency:
    median, low, high = np.percentile(answer.latencies_ms, [50, 25, 75])
    return Latency(float(median), float(low), float(high))
