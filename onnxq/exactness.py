"""The proof of integer arithmetic: the same bits however a model is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxq.coded_io import from_metadata
from onnxq.errors import OnnxqError
from onnxq.feeds import input_specs
from onnxq.ops.evaluate import evaluate
from onnxq.runtime import Session
from onnxq.storage import model_size
from onnxq.verify import Array, Feed

LARGEST = 1 << 29  # bytes of a model that is computed without the runtime


def check_exact(
    model: Path, feed: Feed, providers: Sequence[str], config: Mapping[str, str]
) -> list[str]:
    """What gave the same bits on one sample: the runtime in its ways, and integers of any size.

    The latter are computed in memory, of models that are not too large for it.
    Raises OnnxqError, naming the output and how the model was run, where something did not.
    """
    exact: dict[str, Array] = {}
    ways = ["optimizations off and on", "one thread and two"]
    if model_size(model) <= LARGEST:
        exact = _evaluated(onnx.load(model), feed)
        ways.append("integers of any size (NumPy)")
    for optimize in (False, True):
        for threads in (1, 2):
            session = Session(
                model, providers=providers, threads=threads, config=config, optimize=optimize
            )
            said = session.run(feed)
            exact = exact or said
            _compare(exact, said, optimize, threads)
    return ways


def _evaluated(model: onnx.ModelProto, feed: Feed) -> dict[str, Array]:
    """Outputs by exact arithmetic, as a Session gives them where inputs and outputs are codes."""
    coded = from_metadata({entry.key: entry.value for entry in model.metadata_props})
    types = {spec.name: spec.dtype for spec in input_specs(model)}
    given = {
        name: coded[name].codes(feed[name], dtype) if name in coded else feed[name]
        for name, dtype in types.items()
    }
    said = evaluate(model, given)
    return said | {name: coded[name].real(said[name]) for name in coded.keys() & said.keys()}


def _compare(
    exact: Mapping[str, Array], said: Mapping[str, Array], optimize: bool, threads: int
) -> None:
    for name, values in said.items():
        if not np.array_equal(values, exact[name]):
            how = f"graph optimizations {'on' if optimize else 'off'}, threads: {threads}"
            count = int(np.sum(values != exact[name]))
            raise OnnxqError(
                f"output {name!r} has other bits than integer arithmetic gives ({how}; {count} of "
                f"{values.size} values differ): a fault of the runtime or of onnxq; please report "
                "it with the model"
            )
