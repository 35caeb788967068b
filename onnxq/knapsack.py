"""The multiple-choice knapsack: one option for each item, all trade-offs of two sums at once.

Item i offers options j with a loss l_ij and a cost c_ij. A choice takes one option of each item;
its losses and its costs add up. The front holds every choice that no other one beats in both sums:
for any budget of either, its best entry is the solution.

Nemhauser and Ullmann's algorithm: the front of the first i items, extended by every option of the
next one, holds the front of i + 1 items (Discrete dynamic programming and capital allocation,
Management Science 1969). Its time grows with the size of the fronts, which the sums' order bounds
in practice; beyond `MOST` entries only every n-th is kept, both ends included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST = 20_000  # entries of a front


@dataclass(frozen=True)
class Choice:
    """The option of each item, and what their losses and costs add up to."""

    options: tuple[int, ...]
    loss: float
    cost: float


def front(losses: Sequence[ArrayLike], costs: Sequence[ArrayLike]) -> list[Choice]:
    """The choices that none beats, by rising loss and falling cost.

    `losses[i]` and `costs[i]` are (options of item i,).
    """
    loss, cost = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []  # parent and option of each entry
    for item_losses, item_costs in zip(losses, costs, strict=True):
        more_loss, more_cost = np.asarray(item_losses, float), np.asarray(item_costs, float)
        all_losses = (loss[:, None] + more_loss).ravel()
        all_costs = (cost[:, None] + more_cost).ravel()
        kept = _undominated(all_losses, all_costs)
        steps.append((kept // len(more_loss), kept % len(more_loss)))
        loss, cost = all_losses[kept], all_costs[kept]
    return [
        Choice(_options(steps, entry), float(loss[entry]), float(cost[entry]))
        for entry in range(len(loss))
    ]


def _undominated(losses: NDArray[np.float64], costs: NDArray[np.float64]) -> NDArray[np.intp]:
    """Entries by rising loss, each cheaper than all before it."""
    order = np.lexsort((costs, losses))
    cheapest = np.minimum.accumulate(costs[order])
    better = np.ones(len(order), bool)
    better[1:] = costs[order][1:] < cheapest[:-1]
    kept = order[better]
    if len(kept) > MOST:
        kept = kept[np.linspace(0, len(kept) - 1, MOST).round().astype(int)]
    return kept


def _options(steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]], entry: int) -> tuple[int, ...]:
    chosen: list[int] = []
    for parents, options in reversed(steps):
        chosen.append(int(options[entry]))
        entry = int(parents[entry])
    return tuple(reversed(chosen))
