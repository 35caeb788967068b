"""The first layer where a provider says something else than the CPU, and why.

Errors add up from layer to layer, so layers are tried one by one: each is cut out and given the
CPU's own codes, once alone and once together with the layers that it reads, for what a provider
fuses. A layer that differs is then computed in exact numbers, and one thing after another that
a provider might have done is done to it, until the provider's codes come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.devices.exact import evaluate, operands
from onnxq.devices.hypotheses import Exact, half_to_even, requantizations
from onnxq.devices.pieces import Pieces
from onnxq.devices.place import Job, Place, ask
from onnxq.devices.products import products
from onnxq.report import DisagreementRecord
from onnxq.runtime import CPU, Ends

Array = NDArray[Any]
Feed = Mapping[str, Array]
AT_ONCE = 8  # layers that are tried in one process
TIES = 1e-3  # the share of codes that may fall to the other side of a tie
CLOSE = 1e-4  # of the largest value: floats that differ by less are equal but for their last bits
NEAR = 1e-3  # steps from a tie, more than sums in float32 are off
ALL = 0.99  # the share of the differences that has to be given where one might have other causes


def first_disagreement(
    model: str | Path | onnx.ModelProto,
    feed: Feed,
    place: Place,
    *,
    custom_ops: Sequence[str | Path] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DisagreementRecord | None:
    """The first layer that a place computes otherwise than the CPU here, on one sample.

    A layer where a few codes fall to the other side of a tie is named only where no other differs.
    None where all say the same, and where no layer can be cut out.
    """
    pieces = Pieces(g.load(model, operators=place.provider == CPU))
    said = _everything(pieces, feed, custom_ops)
    if said is None:
        return None
    ties: DisagreementRecord | None = None
    for start in range(0, len(pieces.names), AT_ONCE):
        progress(start, len(pieces.names))
        names = pieces.names[start : start + AT_ONCE]
        for name, trials in _tried(pieces, names, said, place, custom_ops):
            found = [(t, f) for t in trials if (f := _measured(t, pieces, said[name])).share]
            if len(found) < len(trials) and not (found and found[0][0].deeper):
                continue  # what the layer says alone, it does not say among others
            for trial, record in found:
                record.why, record.explained = _why(trial, pieces, said)
                if trial.deeper and record.explained < ALL:
                    continue  # what the layers before it said, handed on
                if record.share > TIES or record.largest > 1 or trial.deeper:
                    return record
                ties = ties or record
    return ties


def _everything(
    pieces: Pieces, feed: Feed, custom_ops: Sequence[str | Path]
) -> dict[str, Array] | None:
    """What the CPU here makes of the sample: the ends of all layers, and the sample itself."""
    model = g.to_proto(pieces.graph)
    taken = Ends.of_model(model).codes(feed)
    del model.metadata_props[:]  # which may say that outputs stand for other numbers
    shown = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in pieces.names if n not in shown)
    (answer,) = ask(Place.parse("cpu"), [Job(model, [taken], custom_ops=custom_ops)])
    return None if answer.error else {**taken, **answer.outputs[0]}


@dataclass(frozen=True)
class _Trial:
    """A layer as a model of its own, `deeper`: with those that it reads, and what a place said."""

    name: str
    deeper: bool
    model: onnx.ModelProto
    got: Array


def _tried(
    pieces: Pieces,
    names: list[str],
    said: Mapping[str, Array],
    place: Place,
    custom_ops: Sequence[str | Path],
) -> Iterator[tuple[str, list[_Trial]]]:
    """What a place makes of each layer, alone and with those before it, where it runs them."""
    tries = [
        (name, deeper, pieces.model(name, said, deeper))
        for name in names
        for deeper in (False, True)
        if not deeper or pieces.feeds(name) != pieces.feeds(name, True)
    ]
    jobs = [
        Job(model, [{n: said[n] for n in pieces.feeds(name, deeper)}], custom_ops=custom_ops)
        for name, deeper, model in tries
    ]
    answers = list(zip(tries, ask(place, jobs), strict=True))
    for wanted in names:
        yield (
            wanted,
            [
                _Trial(name, deeper, model, answer.outputs[0][name])
                for (name, deeper, model), answer in answers
                if name == wanted and not answer.error
            ],
        )


def _measured(trial: _Trial, pieces: Pieces, expected: Array) -> DisagreementRecord:
    """How far a layer is off: of codes in steps, of floats in parts of the largest value."""
    difference = np.abs(np.asarray(trial.got, np.float64) - np.asarray(expected, np.float64))
    codes = expected.dtype.kind in "iu"
    if not codes:
        difference /= float(np.abs(expected).max(initial=0)) or 1.0
        difference[difference < CLOSE] = 0
    return DisagreementRecord(
        layer=pieces.label(trial.name),
        operators=pieces.operators(trial.name),
        unit="step" if codes else "of the largest value",
        share=float(np.mean(difference != 0)) if difference.size else 0.0,
        largest=float(difference.max(initial=0)),
    )


# ── why ──────────────────────────────────────────────────────────────────────────────────────────


def _why(trial: _Trial, pieces: Pieces, said: Feed) -> tuple[str, float]:
    """What best gives a provider's answer of a layer, and of what share of its differences."""
    reads = pieces.feeds(trial.name, trial.deeper)
    inside = [n for n in pieces.feeds(trial.name) if n not in reads]
    differing = int(np.count_nonzero(trial.got != said[trial.name]))
    best, fewest = "", differing / 2
    for what, answer in _suspects(trial, {n: said[n] for n in reads}, inside):
        wrong = int(np.count_nonzero(answer != trial.got))
        if wrong < fewest:
            best, fewest = what, wrong
    return best, 1 - fewest / differing if best else 0.0


