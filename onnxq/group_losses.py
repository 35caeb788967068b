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
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from numpy.typing import NDArray

from onnxq import verify
from onnxq.errors import OnnxqError
from onnxq.groups import Grouped, check_number, row_of
from onnxq.report import GroupRecord, Report
from onnxq.runtime import Session

LEAST = 8  # samples


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
            check_number(groups)
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


def _output(name: str, array: NDArray[Any], row: int, count: int) -> NDArray[Any]:
    if count > 1 and array.shape[:1] != (count,):
        raise OnnxqError(
            f"output {name!r} is {list(array.shape)} for {count} samples fed at once, so that no "
            "row of it belongs to one of them; group with samples fed one at a time "
            "(--batch-size 1)"
        )
    return row_of(array, row, count)


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
