"""When a group loses much more than the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxq.group_losses import Losses, stands_out, warn_of_groups
from onnxq.report import GroupRecord, Report


def losses(values: Any) -> Losses:
    found = Losses()
    for value in values:
        found.add(float(value))
    return found


def test_mean_and_standard_error_are_those_of_the_samples() -> None:
    values = np.random.default_rng(0).uniform(size=37)
    found = losses(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / np.sqrt(37))
    rest = losses(values).without(losses(values[:10]))
    assert rest.mean == pytest.approx(values[10:].mean())
    assert rest.error == pytest.approx(values[10:].std(ddof=1) / np.sqrt(27))
    assert (losses([]).mean, losses([0.5]).error) == (0, 0)


@pytest.mark.parametrize("rate", [0.002, 0.03, 0.2, 0.4])
@pytest.mark.parametrize(("groups", "size"), [(2, 10), (10, 10), (10, 100), (100, 8)])
def test_random_groups_seldom_stand_out(rate: float, groups: int, size: int) -> None:
    """Top-1 agreement that no group has less of: hardly a run with a warning."""
    rng = np.random.default_rng(0)
    warned = 0
    for _ in range(200):
        drawn = (rng.uniform(size=(groups, size)) < rate).astype(float)
        everything = losses(drawn.ravel())
        own = [losses(row) for row in drawn]
        warned += any(stands_out(one, everything.without(one), 2, groups) for one in own)
    assert warned <= 0.03 * 200


@pytest.mark.parametrize("groups", [2, 10, 50])
def test_random_groups_of_cosines_seldom_stand_out(groups: int) -> None:
    rng = np.random.default_rng(0)
    warned = 0
    for _ in range(100):
        drawn = np.exp(rng.normal(-5, 1.5, (groups, 10)))  # most lose little, some much
        everything = losses(drawn.ravel())
        own = [losses(row) for row in drawn]
        warned += any(stands_out(one, everything.without(one), 4, groups) for one in own)
    assert warned <= 3


def test_a_group_that_loses_much_more_stands_out() -> None:
    rest = losses([0] * 95 + [1] * 5)
    assert stands_out(losses([1] * 8 + [0] * 4), rest, 2, 10)
    assert not stands_out(losses([1] * 4 + [0] * 8), rest, 2, 10)  # chance among ten groups
    assert not stands_out(losses([1] * 6), rest, 2, 10)  # too few to tell
    assert not stands_out(losses([1] + [0] * 11), rest, 2, 10)
    assert not stands_out(losses([0.009] * 50), losses([0.0001] * 50), 4, 2)  # nothing to speak of


def test_the_warning_counts_the_other_groups() -> None:
    one = GroupRecord("a", "y", 20, 0.4, 0.1, 0.6, 0.9, 10.0, True)
    calm = replace(one, group="z", drop=0.02, agreement=0.98, stands_out=False, samples=80)
    report = Report(groups=[one, replace(one, group="b", drop=0.3), calm])
    warn_of_groups(report)
    assert "group 'a' loses" in report.warnings[0]
    assert "; so does 1 more group;" in report.warnings[0]
    quiet = Report(groups=[calm])
    warn_of_groups(quiet)
    assert quiet.warnings == []
