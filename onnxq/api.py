"""What the command line and Python users call."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq import graph as g
from onnxq import verify
from onnxq.errors import OnnxqError
from onnxq.layers import count_macs, record_layers
from onnxq.passes import Assign, FoldBatchNorm, FoldFakeQuant, Normalize
from onnxq.passes.solve.assign import HEAVY
from onnxq.passes.solve.fake_quant import is_trained, without_fake_quant
from onnxq.pipeline import Pass, Pipeline, Progress, Result
from onnxq.recipe import Recipe, load_recipe
from onnxq.report import LayerRecord, Report
from onnxq.runtime import Session
from onnxq.samples import Feed, Samples, input_specs, open_samples
from onnxq.storage import file_hash, load_proto, model_size
from onnxq.synthesize import synthesize
from onnxq.target import Target, cpu_flags, load_target

VERIFICATION_SAMPLES = 16  # at most; enough to tell models apart, few enough to stay quick
LAYER_SAMPLES = 2  # every layer is run apart on each of them
SYNTHETIC_SAMPLES = 32
MADE_UP = {
    "images": "made-up images",
    "language model": "text that the model wrote itself",
    "tokens": "random tokens",
    "random": "random numbers",
}

Source = Any  # a path, "module:function", a dict of arrays, a list of feeds, an iterable, None


def quantize(
    model: str | Path,
    preset: str = "int8-static",
    *,
    samples: Source = None,
    output: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: Sequence[str] = (),
    target: str | Target = "cpu",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int = 128,
    batch_size: int = 1,
    seed: int = 0,
    threads: int | None = None,
    check: bool = True,
    write: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> Result:
    """Quantize a model, run the result beside the original, and write it if it holds.

    `samples` is anything `open_samples` takes; without any they are made up from the model.
    `limit` is how many of them calibrate. `output` defaults to `<model>.<preset>.onnx` beside the
    model. `check=False` leaves the verification out, and the report says so. `write=False` writes
    no file.

    Raises OnnxqError, with nothing written, for bad input and for a result that does not hold.
    """
    if isinstance(recipe, Recipe) and settings:
        raise OnnxqError("settings change a preset or a recipe file; a Recipe is final")
    path = Path(model)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe or preset), settings)
    device = target if isinstance(target, Target) else load_target(target)
    place = Path(output) if output else path.with_name(f"{path.stem}.{chosen.name}.onnx")
    _check_paths(path, place)
    original = g.load(path)
    model_proto = load_proto(path)
    report = Report(
        model=str(path),
        output=str(place) if write else "",
        target=device.name,
        preset=chosen.name,
        recipe=chosen.text,
        float_bytes=model_size(path),
        environment=_environment(path, seed),
    )
    progress("samples", 0, 1)
    calibration, unseen = _samples(path, model_proto, samples, limit, batch_size, seed, report)
    report.samples = calibration.description
    _warn_of_saturation(device, report)
    result = chosen.pipeline.run(
        original,
        calibration,
        device,
        report=report,
        include=tuple(include),
        exclude=tuple(exclude),
        threads=threads,
        progress=progress,
    )
    record_layers(result, report)
    if check:
        with tempfile.TemporaryDirectory(prefix="onnxq-") as scratch:
            staged = Path(scratch) / "model.onnx"
            result.save(staged)
            _verify(original, result, staged, unseen, report, threads, progress)
    _finish(result, place, report, write)
    return result


def _check_paths(model: Path, output: Path) -> None:
    if not model.is_file():
        raise OnnxqError(f"there is no model {str(model)!r}")
    if output.exists() and output.samefile(model):
        raise OnnxqError("the output would replace the input; choose another --output")
    if output.is_dir():
        raise OnnxqError(f"the output {str(output)!r} is a folder; name a file")
    if not output.absolute().parent.is_dir():
        raise OnnxqError(f"there is no folder {str(output.absolute().parent)!r} to write to")
    if not os.access(output.absolute().parent, os.W_OK):
        raise OnnxqError(f"the folder {str(output.absolute().parent)!r} cannot be written to")


def _samples(
    path: Path,
    model: onnx.ModelProto,
    source: Source,
    limit: int,
    batch_size: int,
    seed: int,
    report: Report,
) -> tuple[Samples, Samples]:
    """Samples to calibrate on, and others to verify on.

    Those beyond `limit` verify; where there are none a tenth is held back, four at least.
    """
    specs = input_specs(model)
    if source is None:
        made, kind = synthesize(model, n=SYNTHETIC_SAMPLES, seed=seed, path=path)
        report.warn(
            f"no samples given: calibrated on {MADE_UP[kind]}; give real ones with --data: they "
            "decide the accuracy"
        )
        drawn = open_samples(made, specs, synthesised=True, name=MADE_UP[kind])
        kept = max(1, len(made) - max(1, len(made) // 5))
        report.verification_unseen = kept < len(made)
        return drawn.slice(0, kept), drawn.slice(kept if kept < len(made) else 0, None)
    drawn = open_samples(source, specs, batch_size=batch_size, limit=limit + VERIFICATION_SAMPLES)
    total = len(drawn)
    held_back = max(total - limit, min(VERIFICATION_SAMPLES, max(4, total // 10)))
    if total <= held_back + 1:
        report.warn(
            f"only {total} sample{'s' * (total > 1)}: verified on what calibration saw; give more"
        )
        return drawn, drawn
    report.verification_unseen = True
    return drawn.slice(0, total - held_back), drawn.slice(total - held_back, None)


def _warn_of_saturation(target: Target, report: Report) -> None:
    """A model made for VNNI says something else on a CPU without it."""
    bound = any(rule.pair_limit for rules in target.ops.values() for rule in rules)
    flags = cpu_flags()
    vnni = flags & {"avx512_vnni", "avx_vnni"}
    if not bound and "avx2" in flags and not vnni and "CPUExecutionProvider" in target.providers:
        report.warn(
            f"target {target.name} counts on VNNI, which this CPU lacks: products will saturate "
            "here; use --target cpu"
        )


def _environment(path: Path, seed: int) -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("onnxq", "onnx", "onnxruntime", "numpy")}
    return versions | {
        "model_sha256": file_hash(path),
        "seed": str(seed),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# ── verification ─────────────────────────────────────────────────────────────────────────────────


def _verify(
    original: g.Graph,
    result: Result,
    model: Path,
    unseen: Samples,
    report: Report,
    threads: int | None,
    progress: Progress,
) -> None:
    """Law 7: checker, session, run, optimizations off and on, comparison with the input model."""
    steps = 5
    progress("verify", 0, steps)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        text = " ".join(str(error).split())
        raise OnnxqError(f"the quantized model fails the ONNX checker: {text}") from None
    providers = tuple(result.context.target.providers) or ("CPUExecutionProvider",)
    reference = Session(g.to_proto(original), threads=threads)
    config = result.context.target.session
    optimized = Session(model, providers=providers, threads=threads, config=config)
    plain = Session(model, providers=providers, threads=threads, config=config, optimize=False)
    written = unquantized = reference
    if (trained := result.context.float_form) is not None:
        # Training saw the model as written, which optimizations may round otherwise; how much
        # that may change is measured by what its quantization changes.
        written = Session(g.to_proto(original), threads=threads, optimize=False)
        unquantized = Session(g.to_proto(without_fake_quant(trained)), threads=threads)
    feeds = verify.take(unseen, VERIFICATION_SAMPLES)
    report.verification_samples = len(feeds)
    progress("compare outputs", 1, steps)
    report.outputs = verify.output_records(verify.compare(written, optimized, feeds))
    progress("compare optimizations off and on", 2, steps)
    report.optimizations_sqnr_db = verify.check_optimizations(
        result.to_proto(), plain, optimized, unquantized, feeds[:4]
    )
    progress("compare layers", 3, steps)
    _rank(result, report, feeds[:LAYER_SAMPLES])
    progress("time both models", 4, steps)
    timed = verify.latency([reference, optimized], feeds[0])
    report.float_latency, report.quantized_latency = timed
    report.verified = True
    _warn_of_results(report)
    progress("verify", steps, steps)


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


def _warn_of_results(report: Report) -> None:
    for output in report.outputs:
        if output.cosine < 0.9:
            worst = report.ranked[0].name if report.ranked else "none measured"
            report.warn(
                f"output {output.name!r} has a cosine of {output.cosine:.3f} to float; the layer "
                f"that hurts most is {worst!r}: try --exclude {worst!r}"
            )
    before, after = report.float_latency, report.quantized_latency
    if before and after and after.median_ms > 1.05 * before.median_ms:
        report.warn(
            f"slower than float on this machine: {after.median_ms:.2f} ms against "
            f"{before.median_ms:.2f} ms; small models are better left float"
        )


def _finish(result: Result, place: Path, report: Report, write: bool) -> None:
    """Note the summary in the model and write it, in one rename."""
    digest = hashlib.sha256(result.to_proto().SerializeToString(deterministic=True)).hexdigest()
    summary = {
        "onnxq.version": report.environment["onnxq"],
        "onnxq.preset": report.preset,
        "onnxq.target": report.target,
        "onnxq.recipe": report.recipe,
        "onnxq.source_sha256": report.environment["model_sha256"],
        "onnxq.verified": str(report.verified).lower(),
    }
    if report.verified:
        cosines = {o.name: round(o.cosine, 4) for o in report.outputs}
        summary["onnxq.cosine"] = json.dumps(cosines)
    g.set_metadata(result.graph, summary)
    report.environment["graph_sha256"] = digest
    if write:
        report.quantized_bytes = result.save(str(place))
    else:
        report.quantized_bytes = len(result.to_proto().SerializeToString())
    if not report.verified:
        report.warn("not verified: the model was neither run nor compared (--no-verify)")


def validate(
    reference: str | Path,
    quantized: str | Path,
    *,
    samples: Source = None,
    limit: int = 64,
    batch_size: int = 1,
    target: str = "cpu",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Compare a model with the float model it was made from: outputs, layers, sizes, latency."""
    device = load_target(target)
    report = Report(
        model=str(reference),
        output=str(quantized),
        target=device.name,
        float_bytes=model_size(_existing(reference)),
        quantized_bytes=model_size(_existing(quantized)),
        environment=_environment(Path(reference), seed),
    )
    float_model = load_proto(reference)
    specs = input_specs(float_model)
    if samples is None:
        feeds, kind = synthesize(float_model, n=8, seed=seed, path=Path(reference))
        report.warn(f"no samples given: compared on {MADE_UP[kind]}")
        report.samples = f"{len(feeds)} × {MADE_UP[kind]}"
        drawn = open_samples(feeds, specs)
    else:
        drawn = open_samples(samples, specs, batch_size=batch_size, limit=limit)
        report.samples = drawn.description
    progress("compare", 0, 3)
    left = Session(reference, threads=threads)
    config = device.session
    right = Session(quantized, providers=device.providers, threads=threads, config=config)
    report.outputs = verify.output_records(verify.compare(left, right, drawn))
    report.verification_samples, report.verification_unseen = len(drawn), False
    progress("compare layers", 1, 3)
    graphs = g.load(reference), g.load(quantized)
    outputs = {
        node.outputs[0].name: node
        for node in graphs[0].nodes
        if node.op in HEAVY or node.op == "BatchNormalization"
    }
    few = verify.take(drawn, LAYER_SAMPLES)
    for name, error in verify.layer_errors(*graphs, list(outputs), few).items():
        node = outputs[name]
        report.layers.append(
            LayerRecord(
                node.name or name, node.op, "quantized", output=name,
                sqnr_db=error.sqnr_db, contribution=error.contribution,
            )
        )  # fmt: skip
    progress("time both models", 2, 3)
    report.float_latency, report.quantized_latency = verify.latency([left, right], few[0])
    report.verified = True
    _warn_of_results(report)
    return report


