"""What the command line and Python users call."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnx

from onnxq import graph as g
from onnxq import verify
from onnxq.checkpoint import Checkpoint
from onnxq.choose import settle
from onnxq.details import record_details
from onnxq.devices import Place
from onnxq.devices.check import will_not_run
from onnxq.devices.compare import compare_places
from onnxq.dims import fix_dims, fix_shapes
from onnxq.errors import OnnxqError
from onnxq.group_losses import compare_groups
from onnxq.groups import GroupBy, Grouped, Groups
from onnxq.layers import count_macs, record_layers
from onnxq.ops.library import MISSING, find_library
from onnxq.passes import (
    Assign,
    CodebookMatMul,
    FoldBatchNorm,
    FoldFakeQuant,
    Normalize,
    SpareSlow,
    Widen,
)
from onnxq.passes.solve.assign import HEAVY
from onnxq.passes.solve.fake_quant import is_trained
from onnxq.pipeline import MEMORY_BUDGET, Pass, Pipeline, Progress, Result
from onnxq.proof import LAYER_SAMPLES, VERIFICATION_SAMPLES, prove, warn_of_results
from onnxq.recipe import Recipe, check_target, load_recipe
from onnxq.report import LayerRecord, Report
from onnxq.reported_metrics import records, shown
from onnxq.runtime import Session
from onnxq.runtime import custom_ops as registered
from onnxq.samples import Feed, Preprocessing, Samples, input_specs
from onnxq.sampling import MADE_UP, Sampling
from onnxq.scratch import scratch
from onnxq.storage import data_files, data_paths, file_hash, load_proto, model_size
from onnxq.synthesize import synthesize
from onnxq.target import Target, cpu_flags, cpu_name, load_target, target_names
from onnxq.text import MAX_TOKENS

SYNTHETIC_SAMPLES = 32

Source = Any  # a path, "module:function", a dict of arrays, a list of feeds, an iterable, None
P = ParamSpec("P")
R = TypeVar("R")


def _with_custom_ops(function: Callable[P, R]) -> Callable[P, R]:
    """Its keyword `custom_ops` lists libraries that every session it makes will know."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        libraries: Any = kwargs.get("custom_ops", ())
        with registered(libraries):
            return function(*args, **kwargs)

    return run


