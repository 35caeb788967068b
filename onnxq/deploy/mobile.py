"""For phones: ORT format, the operators that a reduced build needs, Kotlin and Swift."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort

from onnxq.deploy.base import Made, Source, fill, session_options, text_of
from onnxq.deploy.options import SessionOptions
from onnxq.deploy.smoke import Smoke
from onnxq.errors import OnnxqError, one_line
from onnxq.storage import model_size
from onnxq.tables import quantity

_GROWN = 1.2  # times the bytes of the ONNX file, from which the README tells why


def mobile(source: Source, smoke: Smoke, folder: Path) -> Made:
    """ORT format, the operators that a reduced build needs, Kotlin and Swift."""
    resting = {"session.intra_op.allow_spinning": "0"}  # threads that wait drain no battery
    given = replace(source, config=resting | dict(source.config))
    session = session_options(given, folder, "CPUExecutionProvider")
    model = "model.ort"
    write_ort(source.path, folder / model, session)
    write_operators(folder / model, folder / "required_operators.config")
    names = {
        "model": model,
        "stem": "model",
        "suffix": "ort",
        "threads": str(session.threads),
        "inputs": ", ".join(map(str, source.inputs)),
        "outputs": ", ".join(map(str, source.outputs)),
        "output_names": ", ".join(json.dumps(value.name) for value in source.model.graph.output),
    }
    fill(folder, "session.py", **names, settings=session.code("py"))
    fill(folder, "mobile/android/OnnxModel.kt", **names, settings=session.code("kt"))
    fill(folder, "mobile/ios/OnnxModel.swift", **names, settings=session.code("swift"))
    fill(folder, "smoke_test.py", needs="onnxruntime and NumPy")
    use = text_of("mobile/README.md", model=model, version=ort.__version__)
    return Made(
        model, session, smoke, use, (sys.executable,), notes=_growth(source, folder / model)
    )


def _growth(source: Source, made: Path) -> tuple[str, ...]:
    before, after = model_size(source.path), made.stat().st_size
    if after < _GROWN * before:
        return ()
    return (
        f"The ORT format takes {quantity(after, 'B')}, the ONNX file {quantity(before, 'B')}: "
        "constants that a session computes when it starts are computed ahead.",
    )


def write_ort(model: Path, place: Path, session: SessionOptions) -> None:
    """The model in ORT format, optimized ahead for ARM.

    As onnxruntime's own converter does for such a device: no blocked layout of channels, which is
    that of x86, and 8-bit signed activations stay signed. Raises OnnxqError where it is refused.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(place)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    for library in session.custom_ops:
        options.register_custom_ops_library(str(place.parent / library))
    try:
        ort.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"],
            disabled_optimizers=["NchwcTransformer"],
        )  # fmt: skip
    except Exception as error:
        raise OnnxqError(f"onnxruntime writes no ORT format of it: {one_line(error)}") from None


def write_operators(model: Path, place: Path) -> None:
    """The operators and types that a reduced build of onnxruntime needs for an .ort file."""
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    create_config_from_models([model], place, enable_type_reduction=True)
    lines = place.read_text("utf-8").splitlines()
    named = [f"# - {model.name}" if line.startswith("# - ") else line for line in lines]
    place.write_text("\n".join(named) + "\n", "utf-8")
