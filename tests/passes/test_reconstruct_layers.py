from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from graphs import Array, Feeds, feeds_of, model, normal, run, samples_of
from onnxq.passes import GPTQ, BiasCorrect, CoordinateDescent, ReconstructLayers, SearchScales
from onnxq.passes.solve.coordinate_descent import coordinate_descent
from onnxq.passes.solve.reconstruct_layers import Pairs, asymmetric_target, mean_output
from rounding import correlated, layer

from onnxq import graph as g
from onnxq.pipeline import Pass, Pipeline
from onnxq.recipe import load_recipe
from onnxq.target import load_target


def pairs_of(rows: int, columns: int, groups: int = 1) -> tuple[Array, Array]:
    """x, and x̂ as errors of earlier layers leave it: (groups, rows, columns)."""
    mix = correlated(columns, groups)
    x = normal(groups, rows, columns) @ mix + 0.5
    seen = x + 0.2 * normal(groups, rows, columns, seed=1) + 0.1 * x[..., ::-1]
    return x.astype(np.float64), seen.astype(np.float64)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_target_is_the_least_squares_solution(groups: int) -> None:
    x, seen = pairs_of(50, 7, groups)
    weight = normal(4 * groups, 7)
    hessian, cross = (a.swapaxes(1, 2) @ seen / 50 for a in (seen, x))
    target = asymmetric_target(weight, hessian, cross, 0).reshape(groups, 4, 7)
    for k, rows in enumerate(weight.reshape(groups, 4, 7)):
        best = np.linalg.lstsq(seen[k], x[k] @ rows.T)[0]
        np.testing.assert_allclose(target[k], best.T, rtol=1e-3, atol=1e-4)


def test_inputs_that_come_through_unchanged_leave_coordinate_descent() -> None:
    made = layer(8, 20)
    target = asymmetric_target(made.weight, made.hessian, made.hessian, 0.3)
    np.testing.assert_array_equal(target, made.weight)
    one, other = (coordinate_descent(made._replace(weight=w)) for w in (made.weight, target))
    np.testing.assert_array_equal(one.codes, other.codes)


def test_damping_draws_the_target_to_the_weight() -> None:
    x, seen = pairs_of(40, 6)
    weight = normal(3, 6)
    hessian, cross = (a.swapaxes(1, 2) @ seen / 40 for a in (seen, x))
    moved = [
        np.abs(asymmetric_target(weight, hessian, cross, damping) - weight).max()
        for damping in (0, 0.3, 1e6)
    ]
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 1e-3


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_are_those_of_all_rows(groups: int) -> None:
    x, seen = (a[0] for a in pairs_of(6000, 4 * groups))
    pairs = Pairs(g.Unfolding(groups, (1,), (1,), (1,), (0, 0)))
    for first in range(0, 6000, 100):
        one, other = (a[first : first + 100].T[None].astype(np.float32) for a in (x, seen))
        pairs.update(one, other)
    assert pairs.rows == 6000
    moments = pairs.moments(centred=True)
    for k in range(groups):
        part = slice(4 * k, 4 * k + 4)
        both = np.cov(x[:, part].T, seen[:, part].T, bias=True)
        scale = np.abs(both).max()
        np.testing.assert_allclose(moments.hessian[k], both[4:, 4:], rtol=0.01, atol=0.01 * scale)
        np.testing.assert_allclose(moments.cross[k], both[:4, 4:], rtol=0.01, atol=0.01 * scale)
        np.testing.assert_allclose(moments.mean[k], x[:, part].mean(0), rtol=1e-4)
    whole = pairs.moments(centred=False)
    outer = moments.mean[:, :, None] * moments.mean_of_seen[:, None, :]
    np.testing.assert_allclose(whole.cross, moments.cross + outer, rtol=1e-3)


def test_few_rows_prove_no_covariance() -> None:
    few, many = (Pairs(g.Unfolding()) for _ in range(2))
    x, seen = pairs_of(8, 8)
    few.update(x[0], seen[0])
    for _ in range(1000):
        many.update(x[0], seen[0])
    one, other = few.moments(True).hessian[0], many.moments(True).hessian[0]
    np.testing.assert_allclose(np.diag(one), np.diag(other), rtol=1e-3)
    assert np.abs(np.triu(one, 1)).sum() < 0.3 * np.abs(np.triu(other, 1)).sum()


def test_pairs_of_unlike_shapes_are_left_out_and_nan_is_refused() -> None:
    pairs = Pairs(g.Unfolding())
    pairs.update(np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32))
    assert pairs.rows == 0
    with pytest.raises(FloatingPointError):
        pairs.update(np.zeros((3, 4), np.float32), np.full((3, 4), np.nan, np.float32))


def test_the_mean_output_of_groups() -> None:
    weight, mean = normal(4, 3), normal(2, 3, seed=1)
    expected = np.concatenate([weight[:2] @ mean[0], weight[2:] @ mean[1]])
    np.testing.assert_allclose(mean_output(weight, mean), expected, rtol=1e-5)


