from itertools import product

import numpy as np
import onnx
import pytest
from graphs import Array, Feeds, context, feeds_of, model, normal, run, samples_of
from onnxq.passes.solve.round_to_nearest import round_to_nearest, worst_pair
from onnxq.passes.solve.search_activation_scales import Trial, distinct, rules, search_ranges
from onnxq.passes.solve.search_scales import SearchScales, telling_samples
from onnxq.passes.solve.search_weight_scales import search_weight_scale, shares
from rounding import errors, layer

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.observe import Histogram
from onnxq.pipeline import Context
from onnxq.qtype import QParams, QType, quantize_weight, weight_scale
from onnxq.recipe import load_recipe

FORMATS = [
    "s8",
    "s8a",
    "u8a:channel",
    "s8:channel",
    "s4:channel",
    "u4a:4",
    "s4:5",
    "s2:channel",
    "s8p:channel",
    "u4ap",
]

# ── weights ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spec", FORMATS)
def test_each_scale_is_the_best_of_its_candidates(spec: str, groups: int) -> None:
    """Against every candidate in turn, in what shares a scale: a tensor, a row or a block."""
    made = layer(6, 12, spec, groups)
    qtype, found = made.qtype, search_weight_scale(made)
    assert not qtype.power_of_two or (np.frexp(found.scale)[0] == 0.5).all()
    size = qtype.group if (qtype.group or -1) > 0 else 12
    for first in range(0, 12, size):
        part = slice(first, first + size)
        inside = made._replace(hessian=made.hessian.copy())
        inside.hessian[:, :first] = inside.hessian[:, part.stop :] = 0  # the block's own columns
        inside.hessian[:, :, :first] = inside.hessian[:, :, part.stop :] = 0
        tried = []
        for share in shares(qtype, None):
            scale, zero = weight_scale(made.weight * np.float32(share), qtype)
            tried.append(errors(inside, quantize_weight(made.weight, scale, zero, qtype)))
        reached = errors(inside, found)
        if qtype.group is None:
            assert reached.sum() == pytest.approx(np.sum(tried, axis=1).min(), rel=1e-3)
        else:
            np.testing.assert_allclose(reached, np.min(tried, axis=0), rtol=2e-3, atol=1e-7)


def test_four_bits_gain_much_from_a_scale_of_their_own() -> None:
    made = layer(64, 64)
    plain = round_to_nearest(made.weight, made.qtype)
    assert errors(made, search_weight_scale(made)).sum() < 0.8 * errors(made, plain).sum()


@pytest.mark.parametrize("spec", ["s8", "s8:channel"])
def test_the_bound_on_pairs_holds(spec: str) -> None:
    made = layer(32, 41, spec, pair_limit=128)
    assert worst_pair(search_weight_scale(made)) <= 128


# ── activations ──────────────────────────────────────────────────────────────────────────────────


def rare_strong_values() -> tuple[onnx.ModelProto, Feeds]:
    """What the answer hangs on is one value in a thousand, and strong."""
    text = """(float[n,2000] x) => (float[n,1] y) {
        a = Relu (x)
        m = MatMul (a, w)
        y = Gemm (m, v)
    }"""
    weight = normal(2000, 4, scale=0.02)
    feeds = feeds_of(12, x=(1, 2000))
    rng = np.random.default_rng(0)
    for feed in feeds:
        feed["x"][0, rng.choice(2000, 2, replace=False)] = rng.uniform(40, 80, 2)
    return model(text, w=weight, v=normal(4, 1, seed=1)), feeds


def calibrated(made: onnx.ModelProto, feeds: Feeds, method: str) -> tuple[g.Graph, Context]:
    graph, samples = g.load(made), samples_of(made, feeds)
    recipe = load_recipe("int8-static", [f"calibrate.method={method}", "calibrate.percentile=99.5"])
    steps = {step.name: step for step in recipe.passes}
    ctx = context(samples=samples, lowering=(steps["quantize-bias"], steps["insert-qdq"]))
    for name in ("normalize", "assign", "calibrate"):
        wanted = dict(steps[name].observe(graph, ctx))
        wanted |= dict(SearchScales().observe(graph, ctx)) if name == "calibrate" else {}
        ctx.stats |= observe(graph, wanted, samples, threads=1) if wanted else {}
        steps[name].apply(graph, ctx)
    return graph, ctx


