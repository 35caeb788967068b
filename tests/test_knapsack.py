"""The front is what trying every choice finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxq import knapsack
from onnxq.knapsack import front


def exhaustive(losses: list[list[float]], costs: list[list[float]]) -> set[tuple[float, float]]:
    """The sums of every choice that no other one beats."""

    def total(rows: list[list[float]], choice: tuple[int, ...]) -> float:
        return round(sum(map(list.__getitem__, rows, choice)), 9)

    choices = itertools.product(*(range(len(row)) for row in losses))
    sums = {(total(losses, choice), total(costs, choice)) for choice in choices}
    return {
        (a, b)
        for a, b in sums
        if not any((x <= a and y <= b) and (x, y) != (a, b) for x, y in sums)
    }


@pytest.mark.parametrize("seed", range(12))
def test_the_front_is_that_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, size=6)
    draw = rng.integers(-3, 9, size=(2, 6, 4)) if seed % 2 else rng.normal(size=(2, 6, 4))
    losses = [[float(x) for x in draw[0, i, :n]] for i, n in enumerate(counts)]
    costs = [[float(x) for x in draw[1, i, :n]] for i, n in enumerate(counts)]
    found = front(losses, costs)
    assert {(round(c.loss, 9), round(c.cost, 9)) for c in found} == exhaustive(losses, costs)
    assert [c.loss for c in found] == sorted(c.loss for c in found)
    for choice in found:
        assert sum(map(list.__getitem__, losses, choice.options)) == pytest.approx(choice.loss)
        assert sum(map(list.__getitem__, costs, choice.options)) == pytest.approx(choice.cost)


@pytest.mark.parametrize("budget", [0.0, 0.7, 1.5, 4.0])
def test_the_best_within_a_budget_is_on_the_front(budget: float) -> None:
    rng = np.random.default_rng(7)
    losses = [[0.0, *map(float, rng.uniform(0, 1, 2))] for _ in range(7)]
    costs = [[1.0, *map(float, rng.uniform(0, 1, 2))] for _ in range(7)]
    best = min(
        sum(map(list.__getitem__, costs, c))
        for c in itertools.product(range(3), repeat=7)
        if sum(map(list.__getitem__, losses, c)) <= budget
    )
    assert min(c.cost for c in front(losses, costs) if c.loss <= budget) == pytest.approx(best)


def test_many_items_stay_within_bounds_and_keep_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "MOST", 200)
    rng = np.random.default_rng(0)
    losses = [[0.0, *map(float, rng.uniform(0.1, 1, 3))] for _ in range(60)]
    costs = [[1.0, *map(float, rng.uniform(0, 0.9, 3))] for _ in range(60)]
    found = front(losses, costs)
    assert len(found) <= 200
    assert found[0].options == (0,) * 60
    assert found[-1].cost == pytest.approx(sum(min(row) for row in costs))


def test_no_items_have_one_choice() -> None:
    assert [c.options for c in front([], [])] == [()]
