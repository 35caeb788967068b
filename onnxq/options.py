"""What the commands share: how they fail, the options of several, how they print."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from onnxq.errors import OnnxqError

if TYPE_CHECKING:
    from onnxq.folder import FolderResult
    from onnxq.report import Report


class Command(TyperCommand):
    """A command that ends with one line on stderr when it cannot do what it was asked.

    With `onnxq --debug COMMAND` a traceback stands before it.
    """

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.find_root().params.get("debug"))
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except OnnxqError as error:
            raise failed(str(error), debug) from None
        except KeyboardInterrupt:
            raise stopped() from None
        except OSError as error:
            what = f"{error.strerror or error}: {error.filename or ''}"
            raise failed(what.rstrip(": "), debug) from None
        except MemoryError:
            raise failed("there is not enough memory for this model", debug) from None
        except Exception as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # hit a library while it loaded
                raise stopped() from None
            raise failed(
                f"unexpected {type(error).__name__}: {error} (a fault of onnxq: please report it "
                "with what `onnxq --debug COMMAND` prints)",
                debug,
            ) from None


def stopped() -> typer.Exit:
    typer.echo("onnxq: stopped; nothing was written", err=True)
    return typer.Exit(130)


def failed(message: str, debug: bool) -> typer.Exit:
    if debug:
        import traceback

        traceback.print_exc()
    typer.echo(f"onnxq: error: {' '.join(message.split())}", err=True)
    return typer.Exit(1)


# ── options ──────────────────────────────────────────────────────────────────────────────────────

RUN, CHOICE, OUT = "Samples and running", "What to quantize, and how", "Output"


Model = Annotated[Path, typer.Argument(help="The float ONNX model.", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        rich_help_panel=RUN,
        show_default=False,
        help="Samples: an .npz file with an array per model input, a sample per row; a folder of "
        ".npz files, a sample each; a folder of images, see --preprocess; a .txt file, of which a "
        "line is a sample, or a paragraph where blank lines part them; or module:function, which "
        "yields dicts of arrays. Without it, samples are made up from the model.",
    ),
]
BatchSize = Annotated[
    int, typer.Option(min=1, metavar="N", rich_help_panel=RUN, help="Samples per inference.")
]
Preprocess = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml",
        rich_help_panel=RUN,
        show_default="preprocess.toml in the folder",
        help="How a folder of images is prepared: resize, crop, scale, mean, std, color, layout.",
    ),
]
MAX_TOKENS = 256  # that of onnxq.text, which imports numpy
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=RUN,
        show_default="tokenizer.json beside the model",
        help="The tokenizer that makes tokens of a text file.",
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option(
        min=2,
        metavar="N",
        rich_help_panel=RUN,
        help="Tokens per sample of a text file; longer texts are cut.",
    ),
]
States = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        metavar="OUT=IN",
        rich_help_panel=RUN,
        show_default=False,
        help="The output OUT of one run is the input IN of the next: samples may leave IN out. "
        "Usual names are recognised. Can be repeated.",
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option(
        "--dim",
        metavar="NAME=N",
        rich_help_panel=RUN,
        show_default=False,
        help="Fix a named dimension of the inputs, such as batch=1 or sequence=128. Can be "
        "repeated.",
    ),
]
GroupBy = Annotated[
    str | None,
    typer.Option(
        "--group-by",
        metavar="WHAT",
        rich_help_panel=RUN,
        show_default=False,
        help="Show what each group of samples loses: an array of the .npz with an entry per "
        "sample, such as a label; folder for the sub-folders of images; or module:function, called "
        "with each feed for its group.",
    ),
]
MetricName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        rich_help_panel=CHOICE,
        show_default="by the outputs",
        help="kl, perplexity, top1, agreement, cosine, sqnr, or module:function: called with a "
        "list of {output: array}, one for each sample, it returns a number, higher for a better "
        "model.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", rich_help_panel=RUN, show_default="all cores", help="Threads to use."
    ),
]
Seed = Annotated[
    int,
    typer.Option(min=0, metavar="N", rich_help_panel=RUN, help="For all that is drawn at random."),
]
TargetName = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="NAME",
        rich_help_panel=CHOICE,
        help="What will run the model: a name from `onnxq targets`, auto for this machine, or a "
        ".toml file of your own.",
    ),
]
Preset = Annotated[
    str,
    typer.Option(metavar="NAME", rich_help_panel=CHOICE, help="A name from `onnxq presets`."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE.toml",
        rich_help_panel=CHOICE,
        show_default=False,
        help="A recipe of your own instead of a preset; begin with `onnxq presets show "
        "int8-static > mine.toml`.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PASS.FIELD=VALUE",
        rich_help_panel=CHOICE,
        show_default=False,
        help="Change one field of one pass of the recipe; can be repeated. `onnxq passes show "
        "PASS` lists the fields.",
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=CHOICE,
        show_default="the preset's",
        help="Bits of a weight, for presets of weights alone: 2, 3, 4 or 8.",
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=CHOICE,
        show_default="the preset's",
        help="Neighbouring weights that share a scale, for the same presets: 16 to 256. Fewer are "
        "more accurate and take more bytes.",
    ),
]
Fuse = Annotated[
    bool,
    typer.Option(
        "--fuse",
        rich_help_panel=CHOICE,
        help="For presets in QDQ form: write the integer operators of ONNX Runtime itself instead, "
        "which is faster there than what it makes of QDQ.",
    ),
]
Ops = Annotated[
    bool,
    typer.Option(
        "--ops",
        rich_help_panel=CHOICE,
        help="For the presets nf4, int3 and int2: keep their codes in memory too, in operators of "
        "onnxq's own. Fast on a CPU that has onnxq's library (`onnxq ops`); any other runtime "
        "computes them with standard operators, slowly.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        rich_help_panel=CHOICE,
        help="For the preset integer-only: an operator that would stay float is an error.",
    ),
]
MemoryBudget = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=RUN,
        help="Memory for the statistics of layers, beside the float model: 512MB, 2GB. More are "
        "solved at a time.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        rich_help_panel=RUN,
        help="Go on after the last layer that an interrupted run of the same command had solved.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        rich_help_panel=CHOICE,
        show_default=False,
        help="Quantize these nodes only: a name or operator type, with wildcards (*, ?), or a "
        "regular expression after re:. Can be repeated.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        rich_help_panel=CHOICE,
        show_default=False,
        help="Leave these nodes float; patterns as for --include. Can be repeated.",
    ),
]
CustomOps = Annotated[
    list[Path] | None,
    typer.Option(
        "--custom-ops",
        metavar="LIB",
        rich_help_panel=RUN,
        show_default=False,
        help="A shared library of custom operators that the model uses; its code runs. Can be "
        "repeated.",
    ),
]
Places = Annotated[
    list[str] | None,
    typer.Option(
        "--ep",
        metavar="NAME[@PYTHON]",
        rich_help_panel=RUN,
        show_default=False,
        help="Run the quantized model on this execution provider too: cpu, openvino, qnn, cuda, …, "
        "of onnxq's own onnxruntime or of another Python, such as a virtual environment's. Can be "
        "repeated.",
    ),
]
AllowFallback = Annotated[
    bool,
    typer.Option(
        "--allow-fallback",
        rich_help_panel=RUN,
        help="With --ep: nodes that run on another provider are no error.",
    ),
]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        rich_help_panel=RUN,
        help="Measure anew what was measured before, and keep nothing. Else results are kept in "
        "$ONNXQ_CACHE, by default ~/.cache/onnxq.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUT, help="Print JSON and nothing else on stdout."),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        rich_help_panel=OUT,
        show_default=False,
        help="Write the whole report, every layer, to this file: a page to look at where it ends "
        "in .html (needs the extra report), JSON elsewhere. `onnxq report` makes a page of JSON.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", rich_help_panel=OUT, help="Print warnings and errors only."),
]


# ── printing ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def working(progress: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar, and stdout kept free of what libraries and users' functions print."""
    from onnxq.show import progress_bar

    with redirect_stdout(sys.stderr), progress_bar(progress) as report:
        yield report