def output_error(graph: g.Graph, ctx: Context, made: onnx.ModelProto, feeds: Feeds) -> float:
    lowered = ctx.quantized(graph)
    said = [run(lowered, feed, optimize=False)["y"] - run(made, feed)["y"] for feed in feeds]
    return float(np.square(said).sum())


def test_ranges_hold_the_rare_values_that_the_answer_hangs_on() -> None:
    made, feeds = rare_strong_values()
    graph, ctx = calibrated(made, feeds, "percentile")
    before = output_error(graph, ctx, made, feeds)
    search = SearchScales(weights=False)
    assert search.apply(graph, ctx) > 0
    assert output_error(graph, ctx, made, feeds) < 0.05 * before
    assert search.apply(graph, ctx) == 0


def test_the_error_is_that_of_the_lowered_model() -> None:
    made, feeds = rare_strong_values()
    graph, ctx = calibrated(made, feeds, "minmax")
    trial = Trial(graph, ctx, feeds)
    assert set(trial.inputs) == set(ctx.activations)
    power = sum(float(np.square(run(made, feed)["y"]).sum()) for feed in feeds)
    for factor in (1.0, 0.5):
        for name, params in ctx.activations.items():
            low, high = params.range
            ctx.activations[name] = QParams.from_range(low * factor, high * factor, params.qtype)
        expected = output_error(graph, ctx, made, feeds) / power
        assert trial.error(ctx.activations) == pytest.approx(expected, rel=1e-3)


class Landscape:
    """Stands for a Trial: E is a table over the candidates of two tensors."""

    def __init__(self, table: Array, candidates: list[QParams]) -> None:
        self.table, self.candidates, self.asked = table, candidates, 0

    def error(self, ranges: dict[str, QParams]) -> float:
        self.asked += 1
        k, j = (
            next(i for i, c in enumerate(self.candidates) if c is ranges[name]) for name in "ab"
        )
        return float(self.table[k, j])


def test_the_search_finds_the_best_where_tensors_do_not_depend_on_each_other() -> None:
    u8 = QType.parse("u8a")
    candidates = [QParams.from_range(0, high, u8) for high in (1, 2, 3, 4)]
    rng = np.random.default_rng(0)
    for _ in range(10):
        table = rng.uniform(1, 3, (4, 1)) + rng.uniform(1, 3, (1, 4))
        trial = Landscape(table, candidates)
        found = search_ranges(trial, dict.fromkeys("ab", candidates), [["a"], ["b"]], 100)  # type: ignore[arg-type]
        best = min(table[k, j] for k, j in product(range(4), repeat=2))
        assert trial.error(found) <= best * 1.02  # a gain of less than 1% is left
        bounded = Landscape(table, candidates)
        kept = search_ranges(bounded, dict.fromkeys("ab", candidates), [["a"], ["b"]], 6)  # type: ignore[arg-type]
        assert bounded.asked == 6
        assert table.diagonal().min() >= bounded.error(kept)


def test_candidates_are_the_present_one_and_ranges_of_what_was_seen() -> None:
    histogram = Histogram()
    histogram.update(normal(20000))
    seen, now = histogram.result(), QParams.from_range(-1, 1, QType.parse("u8a"))
    found = rules(seen, now)
    assert found[0] is now
    assert found[1].range == pytest.approx((seen.low, seen.high), abs=0.02)
    others = distinct(found, now)
    assert 2 <= len(others) < len(found)
    assert all(other is not now for other in others)


def test_samples_with_the_largest_values_are_among_those_measured_on() -> None:
    assert telling_samples([7, 7, 3, 7, 3, 5], 40, 4) >= {7, 3}
    assert len(telling_samples([7, 7, 3, 7, 3, 5], 40, 4)) == 4
    assert telling_samples([0, 1], 2, 8) == {0, 1}
    assert telling_samples([0], 1, 1) == {0}
