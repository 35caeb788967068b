"""The proof of a quantized model: it is run beside the original before it may be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from onnxq import graph as g
from onnxq import verify
from onnxq.errors import OnnxqError, one_line
from onnxq.exactness import check_exact
from onnxq.group_losses import compare_groups, warn_of_groups
from onnxq.groups import Grouped
from onnxq.layers import count_macs
from onnxq.metrics import Metric
from onnxq.passes.solve.assign import HEAVY
from onnxq.passes.solve.fake_quant import without_fake_quant
from onnxq.pipeline import Progress, Result
from onnxq.report import Report
from onnxq.reported_metrics import records, shown
from onnxq.runtime import Session
from onnxq.sample_checks import compare_ranges, warn_of_ranges
from onnxq.samples import Samples
from onnxq.target import CPU

VERIFICATION_SAMPLES = 16  # at most; enough to tell models apart, few enough to stay quick
LAYER_SAMPLES = 2  # every layer is run apart on each of them
# Where rules for another device do not bound pairs of products, a CPU without VNNI would saturate.
EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
FLOAT_SQNR = 30.0  # dB, between optimizations on and off; float16 that is fused keeps more


def prove(
    original: g.Graph,
    result: Result,
    model: Path,
    unseen: Samples,
    report: Report,
    threads: int | None,
    progress: Progress,
    grouped: Grouped | None = None,
    details: bool = False,
) -> None:
    """Law 7: checker, session, run, optimizations off and on, comparison with the input model.

    With `details` the report has the distributions of activations.
    """
    steps = 5
    progress("verify", 0, steps)
    _check_model(model, report.model)
    target = result.context.target
    providers = target.stand_in
    config = target.session if target.is_cpu else {**target.session, **EXACT_PRODUCTS}

    def session(optimize: bool) -> Session:
        return Session(
            model, providers=providers, threads=threads, config=config, optimize=optimize
        )

    feeds = verify.take(unseen, VERIFICATION_SAMPLES)
    report.verification_samples = len(feeds)
    progress("compare outputs", 1, steps)
    reference, optimized = _float_session(result, report, threads), session(True)
    said = unquantized = verify.Recorded(reference, feeds)
    if (trained := result.context.float_form) is not None:
        # Training saw the model as written, which optimizations may round otherwise; how much
        # that may change is measured by what its quantization changes.
        plain = Session.of(original, threads=threads, optimize=False)
        said = verify.Recorded(plain, feeds)
        unquantized = verify.Recorded(
            Session.of(without_fake_quant(trained), threads=threads), feeds
        )
    judged: verify.Runs = optimized
    if CPU in providers and (half := verify.with_roundings(result.graph)):
        judged = verify.Recorded(Session.of(half, threads=threads, optimize=False), feeds)
    metrics = shown((), said, feeds[0], reference)
    _compare(said, judged, feeds, metrics, report)
    if target.is_here:
        progress("time both models", 2, steps)
        timed = verify.latency([reference, optimized], feeds[0])
        report.float_latency, report.quantized_latency = timed
    del reference  # large models fit into memory one at a time
    as_written = trained is not None
    if not as_written and _misread(said, report, threads, feeds[:2]):
        as_written = True
        said = unquantized = verify.Recorded(
            Session(report.model, threads=threads, optimize=False), feeds
        )
        _compare(said, judged, feeds, metrics, report)
    if grouped is not None:
        progress("compare groups", 2, steps)
        reference = (
            Session.of(original, threads=threads, optimize=False)
            if as_written
            else _float_session(result, report, threads)
        )
        report.groups = compare_groups(reference, optimized, grouped)
        del reference
    progress("compare optimizations off and on", 3, steps)
    report.optimizations_sqnr_db = verify.check_optimizations(
        result.to_proto(),
        verify.Recorded(session(False), feeds[:4]),
        optimized,
        unquantized,
        feeds[:4],
    )
    del optimized
    if report.float_operators == []:
        progress("compare bits", 3, steps)
        report.exact_with = check_exact(model, feeds[0], providers, config)
    progress("compare layers", 4, steps)
    _rank(result, report, feeds[:LAYER_SAMPLES])
    report.ranges = compare_ranges(result, feeds, unseen.synthesised, details)
    report.verified = True
    warn_of_results(report)
    progress("verify", steps, steps)


def _compare(
    said: verify.Runs,
    quantized: verify.Runs,
    feeds: Sequence[verify.Feed],
    metrics: Sequence[Metric],
    report: Report,
) -> None:
    distances = [metric.start() for metric in metrics]
    compared = verify.compare(said, quantized, feeds, distances)
    verify.check_finite(compared)
    report.outputs = verify.output_records(compared)
    report.metrics = records(metrics, distances)


def _check_model(model: Path, source: str) -> None:
    """The ONNX checker, which also refuses models that run: where it refuses the input, no more is
    asked of the output.
    """
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        try:
            onnx.checker.check_model(source)
        except Exception:
            return
        text = one_line(error)
        raise OnnxqError(f"the quantized model fails the ONNX checker: {text}") from None


def _misread(
    said: verify.Recorded, report: Report, threads: int | None, feeds: Sequence[verify.Feed]
) -> bool:
    """Whether graph optimizations change what the float model itself says."""
    try:
        plain = verify.Recorded(Session(report.model, threads=threads, optimize=False), feeds)
    except OnnxqError:
        return False
    worst = min((c.sqnr_db for c in verify.compare(plain, said, feeds).values()), default=200.0)
    if worst < FLOAT_SQNR:
        report.warn(
            f"onnxruntime's graph optimizations change what the float model says ({worst:.0f} dB "
            "SQNR): compared with the model as it is written, without them"
        )
    return worst < FLOAT_SQNR


def _float_session(result: Result, report: Report, threads: int | None) -> Session:
    """The input model; computed in float32 where the runtime has no kernels for its types."""
    try:
        return Session(report.model, threads=threads)
    except OnnxqError as error:
        session = Session.of(result.prepared, threads=threads)
        report.warn(f"compared with the model in float32, since as it is {error}")
        return session


def _rank(result: Result, report: Report, feeds: Sequence[verify.Feed]) -> None:
    """Each layer's own error and its share of the output error, into the report."""
    heavy = {r.output: r for r in report.layers if r.op in HEAVY}
    count_macs(result, report, feeds[0])
    lowered = result.context.qdq_form or result.graph
    errors = verify.layer_errors(result.prepared, lowered, list(heavy), feeds)
    for output, error in errors.items():
        if heavy[output].form != "float":
            heavy[output].sqnr_db = error.sqnr_db
            heavy[output].contribution = error.contribution


def warn_of_results(report: Report) -> None:
    warn_of_groups(report)
    warn_of_ranges(report)
    for output in report.outputs:
        if output.cosine < 0.9:
            worst = report.ranked[0].name if report.ranked else "none measured"
            report.warn(
                f"output {output.name!r} has a cosine of {output.cosine:.3f} to float; the layer "
                f"that hurts most is {worst!r}: try --exclude {worst!r}"
            )
    before, after = report.float_latency, report.quantized_latency
    if report.float_operators is not None:
        return  # for hardware that does not run the float model
    if before and after and after.median_ms > 1.05 * before.median_ms:
        report.warn(
            f"slower than float on this machine: {after.median_ms:.2f} ms against "
            f"{before.median_ms:.2f} ms; small models are better left float"
        )
