from dataclasses import replace

import numpy as np
import pytest
from onnxq.passes.solve.coordinate_descent import CoordinateDescent, coordinate_descent
from onnxq.passes.solve.round_to_nearest import worst_pair
from rounding import errors, layer, least_error

from onnxq.errors import OnnxqError
from onnxq.qtype import QTensor

FORMATS = [
    "s8",
    "s8a",
    "u8",
    "u8a:channel",
    "s8:channel",
    "s4:channel",
    "u4a:4",
    "s2:channel",
    "s8p:channel",
    "u4ap",
]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spec", FORMATS)
def test_no_row_gets_worse_in_any_format(spec: str, groups: int) -> None:
    made = layer(12, 70, spec, groups)  # more columns than a block
    solved = coordinate_descent(made)
    assert made.start is not None
    before, after = errors(made, made.start), errors(made, solved)
    if made.qtype.group is None:  # one scale: a row may pay for the others
        assert after.sum() < before.sum()
    else:
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
    codes = solved.codes.astype(int)
    assert codes.min() >= made.qtype.qmin
    assert codes.max() <= made.qtype.qmax
    assert solved.codes.dtype == made.qtype.dtype
    np.testing.assert_array_equal(solved.zero, made.start.zero)
    if made.qtype.power_of_two:
        np.testing.assert_array_equal(solved.scale, made.start.scale)


def test_no_single_code_could_do_better() -> None:
    """The definition of the end of coordinate descent, against trying every move."""
    made = layer(6, 20)
    solved = coordinate_descent(made, sweeps=50)
    reached = errors(made, solved)
    for column in range(20):
        for move in (-1, 1):
            codes = solved.codes.astype(int)
            codes[:, column] = np.clip(codes[:, column] + move, -7, 7)
            moved = replace(solved, codes=codes.astype(solved.codes.dtype))
            assert (errors(made, moved) >= reached * (1 - 1e-4)).all()


def test_close_to_the_best_of_all_roundings() -> None:
    made = layer(8, 10)
    solved = coordinate_descent(made, sweeps=20)
    assert made.start is not None
    best = np.array([least_error(made, solved, row) for row in range(8)])
    start, found = errors(made, made.start), errors(made, solved)
    assert start.sum() - found.sum() > 0.8 * (start.sum() - best.sum())


def test_inputs_that_vary_by_themselves_leave_the_nearest_codes() -> None:
    made = layer(8, 30)._replace(hessian=np.eye(30, dtype=np.float32)[None])
    assert made.start is not None
    np.testing.assert_array_equal(coordinate_descent(made, 1).codes, made.start.codes)


@pytest.mark.parametrize("spec", ["s8", "s8:channel"])
@pytest.mark.parametrize("columns", [40, 41])
def test_the_bound_on_pairs_holds(spec: str, columns: int) -> None:
    made = layer(32, columns, spec, pair_limit=60)  # which many a pair would break
    solved = coordinate_descent(made)
    assert made.start is not None
    assert worst_pair(solved) <= 60
    assert worst_pair(coordinate_descent(made._replace(pair_limit=None))) > 60
    assert errors(made, solved).sum() < 0.7 * errors(made, made.start).sum()


def test_dead_inputs_keep_their_codes() -> None:
    made = layer(5, 12)
    made.hessian[:, 3] = made.hessian[:, :, 3] = 0
    assert made.start is not None
    solved = coordinate_descent(made)
    np.testing.assert_array_equal(solved.codes[:, 3], made.start.codes[:, 3])
    assert np.isfinite(solved.scale).all()


def test_correlated_inputs_at_four_bits_lose_half_of_their_error() -> None:
    made = layer(64, 64)
    solved: QTensor = CoordinateDescent().solve(made)
    assert made.start is not None
    assert errors(made, solved).sum() < 0.5 * errors(made, made.start).sum()


def test_without_codes_to_start_from_the_recipe_is_wrong() -> None:
    with pytest.raises(OnnxqError, match="round-to-nearest"):
        coordinate_descent(layer(4, 4)._replace(start=None))
