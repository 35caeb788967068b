"""The commands that look for the layers that hurt, and leave them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.options import (
    CHOICE,
    MAX_TOKENS,
    OUT,
    RUN,
    BatchSize,
    CustomOps,
    Data,
    Exclude,
    Include,
    Json,
    MaxTokens,
    MetricName,
    Model,
    NoCache,
    Preprocess,
    Preset,
    Quiet,
    RecipeFile,
    ReportFile,
    Seed,
    Settings,
    States,
    TargetName,
    Threads,
    Tokenizer,
    check_file,
    print_json,
    print_warnings,
    state_pairs,
    working,
    write_report,
)

SENSITIVITY_EXAMPLES = (
    "Examples:\n\n"
    "onnxq sensitivity model.onnx --data samples.npz\n\n"
    "onnxq sensitivity model.onnx --data samples.npz --metric cosine --layers Conv\n\n"
    "onnxq sensitivity model.onnx --data samples.npz --metric mymetrics:accuracy"
)
TUNE_EXAMPLES = (
    "Examples:\n\n"
    "onnxq tune model.onnx --data samples.npz --max-drop 0.5%\n\n"
    "onnxq tune model.onnx --data samples.npz --min-cosine 0.99 --max-size 0.3x\n\n"
    "onnxq tune model.onnx --data samples.npz --max-latency 0.7x"
)

Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        min=1,
        metavar="N",
        rich_help_panel=RUN,
        help="How many samples calibrate, at most.",
    ),
]


def sensitivity(
    model: Model,
    data: Data = None,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    state: States = None,
    samples: Samples = 128,
    measure: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=RUN,
            help="How many samples effects are measured on: the first ones.",
        ),
    ] = 64,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    threads: Threads = None,
    custom_ops: CustomOps = None,
    no_cache: NoCache = False,
    preset: Preset = "int8-static",
    recipe: RecipeFile = None,
    settings: Settings = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            rich_help_panel=CHOICE,
            show_default=False,
            help="Measure these layers only; patterns as for --include. Can be repeated.",
        ),
    ] = None,
    metric: MetricName = "auto",
    target: TargetName = "cpu",
    report: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what quantizing each layer alone, or all but it, does to the model's outputs."""
    with working(not quiet) as progress:
        from onnxq import cache
        from onnxq.tuning.sensitivity import sensitivity as run

        check_file(report, model)
        with cache.disabled(no_cache):
            found = run(
                model,
                preset,
                samples=data,
                preprocess=preprocess,
                states=state_pairs(state),
                tokenizer=tokenizer,
                max_tokens=max_tokens,
                recipe=recipe,
                settings=settings or (),
                target=target,
                include=include or (),
                exclude=exclude or (),
                layers=layers or (),
                metric=metric,
                limit=samples,
                measure=measure,
                batch_size=batch_size,
                seed=seed,
                threads=threads,
                custom_ops=custom_ops or (),
                progress=progress,
            )
    if report is not None:
        write_report(report, found.to_json(), Path(found.model).stem)
    if json:
        print_json(found.to_json(), found.warnings)
    elif quiet:
        print_warnings(found.warnings)
    else:
        from onnxq import show, show_tuning

        show_tuning.show_sensitivity(found, show.output_console())


def tune(
    model: Model,
    data: Data = None,
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            show_default=False,
            help="How much of the metric may be lost: 0.5% or 0.005 of the float model's.",
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(metavar="C", show_default=False, help="The least cosine to float outputs."),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", show_default=False, help="0.7x of the float model's, or 12ms."
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", show_default=False, help="0.3x of the float model's, or 3MB."),
    ] = None,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    state: States = None,
    samples: Samples = 128,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    threads: Threads = None,
    custom_ops: CustomOps = None,
    no_cache: NoCache = False,
    metric: MetricName = "auto",
    presets: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            rich_help_panel=CHOICE,
            show_default="int8-accurate, int8-static, int8-dynamic, int8-weights",
            help="A preset or a recipe file to try and to mix from. Can be repeated.",
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            rich_help_panel=CHOICE,
            show_default="w4a8 where size is bounded",
            help="A format that layers may have beside the preset's own and float: w4a8, w8a16. "
            "Can be repeated.",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    target: TargetName = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.onnx",
            rich_help_panel=OUT,
            show_default="MODEL.tuned.onnx beside the model",
            help="Where the model goes; its recipe goes beside it.",
        ),
    ] = None,
    report: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the fastest model within bounds, leaving layers float where that helps."""
    with working(not quiet) as progress:
        from onnxq import cache
        from onnxq.tuning.tuner import tune as run

        check_file(report, model, output)
        with cache.disabled(no_cache):
            found = run(
                model,
                samples=data,
                max_drop=max_drop,
                min_cosine=min_cosine,
                max_latency=max_latency,
                max_size=max_size,
                metric=metric,
                presets=presets or (),
                formats=formats or (),
                target=target,
                include=include or (),
                exclude=exclude or (),
                preprocess=preprocess,
                states=state_pairs(state),
                tokenizer=tokenizer,
                max_tokens=max_tokens,
                output=output,
                limit=samples,
                batch_size=batch_size,
                seed=seed,
                threads=threads,
                custom_ops=custom_ops or (),
                details=report is not None,
                progress=progress,
            )
    if report is not None:
        write_report(report, found.to_json(), Path(found.output).stem)
    if json:
        print_json(found.to_json(), found.warnings)
    elif quiet:
        print_warnings(found.warnings)
    else:
        from onnxq import show, show_tuning

        show_tuning.show_tuning(found, show.output_console())
