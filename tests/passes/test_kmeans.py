from itertools import combinations

import numpy as np
import pytest
from graphs import Array, normal
from onnxq.passes.solve.kmeans import best_levels


def error(x: Array, q: Array, levels: Array) -> float:
    return float((q * ((x[:, None] - levels.astype(np.float64)) ** 2).min(axis=1)).sum())


def lloyd(x: Array, q: Array, levels: Array, rounds: int = 100) -> Array:
    """Lloyd's iteration, from the paper's definition; levels rounded to integers at the end."""
    levels = levels.astype(np.float64)
    for _ in range(rounds):
        owner = np.abs(x[:, None] - levels).argmin(axis=1)
        for k in range(len(levels)):
            if (own := owner == k).any():
                levels[k] = (q[own] * x[own]).sum() / q[own].sum()
    return np.rint(levels)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_tables(count: int, seed: int) -> None:
    grid = (-6, 5)
    rng = np.random.default_rng(seed)
    x, q = rng.normal(0, 3, 60), rng.exponential(size=60)  # some beyond the grid
    tried = [np.array(c) for c in combinations(range(grid[0], grid[1] + 1), count)]
    least = min(error(x, q, levels) for levels in tried)
    found = best_levels(x, q, count, grid)
    assert found.dtype == np.int8
    assert len(found) == count
    assert error(x, q, found) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_never_worse_than_lloyd_s_iteration(count: int) -> None:
    x = 30 * normal(4000, seed=1).astype(np.float64)
    q = np.random.default_rng(2).exponential(size=4000) ** 2
    start = np.quantile(x, (np.arange(count) + 0.5) / count)
    found = best_levels(x, q, count, (-127, 127))
    assert error(x, q, found) <= error(x, q, lloyd(x, q, start)) * (1 + 1e-12)


def test_weights_decide_what_a_level_is_for() -> None:
    x = np.array([-10.0, 0.0, 1.0, 10.0])
    heavy = np.array([1.0, 1000.0, 1000.0, 1.0])
    assert {0, 1} <= set(best_levels(x, heavy, 3, (-12, 12)).tolist())
    assert {-10, 10} <= set(best_levels(x, np.ones(4), 3, (-12, 12)).tolist())


def test_a_grid_with_fewer_integers_is_taken_whole() -> None:
    assert best_levels(np.zeros(3), np.ones(3), 8, (-2, 1)).tolist() == [-2, -1, 0, 1]
