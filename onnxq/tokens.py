"""Cuts the samples of a decoder along their tokens, so that the later ones are fed with a past.

The input of tokens is cut, and with it whatever has the same symbolic dimension, positions too. An
attention mask covers past and new tokens, and a switch says whether there is a past: of n tokens,
cut into steps,

    tokens, positions    [start : stop]
    mask                 [0 : stop]
    use_cache_branch     start > 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.feeds import Feed, InputSpec

_NO_TOKENS = ("mask", "position", "type", "segment")


@dataclass(frozen=True)
class Tokens:
    """The input of tokens among all that samples give, and the axis that counts them.

    `fixed` is how many the model takes at a time, where it fixes that; `symbol` its name for the
    axis, where it is open.
    """

    spec: InputSpec
    axis: int
    fixed: int | None
    symbol: str | None
    given: tuple[InputSpec, ...]

    @classmethod
    def find(cls, given: Sequence[InputSpec]) -> Tokens | None:
        """None where no input can be cut."""
        whole = [s for s in given if s.shape and not _named(s, *_NO_TOKENS)]
        ids = [s for s in whole if np.dtype(s.dtype).kind in "iu"]
        named = [s for s in ids if _named(s, "ids", "token")]
        wide = [s for s in whole if len(s.shape or ()) > 1]
        embedded = [s for s in wide if _named(s, "embed")]
        spec = next(iter(named + ids + embedded + wide), None)
        if spec is None or spec.shape is None:
            return None
        axis = min(1, len(spec.shape) - 1)
        dim = spec.shape[axis]
        if not isinstance(dim, int):
            return cls(spec, axis, None, dim, tuple(given))
        return cls(spec, axis, dim, None, tuple(given)) if spec in ids and dim > 0 else None

    def loosened(self, spec: InputSpec) -> InputSpec:
        """The input as samples may give it: with more tokens than the model takes at a time."""
        along = spec.shape is not None and len(spec.shape) > self.axis
        if self.fixed is None or spec.shape is None or not along or _named(spec, "mask"):
            return spec
        dims = list(spec.shape)
        dims[self.axis] = None if dims[self.axis] == self.fixed else dims[self.axis]
        return replace(spec, shape=tuple(dims))

    def steps(self, feed: Feed, where: str) -> list[Feed]:
        """Two halves, or as many tokens at a time as the model takes.

        Raises OnnxqError for a number of tokens that cannot be cut so; `where` names the sample.
        """
        n = feed[self.spec.name].shape[self.axis]
        if self.fixed is None:
            ends = [n // 2, n] if n > 1 else [n]
        elif n and not n % self.fixed:
            ends = list(range(self.fixed, n + 1, self.fixed))
        else:
            raise OnnxqError(
                f"{where}: {self.spec.name!r} has {n} tokens and the model takes {self.fixed} at a "
                "time; give a multiple"
            )
        starts = [0, *ends[:-1]]
        return [self._cut(feed, start, stop, n) for start, stop in zip(starts, ends, strict=True)]

    def _cut(self, feed: Feed, start: int, stop: int, n: int) -> Feed:
        parts = {
            spec.name: feed[spec.name][self._part(spec, feed[spec.name], start, stop, n)]
            for spec in self.given
        }
        switches = [s for s in self.given if s.dtype.kind == "b" and _named(s, "use_cache")]
        for spec in switches:
            parts[spec.name] = np.full_like(parts[spec.name], start > 0)
        return parts

    def _part(
        self, spec: InputSpec, array: NDArray[Any], start: int, stop: int, n: int
    ) -> tuple[slice, ...]:
        """What of an array belongs to a step, axis by axis."""
        part = [slice(None)] * array.ndim
        dims = spec.shape or (None,) * array.ndim
        for axis in range(array.ndim):
            batch = axis == 0 and self.axis > 0 and array.ndim > 1
            counts = array.shape[axis] == n and not batch
            if self._is_along(spec, dims, axis, counts):
                part[axis] = slice(start, stop)
            elif counts and _named(spec, "mask") and self._covers(spec, dims[axis]):
                last = axis == array.ndim - 1
                part[axis] = slice(0, stop) if last else slice(start, stop)
        return tuple(part)

    def _is_along(
        self, spec: InputSpec, dims: Sequence[int | str | None], axis: int, counts: bool
    ) -> bool:
        """Whether an axis counts the new tokens."""
        if spec.name == self.spec.name:
            return axis == self.axis
        if self.symbol is not None and dims[axis] == self.symbol:
            return True
        unnamed = self.symbol is None and dims[axis] == self.fixed and axis == self.axis
        return counts and not _named(spec, "mask") and (unnamed or _named(spec, "position"))

    def _covers(self, mask: InputSpec, dim: int | str | None) -> bool:
        """Whether a mask's axis is that of past and new tokens, not one of other data."""
        if isinstance(dim, int) or "encoder" in f"{mask.name} {dim}".lower():
            return False
        others = [spec for spec in self.given if not _named(spec, "mask")]
        return dim is None or not any(dim in (spec.shape or ()) for spec in others)


def _named(spec: InputSpec, *words: str) -> bool:
    return any(word in spec.name.lower() for word in words)
