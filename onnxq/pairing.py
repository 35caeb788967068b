"""Which output of a model is which input of its next run: the states of streams, past and present.

A pair is declared (`--state OUT=IN`) or told by its names. Either way the data types and ranks of
output and input agree, and so do the sizes that both fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxq.errors import OnnxqError, suggest
from onnxq.feeds import InputSpec, Shape, may_carry, type_text

# What the name of an output becomes in the name of its input, the surest first.
_RENAMED = (
    (r"present_key_values", "past_key_values"),
    (r"present", "past_key_values"),
    (r"present", "past"),
    (r"[._]out(put)?$", "_in"),
    (r"[._]out(put)?$", "_input"),
    (r"[._]out(put)?$", ""),
    (r"out$", "in"),
    (r"[._]out(?=[._]?\d+$)", "_in"),
    (r"[._]out(?=[._]?\d+$)", ""),
    (r"^output[._]", "input_"),
    (r"^out(put)?[._]", "in_"),
    (r"^out(put)?[._]", ""),
    (r"[._](next|new|updated)$", ""),
    (r"[._](next|new|updated)$", "_prev"),
    (r"^(next|new|updated)[._]?", ""),
    (r"^(next|new|updated)[._]?", "prev_"),
    (r"^(next|new|updated)[._]?", "past_"),
    (r"final", "initial"),
    (r"N$", ""),
    (r"n$", "0"),
    (r"_?n$", ""),
)
_STATE_WORDS = r"past|cache|state|hidden|cell|mem|context|history|buffer"
_STATE_LETTERS = r"[hc][_.]?(0|x|in|t|prev)?"


@dataclass(frozen=True)
class Pair:
    """`output` of one run is `input` of the next.

    `axis` is the one along which the output is longer (past and present); None for a fixed shape.
    `sure` is False where only a common ending tells it, which data that pass through have too.
    """

    output: str
    input: InputSpec
    axis: int | None
    sure: bool


def find_pairs(
    inputs: Sequence[InputSpec], outputs: Sequence[InputSpec], declared: Mapping[str, str]
) -> list[Pair]:
    """The declared pairs {output: input} and those that the names tell, in the inputs' order.

    Raises OnnxqError for a declared name that the model lacks, a pair that does not fit, and an
    input that is declared twice.
    """
    found = _declared(inputs, outputs, declared)
    told = {
        name: output
        for name, output in _recognised(inputs, outputs).items()
        if name not in found and output not in found.values()
    }
    unsure = {name for name in told if not _is_state(name)}
    for dropped in (unsure, set(told)):  # something must be left for a sample to give
        fed = [spec for spec in inputs if spec.shape != () and spec.name not in {**found, **told}]
        if not fed:
            told = {name: output for name, output in told.items() if name not in dropped}
    both = found | told
    shapes = {spec.name: spec.shape for spec in outputs}
    batches = {s.shape[0] for s in inputs if s.shape and s.name not in both}
    return [
        Pair(both[spec.name], spec, axis, spec.name not in unsure)
        for spec in inputs
        if spec.name in both
        for axis in [_growing_axis(spec.shape, shapes[both[spec.name]], batches)]
    ]


def _declared(
    inputs: Sequence[InputSpec], outputs: Sequence[InputSpec], declared: Mapping[str, str]
) -> dict[str, str]:
    """{input: output}"""
    found: dict[str, str] = {}
    known: dict[Literal["output", "input"], dict[str, InputSpec]] = {
        "output": {spec.name: spec for spec in outputs},
        "input": {spec.name: spec for spec in inputs},
    }
    for pair in declared.items():
        for kind, name in zip(known, pair, strict=True):
            if name not in known[kind]:
                raise OnnxqError(
                    f"state {pair[0]}={pair[1]}: the model has no {kind} {name!r}"
                    f"{suggest(name, known[kind])}"
                )
        made, spec = known["output"][pair[0]], known["input"][pair[1]]
        if not may_carry(made, spec):
            raise OnnxqError(
                f"state {pair[0]}={pair[1]}: the output is {type_text(made.dtype, made.shape)} and "
                f"the input {type_text(spec.dtype, spec.shape)}; pair tensors of one type and shape"
            )
        if spec.name in found:
            raise OnnxqError(
                f"state {pair[0]}={pair[1]}: {spec.name!r} has {found[spec.name]!r} already; "
                "declare one output for each input"
            )
        found[spec.name] = made.name
    return found


def _recognised(inputs: Sequence[InputSpec], outputs: Sequence[InputSpec]) -> dict[str, str]:
    """{input: output}"""
    known = {spec.name: spec for spec in inputs if _may_be_state(spec)}
    found: dict[str, str] = {}
    for output in outputs:
        for name in _input_names(output.name):
            if name in known and name not in found and may_carry(output, known[name]):
                found[name] = output.name
                break
    return found


def _input_names(output: str) -> Iterator[str]:
    for pattern, replacement in _RENAMED:
        name, changes = re.subn(pattern, replacement, output, count=1)
        if changes:
            yield name


def _is_state(name: str) -> bool:
    lower = name.lower()
    return bool(re.search(_STATE_WORDS, lower) or re.fullmatch(_STATE_LETTERS, lower))


def _may_be_state(spec: InputSpec) -> bool:
    """Data that pass through a model have a namesake among the outputs too."""
    if _is_state(spec.name):
        return True
    shape = spec.shape or ()
    image = len(shape) == 4 and (shape[1] in (1, 3) or shape[3] in (1, 3))
    return bool(shape) and not image and np.dtype(spec.dtype).kind == "f"


def _growing_axis(
    shape: Shape | None, made: Shape | None, batches: set[int | str | None]
) -> int | None:
    """The axis of the time steps of a past: open, not the batch, and another in the output."""
    for axis, dim in enumerate(shape or ()):
        if not isinstance(dim, int) and not is_batch(shape or (), axis, batches):
            return None if dim is not None and made is not None and made[axis] == dim else axis
    return None


def is_batch(shape: Shape, axis: int, batches: set[int | str | None]) -> bool:
    """Whether an open dimension of a state is the batch; `batches` are first dimensions of data."""
    dim = shape[axis]
    if dim is None:  # recurrent layers have (layers, batch, width)
        return axis == 0 or (axis == 1 and len(shape) <= 3 and isinstance(shape[0], int))
    name = str(dim).lower()
    first = axis == 0 and not re.search(r"past|total|len|seq|time", name)
    return first or "batch" in name or dim in batches
