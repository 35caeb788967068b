"""onnxq quantizes ONNX models and proves the result by running it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.api import bench, inspect, quantize, validate
    from onnxq.codebook import CodebookTensor
    from onnxq.devices.check import check
    from onnxq.diff import diff
    from onnxq.errors import OnnxqError
    from onnxq.folder import quantize_folder
    from onnxq.pipeline import Context, Pass, Pipeline, Result
    from onnxq.qtype import QParams, QTensor, QType
    from onnxq.recipe import load_recipe
    from onnxq.report import Report
    from onnxq.target import load_target
    from onnxq.tuning.sensitivity import sensitivity
    from onnxq.tuning.tuner import tune

_HOMES = {
    "api": ("bench", "inspect", "quantize", "validate"),
    "codebook": ("CodebookTensor",),
    "devices.check": ("check",),
    "diff": ("diff",),
    "errors": ("OnnxqError",),
    "folder": ("quantize_folder",),
    "pipeline": ("Context", "Pass", "Pipeline", "Result"),
    "qtype": ("QParams", "QTensor", "QType"),
    "recipe": ("load_recipe",),
    "report": ("Report",),
    "tuning.sensitivity": ("sensitivity",),
    "target": ("load_target",),
    "tuning.tuner": ("tune",),
}
_HOME = {name: f"onnxq.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [
    "CodebookTensor",
    "Context",
    "OnnxqError",
    "Pass",
    "Pipeline",
    "QParams",
    "QTensor",
    "QType",
    "Report",
    "Result",
    "bench",
    "check",
    "diff",
    "inspect",
    "load_recipe",
    "load_target",
    "quantize",
    "quantize_folder",
    "sensitivity",
    "tune",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `onnxq --help` should not load a runtime."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
