"""The places beside this CPU that `scripts/providers` made, for tests that run models there."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from onnxq.devices import Place

PROVIDERS = {"openvino": "openvino", "qnn": "qnn", "web": "cpu", "arm64": "cpu"}  # place: provider


def place(name: str) -> Place:
    """A place by name; skips the test, with the reason, where it could not be had."""
    root = Path(__file__).resolve().parent.parent / ".providers"
    folder = Path(os.environ.get("ONNXQ_PROVIDERS", root)) / name
    if not (folder / "python").exists():
        reason = folder / "reason"
        why = reason.read_text("utf-8").strip() if reason.exists() else "not made"
        pytest.skip(f"{name}: {why}; make it with scripts/providers {name}")
    return Place.parse(f"{PROVIDERS[name]}@{shlex.quote(str(folder / 'python'))}")
