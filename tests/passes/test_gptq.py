from dataclasses import replace

import numpy as np
import pytest
from graphs import Array
from onnxq.passes.solve.gptq import GPTQ, feedback, gptq
from onnxq.passes.solve.round_to_nearest import worst_pair
from rounding import errors, layer

from onnxq.errors import OnnxqError
from onnxq.qtype import QTensor, spread
from onnxq.solver import Layer

FORMATS = ["s8", "s8:channel", "u4a:channel", "u4a:4", "u4:16", "s4:8", "u2a:8", "s8p:channel"]


def in_float64(made: Layer) -> Layer:
    return made._replace(
        weight=made.weight.astype(np.float64), hessian=made.hessian.astype(np.float64)
    )


def optimal_brain_quantizer(made: Layer, damping: float) -> tuple[Array, Array]:
    """Frantar et al. 2022, "Optimal Brain Compression", eq. 5, all rows in the same order: after
    each column the inverse of what is left of H is made anew. Codes, and Ŵ (out, in).
    """
    start = made.start
    assert start is not None
    scale, zero = (
        np.broadcast_to(
            spread(a, start.codes.shape, start.qtype.group).astype(np.float64), start.codes.shape
        )
        for a in (start.scale, start.zero)
    )
    codes, real = (np.zeros(start.codes.shape) for _ in range(2))
    per_group = len(made.weight) // len(made.hessian)
    for row, weight in enumerate(made.weight.astype(np.float64)):
        h = made.hessian[row // per_group].astype(np.float64)
        left = list(np.argsort(-np.diagonal(h), kind="stable"))
        h = h + damping * np.diagonal(h).mean() * np.eye(len(h))
        w = weight.copy()
        while left:
            k = left[0]
            inverse = np.linalg.inv(h[np.ix_(left, left)])
            code = np.rint(w[k] / scale[row, k]) + zero[row, k]
            codes[row, k] = np.clip(code, made.qtype.qmin, made.qtype.qmax)
            real[row, k] = (codes[row, k] - zero[row, k]) * scale[row, k]
            w[left] -= (w[k] - real[row, k]) / inverse[0, 0] * inverse[0]
            left = left[1:]
    return codes, real


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("columns", [1, 2, 21, 40])
@pytest.mark.parametrize("spec", ["u4a:8", "s4:channel"])
def test_the_codes_are_those_of_inverting_what_is_left_of_h_for_each_column(
    spec: str, columns: int, groups: int
) -> None:
    made = in_float64(layer(12, columns, spec, groups))
    solved = gptq(made)
    expected, real = optimal_brain_quantizer(made, GPTQ.damping)
    assert made.start is not None
    kept = errors(made, replace(solved, codes=expected.astype(made.qtype.dtype))) >= errors(
        made, made.start
    )
    expected[kept], real[kept] = made.start.codes[kept], made.start.dequantize()[kept]
    np.testing.assert_array_equal(solved.codes.astype(float), expected)
    np.testing.assert_allclose(solved.dequantize(), real, atol=1e-6)


def test_feedback_is_the_row_of_the_inverse_of_what_is_left() -> None:
    """F_k = −(H⁻¹)_k,k+1: / (H⁻¹)_kk is what GPTQ adds; here each column gathers its own."""
    h = in_float64(layer(2, 12)).hessian[0]
    order = np.argsort(-np.diagonal(h))
    damped = h + 0.01 * np.diagonal(h).mean() * np.eye(12)
    factor = np.linalg.cholesky(damped[np.ix_(order[::-1], order[::-1])])[::-1, ::-1]
    np.testing.assert_allclose(factor @ factor.T, damped[np.ix_(order, order)], atol=1e-12)
    expected = np.triu(factor / np.diagonal(factor), 1)
    np.testing.assert_allclose(feedback(h, order, 0.01), expected, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spec", FORMATS)
def test_no_row_gets_worse_in_any_format(spec: str, groups: int) -> None:
    made = layer(12, 70, spec, groups)
    solved = gptq(made)
    assert made.start is not None
    before, after = errors(made, made.start), errors(made, solved)
    assert (after <= before * (1 + 1e-4) + 1e-9).all()
    assert after.sum() < before.sum()
    codes = solved.codes.astype(int)
    assert codes.min() >= made.qtype.qmin
    assert codes.max() <= made.qtype.qmax
    assert solved.codes.dtype == made.qtype.dtype
    np.testing.assert_array_equal(solved.scale, made.start.scale)
    np.testing.assert_array_equal(solved.zero, made.start.zero)


def test_a_row_that_rounding_serves_better_keeps_its_codes() -> None:
    made = layer(400, 6, "s8:channel")
    solved = gptq(made)
    assert made.start is not None
    changed = (solved.codes != made.start.codes).any(axis=1)
    assert 0 < changed.sum() < len(changed)
    before, after = errors(made, made.start), errors(made, solved)
    assert (after[changed] < before[changed]).all()


@pytest.mark.parametrize("spec", ["u4a:8", "s8:channel"])
def test_inputs_that_vary_by_themselves_leave_the_nearest_codes(spec: str) -> None:
    made = layer(8, 30, spec)
    made = made._replace(hessian=np.diag(np.arange(1, 31, dtype=np.float32))[None])
    assert made.start is not None
    np.testing.assert_array_equal(gptq(made).codes, made.start.codes)


@pytest.mark.parametrize("columns", [40, 41])
def test_the_bound_on_pairs_holds(columns: int) -> None:
    made = layer(32, columns, "s8:channel", pair_limit=128)
    solved = gptq(made)
    assert made.start is not None
    assert worst_pair(solved) <= 128
    assert worst_pair(gptq(made._replace(pair_limit=None))) > 128
    assert errors(made, solved).sum() < 0.8 * errors(made, made.start).sum()


def test_dead_inputs_and_none_alive_keep_the_nearest_codes() -> None:
    made = layer(5, 12)
    made.hessian[:, 3] = made.hessian[:, :, 3] = 0
    assert made.start is not None
    np.testing.assert_array_equal(gptq(made).codes[:, 3], made.start.codes[:, 3])
    dead = made._replace(hessian=np.zeros_like(made.hessian))
    np.testing.assert_array_equal(gptq(dead).codes, made.start.codes)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_of_which_few_were_seen_have_a_factor_all_the_same(damping: float) -> None:
    """Fewer rows than columns, a thousand times apart: in float32 there is no factor."""
    made = layer(16, 60, "u4a:16")
    few = np.random.default_rng(0).normal(size=(3, 60)).astype(np.float32)
    few *= np.geomspace(1e-3, 1e3, 60, dtype=np.float32)
    made = made._replace(hessian=(few.T @ few / 3)[None])
    solved = gptq(made, damping)
    assert made.start is not None
    assert errors(made, solved).sum() < 0.1 * errors(made, made.start).sum()


def test_correlated_inputs_at_four_bits_lose_half_of_their_error() -> None:
    made = layer(64, 128, "u4a:32")
    solved: QTensor = GPTQ().solve(made)
    assert made.start is not None
    assert errors(made, solved).sum() < 0.5 * errors(made, made.start).sum()


def test_without_codes_to_start_from_the_recipe_is_wrong() -> None:
    with pytest.raises(OnnxqError, match="round-to-nearest"):
        gptq(layer(4, 4)._replace(start=None))
