"""low-rank against the paper's own form of its solution, and add-low-rank against numpy."""

import numpy as np
import onnx
import pytest
from graphs import Array, Feeds, context, model, normal, run, samples_of, sqnr
from onnxq.passes import AddLowRank, Assign, LowRank, MatMulNBits, Normalize, RoundToNearest
from onnxq.passes.solve.low_rank import Components, components, in_halves, within
from rounding import correlated

from onnxq import graph as g
from onnxq.errors import OnnxqError


def seen(error: Array, hessian: Array) -> float:
    """tr(DHDᵀ)"""
    exact = error.astype(np.float64)
    return float(np.trace(exact @ hessian @ exact.T))


def truncated(error: Array, root: Array, rank: int) -> Array:
    """SVD_r(D L) L⁻¹: the best of this rank for H = L Lᵀ."""
    u, s, v = np.linalg.svd(error.astype(np.float64) @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(root)


def case(out: int, columns: int) -> tuple[Array, Array]:
    return normal(out, columns, seed=1), correlated(columns)[0]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (90, 90)])
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_as_good_as_the_svd_with_either_root_of_h(shape: tuple[int, int], rank: int) -> None:
    error, hessian = case(*shape)
    parts = components(error, hessian, rank)
    found = seen(error - parts.a @ parts.b, hessian)
    values, vectors = np.linalg.eigh(hessian.astype(np.float64))
    symmetric = (vectors * np.sqrt(np.maximum(values, 1e-12))) @ vectors.T
    for root in (symmetric, np.linalg.cholesky(hessian.astype(np.float64))):
        best = seen(error - truncated(error, root, rank), hessian)
        assert best * (1 - 1e-5) <= found <= best * 1.001
    whole = seen(error, hessian)
    assert whole - parts.gain.sum() == pytest.approx(found, abs=1e-5 * whole)


def test_better_than_knowing_only_the_diagonal_and_that_than_knowing_nothing() -> None:
    error, hessian = case(60, 60)
    parts = components(error, hessian, 8)
    diagonal = np.diag(np.sqrt(np.diag(hessian).astype(np.float64)))
    exact, by_diagonal, plain = (
        seen(error - guess, hessian)
        for guess in (
            parts.a @ parts.b,
            truncated(error, diagonal, 8),
            truncated(error, np.eye(60), 8),
        )
    )
    assert exact < 0.99 * by_diagonal
    assert by_diagonal < plain


def test_the_error_falls_with_every_rank_to_nothing() -> None:
    error, hessian = case(30, 50)
    parts = components(error, hessian, 30)
    left = [
        seen(error - part.a @ part.b, hessian) for part in (parts.first(rank) for rank in range(31))
    ]
    assert (np.diff(left) < 0).all()
    assert left[-1] < 1e-6 * left[0]


def test_inputs_of_few_directions_need_few_ranks() -> None:
    """H of rank 2, of which no Cholesky factor has an inverse."""
    directions = normal(2, 40, seed=3)
    error, hessian = normal(20, 40, seed=1), directions.T @ directions
    parts = components(error, hessian, 2)
    assert seen(error - parts.a @ parts.b, hessian) < 1e-6 * seen(error, hessian)


def test_bits_go_where_each_takes_back_the_most() -> None:
    def layer(size: int, *gain: float) -> Components:
        zeros = np.zeros((size, len(gain)), np.float32)
        return Components(zeros, zeros.T, np.array(gain))

    found = {"small": layer(10, 5.0, 1.0), "large": layer(40, 30.0, 8.0), "dead": layer(10, 0.0)}
    bits = {"small": 320, "large": 1280}
    assert {n: len(p.gain) for n, p in within(found, bits["large"]).items()} == {"large": 1}
    both = within(found, bits["large"] + bits["small"])
    assert {n: len(p.gain) for n, p in both.items()} == {"large": 1, "small": 1}
    assert {n: len(p.gain) for n, p in within(found, 1e9).items()} == {"small": 2, "large": 2}


def test_float16_costs_next_to_nothing_whatever_the_sizes() -> None:
    parts = components(*case(30, 50), 8)
    far = parts._replace(b=parts.b * np.float32(1e-6))
    halves = in_halves(far)
    exact, stored = far.a @ far.b, halves.a.astype(np.float32) @ halves.b.astype(np.float32)
    assert np.abs(stored - exact).max() < 2e-3 * np.abs(exact).max()


def gemm(alpha: float, trans_a: int, trans_b: int) -> tuple[onnx.ModelProto, Feeds]:
    """Gemm with C and a Relu behind it; weight (96, 64)."""
    weight, shape = normal(96, 64, seed=5), "64, n" if trans_a else "n, 64"
    attributes = f"alpha = {alpha}, beta = 0.5, transA = {trans_a}, transB = {trans_b}"
    made = model(
        f"(float[{shape}] x) => (float[n, 96] z)"
        f"{{ y = Gemm <{attributes}> (x, w, c) z = Relu(y) }}",
        w=weight if trans_b else np.ascontiguousarray(weight.T),
        c=normal(96, seed=6),
    )
    rows = [normal(8, 64, seed=s) @ correlated(64)[0] for s in range(4)]
    return made, [{"x": r.T.copy() if trans_a else r} for r in rows]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_layer_with_factors_gives_the_product_with_their_sum(
    alpha: float, trans_a: int, trans_b: int
) -> None:
    made, feeds = gemm(alpha, trans_a, trans_b)
    samples = samples_of(made, feeds)
    graph, ctx = g.load(made), context(samples=samples)
    for step in (Normalize(), Assign(form="weights", format="w2:32"), RoundToNearest()):
        step.apply(graph, ctx)
    exact = [run(graph, feed)["z"] for feed in feeds]
    assert LowRank(bits=4).apply(graph, ctx) == 1
    assert LowRank(bits=4).apply(graph, ctx) == 0
    (name,) = ctx.corrections
    a, b = (part.astype(np.float32) for part in ctx.corrections[name])
    whole = ctx.weights[name].dequantize() + a @ b
    assert AddLowRank().apply(graph, ctx) == 1
    assert AddLowRank().apply(graph, ctx) == 0
    MatMulNBits().apply(graph, ctx)
    for feed, want in zip(feeds, exact, strict=True):
        x = feed["x"].T if trans_a else feed["x"]
        expected = np.maximum(alpha * x @ whole.T + 0.5 * normal(96, seed=6), 0)
        near = 1e-4 * np.abs(want).max()
        np.testing.assert_allclose(run(graph, feed, False)["z"], expected, rtol=1e-4, atol=near)
        assert sqnr(run(graph, feed)["z"], expected) > 30  # activations of 8 bits


def test_no_bits_are_refused() -> None:
    with pytest.raises(OnnxqError, match="above 0"):
        LowRank(bits=0)
