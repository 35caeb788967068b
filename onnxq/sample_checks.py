"""Do the ranges that calibration set hold on samples that it did not see?

The float model is run on the verification samples; what each quantized tensor shows is compared
with what its codes can hold and with what calibration saw. What is worth a word, RangeRecord says.
One sample of sixteen that goes beyond all others is chance: what clips does so in SIGHTINGS runs,
what is wider in fewer is no warning, and fewer than ENOUGH runs may well miss the largest values.
Made-up samples say nothing of how calibration meets real ones: nothing is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.distribution import coarser
from onnxq.observe import Extremes, Histogram, HistogramResult
from onnxq.passes.solve.calibrate import OUTLIER, activation_types
from onnxq.passes.solve.integer_planner import WIDE
from onnxq.passes.solve.masks import masked
from onnxq.pipeline import Result
from onnxq.qtype import QParams, QType
from onnxq.report import CLIPPED, NARROWER, WIDER, RangeRecord, Report
from onnxq.tap import Tap

SIGHTINGS, ENOUGH = 3, 8  # runs
BY_CHOICE = 4  # times the share that calibration clipped
FINDINGS = ("clipped", "wider", "one sample", "narrower")  # in the order of what they cost


@dataclass
class Clipping:
    """What a tensor showed, and how much of it lies outside the codes from `low` to `high`.

    Values within a `step` outside do not count: rounding the zero point moves both ends by up to a
    half, and rounding values costs as much. The range seen holds 0, as that of codes does.
    """

    low: float
    high: float
    step: float
    seen_low: float = 0.0
    seen_high: float = 0.0
    outside: int = 0
    values: int = 0
    runs: int = 0
    clipped_runs: int = 0  # in which any value was outside
    histogram: Histogram | None = None  # of the values, where one is wanted

    def update(self, x: NDArray[Any]) -> None:
        if not x.size:
            return
        self.runs += 1
        self.values += x.size
        low, high = float(x.min()), float(x.max())
        least, most = self.low - self.step, self.high + self.step
        if not (low >= least and high <= most):
            self.outside += int(np.count_nonzero((x < least) | (x > most)))
            self.clipped_runs += 1
        if not math.isfinite(high - low):
            x = finite = x[np.isfinite(x)]
            low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
        self.seen_low, self.seen_high = min(self.seen_low, low), max(self.seen_high, high)
        if self.histogram is not None:
            self.histogram.update(x)

    @property
    def share(self) -> float:
        return self.outside / self.values if self.values else 0.0


def compare_ranges(
    result: Result,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    synthesised: bool,
    details: bool = False,
) -> list[RangeRecord]:
    """A record of every activation that the plan quantizes; the worst first.

    With `details` each has the distribution of its values.
    """
    ctx, graph = result.context, result.prepared
    known = g.tensors(graph)
    types, scores = activation_types(graph, ctx), masked(graph)
    planned = [
        name for name, qtype in types.items()
        if name in ctx.activations and name in known
        and not (qtype.bits == WIDE and name in scores)  # what a mask writes is meant to be clipped
    ]  # fmt: skip
    if not planned:
        return []
    params = {name: ctx.activations[name] for name in planned}
    return _records(graph, params, ctx.stats, feeds, synthesised, details, ctx.threads)


def ranges_of_codes(
    reference: g.Graph,
    quantized: g.Graph,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    synthesised: bool,
    details: bool = False,
    threads: int | None = None,
) -> list[RangeRecord]:
    """The same of a model whose calibration is not known, by the codes that it makes itself."""
    params = _coded(quantized, reference)
    return _records(reference, params, {}, feeds, synthesised, details, threads) if params else []


def _coded(quantized: g.Graph, reference: g.Graph) -> dict[str, QParams]:
    """Tensors of the float model that a QuantizeLinear turns to integers by one constant scale.

    Where the codes' ends do what a ReLU or Clip did, codes are those of what that gave.
    """
    known, found = g.tensors(reference), dict[str, QParams]()
    made = {name: tensor.inputs for name, tensor in g.tensors(quantized).items()}
    for node in g.walk(quantized):
        name = node.inputs[0].name if node.inputs else ""
        if node.op != "QuantizeLinear" or name not in known or g.is_constant(known[name]):
            continue
        if len(node.inputs) < 3 or not all(map(g.is_constant, node.inputs[1:3])):
            continue
        scale, zero = map(g.values, node.inputs[1:3])
        kind = re.fullmatch(r"(u?)int(\d+)", zero.dtype.name)
        if scale.size == 1 and kind:
            qtype = QType.parse(f"{'u' if kind[1] else 's'}{kind[2]}a")
            after = known[name].outputs
            while len(after) == 1 and after[0].op in ("Relu", "Clip"):
                bounded = after[0].outputs[0]
                if any(maker.op == after[0].op for maker in made.get(bounded.name, ())):
                    break
                name, after = bounded.name, bounded.outputs
            found[name] = QParams(scale.reshape(()), zero.reshape(()), qtype)
    return found


def _records(
    graph: g.Graph,
    params: Mapping[str, QParams],
    calibrated: Mapping[str, Any],
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    synthesised: bool,
    details: bool,
    threads: int | None,
) -> list[RangeRecord]:
    """Of the tensors that `params` are of, as the float `graph` makes them of the feeds."""
    seen = {
        name: Clipping(*p.range, float(p.scale), histogram=Histogram() if details else None)
        for name, p in params.items()
    }
    probe = Tap(graph, sorted(params), threads=threads)
    for feed in feeds:
        for name, values in probe.run(feed).items():
            for value in values:
                seen[name].update(value)
    records = [
        record_of(name, params[name], calibrated.get(name), clipping, synthesised)
        for name, clipping in seen.items()
        if clipping.values
    ]
    return sorted(records, key=_severity)


def record_of(
    name: str, params: QParams, calibrated: Any, seen: Clipping, synthesised: bool = False
) -> RangeRecord:
    """One tensor. `calibrated` is what an observer of calibration saw, if any did."""
    low, high = params.range
    record = RangeRecord(
        name,
        low,
        high,
        calibration_low=None,
        calibration_high=None,
        calibration_clipped=None,
        validation_low=seen.seen_low,
        validation_high=seen.seen_high,
        validation_clipped=seen.share,
        clipped_runs=seen.clipped_runs,
    )
    extremes: Extremes | None = None
    if isinstance(calibrated, HistogramResult):
        extremes = calibrated.extremes
        outside = (calibrated.centers < low - seen.step) | (calibrated.centers > high + seen.step)
        record.calibration_clipped = float(
            calibrated.counts[outside].sum() / max(1, calibrated.counts.sum())
        )
    elif isinstance(calibrated, Extremes):
        extremes, record.calibration_clipped = calibrated, 0.0
    if extremes is not None:
        record.calibration_low = min(0.0, extremes.low)
        record.calibration_high = max(0.0, extremes.high)
    if seen.histogram is not None:
        counted = seen.histogram.result()
        record.values = coarser(counted.counts, -counted.limit, counted.limit)
    if synthesised:
        return record
    if extremes is not None and extremes.others:
        reach = min(max(-low, high), max(-extremes.low, extremes.high))
        record.set_by = extremes.loudest if reach > OUTLIER * extremes.others else None
    record.finding = finding(record, seen)
    return record


def finding(record: RangeRecord, seen: Clipping) -> str:
    """The first of FINDINGS that holds, or ""."""
    least, most = record.calibration_low, record.calibration_high
    if least is None or most is None:
        least, most = record.low, record.high
    calibrated, validated = most - least, record.validation_high - record.validation_low
    low, high = min(record.low, least), max(record.high, most)
    joined = max(high, record.validation_high) - min(low, record.validation_low)
    if seen.share > CLIPPED and seen.clipped_runs >= min(SIGHTINGS, seen.runs):
        return "clipped"
    if joined > WIDER * (high - low):
        return "wider"
    if record.set_by is not None:
        return "one sample"
    if seen.runs >= ENOUGH and validated < NARROWER * min(calibrated, record.high - record.low):
        return "narrower"
    return ""


def _severity(record: RangeRecord) -> tuple[int, float, str]:
    place = FINDINGS.index(record.finding) if record.finding else len(FINDINGS)
    reach = max(record.validation_high, -record.validation_low)
    beyond = reach / max(record.high, -record.low)
    size = {"clipped": record.validation_clipped, "wider": beyond, "narrower": 1 / (beyond + 1e-9)}
    return place, -size.get(record.finding, 0.0), record.tensor


def warn_of_ranges(report: Report) -> None:
    """One line for what validation shows that calibration did not, or did without need.

    What calibration itself clips, to a few times as much, is its method's choice: that is in the
    table alone, and so is all of a calibration that is not known.
    """
    known = [r for r in report.ranges if r.calibration_clipped is not None]
    unlike = [
        r
        for r in known
        if (r.finding == "wider" and r.clipped_runs >= SIGHTINGS)
        or (
            r.finding == "clipped"
            and r.validation_clipped > BY_CHOICE * (r.calibration_clipped or 0)
        )
    ]
    if unlike:
        worst = unlike[0]
        method = next(
            (p.settings.get("method") for p in report.passes if p.name == "calibrate"), ""
        )
        cure = "" if method in ("minmax", "", None) else ", or --set calibrate.method=minmax"
        report.warn(
            f"calibration saw too little: {worst.tensor!r} clips "
            f"{100 * worst.validation_clipped:.2g} % of its values in validation, which reach from "
            f"{worst.validation_low:.3g} to {worst.validation_high:.3g} where its codes end at "
            f"{worst.low:.3g} and {worst.high:.3g}{_and_more(unlike)}; give more samples, or "
            f"others that are like what the model will meet{cure}"
        )
        return
    narrow = [r for r in known if r.finding == "narrower"]
    if narrow:
        worst = narrow[0]
        report.warn(
            f"calibration saw more than there is: the codes of {worst.tensor!r} reach from "
            f"{worst.low:.3g} to {worst.high:.3g}, validation from {worst.validation_low:.3g} to "
            f"{worst.validation_high:.3g}{_and_more(narrow)}; leave out samples that are unlike "
            "what the model will meet"
        )


def _and_more(found: Sequence[RangeRecord]) -> str:
    more = len(found) - 1
    return f", and {more} more tensor{'s' * (more > 1)} like it" if more else ""
