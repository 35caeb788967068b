import numpy as np
import pytest
from graphs import normal
from onnxq.passes.solve.adaround import (
    adaround,
    bounds,
    error_gradient,
    logit,
    penalty_gradient,
    rectified,
)
from onnxq.passes.solve.round_to_nearest import worst_pair
from rounding import correlated, errors, layer, least_error

FORMATS = [
    "s8",
    "s8a",
    "u8a:channel",
    "s8:channel",
    "s4:channel",
    "u4a:4",
    "s2:channel",
    "s8p:channel",
    "u4ap",
]


def test_the_gradients_are_those_of_finite_differences() -> None:
    """Of Σ dHdᵀ and of Σ (1 − |2h − 1|^β), in float64."""
    hessian = correlated(5, 2).astype(np.float64)
    real = normal(2, 3, 5).astype(np.float64) * 2
    low, scale = np.floor(real), np.full((2, 3, 5), 0.7)
    high = low + 1
    high[0, 0, 0] = low[0, 0, 0]  # no choice there
    v = normal(2, 3, 5, seed=3).astype(np.float64)

    def error(v: np.ndarray) -> float:
        d = (real - low - (high - low) * rectified(v)) * scale
        return float(np.sum((d @ hessian) * d) / 0.7**2)

    def penalty(v: np.ndarray) -> float:
        return float(np.sum(1 - np.abs(2 * rectified(v) - 1) ** 3.5))

    gradients = (error_gradient(v, real, low, high, scale, hessian), penalty_gradient(v, 3.5))
    for function, gradient in zip((error, penalty), gradients, strict=True):
        for index in np.ndindex(v.shape):
            step = np.zeros_like(v)
            step[index] = 1e-6
            slope = (function(v + step) - function(v - step)) / 2e-6
            assert gradient[index] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_v_begins_where_the_weights_are() -> None:
    fraction = np.linspace(0, 1, 21)
    np.testing.assert_allclose(rectified(logit(fraction)), fraction, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spec", FORMATS)
def test_no_row_gets_worse_and_every_code_is_a_neighbour(spec: str, groups: int) -> None:
    made = layer(12, 24, spec, groups)
    solved = adaround(made, steps=60)
    assert made.start is not None
    assert (errors(made, solved) <= errors(made, made.start) * (1 + 1e-4) + 1e-9).all()
    step = np.abs(solved.codes.astype(int) - made.start.codes.astype(int))
    assert step.max() <= 1
    np.testing.assert_array_equal(solved.scale, made.start.scale)


def test_close_to_the_best_of_all_roundings() -> None:
    made = layer(8, 10)
    solved = adaround(made, steps=1500)
    assert made.start is not None
    best = np.array([least_error(made, solved, row) for row in range(8)])
    start, found = errors(made, made.start), errors(made, solved)
    assert (found >= best * (1 - 1e-4)).all()
    assert start.sum() - found.sum() > 0.7 * (start.sum() - best.sum())


def test_the_bound_on_pairs_holds() -> None:
    made = layer(32, 41, "s8:channel", pair_limit=128)
    solved = adaround(made, steps=60)
    assert made.start is not None
    assert worst_pair(solved) <= 128
    assert errors(made, solved).sum() < 0.8 * errors(made, made.start).sum()


def test_only_pairs_that_could_break_the_bound_have_no_choice() -> None:
    made = layer(1, 4, "s8:channel", pair_limit=128)
    real = np.array([[[64.5, 63.7, 10.2, -100.9]]], np.float32)
    codes = np.array([[[64, 64, 10, -101]]], np.float32)
    low, high = bounds(real, codes, made)
    assert low.ravel().tolist() == [64, 64, 10, -101]
    assert high.ravel().tolist() == [64, 64, 11, -100]


def test_correlated_inputs_at_four_bits_lose_much_of_their_error() -> None:
    made = layer(64, 64)
    solved = adaround(made)
    assert made.start is not None
    assert errors(made, solved).sum() < 0.6 * errors(made, made.start).sum()


def test_the_same_layer_gives_the_same_bytes() -> None:
    first, second = (adaround(layer(8, 16), steps=50) for _ in range(2))
    assert first.codes.tobytes() == second.codes.tobytes()
