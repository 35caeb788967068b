"""For a small computer with Linux: the model as it is, and Python and C++ that run it."""

from __future__ import annotations

import sys
from pathlib import Path

from onnxq.deploy.base import Made, Source, copy_model, fill, session_options, text_of
from onnxq.deploy.smoke import Smoke


def edge_linux(source: Source, smoke: Smoke, folder: Path) -> Made:
    """The model as it is, and Python and C++ that run it."""
    session = session_options(source, folder, "CPUExecutionProvider")
    model = copy_model(source, folder)
    names = {"model": model, "threads": str(session.threads)}
    fill(folder, "session.py", **names, settings=session.code("py"))
    fill(folder, "session.cpp", **names, settings=session.code("cpp"))
    fill(folder, "smoke_test.py", needs="onnxruntime and NumPy")
    fill(folder, "edge-linux/run.py")
    return Made(model, session, smoke, text_of("edge-linux/README.md"), (sys.executable,))
