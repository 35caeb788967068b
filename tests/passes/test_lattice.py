"""E8P against its definition, brute force and the kernel that multiplies with it."""

import numpy as np
import onnx
import pytest
from graphs import Array, Feeds, context, model, normal, ops, run, samples_of, sqnr
from onnxq.passes import AddLowRank, Assign, Expand, Lattice, LowRank, MatMulNBits, Normalize
from onnxq.passes.solve.lattice import ldlq, nearest, sweep, with_damping
from rounding import correlated

from onnxq import graph as g
from onnxq.lattice import LatticeTensor, patterns, points
from onnxq.pipeline import Context
from onnxq.qtype import QType, quantize_weight, weight_scale


def seen(error: Array, hessian: Array) -> float:
    return float(np.sum((error @ hessian) * error))


def test_65536_points_of_e8_moved_by_a_quarter() -> None:
    assert points().shape == (65536, 8)
    assert len(np.unique(points(), axis=0)) == 65536
    moved = points() - 0.25
    halves = moved * 2
    np.testing.assert_array_equal(halves, np.rint(halves))
    whole = halves % 2 == 0  # all coordinates of a point of E8 are whole, or none; its sum is even
    assert (whole.all(axis=1) | ~whole.any(axis=1)).all()
    assert (moved.sum(axis=1) % 2 == 0).all()
    assert np.abs(points()).max() == 2.75
    assert np.abs(points()).min() == 0.25


def test_the_patterns_are_the_shortest_there_are() -> None:
    lengths = np.sum(patterns() ** 2, axis=1)
    assert np.count_nonzero(lengths <= 10) == 227
    assert np.count_nonzero(lengths == 12) == 29


@pytest.mark.parametrize("size", [0.3, 1.03, 2.0, 4.0])
def test_the_nearest_point_is_that_of_brute_force(size: float) -> None:
    x = normal(400, 8, seed=7, scale=size)
    found = np.sum((x - points()[nearest(x)]) ** 2, axis=1)
    squares = np.sum(points() ** 2, axis=1)
    best = np.min(squares - 2 * x @ points().T, axis=1) + np.sum(x**2, axis=1)
    np.testing.assert_allclose(found, best, rtol=1e-4, atol=1e-5)


def test_the_error_of_normal_weights_is_that_of_the_paper() -> None:
    x = normal(50_000, 8, seed=3)
    error = np.mean((x - points()[nearest(x * np.float32(1.03))] / 1.03) ** 2)
    assert error == pytest.approx(0.0919, abs=0.001)  # the best four levels alone: 0.1175


def naive_ldlq(weight: Array, hessian: Array) -> Array:
    """Block after block, what is left of a row made the best for the errors so far."""
    weight, size = weight.astype(np.float64), weight.shape[1]
    found = np.zeros_like(weight)
    for start in range(0, size, 8):
        block, rest = slice(start, start + 8), slice(start + 8, size)
        found[:, block] = points()[nearest(weight[:, block])]
        error = weight[:, block] - found[:, block]
        weight[:, rest] += error @ hessian[block, rest] @ np.linalg.inv(hessian[rest, rest])
    return found


def test_blocks_make_up_for_the_errors_of_those_before_them() -> None:
    weight, hessian = normal(16, 40, seed=2), with_damping(correlated(40)[0], 0.01)
    hessian = hessian + np.eye(40) * hessian.trace() / 40
    found = points()[ldlq(weight, hessian)].reshape(weight.shape)
    np.testing.assert_array_equal(found, naive_ldlq(weight, hessian))
    plain = points()[nearest(weight.reshape(-1, 8))].reshape(weight.shape)
    assert seen(weight - found, hessian) < 0.9 * seen(weight - plain, hessian)


