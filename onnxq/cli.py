"""The command line. Every command is one call into `onnxq.api` and one into `onnxq.show`.

What is slow to import is imported inside the commands: `onnxq --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from onnxq import cli_deploy, cli_devices, cli_look, cli_probe, cli_tuning
from onnxq.options import (
    CHOICE,
    MAX_TOKENS,
    OUT,
    RUN,
    AllowFallback,
    BatchSize,
    Bits,
    BlockSize,
    Command,
    CustomOps,
    Data,
    Dims,
    Exclude,
    Fuse,
    GroupBy,
    Include,
    Json,
    MaxTokens,
    MemoryBudget,
    MetricName,
    Model,
    NoCache,
    Ops,
    Places,
    Preprocess,
    Preset,
    Quiet,
    RecipeFile,
    ReportFile,
    Resume,
    Seed,
    Settings,
    States,
    Strict,
    TargetName,
    Threads,
    Tokenizer,
    bytes_of,
    check_file,
    deliver,
    deliver_folder,
    fixed_dims,
    print_json,
    require_all,
    state_pairs,
    stopped,
    working,
)


class Catalogue(TyperGroup):
    """`onnxq presets` alone is `onnxq presets list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["list"])


app = typer.Typer(
    name="onnxq",
    help="Quantize ONNX models, and prove the result by running it.",
    epilog=(
        "Start with: onnxq quantize model.onnx --data samples.npz\n\n"
        "Each command explains itself: onnxq quantize --help"
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of `onnxq`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks × still gets its table
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(stopped().exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"onnxq {version('onnxq')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show where an error came from: onnxq --debug COMMAND ..."),
    ] = False,
) -> None: ...


class Form(StrEnum):
    """How activations are quantized."""

    static = "static"
    dynamic = "dynamic"


Name = Annotated[str, typer.Argument(metavar="NAME", help="As the list has it.")]

# ── commands ─────────────────────────────────────────────────────────────────────────────────────


@app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        "onnxq quantize model.onnx --data samples.npz\n\n"
        "onnxq quantize bert.onnx --preset int8-dynamic -o small.onnx\n\n"
        "onnxq quantize llama-folder --preset int8-dynamic --data text.txt\n\n"
        "onnxq quantize model.onnx --data samples.npz --exclude 're:^/head/'\n\n"
        "onnxq quantize model.onnx --data samples.npz --set calibrate.method=mse"
    ),
)
def quantize(
    model: Annotated[
        Path,
        typer.Argument(
            help="The float ONNX model, or a folder that holds some.", show_default=False
        ),
    ],
    data: Data = None,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    state: States = None,
    dim: Dims = None,
    group_by: GroupBy = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=RUN,
            help="How many samples calibrate, at most. Further ones are used to compare.",
        ),
    ] = 128,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    threads: Threads = None,
    custom_ops: CustomOps = None,
    no_cache: NoCache = False,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            rich_help_panel=RUN,
            help="Write the result without running it and comparing it with the float model.",
        ),
    ] = False,
    no_latency_check: Annotated[
        bool,
        typer.Option(
            "--no-latency-check",
            rich_help_panel=RUN,
            help="Also quantize what is slower in integers on this machine.",
        ),
    ] = False,
    memory_budget: MemoryBudget = "1GB",
    resume: Resume = False,
    preset: Preset = "int8-static",
    bits: Bits = None,
    block_size: BlockSize = None,
    strict: Strict = False,
    fuse: Fuse = False,
    ops: Ops = False,
    recipe: RecipeFile = None,
    settings: Settings = None,
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
            show_default="MODEL.PRESET.onnx beside the model",
            help="Where the quantized model goes; of a folder, a folder that does not exist yet.",
        ),
    ] = None,
    report: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model, run it beside the original, and write it if it holds.

    Of a folder that Hugging Face Optimum exported, every ONNX file, into a folder that loads like
    it.
    """
    with working(not quiet) as progress:
        from onnxq import api, cache, folder

        check_file(report, model, output)
        run: Any = folder.quantize_folder if model.is_dir() else api.quantize
        with cache.disabled(no_cache):
            result = run(
                model,
                preset,
                samples=data,
                preprocess=preprocess,
                states=state_pairs(state),
                dims=fixed_dims(dim),
                tokenizer=tokenizer,
                max_tokens=max_tokens,
                output=output,
                recipe=recipe,
                settings=settings or (),
                target=target,
                include=include or (),
                exclude=exclude or (),
                limit=samples,
                group_by=group_by,
                batch_size=batch_size,
                seed=seed,
                threads=threads,
                custom_ops=custom_ops or (),
                check=not no_verify,
                latency_check=not no_latency_check,
                bits=bits,
                block_size=block_size,
                strict=strict,
                fuse=fuse,
                ops=ops,
                memory_budget=bytes_of("--memory-budget", memory_budget),
                resume=resume,
                details=report is not None,
                progress=progress,
            )
    if model.is_dir():
        deliver_folder(result, report, json, quiet)
    else:
        deliver(result.report, report, json, quiet)


@app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        "onnxq validate model.onnx model.int8-static.onnx --data test.npz\n\n"
        "onnxq validate model.onnx small.onnx --data test.npz --ep openvino@venv/bin/python"
    ),
)
def validate(
    model: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model.")],
    quantized: Annotated[Path, typer.Argument(help="The model that was made from it.")],
    data: Data = None,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    state: States = None,
    group_by: GroupBy = None,
    samples: Annotated[
        int,
        typer.Option(min=1, metavar="N", rich_help_panel=RUN, help="Samples to use, at most."),
    ] = 64,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    custom_ops: CustomOps = None,
    metric: MetricName = "auto",
    target: TargetName = "cpu",
    ep: Places = None,
    allow_fallback: AllowFallback = False,
    report: ReportFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a quantized model with its float model: outputs, layers, size, latency.

    With --ep also on other execution providers: which nodes they run, where they first say
    something else than the CPU, and why. What does not run there is an error.
    """
    with working(not quiet) as progress:
        from onnxq import api

        check_file(report, model, quantized)
        found = api.validate(
            model,
            quantized,
            samples=data,
            preprocess=preprocess,
            states=state_pairs(state),
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            limit=samples,
            group_by=group_by,
            batch_size=batch_size,
            metric=metric,
            target=target,
            threads=threads,
            custom_ops=custom_ops or (),
            ep=ep or (),
            details=report is not None,
            progress=progress,
        )
    deliver(found, report, json, quiet)
    require_all({p.name: p.problem(allow_fallback) for p in found.providers})


@app.command(cls=Command, epilog="Example: onnxq inspect model.onnx --target cpu --form dynamic")
def inspect(
    model: Model,
    target: TargetName = "cpu",
    form: Annotated[
        Form,
        typer.Option(
            rich_help_panel=CHOICE,
            help="Ranges of activations calibrated on samples, or taken as they come.",
        ),
    ] = Form.static,
    custom_ops: CustomOps = None,
    json: Json = False,
) -> None:
    """Say what a model is made of, what a target could quantize, and why not the rest."""
    with working(True) as progress:
        from onnxq import api

        progress("inspect", 0, 1)
        found = api.inspect(model, target=target, form=form.value, custom_ops=custom_ops or ())
    if json:
        print_json(found.to_json(), found.warnings)
        return
    from onnxq import show

    show.show_inspection(found, form.value, show.output_console())


@app.command(
    cls=Command,
    epilog="Example: onnxq bench model.onnx model.int8-static.onnx --seconds 10",
)
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL",
            help="Models with the same inputs; the others are measured by the first.",
        ),
    ],
    data: Data = None,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    state: States = None,
    seconds: Annotated[
        float,
        typer.Option(min=0.1, metavar="S", rich_help_panel=RUN, help="Time per model, at most."),
    ] = 5.0,
    threads: Threads = None,
    custom_ops: CustomOps = None,
    json: Json = False,
) -> None:
    """Time models against each other, run by run in turns, and measure their peak memory."""
    with working(True) as progress:
        from onnxq import api

        progress("time the models", 0, 1)
        rows = api.bench(
            models,
            samples=data,
            preprocess=preprocess,
            states=state_pairs(state),
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            seconds=seconds,
            threads=threads,
            custom_ops=custom_ops or (),
        )
    if json:
        from json import dumps

        print_json(dumps(rows, indent=2), ())
        return
    from onnxq import show

    show.show_bench(rows, show.output_console())


app.command(cls=Command, epilog=cli_tuning.SENSITIVITY_EXAMPLES)(cli_tuning.sensitivity)
app.command(cls=Command, epilog=cli_tuning.TUNE_EXAMPLES)(cli_tuning.tune)
app.command(cls=Command, epilog=cli_devices.CHECK_EXAMPLES)(cli_devices.check)
app.command(cls=Command, epilog=cli_deploy.EXAMPLES)(cli_deploy.deploy)
app.command(cls=Command, epilog=cli_probe.EXAMPLES)(cli_probe.probe)
app.command(cls=Command, epilog=cli_look.REPORT_EXAMPLES)(cli_look.report)
app.command(cls=Command, epilog=cli_look.DIFF_EXAMPLES)(cli_look.diff)


@app.command(
    cls=Command,
    epilog=(
        "Examples:\n\n"
        "onnxq export Qwen/Qwen2.5-0.5B qwen-onnx\n\n"
        "onnxq export ./my-bert bert-onnx --task feature-extraction"
    ),
)
def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder of transformers, or a name on the Hub."),
    ],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default="that of the architecture",
            help="As optimum names it: text-generation-with-past, feature-extraction, …",
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(min=11, metavar="N", show_default="optimum's own", help="The ONNX opset."),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the code that comes with the model."),
    ] = False,
) -> None:
    """Export a Hugging Face model to a folder of ONNX files, which quantize takes.

    Needs the extra hf: pip install 'onnxq[hf]'.
    """
    with working(True) as progress:
        from onnxq.export import export as run

        progress("export", 0, 1)
        made = run(model, output, task=task, opset=opset, trust_remote_code=trust_remote_code)
    typer.echo(f"wrote {made}: {', '.join(sorted(p.name for p in made.glob('*.onnx')))}")


@app.command(cls=Command, epilog="Example: onnxq ops --json")
def ops(json: Json = False) -> None:
    """Say whether onnxq's own operators have their library here, and what it was built for."""
    from onnxq.ops import OPERATORS
    from onnxq.ops.library import MISSING, build, find_library

    path = find_library()
    known = build() if path else None
    if json:
        from dataclasses import asdict
        from json import dumps

        about = {"library": str(path) if path else None, "operators": list(OPERATORS)}
        typer.echo(dumps(about | (asdict(known) if known else {}), indent=2))
        return
    typer.echo(f"operators: {', '.join(OPERATORS)}")
    if known is None:
        typer.echo(MISSING)
        return
    typer.echo(f"library: {path}")
    typer.echo(f"built by {known.compiler} for: {', '.join(known.built)}")
    typer.echo(f"this CPU uses: {known.used}")


# ── catalogues ───────────────────────────────────────────────────────────────────────────────────


def _catalogue(
    name: str, what: str, listing: Callable[[], None], showing: Callable[[str], None], example: str
) -> None:
    """The command group `onnxq NAME [list | show NAME]`."""
    epilog = f"Example: {example}"
    group = typer.Typer(cls=Catalogue, help=f"List the {name}, or show one: {what}.", epilog=epilog)
    app.add_typer(group, name=name)

    @group.command("list", cls=Command, help=f"List the {name}.")
    def _list() -> None:
        listing()

    @group.command("show", cls=Command, help=f"Show one of the {name}.", epilog=epilog)
    def _show(wanted: Name) -> None:
        showing(wanted)


def _list_presets() -> None:
    import tomllib

    from onnxq.recipe import preset_names, preset_text

    _print_names([(n, tomllib.loads(preset_text(n))["summary"]) for n in preset_names()])


def _show_preset(name: str) -> None:
    from onnxq.recipe import preset_text

    typer.echo(preset_text(name), nl=False)


def _list_targets() -> None:
    from onnxq.target import load_target, target_names

    _print_names([(name, load_target(name).summary) for name in target_names()])


def _show_target(name: str) -> None:
    from onnxq.ops.library import MISSING, find_library
    from onnxq.target import detect, load_target, target_text

    name = detect() if name == "auto" else name
    if name.endswith(".toml"):
        load_target(name)  # says what is wrong with it
        typer.echo(Path(name).read_text("utf-8"), nl=False)
        return
    typer.echo(target_text(name), nl=False)
    if load_target(name).is_cpu and find_library() is None:
        typer.echo(f"# operators of onnxq's own (--ops): {MISSING}")


def _list_passes() -> None:
    from onnxq.recipe import load_pass, pass_types

    def summary(name: str) -> str:
        try:
            return (load_pass(name).__doc__ or "").strip().split("\n")[0]
        except Exception as error:  # one that somebody else wrote must not hide the others
            return f"cannot be imported: {type(error).__name__}: {error}"

    _print_names([(name, summary(name)) for name in pass_types()])


def _show_pass(name: str) -> None:
    from dataclasses import fields
    from inspect import getdoc
    from typing import get_type_hints

    from onnxq import show
    from onnxq.recipe import load_pass

    kind = load_pass(name)
    kinds = get_type_hints(kind)
    rows = [(f.name, _type_text(kinds[f.name]), _value_text(f.default)) for f in fields(kind)]
    show.show_pass(name, getdoc(kind) or "", rows, show.output_console())


_catalogue(
    "presets",
    "recipes that ship with onnxq",
    _list_presets,
    _show_preset,
    "onnxq presets show int8-static > mine.toml",
)
_catalogue(
    "passes",
    "the steps that recipes are made of, and their fields",
    _list_passes,
    _show_pass,
    "onnxq passes show calibrate",
)
_catalogue(
    "targets",
    "what a device runs in integers, and how we know",
    _list_targets,
    _show_target,
    "onnxq targets show cpu",
)


def _print_names(rows: list[tuple[str, str]]) -> None:
    from onnxq import show

    show.show_names(rows, show.output_console())


def _type_text(kind: Any) -> str:
    """A field's type as a user writes it: the choices where it is one of a few."""
    from typing import Literal, get_args, get_origin

    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"list of {_type_text(get_args(kind)[0])}"
    return str(kind) if get_origin(kind) else str(getattr(kind, "__name__", kind))


def _value_text(value: Any) -> str:
    from dataclasses import MISSING

    if isinstance(value, tuple):
        return repr(list(value))
    return "required" if value is MISSING else str(value)


if __name__ == "__main__":
    main()