def _existing(path: str | Path) -> Path:
    load_proto(path)
    return Path(path)


def inspect(model: str | Path, *, target: str = "cpu", form: str = "static") -> Report:
    """What a model is made of and what a target could quantize of it, without changing it."""
    device = load_target(target)
    path = _existing(model)
    report = Report(
        model=str(path), target=device.name, float_bytes=model_size(path),
        environment=_environment(path, 0),
    )  # fmt: skip
    original = g.load(path)
    report.operators = dict(Counter(node.op for node in g.walk(original)))
    steps: list[Pass] = [Normalize(), FoldBatchNorm(), Assign(form=form)]  # type: ignore[arg-type]
    if is_trained(original):
        steps = [Normalize(), FoldFakeQuant()]
    try:
        result = Pipeline(steps).run(original, None, device, report=report)
    except OnnxqError as error:
        report.warn(str(error))
        result = Pipeline(steps[:-1]).run(original, None, device, report=report)
    record_layers(result, report)
    try:
        feed = synthesize(load_proto(path), n=1, seed=0, path=path)[0][0]
        count_macs(result, report, feed)
    except OnnxqError as error:
        report.warn(f"multiply-accumulates not counted: {error}")
    return report


def bench(
    models: Sequence[str | Path],
    *,
    samples: Source = None,
    seconds: float = 5.0,
    runs: int = 200,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Latency of several models in turns, and the peak memory of each in a process of its own."""
    first = _existing(models[0])
    proto = load_proto(first)
    feeds: Any = samples
    if samples is None:
        feeds, _ = synthesize(proto, n=1, seed=0, path=first)
    feed = next(iter(open_samples(feeds, input_specs(proto))))
    sessions = [Session(_existing(m), threads=threads) for m in models]
    for model, session in zip(models, sessions, strict=True):
        if set(session.inputs) != set(sessions[0].inputs):
            raise OnnxqError(
                f"{str(model)!r} takes {', '.join(session.inputs)} and {str(models[0])!r} takes "
                f"{', '.join(sessions[0].inputs)}; bench models that take the same inputs"
            )
    timed = verify.latency(sessions, feed, seconds=seconds * len(sessions), most=runs)
    memory = [_peak_memory(Path(m), feed, threads) for m in models]
    return [
        {
            "model": str(model),
            "bytes": model_size(model),
            "median_ms": t.median_ms,
            "low_ms": t.low_ms,
            "high_ms": t.high_ms,
            "ratio": t.median_ms / timed[0].median_ms,
            "peak_mb": peak,
        }
        for model, t, peak in zip(models, timed, memory, strict=True)
    ]


def _peak_memory(model: Path, feed: Feed, threads: int | None) -> float:
    """MiB that loading and running a model adds to a fresh process's peak."""
    import subprocess
    import sys

    with tempfile.TemporaryDirectory(prefix="onnxq-") as scratch:
        path = Path(scratch) / "feed.npz"
        np.savez(path, **feed)  # type: ignore[arg-type]
        code = (
            "import sys, numpy as np; from onnxq.runtime import Session;"
            "from onnxq.pipeline import peak_mb; feed = dict(np.load(sys.argv[2])); b = peak_mb();"
            "s = Session(sys.argv[1], threads=int(sys.argv[3]) or None); s.run(feed);"
            "print(peak_mb() - b)"
        )
        arguments = [sys.executable, "-P", "-c", code, str(model), str(path), str(threads or 0)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OnnxqError(f"{str(model)!r} does not run in a process of its own: {last}")
    return float(done.stdout)
