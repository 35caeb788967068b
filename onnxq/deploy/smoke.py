"""A sample, the answer expected of it, and how far another machine's answer may be from that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.feeds import Feed
from onnxq.float_operators import float_operators
from onnxq.runtime import Ends, Session

Array = NDArray[Any]

STEPS = 4  # of 8 bits over an output's range: a code here and there may round the other way
_CARRIED = "fiubU"  # kinds of arrays that a .npy file holds for any reader


@dataclass(frozen=True)
class Smoke:
    """`inputs` and `outputs` by name, as the model itself takes and makes them: codes are codes.

    `tolerance` is the largest difference allowed of any number of an output; `rule` says in words
    where it comes from.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    tolerance: Mapping[str, float]
    rule: str

    def write(self, folder: Path) -> None:
        """A .npy file for each array, and `smoke.json`, which lists them."""
        folder.mkdir()
        inputs = [
            _saved(folder, f"input-{index}.npy", name, array)
            for index, (name, array) in enumerate(self.inputs.items())
        ]
        outputs = [
            _saved(folder, f"expected-{index}.npy", name, array)
            | {"tolerance": self.tolerance[name]}
            for index, (name, array) in enumerate(self.outputs.items())
        ]
        table = {"inputs": inputs, "outputs": outputs, "rule": self.rule}
        (folder / "smoke.json").write_text(json.dumps(table, indent=2) + "\n", "utf-8")


def make_smoke(model: onnx.ModelProto, path: Path, sample: Feed, threads: int | None) -> Smoke:
    """What the model at `path` says of a sample here, on the CPU.

    Raises OnnxqError for inputs and outputs that no .npy file can hold.
    """
    feed = Ends.of_model(model).codes(sample)
    said = _said(path, feed, True, threads)
    if not float_operators(model):
        rule = "the model computes with integers alone: every bit must be the same"
        return Smoke(feed, said, dict.fromkeys(said, 0.0), rule)
    others = [
        _said(path, feed, False, threads),
        _said(path, {name: nudged(array) for name, array in feed.items()}, True, threads),
    ]
    tolerance = {name: allowed(array, [o[name] for o in others]) for name, array in said.items()}
    rule = (
        "twice what the runtime's optimizations, or another last digit of the inputs, change where "
        f"this was made, and {STEPS} steps of 8 bits over the output's range at least"
    )
    return Smoke(feed, said, tolerance, rule)


def nudged(array: Array) -> Array:
    """With another last digit, as sums in another order have: what rounds to a code may then round
    to its neighbour."""
    if array.dtype.kind != "f":
        return array
    signs = np.random.default_rng(0).choice([-1.0, 1.0], array.shape)
    return (array * (1 + 4 * np.finfo(array.dtype).eps * signs)).astype(array.dtype)


def allowed(said: Array, others: Sequence[Array]) -> float:
    """The largest difference that another machine may make, from the answer here and others of the
    same right. What is no float must be the same."""
    if said.dtype.kind != "f" or not said.size:
        return 0.0
    seen = said.astype(np.float64)
    finite = np.isfinite([seen, *others]).all(0)
    if not finite.any():
        return 0.0
    width = max(float(np.ptp(seen[finite])), float(np.abs(seen[finite]).max()))
    changes = [float(np.abs(seen - other)[finite].max()) for other in others]
    return max(2 * max(changes), STEPS * width / 255)


def _said(
    path: Path, feed: Mapping[str, Array], optimize: bool, threads: int | None
) -> dict[str, Array]:
    session = Session(path, optimize=optimize, threads=threads)
    answers = dict(zip(session.outputs, session.ort.run(session.outputs, dict(feed)), strict=True))
    for name, array in answers.items():
        if isinstance(array, np.ndarray) and array.dtype == object:
            answers[name] = np.asarray(array, str)
    return answers


def _saved(folder: Path, file: str, name: str, array: Any) -> dict[str, Any]:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in _CARRIED:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise OnnxqError(f"{name!r} is {kind}, which a smoke test has no file for")
    np.save(folder / file, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)
    return {"name": name, "file": file, "type": str(array.dtype), "shape": list(array.shape)}
