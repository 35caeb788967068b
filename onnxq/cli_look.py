"""The commands that look at what was made: the report page, the difference of two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.errors import OnnxqError
from onnxq.options import OUT, Json, check_file, is_page, print_json, working, write_text

REPORT_EXAMPLES = (
    "Examples:\n\n"
    "onnxq report run.json -o run.html\n\n"
    "onnxq report int8.json int4.json -o compared.html"
)
DIFF_EXAMPLES = "Example: onnxq diff model.onnx model.int8-static.onnx"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN.json...",
            help="What --report wrote; several are laid side by side.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.html",
            rich_help_panel=OUT,
            show_default="RUN.html beside the first",
            help="Where the page goes.",
        ),
    ] = None,
) -> None:
    """Make a page to look at of saved reports: one file that opens anywhere, offline.

    Needs the extra report: pip install 'onnxq[report]'.
    """
    place = output or runs[0].with_suffix(".html")
    if not is_page(place):
        raise OnnxqError(f"a page ends in .html, unlike {str(place)!r}")
    if place.absolute() in [run.absolute() for run in runs]:
        raise OnnxqError(f"the page would replace {str(place)!r}; choose another --output")
    with working(True) as progress:
        from onnxq.page import page, read_runs

        check_file(place)
        progress("make the page", 0, 1)
        write_text(place, page(read_runs(runs)))
    typer.echo(f"wrote {place}")


def diff(
    before: Annotated[Path, typer.Argument(metavar="A.onnx", help="A model.")],
    after: Annotated[Path, typer.Argument(metavar="B.onnx", help="What it became, or another.")],
    json: Json = False,
) -> None:
    """Say how two models differ in structure: operators, types, parameters, what was fused."""
    with working(True) as progress:
        from onnxq.diff import diff as compare

        progress("compare the models", 0, 1)
        found = compare(before, after)
    if json:
        print_json(found.to_json(), ())
        return
    from onnxq import show, show_diff

    show_diff.show_diff(found, show.output_console())