def _suspects(trial: _Trial, feed: Feed, inside: list[str]) -> Iterator[tuple[str, Array]]:
    """What there may be to say of a layer, and the answer that it would make.

    `inside` are codes that a provider might never make, since it fuses the layers around them.
    """
    model, name, got = trial.model, trial.name, trial.got
    try:
        values = evaluate(model, feed)
    except Exception:  # an operator that onnx.reference does not know: nothing exact to hold it to
        return
    if inside:
        for unrounded in dict.fromkeys([*((n,) for n in inside), tuple(inside)]):
            what = f"fuses {', '.join(unrounded)} without rounding it to codes"
            yield what, evaluate(model, feed, unrounded=unrounded)[name]
        return
    if got.dtype.kind == "f":
        yield from _narrow_floats(got)
        return
    maker = next(node for node in model.graph.node if name in node.output)
    if maker.op_type == "QuantizeLinear":
        layer, sums = _layer(model, maker, values)
        yield from requantizations(layer)
        for what, other in sums:
            yield what, half_to_even(layer.with_sums(other))
        yield "falls to the other side of ties, as float32 does", _at_ties(layer, got)
    else:
        yield "computes integers of 64 bits in 32", evaluate(model, feed, narrow=True)[name]
    inputs = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in inputs:
            what = "takes the zero point of its input for zero"
            yield what, evaluate(model, feed, uncentred=node.output)[name]
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            yield "leaves the bias out", evaluate(model, feed, zeroed=node.input[2:])[name]


def _layer(
    model: onnx.ModelProto, maker: onnx.NodeProto, values: Feed
) -> tuple[Exact, Iterator[tuple[str, Array]]]:
    """A layer's exact result, and other sums that it might have."""
    x, scale, zero = operands(maker, values)
    limits = np.iinfo(zero.dtype)
    plain = Exact(x / scale, int(zero), limits.min, limits.max)
    found = products(model, values)
    (before,) = [n for n in model.graph.node if maker.input[0] in n.output] or [maker]
    if found is None or before.op_type not in ("Conv", "Gemm", "MatMul"):
        return plain, iter(())
    layer = replace(plain, sums=found.sums, multiplier=found.multiplier / float(scale))
    return layer, found.others()


def _at_ties(layer: Exact, got: Array) -> Array:
    """The exact codes, or a provider's where the exact result is as good as a tie and it gives one
    of the two neighbours.
    """
    below = np.floor(layer.steps)
    tied = np.abs(layer.steps - below - 0.5) < NEAR
    neighbour = (got == layer.codes(below)) | (got == layer.codes(below + 1))
    return np.where(tied & neighbour, got, half_to_even(layer))


def _narrow_floats(got: Array) -> Iterator[tuple[str, Array]]:
    for what, kind in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            yield f"gives numbers of {what}", got.astype(kind).astype(got.dtype)