@_with_custom_ops
def quantize(
    model: str | Path,
    preset: str = "int8-static",
    *,
    samples: Source = None,
    preprocess: Preprocessing = None,
    states: Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
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
    group_by: GroupBy | None = None,
    check: bool = True,
    latency_check: bool = True,
    bits: int | None = None,
    block_size: int | None = None,
    strict: bool = False,
    fuse: bool = False,
    ops: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    resume: bool = False,
    write: bool = True,
    details: bool = False,
    tokenizer: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    custom_ops: Sequence[str | Path] = (),
    progress: Progress = lambda what, done, total: None,
) -> Result:
    """Quantize a model, run the result beside the original, and write it if it holds.

    `samples` is anything `open_samples` takes; without any they are made up from the model.
    `preprocess` prepares a folder of images: a TOML file or its settings as a dict. A text file
    (.txt) goes through `tokenizer`, by default the tokenizer.json beside the model, and is cut into
    samples of `max_tokens` tokens at most.
    `states` pairs outputs with the inputs that they are in the next run, {output: input}, beside
    the pairs that their names tell; samples may leave such inputs out.
    `dims` fixes named dimensions of the inputs, {name: size}, and all that follows from them. For a
    target that wants every dimension to be a number, the others are those of the samples.
    `limit` is how many of them calibrate. `group_by` shows what each group of all the others loses:
    an array of `samples` beside the inputs, by name, with an entry per sample; "folder" for the
    sub-folders of images; "module:function" or a function, called with each feed for its label; or
    a sequence of labels, one per sample. `output` defaults to `<model>.<preset>.onnx` beside the
    model. `check=False` leaves the verification out, and the report says so. `latency_check=False`
    quantizes what is slower in integers on this machine too. `bits` and `block_size` change those
    of a preset of weights alone. `strict` refuses a model in which `integer-only` would leave an
    operator float. `fuse` writes a QDQ recipe's result in the runtime's own integer operators:
    faster there, and for nothing else. `ops` keeps codebooks, lattice points and 3 bits as codes,
    in memory too, in onnxq's own operators: their kernels are fast where onnxq's library is, and
    elsewhere functions of standard operators compute them, slowly. `memory_budget` is how many
    bytes the statistics of layers may take at a time, `resume` takes over the layers that an
    interrupted run of the same model, recipe and samples had solved. `write=False` writes no file.
    `details` puts what `onnxq report` shows of single layers into the report: histograms of weights
    and activations, scales, neighbours.
    `custom_ops` are libraries of operators that the model uses beside the runtime's own.

    Raises OnnxqError, with nothing written, for bad input and for a result that does not hold.
    """
    if isinstance(recipe, Recipe) and settings:
        raise OnnxqError("settings change a preset or a recipe file; a Recipe is final")
    path = Path(model)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe or preset), settings)
    if bits is not None or block_size is not None:
        chosen = chosen.in_blocks(bits, block_size)
    if strict:
        chosen = chosen.strict()
    if fuse:
        chosen = chosen.fused()
    if not (check and latency_check):  # what is not run is not timed
        chosen = chosen.without(SpareSlow.name)
    device = target if isinstance(target, Target) else load_target(target)
    if ops:
        chosen.require_operators()
        device = device.with_custom_operators()
    elif not device.custom_operators:
        chosen = chosen.without(CodebookMatMul.name)
    check_target(chosen, device)
    place = Path(output) if output else path.with_name(f"{path.stem}.{chosen.name}.onnx")
    _check_paths(path, place)
    model_proto = load_proto(path)
    if dims:
        model_proto = fix_dims(model_proto, dims)
    original = g.load(model_proto, path.parent)
    _check_inputs(model_proto)
    _check_weights(original)
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
    sampling = Sampling(
        path, model_proto, preprocess, states, batch_size, seed, threads, tokenizer, max_tokens
    )
    groups: Groups | None = None
    if group_by is not None:
        if not check:
            raise OnnxqError(
                "groups of samples are compared with float, which --no-verify leaves out"
            )
        groups = Groups(group_by, samples, sampling)
        samples = groups.source
    needed = samples is not None or bool(chosen.optional)
    needed = needed or any(step.needs_samples for step in chosen.passes)
    calibration: Samples | None = None
    unseen: Samples | None = None
    if needed:
        calibration, unseen = _samples(sampling, samples, limit, report)
        report.samples = calibration.description
    elif check:
        unseen = _made_up_for_verification(sampling, report)
    if device.fixed_shapes:
        model_proto = fix_shapes(model_proto, chain(calibration or (), unseen or ()))
        original = g.load(model_proto, path.parent)
    grouped: Grouped | None = None
    if groups is not None and calibration is not None:
        drawn = sampling.given(samples, limit + VERIFICATION_SAMPLES)
        seen = calibration.samples(0, len(calibration)) if report.verification_unseen else 0
        grouped = groups.beyond(drawn, seen)
    _warn_of_saturation(device, report)
    if device.custom_operators and find_library() is None:
        report.warn(MISSING)
    options: dict[str, Any] = {
        "include": tuple(include),
        "exclude": tuple(exclude),
        "threads": threads,
        "memory_budget": memory_budget,
    }
    if chosen.optional:
        assert calibration is not None
        chosen = settle(chosen, original, calibration, device, report, options, progress)
        report.recipe = chosen.text
    checkpoint = Checkpoint.of(
        report.environment["model_sha256"],
        chosen.text,
        calibration.identity() if calibration else "",
        device.name,
        seed,
        options,
        resume=resume,
    )
    options |= {"unseen": unseen, "checkpoint": checkpoint, "progress": progress}
    result = chosen.pipeline.run(original, calibration, device, report=report, **options)
    record_layers(result, report)
    if not device.is_cpu and (barred := will_not_run(result.graph, device, bool(custom_ops))):
        report.warn(f"{barred}; take another preset, or see onnxq check")
    if details:
        record_details(result, report)
    if check:
        with scratch() as folder:
            staged = folder / "model.onnx"
            result.save(staged)
            assert unseen is not None
            prove(original, result, staged, unseen, report, threads, progress, grouped, details)
    _finish(result, place, report, write)
    checkpoint.clear()
    return result


