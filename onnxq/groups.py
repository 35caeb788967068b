"""Which group each sample is in: a label, a speaker, the folder of an image."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, one_line, suggest
from onnxq.iterables import imported
from onnxq.npz import npz_arrays
from onnxq.samples import Feed, Samples
from onnxq.sampling import Sampling

MOST_GROUPS = 1000
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

GroupBy = str | Callable[[Feed], object] | Sequence[object] | NDArray[Any]
Label = Callable[[int, Feed], str]  # of a sample: its number in the source, what it feeds


@dataclass(frozen=True)
class Grouped:
    """Samples with their groups. Iterating gives each feed and a label for each sample in it, None
    for one that is left out.

    `numbers` are the samples' places in the source, where those are not 0, 1, 2, …
    """

    samples: Samples
    label: Label
    numbers: Sequence[int] | None = None
    left_out: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[tuple[Feed, list[str | None]]]:
        for place, feed in enumerate(self.samples):
            end, count = self.samples.samples(0, place + 1), self.samples.samples(place, place + 1)
            labels: list[str | None] = []
            for row in range(count):
                number = end - count + row
                number = number if self.numbers is None else self.numbers[number]
                left_out = number in self.left_out
                labels.append(None if left_out else self.label(number, _one(feed, row, count)))
            yield feed, labels


class Groups:
    """The groups of all samples of a source; `source` is what to open from here on."""

    def __init__(self, by: GroupBy, source: Any, sampling: Sampling) -> None:
        """`by` is the name of an array beside the inputs with an entry per sample, `folder` for the
        sub-folder of each image, `module:function`, a function of a feed, or a label per sample.

        Raises OnnxqError for what names no groups.
        """
        if source is None:
            raise OnnxqError(
                "groups are of real samples: give them with --data (in Python: samples=...)"
            )
        self._sampling = sampling
        self._whole = sampling.given(source, None)
        self.source = self._whole if isinstance(source, Iterator) else source
        self._label = _label(by, source, self._whole)

    def of(self, drawn: Samples) -> Grouped:
        """Samples drawn from the source, states not yet filled in."""
        return Grouped(self._sampling.carry(drawn), self._label, self._numbers(drawn))

    def beyond(self, drawn: Samples, count: int) -> Grouped:
        """All samples of the source but the first `count` of those drawn."""
        numbers = self._numbers(drawn)
        seen = range(count) if numbers is None else numbers[:count]
        samples = self._sampling.carry(self._whole)
        return Grouped(samples, self._label, left_out=frozenset(seen))

    def _numbers(self, drawn: Samples) -> list[int] | None:
        """Of images some are drawn at even distances; elsewhere the first ones are."""
        if not self._whole.files:
            return None
        places = {path: number for number, path in enumerate(self._whole.files)}
        return [places[path] for path in drawn.files]


def _label(by: GroupBy, source: Any, whole: Samples) -> Label:
    if isinstance(by, str):
        return _named(by, source, whole)
    if callable(by):
        return _called(str(getattr(by, "__name__", "the function")), by, whole)
    return _listed("the list of groups", by, whole)


def _named(by: str, source: Any, whole: Samples) -> Label:
    files = whole.files
    if isinstance(source, Mapping) and by in source:
        return _listed(f"the array {by!r}", source[by], whole)
    if files and files[0].suffix.lower() == ".npz":
        if by in npz_arrays(files[0]):
            return lambda number, feed: _entry(by, files[number])
        known = list(npz_arrays(files[0]))
    elif files:
        if by == "folder" and isinstance(source, str | Path):
            top = Path(source)
            return lambda number, feed: files[number].parent.relative_to(top).as_posix()
        known = ["folder"]
    elif isinstance(source, str | Path) and Path(source).is_file():
        arrays = npz_arrays(Path(source))
        if by in arrays:
            return _listed(f"the array {by!r}", arrays[by].whole(), whole)
        known = list(arrays)
    else:
        known = list(source) if isinstance(source, Mapping) else []
    if _FUNCTION.fullmatch(by):
        function = imported(by, "group samples", "takes a feed and returns a label")
        return _called(by, function, whole)
    named = f"names nothing to group {whole.name} by{suggest(by, known)}" if known else "is neither"
    raise OnnxqError(
        f"--group-by {by}: it {named}; give the name of an array with an entry per sample, "
        "'folder' for images in sub-folders, or module:function"
    )


def _listed(what: str, labels: Any, whole: Samples) -> Label:
    """A label per sample, in the order of the source."""
    array = np.asarray(labels)
    count = whole.samples(0, len(whole))
    if array.ndim == 0 or array.size != len(array):
        raise OnnxqError(
            f"{what} to group by has the shape {list(array.shape)}; give one entry per sample"
        )
    texts = [_text(label) for label in array.reshape(-1)]
    if not count <= len(texts) < count + whole.batch:  # a batch that is not full is not fed
        raise OnnxqError(
            f"{what} to group by has {len(texts)} entries, and {whole.name} {count} samples; give "
            "one entry per sample"
        )
    check_number(set(texts))
    return lambda number, feed: texts[number]


def _entry(by: str, path: Path) -> str:
    """The label in an .npz file that is one sample."""
    arrays = npz_arrays(path)
    if by not in arrays or math.prod(arrays[by].shape) != 1:
        raise OnnxqError(
            f"{str(path)!r} has no array {by!r} of one entry; give each file its group"
        )
    return _text(arrays[by].whole().reshape(()))


def _called(name: str, function: Callable[[Feed], object], whole: Samples) -> Label:
    def label(number: int, feed: Feed) -> str:
        try:
            return _text(function(feed))
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
            raise OnnxqError(
                f"{name} failed on sample {number} of {whole.name} with {reason}; it must take a "
                "feed {input name: array} and return a label"
            ) from error

    label(0, _one(next(iter(whole)), 0, whole.samples(0, 1)))  # does it work at all?
    return label


def _text(label: object) -> str:
    plain = label.item() if isinstance(label, np.generic | np.ndarray) else label
    return plain.decode(errors="replace") if isinstance(plain, bytes) else str(plain)


def check_number(labels: Collection[str]) -> None:
    if len(labels) > MOST_GROUPS:
        raise OnnxqError(
            f"there are more than {MOST_GROUPS} groups of samples, such as {min(labels)!r} and "
            f"{max(labels)!r}; group by something coarser"
        )


def _one(feed: Feed, row: int, count: int) -> Feed:
    return {name: row_of(array, row, count) for name, array in feed.items()}


def row_of(array: NDArray[Any], row: int, count: int) -> NDArray[Any]:
    """The row of one of `count` samples that share a feed; what they have in common, whole."""
    return array[row : row + 1] if count > 1 and array.shape[:1] == (count,) else array
