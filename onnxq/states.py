"""Samples of models with a state: what they leave out, the float model's own outputs fill in.

With s a state, f the model and x₀, x₁, … the feeds, the state of feed t is

    s₀ = 0,    sₜ = f(xₜ₋₁, sₜ₋₁)

A state of a fixed shape (audio streams) is carried from feed to feed: all samples are one stream.
A state that grows (past and present) begins anew, empty, with every sample, whose tokens are then
fed in two steps, the second with the past that the first made; one token a step where the model
fixes that. A state that a sample gives is taken as it is.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.feeds import Feed, InputSpec, input_specs, output_specs
from onnxq.pairing import Pair, find_pairs, is_batch
from onnxq.runtime import Session
from onnxq.samples import Samples
from onnxq.storage import data_paths, file_hash
from onnxq.tokens import Tokens


class States:
    """The states of one model.

    `specs` are its inputs as samples may give them: states may be left out, and tokens that the
    model takes one at a time may come as a sequence. `carry` makes whole feeds of such samples.
    """

    def __init__(
        self,
        model: str | Path | onnx.ModelProto,
        proto: onnx.ModelProto,
        declared: Mapping[str, str] | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """`model` is what is run, `proto` what is read. Raises OnnxqError for wrong `declared`."""
        self._model, self._threads = model, threads
        self._inputs = input_specs(proto)
        self.pairs = find_pairs(self._inputs, output_specs(proto), declared or {})
        self._names = {pair.input.name for pair in self.pairs}
        self._given = [spec for spec in self._inputs if spec.name not in self._names]
        grows = any(pair.axis is not None for pair in self.pairs)
        self._tokens = Tokens.find(self._given) if grows else None

    @property
    def specs(self) -> list[InputSpec]:
        return [
            replace(spec, optional=True)
            if spec.name in self._names
            else self._tokens.loosened(spec)
            if self._tokens
            else spec
            for spec in self._inputs
        ]

    @cached_property
    def model_identity(self) -> str:
        if isinstance(self._model, onnx.ModelProto):
            return hashlib.sha256(self._model.SerializeToString(deterministic=True)).hexdigest()
        path = Path(self._model)
        data = [(str(file), file.stat().st_mtime_ns) for file in sorted(data_paths(path))]
        return repr((file_hash(path), data))

    def carry(self, samples: Samples) -> Samples:
        """The samples with every state in its place; they themselves for a model without states.

        Raises OnnxqError where samples of one stream share a batch.
        """
        if not self.pairs:
            return samples
        left_out = [pair for pair in self.left_out(samples) if pair.axis is None]
        fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in self._given)
        if left_out and samples.batch > 1 and not fixed:
            raise OnnxqError(
                f"{samples.name}: the state {left_out[0].input.name!r} is carried from sample to "
                "sample, so they cannot share a batch; feed one at a time (--batch-size 1)"
            )
        return Samples(_Carried(samples, self), self._inputs, synthesised=samples.synthesised)

    def left_out(self, samples: Samples) -> list[Pair]:
        """Pairs whose input the first of the samples does not give."""
        first = next(iter(samples), {})
        return [pair for pair in self.pairs if pair.input.name not in first]

    @property
    def sure(self) -> set[str]:
        """Inputs that are states beyond doubt: made-up samples may leave them out."""
        return {pair.input.name for pair in self.pairs if pair.sure}

    @property
    def stream(self) -> bool:
        """Whether a state goes on from sample to sample."""
        return any(pair.axis is None for pair in self.pairs)

    # ── one sample ───────────────────────────────────────────────────────────────────────────────

    def steps(self, feed: Feed, where: str) -> list[Feed]:
        """What is fed for one sample, one after the other, states not yet filled in."""
        growing = [pair.input.name for pair in self.pairs if pair.axis is not None]
        left_out = [name for name in growing if name not in feed]
        if not left_out:
            return [feed]
        if len(left_out) < len(growing):
            given = next(name for name in growing if name in feed)
            raise OnnxqError(
                f"{where} gives {given!r} and leaves {left_out[0]!r} out; give all of the past or "
                "none"
            )
        if self._tokens is None:
            return [feed]
        steps = self._tokens.steps(feed, where)
        restart = {name: array for name, array in feed.items() if name in self._names}
        return [steps[0] | restart, *steps[1:]]

    # ── the states of a step ─────────────────────────────────────────────────────────────────────

    @cached_property
    def _session(self) -> Session:
        return Session(self._model, threads=self._threads)

    def completed(self, step: Feed, before: Feed | None, begins: bool, where: str) -> Feed:
        """A step with its states. `before` is the whole feed before it; a sample `begins` here."""
        missing = [pair for pair in self.pairs if pair.input.name not in step]
        carried = [p for p in missing if before is not None and not (begins and p.axis is not None)]
        made: dict[str, NDArray[Any]] = {}
        if before is not None and carried:
            try:
                made = self._session.run(before, [pair.output for pair in carried])
            except OnnxqError as error:
                raise OnnxqError(f"{where}, to carry its states on: {error}") from None
        whole = dict(step)
        for pair in missing:
            shape = self._shape(pair, step)
            if pair.output in made:
                whole[pair.input.name] = _fitting(made[pair.output], shape, pair, where)
            elif pair.input.shape is None:
                raise OnnxqError(
                    f"{where} leaves the state {pair.input.name!r} out, whose shape the model does "
                    "not declare; give its first value in the first sample"
                )
            else:
                zero = tuple(0 if dim is None else dim for dim in shape)
                whole[pair.input.name] = np.zeros(zero, pair.input.dtype)
        return whole

    def _shape(self, pair: Pair, step: Feed) -> tuple[int | None, ...]:
        """The shape of a state beside a step; None where it is the length of the past."""
        sizes: dict[str, int] = {}
        batch = 1
        for spec in reversed(self._given):
            if spec.shape:
                fed = step[spec.name].shape
                batch = fed[0] if len(fed) > 1 else batch
                sizes |= {d: n for d, n in zip(spec.shape, fed, strict=True) if isinstance(d, str)}
        batches = {spec.shape[0] for spec in self._given if spec.shape}
        shape = pair.input.shape or ()

        def size(axis: int, dim: int | str | None) -> int | None:
            if isinstance(dim, int) or axis == pair.axis:
                return dim if isinstance(dim, int) else None
            if dim in sizes:
                return sizes[dim]
            return batch if is_batch(shape, axis, batches) else None

        return tuple(size(axis, dim) for axis, dim in enumerate(shape))


def _fitting(
    made: NDArray[Any], shape: tuple[int | None, ...], pair: Pair, where: str
) -> NDArray[Any]:
    """An output of the float model as a state; raises OnnxqError where it cannot be one."""
    fits = len(made.shape) == len(shape) and all(
        want in (None, got) for want, got in zip(shape, made.shape, strict=True)
    )
    if pair.input.shape is not None and not fits:
        raise OnnxqError(
            f"{where}: the state {pair.input.name!r} is {list(made.shape)} after the feed before "
            f"and should be {[n if n is not None else '?' for n in shape]} here; give samples of "
            f"one batch size, or {pair.input.name!r} with this one"
        )
    if made.dtype.kind == "f" and not np.isfinite(made).all():
        raise OnnxqError(
            f"{where}: the feed before makes {pair.output!r}, the state {pair.input.name!r}, NaN "
            "or infinite; leave its sample out, or check its preprocessing"
        )
    return made


@dataclass
class _Carried:
    """Samples that leave states out, as a source of whole feeds: a feed for each step."""

    inner: Samples
    states: States

    def __post_init__(self) -> None:
        self.name = self.inner.name
        self._ends: list[int] = []  # per sample seen so far, the number of steps up to its end

    @property
    def note(self) -> str:
        pairs = self.states.left_out(self.inner)
        shown = [f"{pair.input.name} from {pair.output}" for pair in pairs]
        if len(pairs) > 3:
            shown = [f"{shown[0]} and {len(pairs) - 1} more states"]
        return f"; {', '.join(shown)}" if shown else ""

    @property
    def _in_steps(self) -> bool:
        return any(pair.axis is not None for pair in self.states.pairs)

    def count(self, stop: int | None) -> int:
        if not self._in_steps:
            return len(self.inner) if stop is None else min(stop, len(self.inner))
        for number, feed in enumerate(self.inner):
            if stop is not None and self._ends and self._ends[-1] >= stop:
                return stop
            self._note_steps(number, len(self.states.steps(feed, self.inner.where(number))))
        total = self._ends[-1] if self._ends else 0
        return total if stop is None else min(stop, total)

    def _note_steps(self, number: int, steps: int) -> None:
        if number == len(self._ends):
            self._ends.append(steps + (self._ends[-1] if self._ends else 0))

    def _sample(self, feed: int) -> int:
        return bisect_right(self._ends, feed) if self._in_steps else feed

    def samples(self, start: int, stop: int) -> int:
        if stop <= start:
            return 0
        return self.inner.samples(self._sample(start), self._sample(stop - 1) + 1)

    def where(self, feed: int, row: int = 0) -> str:
        return self.inner.where(self._sample(feed))

    def origin(self, start: int, stop: int | None) -> str:
        whole, skipped = self.inner.from_start()
        model = self.states.model_identity
        return repr((model, self.states.pairs, whole.identity(), skipped, start, stop))

    def feeds(self, start: int, stop: int | None) -> Iterator[Feed]:
        whole, skipped = self.inner.from_start()
        before: Feed | None = None
        feed_number = 0
        if stop is not None and stop <= start:
            return
        for number, given in enumerate(whole, -skipped):
            where = self.inner.where(number)
            steps = self.states.steps(given, where)
            here = len(steps) if number >= 0 else 0  # feeds of ours
            if here:
                self._note_steps(number, here)
            if feed_number + here <= start and not self.states.stream:
                feed_number += here
                continue
            for place, step in enumerate(steps):
                before = self.states.completed(step, before, place == 0, where)
                if here and feed_number >= start:
                    yield before
                feed_number += bool(here)
                if feed_number == stop:
                    return