def deliver(report: Report, path: Path | None, json: bool, quiet: bool) -> None:
    """The report where the user wants it."""
    from onnxq import show

    try:
        if path is not None:
            write_report(path, report.to_json(), Path(report.output or report.model).stem)
        if json:
            print_json(report.to_json(), report.warnings)
        elif quiet:
            print_warnings(report.warnings)
        else:
            show.show_report(report, show.output_console())
    except KeyboardInterrupt:  # by now something is written
        typer.echo("onnxq: stopped while reporting; the work was done", err=True)
        raise typer.Exit(130) from None


def deliver_folder(result: FolderResult, path: Path | None, json: bool, quiet: bool) -> None:
    """What came of a folder, where the user wants it."""
    from onnxq import show, show_folder

    if path is not None:
        write_report(path, result.to_json(), Path(result.output).name)
    if json:
        print_json(result.to_json(), result.warnings)
    elif quiet:
        print_warnings(result.warnings)
    else:
        show_folder.show_folder(result, show.output_console())


def is_page(path: Path) -> bool:
    return path.suffix.lower() in (".html", ".htm")


def write_report(path: Path, json: str, name: str) -> None:
    """What a command found, as JSON or as a page called `name`, by the file's ending."""
    if is_page(path):
        from onnxq.page import page, runs_in

        write_text(path, page(runs_in(json, name)))
    else:
        write_text(path, json + "\n")