def network() -> tuple[onnx.ModelProto, Feeds]:
    """Depthwise, pointwise and full layers; Gemm with alpha; a MatMul without room for a bias."""
    text = """(float[n,8,10,10] x) => (float[n,6] y) {
        a = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r = Relu (a)
        c = Conv <group = 16, pads = [1,1,1,1]> (r, w2)
        s = Relu (c)
        d = Conv (s, w3)
        t = Relu (d)
        p = GlobalAveragePool (t)
        f = Flatten (p)
        h = Gemm <alpha = 0.5, transB = 1> (f, w4, b4)
        k = Tanh (h)
        y = MatMul (k, w5)
    }"""
    weights = {
        "w1": normal(16, 8, 3, 3, scale=0.2), "b1": normal(16, seed=1),
        "w2": normal(16, 1, 3, 3, seed=2, scale=0.4), "w3": normal(32, 16, 1, 1, seed=3, scale=0.3),
        "w4": normal(24, 32, seed=4, scale=0.4), "b4": normal(24, seed=5),
        "w5": normal(24, 6, seed=6),
    }  # fmt: skip
    mix = normal(8, 8, seed=7)
    feeds = feeds_of(64, x=(1, 8, 10, 10))
    for feed in feeds:
        feed["x"] = np.einsum("ij,njhw->nihw", mix, feed["x"]).astype(np.float32)
    return model(text, **weights), feeds


def recipe(*added: Pass) -> tuple[Pass, ...]:
    steps = [step for step in load_recipe("w4a8").passes if step.name not in OURS]
    at = [step.name for step in steps].index("quantize-bias")
    return (*steps[:at], *added, *steps[at:])


OURS = {"search-scales", "coordinate-descent", "reconstruct-layers", "bias-correct"}


def output_error(made: onnx.ModelProto, feeds: Feeds, added: Sequence[Pass]) -> float:
    """‖y − ŷ‖² / ‖y‖² on the second half of the samples, calibrated on the first."""
    result = Pipeline(recipe(*added)).run(
        g.load(made), samples_of(made, feeds[:32]), load_target("cpu"), threads=1
    )
    error = power = 0.0
    for feed in feeds[32:]:
        expected, said = (run(graph, feed)["y"] for graph in (g.load(made), result.graph))
        error += float(np.square(expected - said).sum())
        power += float(np.square(expected).sum())
    return error / power


def test_the_output_error_falls_against_layers_solved_one_by_one() -> None:
    made, feeds = network()
    alone = output_error(made, feeds, [SearchScales(activations=False), CoordinateDescent()])
    corrected = [SearchScales(activations=False), CoordinateDescent(), BiasCorrect()]
    assert output_error(made, feeds, [ReconstructLayers()]) < 0.8 * alone
    assert output_error(made, feeds, [ReconstructLayers()]) < output_error(made, feeds, corrected)


def test_weights_that_layers_share_keep_their_codes_and_the_same_run_gives_the_same_bytes() -> None:
    text = """(float[n,6] x) => (float[n,6] y) {
        a = Gemm (x, w, b)
        r = Relu (a)
        c = Gemm (r, w)
        d = Tanh (c)
        y = Gemm (d, own, b)
    }"""
    made = model(text, w=normal(6, 6), own=normal(6, 6, seed=1), b=normal(6, seed=2))
    samples = samples_of(made, feeds_of(8, x=(16, 6)))
    plain, one, twice = (
        Pipeline(recipe(*added)).run(g.load(made), samples, load_target("cpu"), threads=1)
        for added in ([], [ReconstructLayers()], [ReconstructLayers()])
    )
    before, after = (
        {name: result.context.weights[name].dequantize() for name in ("w", "own")}
        for result in (plain, one)
    )
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert moved == ["own"]
    assert twice.to_proto().SerializeToString() == one.to_proto().SerializeToString()


def test_weights_alone_in_blocks_make_up_for_each_other_too() -> None:
    """Their kernels take the place of the nodes, and leave the tensors between them."""
    text = """(float[n,64] x) => (float[n,16] y) {
        a = MatMul (x, w1)
        b = Add (a, b1)
        r = Relu (b)
        c = MatMul (r, w2)
        d = Add (c, b2)
        s = Relu (d)
        y = MatMul (s, w3)
    }"""
    made = model(
        text, w1=normal(64, 64, scale=0.2), b1=normal(64, seed=1), w2=normal(64, 64, seed=2) * 0.2,
        b2=normal(64, seed=3), w3=normal(64, 16, seed=4),
    )  # fmt: skip
    mix = normal(64, 64, seed=7)
    feeds = [{"x": feed["x"] @ mix} for feed in feeds_of(64, x=(16, 64))]
    steps = load_recipe("int4-rtn").passes
    errors = []
    for added in ([SearchScales(activations=False), GPTQ(), CoordinateDescent()], None):
        passes = (*steps[:-1], *(added or [ReconstructLayers()]), steps[-1])
        samples = samples_of(made, feeds[:32])
        done = Pipeline(passes).run(g.load(made), samples, load_target("cpu"), threads=1)
        outputs = [(run(g.load(made), f)["y"], run(done.graph, f)["y"]) for f in feeds[32:]]
        errors.append(sum(float(np.square(want - said).sum()) for want, said in outputs))
    assert errors[1] < 0.95 * errors[0]
