"""Samples of models with a state: what they leave out, the float model's own outputs fill in.

With s a state, f the model and x₀, x₁, … the feeds, the state of feed t is

    s₀ = 0,    sₜ = f(xₜ₋₁, sₜ₋₁)

A state of a fixed shape (audio streams) is carried from feed to feed: all samples are one stream.
A state that grows (past and present) begins anew, empty, with every sample, whose tokens are then
fed in two steps, the second with the past that the first made; one token a step where the model
fixes that. A state that a sample gives is taken as it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
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

_NO_TOKENS = ("mask", "position", "type", "segment")


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
        self._tokens = self._find_tokens()

    @property
    def specs(self) -> list[InputSpec]:
        return [
            replace(spec, optional=True) if spec.name in self._names else self._loosened(spec)
            for spec in self._inputs
        ]

    def carry(self, samples: Samples) -> Samples:
        """The samples with every state in its place; they themselves for a model without states.

        Raises OnnxqError when the first feed cannot be completed.
        """
        if not self.pairs:
            return samples
        source = _Carried(samples, self)
        whole = Samples(source, self._inputs, synthesised=samples.synthesised)
        next(iter(whole), None)
        fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in self._given)
        if source.carried and samples.batch > 1 and not fixed:
            raise OnnxqError(
                f"{samples.name}: the state {min(source.carried)!r} is carried from sample to "
                "sample, so they cannot share a batch; feed one at a time (--batch-size 1)"
            )
        return whole

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
        name, axis, fixed = self._tokens
        length = feed[name].shape[axis]
        if fixed is not None and (length % fixed or not length):
            raise OnnxqError(
                f"{where}: {name!r} has {length} tokens and the model takes {fixed} at a time; "
                "give a multiple"
            )
        cuts = [length // 2, length] if length > 1 else [length]
        cuts = list(range(fixed, length + 1, fixed)) if fixed is not None else cuts
        return [
            self._cut(feed, start, stop, length)
            for start, stop in zip([0, *cuts], cuts, strict=False)
        ]

    def _cut(self, feed: Feed, start: int, stop: int, length: int) -> Feed:
        """The tokens `start` to `stop`, and of the other inputs what belongs to them."""
        given = {name: a for name, a in feed.items() if name in self._names and start == 0}
        return given | {
            spec.name: feed[spec.name][self._part(spec, feed[spec.name], start, stop, length)]
            for spec in self._given
        }

    def _part(
        self, spec: InputSpec, array: NDArray[Any], start: int, stop: int, length: int
    ) -> tuple[slice, ...]:
        assert self._tokens is not None
        tokens, token_axis, _ = self._tokens
        symbol = (self._spec(tokens).shape or ())[token_axis]
        dims = spec.shape or (None,) * array.ndim
        part = [slice(None)] * array.ndim
        for axis, dim in enumerate(dims):
            first = axis == 0 and token_axis > 0  # the batch
            if isinstance(dim, str) and dim == symbol:
                part[axis] = slice(start, stop)
            elif first or array.shape[axis] != length:
                continue
            elif spec.name == tokens:
                part[axis] = slice(start, stop) if axis == token_axis else part[axis]
            elif "mask" in spec.name.lower():
                covers = not isinstance(dim, int) and not self._is_elsewhere(dim, spec)
                whole = axis == array.ndim - 1  # past and new tokens
                if covers:
                    part[axis] = slice(0, stop) if whole else slice(start, stop)
            elif "position" in spec.name.lower() or (
                dim == symbol and not isinstance(symbol, str) and axis == token_axis
            ):
                part[axis] = slice(start, stop)
        return tuple(part)

    def _is_elsewhere(self, dim: str | None, mask: InputSpec) -> bool:
        """Whether a dimension of a mask is that of other data, such as an encoder's."""
        others = [s for s in self._given if s is not mask and "mask" not in s.name.lower()]
        named = dim is not None and any(dim in (spec.shape or ()) for spec in others)
        return named or "encoder" in f"{mask.name} {dim}".lower()

    def _find_tokens(self) -> tuple[str, int, int | None] | None:
        """The input that a sample of a growing state is cut along: its name, the axis, and the
        number of tokens that the model takes at a time where it fixes that."""
        if all(pair.axis is None for pair in self.pairs):
            return None
        whole = [s for s in self._given if s.shape and not _named(s, _NO_TOKENS)]
        ids = [s for s in whole if np.dtype(s.dtype).kind in "iu"]
        embedded = [s for s in whole if len(s.shape or ()) > 1 and _named(s, ("embed",))]
        others = [s for s in whole if len(s.shape or ()) > 1]
        named = [s for s in ids if _named(s, ("ids", "token"))]
        for spec in (named + ids + embedded + others)[:1]:
            assert spec.shape is not None
            axis = min(1, len(spec.shape) - 1)
            fixed = spec.shape[axis]
            if not isinstance(fixed, int):
                return spec.name, axis, None
            if spec in ids and fixed > 0:
                return spec.name, axis, fixed
        return None

    def _spec(self, name: str) -> InputSpec:
        return next(spec for spec in self._inputs if spec.name == name)

    def _loosened(self, spec: InputSpec) -> InputSpec:
        """An input of a fixed number of tokens may come with more, to be cut."""
        if self._tokens is None or self._tokens[2] is None or spec.shape is None:
            return spec
        name, axis, fixed = self._tokens
        if spec.name != name and (_named(spec, ("mask",)) or len(spec.shape) <= axis):
            return spec
        dims = list(spec.shape)
        dims[axis] = None if dims[axis] == fixed else dims[axis]
        return replace(spec, shape=tuple(dims))

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
            if spec.name in step and spec.shape:
                shape = step[spec.name].shape
                batch = shape[0] if len(shape) > 1 else batch
                sizes |= {
                    d: n for d, n in zip(spec.shape, shape, strict=True) if isinstance(d, str)
                }
        batches = {spec.shape[0] for spec in self._given if spec.shape}
        shape = pair.input.shape or ()
        return tuple(
            dim
            if isinstance(dim, int)
            else None
            if axis == pair.axis
            else sizes[dim]
            if dim in sizes
            else batch
            if is_batch(shape, axis, batches)
            else None
            for axis, dim in enumerate(shape)
        )