def require_all(problems: Mapping[str, str]) -> None:
    """End with a line for each problem, by what has it, and exit code 1 if there is any."""
    wrong = {name: problem for name, problem in problems.items() if problem}
    for name, problem in wrong.items():
        typer.echo(f"onnxq: error: {name}: {problem}", err=True)
    if wrong:
        raise typer.Exit(1)


def print_json(text: str, warnings: Any) -> None:
    print_warnings(warnings)
    typer.echo(text)


def print_warnings(warnings: Any) -> None:
    for warning in warnings:
        typer.echo(f"onnxq: warning: {warning}", err=True)


def state_pairs(states: list[str] | None) -> dict[str, str]:
    """OUT=IN, as often as it is given, as {OUT: IN}."""
    pairs: dict[str, str] = {}
    for text in states or ():
        output, equals, name = text.partition("=")
        if not (output and equals and name):
            raise OnnxqError(f"--state {text}: give an output and an input as OUT=IN")
        if output in pairs:
            raise OnnxqError(f"--state {text}: {output!r} is paired already; give it once")
        pairs[output] = name
    return pairs


def fixed_dims(dims: list[str] | None) -> dict[str, int]:
    """NAME=N, as often as it is given, as {NAME: N}."""
    fixed: dict[str, int] = {}
    for text in dims or ():
        name, _, size = text.partition("=")
        if not (name and size.isdecimal()):
            raise OnnxqError(f"--dim {text}: give a name and a size, as in --dim batch=1")
        if name in fixed:
            raise OnnxqError(f"--dim {text}: {name!r} is fixed already; give it once")
        fixed[name] = int(size)
    return fixed


def bytes_of(option: str, text: str) -> int:
    """A size such as 512MB or 2GB, in bytes."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kMG]?)i?B\s*", text)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < 1e9:
        raise OnnxqError(f"{option} {text}: give a size as 512MB or 2GB")
    return int(number * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]])


def check_file(path: Path | None, *models: Path | None) -> None:
    """Refuse a report file that could not be written, or is one of the models, before any work."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OnnxqError(f"there is no folder {str(folder)!r} to write the report to")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise OnnxqError(f"the report {str(path)!r} cannot be written")
    if any(path.absolute() == model.absolute() for model in models if model is not None):
        raise OnnxqError("the report would replace a model; choose another --report")
    if is_page(path):
        from onnxq.page import require_libraries

        require_libraries()


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    from onnxq.scratch import scratch

    with scratch(path.parent) as folder:
        staged = folder / "report"
        staged.write_text(text, "utf-8")
        os.replace(staged, path)
