"""What every call asks of its input, and says of where it ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnx

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.passes.solve.assign import HEAVY
from onnxq.runtime import custom_ops as registered
from onnxq.samples import input_specs
from onnxq.storage import data_files, data_paths, file_hash, load_proto
from onnxq.target import cpu_name

Source = Any  # a path, "module:function", a dict of arrays, a list of feeds, an iterable, None
P = ParamSpec("P")
R = TypeVar("R")


def with_custom_ops(function: Callable[P, R]) -> Callable[P, R]:
    """Its keyword `custom_ops` lists libraries that every session it makes will know."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        libraries: Any = kwargs.get("custom_ops", ())
        with registered(libraries):
            return function(*args, **kwargs)

    return run


def existing(path: str | Path) -> Path:
    load_proto(path)
    return Path(path)


def check_paths(model: Path, output: Path) -> None:
    folder = output.absolute().parent
    if not model.exists():
        raise OnnxqError(f"there is no model {str(model)!r}")
    if output.is_dir():
        raise OnnxqError(f"the output {str(output)!r} is a folder; name a file")
    if not folder.is_dir():
        raise OnnxqError(f"there is no folder {str(folder)!r} to write to; make it first")
    if not os.access(folder, os.W_OK):
        raise OnnxqError(f"the folder {str(folder)!r} cannot be written to")
    if output.exists() and output.samefile(model):
        raise OnnxqError("the output would replace the input; choose another --output")
    inputs = data_paths(model)
    replaced = [place for place in (output, *data_files(output)) if place.exists()]
    if any(place.samefile(data) for place in replaced for data in inputs):
        raise OnnxqError("the output would replace the input's data; choose another --output")


def check_inputs(model: onnx.ModelProto) -> None:
    if not input_specs(model):
        raise OnnxqError("the model has no inputs: its answer is a constant, which no sample moves")


def check_weights(graph: g.Graph) -> None:
    """That no weight is NaN or infinite: no scale could hold it. A mask elsewhere may be."""
    for node in g.walk(graph):
        if node.op not in HEAVY or not g.is_standard(node):
            continue
        for tensor in node.inputs:
            maker = g.producer(tensor)
            held = maker.attrs.get("value") if maker and maker.op == "Constant" else tensor
            if not g.is_constant(held) or not g.is_float(held):
                continue
            values = np.atleast_1d(g.values(held))
            with np.errstate(over="ignore", invalid="ignore"):
                if np.isfinite(values.sum(dtype=values.dtype)):
                    continue
            step = max(1, (1 << 22) * len(values) // max(1, values.size))  # rows at a time
            for start in range(0, len(values), step):
                wrong = np.argwhere(~np.isfinite(values[start : start + step]))
                if len(wrong):
                    at = (wrong[0] + [start, *[0] * (values.ndim - 1)]).tolist()
                    label = node.name or node.outputs[0].name
                    raise OnnxqError(
                        f"weight {tensor.name!r} of node {label!r} ({node.op}) holds "
                        f"{values[tuple(at)]} at {at}; weights must be finite: repair the model"
                    )


def environment(path: Path, seed: int) -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("onnxq", "onnx", "onnxruntime", "numpy")}
    return versions | {
        "model_sha256": file_hash(path),
        "seed": str(seed),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
    }
