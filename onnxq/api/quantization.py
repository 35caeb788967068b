"""`quantize`: a model in, a smaller one out, with the proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from onnxq import graph as g
from onnxq.api.inputs import (
    Source,
    check_inputs,
    check_paths,
    check_weights,
    environment,
    with_custom_ops,
)
from onnxq.checkpoint import Checkpoint
from onnxq.choose import settle
from onnxq.details import record_details
from onnxq.devices.check import other_numbers, will_not_run
from onnxq.dims import fix_dims, fix_shapes
from onnxq.errors import OnnxqError
from onnxq.groups import GroupBy, Grouped, Groups
from onnxq.layers import record_layers
from onnxq.ops.library import MISSING, find_library
from onnxq.passes import (
    CodebookMatMul,
    SpareSlow,
)
from onnxq.pipeline import MEMORY_BUDGET, Progress, Result
from onnxq.proof import VERIFICATION_SAMPLES, prove
from onnxq.recipe import Recipe, check_target, load_recipe
from onnxq.report import Report
from onnxq.samples import Preprocessing, Samples
from onnxq.sampling import MADE_UP, Sampling
from onnxq.scratch import scratch
from onnxq.storage import load_proto, model_size
from onnxq.target import Target, cpu_flags, load_target
from onnxq.text import MAX_TOKENS

SYNTHETIC_SAMPLES = 32


@with_custom_ops
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
    check_paths(path, place)
    model_proto = load_proto(path)
    if dims:
        model_proto = fix_dims(model_proto, dims)
    original = g.load(model_proto, path.parent)
    check_inputs(model_proto)
    check_weights(original)
    report = Report(
        model=str(path),
        output=str(place) if write else "",
        target=device.name,
        preset=chosen.name,
        recipe=chosen.text,
        float_bytes=model_size(path),
        environment=environment(path, seed),
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
    if not device.is_cpu:
        if barred := will_not_run(result.graph, device, bool(custom_ops)):
            report.warn(f"{barred}; take another preset, or see onnxq check")
        if wrong := other_numbers(result.graph, device):
            report.warn(f"{wrong}; take 8-bit weights, or --exclude")
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
