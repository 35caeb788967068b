"""The commands about the devices that models run on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.options import CHOICE, RUN, CustomOps, Json, print_json, working

CHECK_EXAMPLES = (
    "Examples:\n\n"
    "onnxq check model.int8-static.onnx --target qnn-htp\n\n"
    "onnxq check model.int8-static.onnx --target cpu --run\n\n"
    "onnxq check model.onnx --target openvino --ep openvino@/opt/openvino/bin/python"
)


def check(
    model: Annotated[
        Path, typer.Argument(help="The ONNX model, quantized or not.", show_default=False)
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=CHOICE,
            help="What will run the model: a name from `onnxq targets`, or a .toml file.",
        ),
    ] = "cpu",
    run: Annotated[
        bool,
        typer.Option(
            "--run",
            rich_help_panel=RUN,
            help="Load the model on the target's provider, and say what happened to each node.",
        ),
    ] = False,
    ep: Annotated[
        str | None,
        typer.Option(
            "--ep",
            metavar="EP[@PYTHON]",
            rich_help_panel=RUN,
            show_default="the target's, in this Python",
            help="Where to run it: openvino@/path/to/python for the provider of another Python.",
        ),
    ] = None,
    custom_ops: CustomOps = None,
    json: Json = False,
) -> None:
    """Say node by node what a target will not run, not fuse, or leave to the CPU, and the fix.

    The exit code is 1 if something will not run.
    """
    with working(True) as progress:
        from onnxq.devices.check import check as look

        found = look(
            model, target=target, run=run, ep=ep, custom_ops=custom_ops or (), progress=progress
        )
    if json:
        print_json(found.to_json(), found.warnings)
    else:
        from onnxq import show, show_devices

        show_devices.show_check(found, show.output_console())
    if found.error or not found.runs:
        raise typer.Exit(1)
