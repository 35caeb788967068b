import numpy as np
import pytest
from graphs import normal
from onnxq.passes.solve.autoround import (
    AutoRound,
    Learned,
    autoround,
    backward,
    error_and_slope,
    forward,
)
from rounding import errors, layer, least_error

from onnxq.errors import OnnxqError
from onnxq.qtype import QTensor

FORMATS = ["s8", "s8a", "u4a:channel", "u4a:4", "u4a:16", "u4:8", "s4:8", "u2a:8", "s8p:channel"]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spec", ["u4a:4", "u4a:8", "u4:4", "u4a:channel", "s4", "u4a"])
def test_gradients_are_those_of_finite_differences_where_nothing_is_rounded(
    spec: str, groups: int
) -> None:
    """A rounding counts as the identity; weights that are cut at the range's ends included."""
    made = layer(3, 10, spec, groups)
    assert made.start is not None
    weight, hessian = made.weight.astype(np.float64), made.hessian.astype(np.float64)
    now = Learned.beginning(weight, made.start)
    now = now._replace(
        v=normal(3, 10, seed=5).astype(np.float64) * 0.1,
        alpha=now.alpha * 0.71,
        beta=now.beta * 0.62,
        low=now.low.astype(np.float64),
        high=now.high.astype(np.float64),
    )

    def same(x: np.ndarray) -> np.ndarray:
        return x

    def loss(now: Learned) -> float:
        d = weight - forward(weight, now, made.qtype, same).real
        return float(error_and_slope(d, hessian)[0].sum())

    rounded = forward(weight, now, made.qtype, same)
    assert not rounded.inside.all()
    slope = error_and_slope(weight - rounded.real, hessian)[1]
    gradients = backward(weight, now, rounded, slope, made.qtype)
    for name, gradient in zip(("v", "alpha", "beta"), gradients, strict=True):
        value = np.asarray(getattr(now, name), np.float64)
        for index in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[index] = 1e-6
            up, down = (loss(now._replace(**{name: value + sign * step})) for sign in (1, -1))
            assert gradient[index] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spec", FORMATS)
def test_no_row_gets_worse_in_any_format(spec: str, groups: int) -> None:
    made = layer(12, 36, spec, groups)
    solved = autoround(made, steps=60)
    assert made.start is not None
    before, after = errors(made, made.start), errors(made, solved)
    if made.qtype.group is None:
        assert after.sum() < before.sum()
    else:
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
        assert after.sum() < before.sum()
    for part in ("codes", "scale", "zero"):
        new, old = getattr(solved, part), getattr(made.start, part)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
    for part in ("codes", "zero"):
        values = getattr(solved, part).astype(int)
        assert made.qtype.qmin <= values.min(initial=0)
        assert values.max(initial=0) <= made.qtype.qmax
    if made.qtype.blocked:
        np.testing.assert_array_equal(solved.scale, solved.scale.astype(np.float16))
    if made.qtype.power_of_two:
        np.testing.assert_array_equal(solved.scale, made.start.scale)


def test_close_to_the_best_of_all_roundings() -> None:
    """Tried are all of them under the scales that were learned."""
    made = layer(8, 10)
    solved = autoround(made, steps=1000)
    assert made.start is not None
    best = np.array([least_error(made, solved, row) for row in range(8)])
    start, found = errors(made, made.start), errors(made, solved)
    assert (found >= best * (1 - 1e-4)).all()
    assert start.sum() - found.sum() > 0.7 * (start.sum() - best.sum())


def test_correlated_inputs_at_four_bits_lose_half_of_their_error() -> None:
    made = layer(64, 64, "u4a:32")
    solved: QTensor = AutoRound().solve(made)
    assert made.start is not None
    assert errors(made, solved).sum() < 0.5 * errors(made, made.start).sum()


def test_better_codes_that_are_there_already_are_kept() -> None:
    made = layer(16, 32, "u4a:16")
    done = autoround(made, 200)
    again = autoround(made._replace(start=done), 5)
    assert (errors(made, again) <= errors(made, done) * (1 + 1e-4)).all()


def test_what_it_cannot_solve_it_refuses() -> None:
    with pytest.raises(OnnxqError, match="round-to-nearest"):
        autoround(layer(4, 4)._replace(start=None))
    with pytest.raises(OnnxqError, match="adaround"):
        autoround(layer(4, 4, "s8:channel", pair_limit=128))


def test_the_same_layer_gives_the_same_bytes() -> None:
    first, second = (autoround(layer(8, 16, "u4a:8"), steps=50) for _ in range(2))
    assert first.codes.tobytes() == second.codes.tobytes()
    assert first.scale.tobytes() == second.scale.tobytes()