def test_no_sweep_makes_a_row_worse() -> None:
    weight, hessian = normal(16, 40, seed=2), with_damping(correlated(40)[0], 0.01)
    codes = ldlq(weight, hessian)
    before = weight - points()[codes].reshape(weight.shape)
    sweep(weight, hessian, codes)
    after = weight - points()[codes].reshape(weight.shape)
    errors = [np.sum((d @ hessian) * d, axis=1) for d in (before, after)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


def test_better_than_two_bits_each_at_the_same_size() -> None:
    weight, hessian = normal(64, 128, seed=4), correlated(128)[0]
    found = Lattice().solve(weight, hessian, 128)
    qtype = QType.parse("u2a:128")
    rounded = quantize_weight(weight, *weight_scale(weight, qtype), qtype)
    errors = [seen(weight - q.dequantize(), hessian) for q in (found, rounded)]
    assert errors[0] < 0.3 * errors[1]


def case(op: str, columns: int, trans_b: int) -> tuple[onnx.ModelProto, Feeds]:
    """Two layers that read one weight (48, columns)."""
    weight, bias = normal(48, columns, seed=5), normal(48, seed=6)
    if op == "Gemm":
        body = f"y = Gemm <transB = {trans_b}, alpha = 0.5, beta = 2.0> (x, w, c) z = Relu(y)"
    else:
        body = "y = MatMul(x, w) v = MatMul(x, w) u = Mul(y, v) z = Add(u, c)"
    made = model(
        f"(float[n, {columns}] x) => (float[n, 48] z) {{ {body} }}",
        w=weight if trans_b else np.ascontiguousarray(weight.T),
        c=bias,
    )
    return made, [{"x": normal(6, columns, seed=s)} for s in range(3)]


def prepared(made: onnx.ModelProto, feeds: Feeds, block: int) -> tuple[g.Graph, Context]:
    graph, ctx = g.load(made), context(samples=samples_of(made, feeds))
    for step in (Normalize(), Assign(form="weights", format=f"w4:{block}")):
        step.apply(graph, ctx)
    return graph, ctx


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("columns", [64, 172, 20])
@pytest.mark.parametrize(("op", "trans_b"), [("Gemm", 0), ("Gemm", 1), ("MatMul", 0)])
def test_the_kernel_multiplies_with_the_points(
    op: str, trans_b: int, columns: int, low_rank: bool
) -> None:
    made, feeds = case(op, columns, trans_b)
    graph, ctx = prepared(made, feeds, 32)
    assert Lattice().apply(graph, ctx) == 1
    assert Lattice().apply(graph, ctx) == 0
    (q,) = ctx.codebooks.values()
    assert isinstance(q, LatticeTensor)
    weight = q.dequantize()
    if low_rank:
        assert LowRank(bits=2).apply(graph, ctx) == 1
        a, b = (part.astype(np.float32) for part in next(iter(ctx.corrections.values())))
        weight = weight + a @ b
    lowered = ctx.quantized(graph)
    assert ops(lowered) == ops(graph)  # there is no lowering in this run
    for step in (AddLowRank(), Expand(), MatMulNBits()):
        step.apply(graph, ctx)
        assert step.apply(graph, ctx) == 0
    onnx.checker.check_model(g.to_proto(graph))
    assert "MatMulNBits" in ops(graph)
    for feed in feeds:
        y = feed["x"] @ weight.T
        bias = normal(48, seed=6)
        expected = np.maximum(0.5 * y + 2 * bias, 0) if op == "Gemm" else y * y + bias
        plain = run(graph, feed, False)["z"]
        np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        assert sqnr(run(graph, feed)["z"], expected) > 30  # activations of 8 bits


def test_two_bits_a_weight_in_the_file() -> None:
    made = model(
        "(float[n, 512] x) => (float[n, 1024] z) { z = MatMul(x, w) }", w=normal(512, 1024, seed=1)
    )
    graph, ctx = prepared(made, [{"x": normal(64, 512, seed=2)}], 128)
    Lattice(sweeps=0).apply(graph, ctx)
    Expand().apply(graph, ctx)
    assert len(g.to_proto(graph).SerializeToString()) < 512 * 1024 / 4 + 2 * 1024 + 9000


def test_a_weight_that_is_looked_up_too_keeps_its_own_codes() -> None:
    made = model(
        "(int64[n] ids) => (float[n, 64] z) { x = Gather(w, ids) z = Gemm <transB = 1> (x, w) }",
        w=normal(64, 64, seed=1),
    )
    graph, ctx = prepared(made, [{"ids": np.arange(8)}], 32)
    Lattice().apply(graph, ctx)
    for name in ctx.codebooks:
        readers = next(t for t in g.constants(graph) if t.name == name).outputs
        assert all(node.op == "Gemm" for node in readers)
