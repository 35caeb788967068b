"""The command that makes folders that are ready to ship."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from onnxq.errors import OnnxqError
from onnxq.options import (
    MAX_TOKENS,
    OUT,
    CustomOps,
    Data,
    Json,
    MaxTokens,
    Preprocess,
    Seed,
    States,
    Tokenizer,
    print_json,
    state_pairs,
    working,
)

EXAMPLES = (
    "Examples:\n\n"
    "onnxq deploy model.int8-static.onnx --for mobile --data samples.npz\n\n"
    "onnxq deploy model.int8-static.onnx --for web --runtime node_modules/onnxruntime-web/dist\n\n"
    "onnxq deploy model.int8-static.onnx --for qnn --ep qnn@/opt/qnn/bin/python -o phone"
)
DEVICE = "The device"


class Kind(StrEnum):
    """What the folder is for."""

    mobile = "mobile"
    web = "web"
    edge_linux = "edge-linux"
    qnn = "qnn"


def deploy(
    model: Annotated[
        Path, typer.Argument(help="The ONNX model, quantized or not.", show_default=False)
    ],
    kind: Annotated[
        Kind,
        typer.Option(
            "--for", rich_help_panel=DEVICE, show_default=False, help="What runs the model."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            rich_help_panel=OUT,
            show_default="MODEL-KIND beside the model",
            help="The folder to make; it may exist if it is empty.",
        ),
    ] = None,
    ep: Annotated[
        str | None,
        typer.Option(
            "--ep",
            metavar="qnn@PYTHON",
            rich_help_panel=DEVICE,
            show_default=False,
            help="For qnn: a Python that has onnxruntime-qnn, which compiles the model here.",
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--ep-option",
            metavar="KEY=VALUE",
            rich_help_panel=DEVICE,
            show_default=False,
            help="An option of the provider itself, such as soc_model=57: the chip that qnn "
            "compiles for. Can be repeated.",
        ),
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(
            "--runtime",
            metavar="FOLDER",
            rich_help_panel=DEVICE,
            show_default="jsdelivr.net, when the page is opened",
            help="For web: the dist folder of onnxruntime-web, which the page then carries.",
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=DEVICE,
            help="Threads of the session; 0 leaves it to the runtime.",
        ),
    ] = 0,
    data: Data = None,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    state: States = None,
    seed: Seed = 0,
    custom_ops: CustomOps = None,
    json: Json = False,
) -> None:
    """Write a folder that is ready to ship: the model, how to run it, and a test that it does.

    The test's sample is the first of --data. It has passed before the folder is there, wherever
    what runs it is at hand.
    """
    with working(True) as progress:
        from onnxq.deploy import deploy as run
        from onnxq.devices import Place

        pairs = dict(map(_pair, options or ()))
        if ep is not None and kind is not Kind.qnn:
            raise OnnxqError("--ep is for qnn, which is compiled where its provider is")
        if runtime is not None and kind is not Kind.web:
            raise OnnxqError("--runtime is for web, whose page carries it")
        made = run(
            model,
            kind.value,
            output,
            samples=data,
            preprocess=preprocess,
            states=state_pairs(state),
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            seed=seed,
            threads=threads,
            custom_ops=custom_ops or (),
            place=Place.parse(ep, pairs) if ep is not None else None,
            options=pairs,
            runtime=runtime,
            progress=progress,
        )
    if json:
        print_json(made.to_json(), ())
        return
    from onnxq import show, show_devices

    show_devices.show_deployment(made, show.output_console())


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise OnnxqError(f"--ep-option {text}: give a key and a value as KEY=VALUE")
    return key, value
