"""Samples that Python objects hold or yield: sequences, functions, iterables, iterators."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from numpy.lib import format as npy

from onnxq.errors import OnnxqError, suggest
from onnxq.feeds import Feed, InputSpec, OneByOne, Source, checked


@dataclass
class List(OneByOne):
    items: Sequence[Mapping[str, Any]]

    def count(self, stop: int | None) -> int:
        return len(self.items) if stop is None else min(stop, len(self.items))

    def feeds(self, start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
        for number in range(start, self.count(stop)):
            yield self.items[number]


@dataclass
class Spool(OneByOne):
    """The feeds of a one-shot iterator in a temporary file, one .npy after the other."""

    file: IO[bytes]
    places: list[tuple[int, tuple[str, ...]]]  # of each feed: its offset, the names of its arrays

    def count(self, stop: int | None) -> int:
        return len(self.places[:stop])

    def feeds(self, start: int, stop: int | None) -> Iterator[Feed]:
        for offset, names in self.places[start:stop]:
            self.file.seek(offset)
            yield {name: npy.read_array(self.file) for name in names}


@dataclass
class Call(OneByOne):
    """What a function yields, called anew for each iteration."""

    make: Callable[[], Iterable[Any]]
    total: int | None = field(default=None)

    def count(self, stop: int | None) -> int:
        if self.total is None:
            return sum(1 for _ in self.feeds(0, stop))
        return self.total if stop is None else min(stop, self.total)

    def feeds(self, start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
        number = 0
        iterator = self.begin()
        while stop is None or number < stop:
            with self._named():
                feed = next(iterator, None)
            if feed is None:
                break
            if number >= start:
                yield feed
            number += 1
        else:
            return
        if self.total is not None and number < self.total:
            raise OnnxqError(
                f"{self.name} gave {self.total} samples at first and {number} when read again; "
                "make it start anew on each call"
            )
        self.total = number

    def begin(self) -> Iterator[Any]:
        with self._named():
            return iter(self.make())

    def _named(self) -> Named:
        return Named(self.name)


@dataclass
class Named:
    """Turns an exception of the user's function into one line that names the function."""

    name: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, OnnxqError):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise OnnxqError(
                f"{self.name} failed with {reason}; it must return or yield dicts "
                "{input name: array}"
            ) from error


def imported(
    text: str, purpose: str = "give samples", returns: str = "yields dicts"
) -> Callable[..., Any]:
    """The function `module:function`. The rest is for messages: what it is for and gives."""
    module, _, attribute = text.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Any = importlib.import_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OnnxqError(
            f"importing {module!r} to {purpose} failed with {reason}; "
            "run where the module lies, or install it"
        ) from error
    for part in attribute.split("."):
        if not hasattr(function, part):
            near = suggest(part, (name for name in vars(function) if name[0] != "_"))
            raise OnnxqError(f"{module!r} has no {attribute!r} to {purpose}{near}")
        function = getattr(function, part)
    if not callable(function):
        raise OnnxqError(f"{text!r} is no function; name one that {returns}")
    return function


def probed(call: Call) -> Call:
    """Finds out early that a function hands out the same iterator each time."""
    first = call.begin()
    with call._named():
        empty = next(first, None) is None
    if empty:
        raise OnnxqError(f"{call.name} gives no samples; make it yield at least one")
    second = call.begin()
    with call._named():
        exhausted = second is first or next(second, None) is None
    if exhausted:
        raise OnnxqError(
            f"{call.name} cannot be read twice; make it start anew on each call, "
            "for example as a generator function"
        )
    return call


def spooled(feeds: Iterator[Any], specs: list[InputSpec], limit: int | None, name: str) -> Source:
    file = tempfile.TemporaryFile(prefix="onnxq-samples-")  # noqa: SIM115 (it lives with the source)
    spool = Spool(name, file, [])
    for number, feed in enumerate(islice(feeds, limit)):
        arrays = checked(feed, specs, spool, number)
        spool.places.append((file.tell(), tuple(arrays)))
        for array in arrays.values():
            npy.write_array(file, array.astype(str) if array.dtype.kind == "O" else array)
    return spool