def _check_paths(model: Path, output: Path) -> None:
    folder = output.absolute().parent
    if not model.exists():
        raise OnnxqError(f"there is no model {str(model)!r}")
    if output.is_dir():
        raise OnnxqError(f"the output {str(output)!r} is a folder; name a file")
    if not folder.is_dir():
        raise OnnxqError(f"there is no folder {str(folder)!r} to write to; make it first")
    if not os.access(folder, os.W_OK):
        raise OnnxqError(f"the folder {str(folder)!r} cannot be written to")
    if output.exists() and output.samefile(model):
        raise OnnxqError("the output would replace the input; choose another --output")
    inputs = data_paths(model)
    replaced = [place for place in (output, *data_files(output)) if place.exists()]
    if any(place.samefile(data) for place in replaced for data in inputs):
        raise OnnxqError("the output would replace the input's data; choose another --output")


def _check_inputs(model: onnx.ModelProto) -> None:
    if not input_specs(model):
        raise OnnxqError("the model has no inputs: its answer is a constant, which no sample moves")


def _check_weights(graph: g.Graph) -> None:
    """That no weight is NaN or infinite: no scale could hold it. A mask elsewhere may be."""
    for node in g.walk(graph):
        if node.op not in HEAVY or not g.is_standard(node):
            continue
        for tensor in node.inputs:
            maker = g.producer(tensor)
            held = maker.attrs.get("value") if maker and maker.op == "Constant" else tensor
            if not g.is_constant(held) or not g.is_float(held):
                continue
            values = np.atleast_1d(g.values(held))
            with np.errstate(over="ignore", invalid="ignore"):
                if np.isfinite(values.sum(dtype=values.dtype)):
                    continue
            step = max(1, (1 << 22) * len(values) // max(1, values.size))  # rows at a time
            for start in range(0, len(values), step):
                wrong = np.argwhere(~np.isfinite(values[start : start + step]))
                if len(wrong):
                    at = (wrong[0] + [start, *[0] * (values.ndim - 1)]).tolist()
                    label = node.name or node.outputs[0].name
                    raise OnnxqError(
                        f"weight {tensor.name!r} of node {label!r} ({node.op}) holds "
                        f"{values[tuple(at)]} at {at}; weights must be finite: repair the model"
                    )


def _samples(
    sampling: Sampling, source: Source, limit: int, report: Report
) -> tuple[Samples, Samples]:
    """Samples to calibrate on, and others to verify on.

    Those beyond `limit` verify; where there are none a tenth is held back, four at least.
    """
    if source is None:
        drawn, kind = sampling.made_up(SYNTHETIC_SAMPLES)
        report.warn(
            f"no samples given: calibrated on {MADE_UP[kind]}; give real ones with --data: they "
            "decide the accuracy"
        )
        total = len(drawn)
        kept = max(1, total - max(1, total // 5))
        report.verification_unseen = kept < total
        unseen = drawn.slice(kept if kept < total else 0, None)
        return sampling.carry(drawn.slice(0, kept)), sampling.carry(unseen)
    drawn = sampling.given(source, limit + VERIFICATION_SAMPLES)
    total = len(drawn)
    held_back = max(total - limit, min(VERIFICATION_SAMPLES, max(4, total // 10)))
    if total <= held_back + 1:
        report.warn(
            f"only {total} sample{'s' * (total > 1)}: verified on what calibration saw; give more"
        )
        return sampling.carry(drawn), sampling.carry(drawn)
    report.verification_unseen = True
    calibration, unseen = (
        drawn.slice(0, total - held_back),
        drawn.slice(total - held_back, None),
    )
    return sampling.carry(calibration), sampling.carry(unseen)


def _made_up_for_verification(sampling: Sampling, report: Report) -> Samples:
    """Samples of a run that needed none: the recipe observes no activations."""
    drawn, kind = sampling.made_up(VERIFICATION_SAMPLES)
    report.samples = f"none needed; compared on {MADE_UP[kind]}"
    report.verification_unseen = True
    return sampling.carry(drawn)


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
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
    }


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


@_with_custom_ops
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
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Compare a model with the float model it was made from: outputs, layers, sizes, latency.

    `samples`, `preprocess`, `states` and `group_by` are as for `quantize`. `metric`, a name of
    `onnxq.metrics` or `module:function`, is measured beside what fits the outputs: `auto`.
    `ep` are places to run the quantized model at too (`Place.parse`), each in a process apart.
    """
    device = load_target(target)
    places = {text: _place(text, device) for text in ep}
    report = Report(
        model=str(reference),
        output=str(quantized),
        target=device.name,
        float_bytes=model_size(_existing(reference)),
        quantized_bytes=model_size(_existing(quantized)),
        environment=_environment(Path(reference), seed),
    )
    float_model = load_proto(reference)
    _check_inputs(float_model)
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
    if places:
        report.providers = compare_places(
            reference, quantized, list(drawn), places,
            custom_ops=custom_ops, threads=threads, progress=progress,
        )  # fmt: skip
    report.verified = True
    warn_of_results(report)
    return report


def _place(text: str, device: Target) -> Place:
    """A place with the options of the target, or of the first that comes with onnxq and is for
    its provider.
    """
    place = Place.parse(text)
    for target in (device, *map(load_target, target_names())):
        if place.provider in target.providers:
            return replace(place, options=target.provider_options)
    return place


def _existing(path: str | Path) -> Path:
    load_proto(path)
    return Path(path)


@_with_custom_ops
def inspect(
    model: str | Path,
    *,
    target: str = "cpu",
    form: str = "static",
    custom_ops: Sequence[str | Path] = (),
) -> Report:
    """What a model is made of and what a target could quantize of it, without changing it."""
    device = load_target(target)
    path = _existing(model)
    report = Report(
        model=str(path), target=device.name, float_bytes=model_size(path),
        environment=_environment(path, 0),
    )  # fmt: skip
    original = g.load(path)
    report.operators = dict(Counter(node.op for node in g.walk(original)))
    steps: list[Pass] = [Widen(), Normalize(), FoldBatchNorm(), Assign(form=form)]  # type: ignore[arg-type]
    if is_trained(original):
        steps = [Widen(), Normalize(), FoldFakeQuant()]
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


@_with_custom_ops
def bench(
    models: Sequence[str | Path],
    *,
    samples: Source = None,
    preprocess: Preprocessing = None,
    states: Mapping[str, str] | None = None,
    seconds: float = 5.0,
    runs: int = 200,
    threads: int | None = None,
    tokenizer: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    custom_ops: Sequence[str | Path] = (),
) -> list[dict[str, Any]]:
    """Latency of several models in turns, and the peak memory of each in a process of its own.

    `samples` (the first feed is what is run), `preprocess` and `states` are as for `quantize`.
    """
    first = _existing(models[0])
    proto = load_proto(first)
    _check_inputs(proto)
    sampling = Sampling(
        first, proto, preprocess, states,
        threads=threads, tokenizer=tokenizer, max_tokens=max_tokens,
    )  # fmt: skip
    given = sampling.made_up(1)[0] if samples is None else sampling.given(samples, None)
    feed = next(iter(sampling.carry(given)))
    sessions = [Session(_existing(m), threads=threads) for m in models]
    for model, session in zip(models, sessions, strict=True):
        if set(session.inputs) != set(sessions[0].inputs):
            raise OnnxqError(
                f"{str(model)!r} takes {', '.join(session.inputs)} and {str(models[0])!r} takes "
                f"{', '.join(sessions[0].inputs)}; bench models that take the same inputs"
            )
    timed = verify.latency(sessions, feed, seconds=seconds * len(sessions), most=runs)
    memory = [_peak_memory(Path(m), feed, threads, custom_ops) for m in models]
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


def _peak_memory(
    model: Path, feed: Feed, threads: int | None, libraries: Sequence[str | Path]
) -> float:
    """MiB that loading and running a model adds to a fresh process's peak."""
    import subprocess
    import sys

    with scratch() as folder:
        path = folder / "feed.npz"
        plain = {k: a.astype(str) if a.dtype.kind == "O" else a for k, a in feed.items()}
        np.savez(path, **plain)  # type: ignore[arg-type]
        code = (
            "import sys, numpy as np\n"
            "from onnxq.pipeline import peak_mb\n"
            "from onnxq.runtime import Session, custom_ops\n"
            "model, feed, threads, *libraries = sys.argv[1:]\n"
            "feed, before = dict(np.load(feed)), peak_mb()\n"
            "with custom_ops(libraries):\n"
            "    Session(model, threads=int(threads) or None).run(feed)\n"
            "print(peak_mb() - before)"
        )
        arguments = [sys.executable, "-P", "-c", code, model, path, threads or 0, *libraries]
        command = list(map(str, arguments))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OnnxqError(f"{str(model)!r} does not run in a process of its own: {last}")
    return float(done.stdout)
