"""Who pays for quantization: what each group of samples loses against float.

A sample loses d = 1 − top-1 agreement with float where an output is class scores, d = 1 − cosine
elsewhere. Of a group of n samples the mean d̄ is reported, with its standard error s/√n, where s² is
the variance of d among them. A group stands out when it and the rest have LEAST samples or more and
it loses much more, by more than chance explains:

    d̄_group > f · d̄_rest,    d̄_group > 0.01    and
    d̄_group − d̄_rest > z · √(s²_group/n_group + s²_rest/n_rest)

with f = 2 for agreement and 4 for the cosine, whose losses are spread more widely; s²_group counts
as no less than s²_rest, since a few samples may be alike by chance; z is the normal quantile of
1 − 0.01/groups, so that of groups drawn at random, however many, seldom one stands out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import verify
from onnxq.errors import OnnxqError, one_line, suggest
from onnxq.iterables import imported
from onnxq.npz import npz_arrays
from onnxq.report import GroupRecord, Report
from onnxq.runtime import Session
from onnxq.samples import Feed, Samples
from onnxq.sampling import Sampling

LEAST = 8  # samples
MOST_GROUPS = 1000
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

GroupBy = str | Callable[[Feed], object] | Sequence[object] | NDArray[Any]
Label = Callable[[int, Feed], str]  # of a sample: its number in the source, what it feeds


# ── which group a sample is in ───────────────────────────────────────────────────────────────────


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
    _check_number(set(texts))
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


def _check_number(labels: Collection[str]) -> None:
    if len(labels) > MOST_GROUPS:
        raise OnnxqError(
            f"there are more than {MOST_GROUPS} groups of samples, such as {min(labels)!r} and "
            f"{max(labels)!r}; group by something coarser"
        )


# ── what it loses ────────────────────────────────────────────────────────────────────────────────


@dataclass
class Losses:
    """Sums over samples that give mean and variance of what they lose."""

    samples: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, loss: float) -> None:
        self.samples += 1
        self.total += loss
        self.squares += loss**2

    def without(self, other: Losses) -> Losses:
        return Losses(
            self.samples - other.samples, self.total - other.total, self.squares - other.squares
        )

    @property
    def mean(self) -> float:
        return self.total / self.samples if self.samples else 0.0

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        if self.samples < 2:
            return 0.0
        variance = (self.squares - self.samples * self.mean**2) / (self.samples - 1)
        return math.sqrt(max(variance, 0.0) / self.samples)


def stands_out(group: Losses, rest: Losses, factor: float, groups: int) -> bool:
    """The rule in this module's docstring."""
    if min(group.samples, rest.samples) < LEAST:
        return False
    z = NormalDist().inv_cdf(1 - 0.01 / groups)
    least = rest.error * math.sqrt(rest.samples / group.samples)
    error = math.hypot(max(group.error, least), rest.error)
    much = group.mean > max(0.01, factor * rest.mean)
    return much and group.mean - rest.mean > z * error


@dataclass
class _Group:
    """One group: each output's values together, and what the samples lose of it."""

    together: dict[str, verify.Comparison]
    losses: dict[str, Losses] = field(default_factory=dict)


def compare_groups(reference: Session, other: Session, grouped: Grouped) -> list[GroupRecord]:
    """What every group loses of every output that both models have, in the order of the outputs."""
    outputs = verify.shared_outputs(reference, other)
    groups: dict[str, _Group] = {}
    for feed, labels in grouped:
        if all(label is None for label in labels):
            continue
        said = [model.run(feed, outputs) for model in (reference, other)]
        for row, label in enumerate(labels):
            if label is None:
                continue
            group = groups.setdefault(label, _Group(verify.comparisons(outputs)))
            _check_number(groups)
            left, right = ({n: _output(n, o[n], row, len(labels)) for n in outputs} for o in said)
            alone = verify.comparisons(outputs)
            for found in (alone, group.together):
                verify.update(found, left, right)
            for name, comparison in alone.items():
                if comparison.reference_energy:
                    group.losses.setdefault(name, Losses()).add(_loss(comparison))
    return [record for name in outputs for record in _records(name, groups)]


def _loss(comparison: verify.Comparison) -> float:
    if comparison.agreement is not None:
        return 1 - comparison.agreement
    return max(0.0, 1 - comparison.cosine)


def _records(output: str, groups: Mapping[str, _Group]) -> list[GroupRecord]:
    """The records of one output, the group that loses most first."""
    own = {label: g.losses[output] for label, g in groups.items() if output in g.losses}
    everything = Losses(
        sum(losses.samples for losses in own.values()),
        math.fsum(losses.total for losses in own.values()),
        math.fsum(losses.squares for losses in own.values()),
    )
    records = []
    for label, losses in own.items():
        all_values = groups[label].together[output]
        factor = 4.0 if all_values.agreement is None else 2.0
        records.append(
            GroupRecord(
                label,
                output,
                losses.samples,
                losses.mean,
                losses.error,
                all_values.agreement,
                all_values.cosine,
                all_values.sqnr_db,
                stands_out(losses, everything.without(losses), factor, len(own)),
            )
        )
    return sorted(records, key=lambda record: (-record.drop, record.group))


def _one(feed: Feed, row: int, count: int) -> Feed:
    return {name: _row(array, row, count) for name, array in feed.items()}


def _row(array: NDArray[Any], row: int, count: int) -> NDArray[Any]:
    """The row of one of `count` samples that share a feed; what they have in common, whole."""
    return array[row : row + 1] if count > 1 and array.shape[:1] == (count,) else array


def _output(name: str, array: NDArray[Any], row: int, count: int) -> NDArray[Any]:
    if count > 1 and array.shape[:1] != (count,):
        raise OnnxqError(
            f"output {name!r} is {list(array.shape)} for {count} samples fed at once, so that no "
            "row of it belongs to one of them; group with samples fed one at a time "
            "(--batch-size 1)"
        )
    return _row(array, row, count)


def warn_of_groups(report: Report) -> None:
    """One line for the groups that lose much more than the rest."""
    worst = sorted((r for r in report.groups if r.stands_out), key=lambda r: (-r.drop, r.group))
    if not worst:
        return
    first = worst[0]
    rest = [r for r in report.groups if r.output == first.output and r is not first]
    others = sum(r.drop * r.samples for r in rest) / sum(r.samples for r in rest)
    kind = "1 − cosine" if first.agreement is None else "1 − top-1 agreement"
    more = len({r.group for r in worst}) - 1
    also = f"; so do{'es' if more == 1 else ''} {more} more group{'s' * (more > 1)}" * (more > 0)
    report.warn(
        f"group {first.group!r} loses much more than the rest: {kind} of {first.output!r} is "
        f"{first.drop:.3g} on its {first.samples} samples and {others:.2g} on the others{also}; "
        "calibrate on more samples like them, or leave the layers that hurt most float (--exclude)"
    )
