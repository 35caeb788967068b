"""The command that measures this device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxq.options import OUT, RUN, Json, NoCache, Quiet, Threads, print_json, working, write_text

EXAMPLES = (
    "Examples:\n\n"
    "onnxq probe -o mydevice.toml\n\n"
    "onnxq quantize model.onnx --data samples.npz --target ./mydevice.toml\n\n"
    "onnxq probe --ep cpu --ep openvino@/opt/openvino/bin/python -o mydevice.toml"
)


def probe(
    ep: Annotated[
        list[str] | None,
        typer.Option(
            "--ep",
            metavar="EP[@PYTHON]",
            rich_help_panel=RUN,
            show_default="all that onnxruntime has here",
            help="What to measure: openvino@/path/to/python for the provider of another Python. "
            "Can be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            rich_help_panel=OUT,
            help="The target to write, for quantize --target; of several providers each gets its "
            "own, FILE.PROVIDER.toml.",
        ),
    ] = Path("device.toml"),
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=RUN,
            show_default="the provider's, or else cpu",
            help="The target whose rules come first, and whose settings are kept.",
        ),
    ] = None,
    threads: Threads = None,
    no_cache: NoCache = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure on this device what runs, how exactly and how fast, and write it as a target."""
    with working(not quiet) as progress:
        from onnxq import cache
        from onnxq.devices.place import Place
        from onnxq.probing import default_places, paths_of, probe, to_json

        places = [Place.parse(text) for text in ep] if ep else default_places()
        files = paths_of(output, places)
        with cache.disabled(no_cache):
            found = [
                probe(place, base=base, threads=threads, progress=progress) for place in places
            ]
        for path, one in zip(files, found, strict=True):
            write_text(path, one.target)
    if json:
        print_json(to_json(found, files), ())
    elif not quiet:
        from onnxq import show, show_probe

        for path, one in zip(files, found, strict=True):
            show_probe.show_probe(one, path, show.output_console())