def _named(spec: InputSpec, words: Sequence[str]) -> bool:
    return any(word in spec.name.lower() for word in words)


def _fitting(
    made: NDArray[Any], shape: tuple[int | None, ...], pair: Pair, where: str
) -> NDArray[Any]:
    """An output of the float model as a state; raises OnnxqError where it cannot be one."""
    fits = len(made.shape) == len(shape) and all(
        want in (None, got) for want, got in zip(shape, made.shape, strict=True)
    )
    if pair.input.shape is not None and not fits:
        raise OnnxqError(
            f"{where}: the state {pair.input.name!r} is {list(made.shape)} after the sample before "
            f"and should be {[n if n is not None else '?' for n in shape]} here; give samples of "
            f"one batch size, or {pair.input.name!r} with this one"
        )
    if made.dtype.kind == "f" and not np.isfinite(made).all():
        raise OnnxqError(
            f"{where}: the sample before makes {pair.output!r}, the state {pair.input.name!r}, NaN "
            "or infinite; leave that sample out, or check its preprocessing"
        )
    return made


@dataclass
class _Carried:
    """Samples that leave states out, as a source of whole feeds: a feed for each step."""

    inner: Samples
    states: States

    def __post_init__(self) -> None:
        self.name = self.inner.name
        self.carried: set[str] = set()  # states of fixed shape that a sample left out
        self._ends: list[int] = []  # per sample seen so far, the number of steps up to its end

    @property
    def note(self) -> str:
        pairs = [p for p in self.states.pairs if p.input.name in self._left_out]
        shown = [f"{pair.input.name} from {pair.output}" for pair in pairs[:3]]
        more = f", {len(pairs) - 3} more" if len(pairs) > 3 else ""
        return f"; {', '.join(shown)}{more}" if shown else ""

    @property
    def _left_out(self) -> set[str]:
        first = next(iter(self.inner), {})
        return {p.input.name for p in self.states.pairs if p.input.name not in first}

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
                self._note_carried(step)
                if here and feed_number >= start:
                    yield before
                feed_number += bool(here)
                if feed_number == stop:
                    return

    def _note_carried(self, step: Feed) -> None:
        fixed = (p.input.name for p in self.states.pairs if p.axis is None)
        self.carried |= {name for name in fixed if name not in step}
