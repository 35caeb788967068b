"""For a small computer with Linux: the model as it is, and Python and C++ that run it."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from onnxq.deploy.base import Made, Source, copy_model, fill, session_options, text_of
from onnxq.deploy.smoke import Smoke
from onnxq.ops.library import FILE
from onnxq.runtime import names_operators


def edge_linux(source: Source, smoke: Smoke, folder: Path) -> Made:
    """The model as it is, and Python and C++ that run it."""
    session = session_options(source, folder, "CPUExecutionProvider")
    model = copy_model(source, folder)
    names = {"model": model, "threads": str(session.threads)}
    fill(folder, "session.py", **names, settings=session.code("py"))
    fill(folder, "session.cpp", **names, settings=session.code("cpp"))
    fill(folder, "smoke_test.py", needs="onnxruntime and NumPy")
    fill(folder, "edge-linux/run.py")
    use = text_of("edge-linux/README.md")
    return Made(model, session, smoke, use, (sys.executable,), notes=_kernels(source))


def _kernels(source: Source) -> tuple[str, ...]:
    if not names_operators(source.model):
        return ()
    return (
        f"`{FILE}` was built for {platform.system()} on {platform.machine()}. For another machine "
        "take that of an onnxq installed there, or leave out the lines that register it: the model "
        "then computes the same by standard operators, slowly.",
    )
