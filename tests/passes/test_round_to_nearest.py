import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward import conv_bn_relu6 as net
from graphs import Array, normal, pipeline
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxq.passes.solve.round_to_nearest import hold_pairs, round_to_nearest, worst_pair

from onnxq import graph as g
from onnxq.observe import ChannelMoments
from onnxq.qtype import QTensor, QType, quantize_weight, weight_scale

SCRIPT = Path(__file__).parents[1] / "exact_on_this_cpu.py"
S8 = QType.parse("s8:channel")
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-4, 4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3),
)


def row_errors(weight: Array, approximation: Array) -> Array:
    return np.sum((weight.astype(np.float64) - approximation) ** 2, axis=1)


# ── formats ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "spec", ["s8", "s8a", "u8", "u8a", "s8:channel", "u8a:channel", "s4:4", "u4a:4", "s8:16", "s2"]
)
def test_without_a_bound_every_weight_becomes_its_nearest_code(spec: str) -> None:
    weight, qtype = normal(6, 10), QType.parse(spec)
    solved = round_to_nearest(weight, qtype)
    group = qtype.group or weight.size
    for out in range(6):
        for column in range(10):
            if qtype.group is None:
                scale, zero = solved.scale, solved.zero
                shared = weight
            elif qtype.group == -1:
                scale, zero = solved.scale[out], solved.zero[out]
                shared = weight[out]
            else:
                block = column // group
                scale, zero = solved.scale[out, block], solved.zero[out, block]
                shared = weight[out, block * group : (block + 1) * group]
            low, high = min(shared.min(), 0), max(shared.max(), 0)
            levels = np.arange(qtype.qmin, qtype.qmax + 1)
            reals = float(scale) * (levels - int(zero))
            step = max(-low, high) / (qtype.qmax - qtype.middle)
            step = step if qtype.symmetric else (high - low) / (qtype.qmax - qtype.qmin)
            if qtype.blocked and qtype.symmetric:  # all codes, the sign of the farthest weight
                step = -shared[np.abs(shared).argmax()] / -qtype.qmin
            assert float(scale) == pytest.approx(step, rel=2**-11 if qtype.blocked else 1e-6)
            best = levels[np.argmin(np.abs(reals - weight[out, column]))]
            assert int(solved.codes[out, column]) == best


# ── under a bound on pairs ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spec", ["s8", "s8:channel"])
@given(matrices, st.data())
def test_no_pair_ever_exceeds_the_bound(spec: str, weight: Array, data: Any) -> None:
    per_input = hnp.arrays(np.float64, (1, weight.shape[1]), elements=st.floats(0, 1e6))
    moments = data.draw(st.none() | st.builds(ChannelMoments, per_input, per_input))
    solved = round_to_nearest(weight, QType.parse(spec), pair_limit=128, moments=moments)
    assert worst_pair(solved) <= 128
    assert solved.codes.dtype == np.int8
    assert np.abs(solved.codes.astype(int)).max() <= 127


@given(matrices)
def test_a_channel_without_a_broken_pair_is_rounded_or_better(weight: Array) -> None:
    plain = round_to_nearest(weight, S8)
    safe = round_to_nearest(weight, S8, pair_limit=128)
    before = row_errors(weight, plain.dequantize())
    after = row_errors(weight, safe.dequantize())
    pairs = np.pad(plain.codes.astype(int), ((0, 0), (0, weight.shape[1] % 2)))
    held = (np.abs(pairs.reshape(len(weight), -1, 2).sum(axis=2)) <= 128).all(axis=1)
    assert (after[held] <= before[held] * (1 + 1e-6) + 1e-12).all()
    same_scale = held & (safe.scale == plain.scale)
    np.testing.assert_array_equal(safe.codes[same_scale], plain.codes[same_scale])


def test_codes_are_plain_rounding_at_the_chosen_scale_except_in_broken_pairs() -> None:
    weight = normal(64, 40)
    safe = round_to_nearest(weight, S8, pair_limit=128)
    nearest = quantize_weight(weight, safe.scale, safe.zero, S8).codes.astype(int)
    broken = np.abs(nearest.reshape(64, -1, 2).sum(axis=2)) > 128
    assert 0 < broken.sum() < broken.size / 20
    kept = ~np.repeat(broken, 2, axis=1)
    np.testing.assert_array_equal(safe.codes[kept], nearest[kept])
    moved = safe.codes.astype(int).reshape(64, -1, 2).sum(axis=2)[broken]
    assert set(np.abs(moved)) == {128}  # no pair gives up more than it must


@given(matrices)
def test_never_worse_than_giving_up_a_bit(weight: Array) -> None:
    base, zero = weight_scale(weight, S8)
    coarse = quantize_weight(weight, (base * np.float32(127 / 64)).astype(np.float32), zero, S8)
    safe = round_to_nearest(weight, S8, pair_limit=128)
    limit = row_errors(weight, coarse.dequantize())
    assert (row_errors(weight, safe.dequantize()) <= limit * (1 + 1e-5) + 1e-12).all()


def test_on_trained_like_weights_it_costs_far_less_than_a_bit() -> None:
    """The claim that it is made for: pairs at the bound are rare, a bit is four times the error."""
    weight = normal(64, 256)
    exact = row_errors(weight, round_to_nearest(weight, S8).dequantize()).sum()
    safe = round_to_nearest(weight, S8, pair_limit=128)
    base, zero = weight_scale(weight, S8)
    coarse = quantize_weight(weight, base * np.float32(2), zero, S8).dequantize()
    assert row_errors(weight, safe.dequantize()).sum() < 2.0 * exact
    assert row_errors(weight, coarse).sum() > 3.5 * exact


@given(hnp.arrays(np.float64, 2, elements=st.floats(64.5, 127)), st.floats(0.01, 100))
def test_a_broken_pair_moves_to_the_best_codes(real: Array, ratio: float) -> None:
    for sign in (1, -1):
        w, m = sign * real[None], np.array([[1.0, ratio]])
        held = hold_pairs(np.rint(w), w, m, 128)
        candidates = sign * np.array([(c, 128 - c) for c in range(1, 128)])
        errors = (m * (candidates - w) ** 2).sum(axis=1)
        assert abs(int(held.sum())) <= 128
        assert float((m * (held - w) ** 2).sum()) <= errors.min() * (1 + 1e-9)


def test_the_scale_is_chosen_for_the_error_that_the_output_sees() -> None:
    """With E[xxᵀ] = diag(σ²) + μμᵀ, against drawn inputs, for inputs with a large mean."""
    rng = np.random.default_rng(0)
    weight = normal(16, 32)
    mean, deviation = rng.uniform(0, 3, 32), rng.uniform(0.1, 1, 32)
    moments = ChannelMoments(mean[None], deviation[None] ** 2)
    x = rng.normal(mean, deviation, (4000, 32))

    def output_error(solved: QTensor) -> float:
        return float(np.mean((x @ (solved.dequantize() - weight).T) ** 2))

    blind = round_to_nearest(weight, S8, pair_limit=128)
    seeing = round_to_nearest(weight, S8, pair_limit=128, moments=moments)
    assert output_error(seeing) < 0.5 * output_error(blind)


@pytest.mark.parametrize("spec", ["u8", "s8a", "s8:4"])
def test_a_format_that_cannot_hold_the_bound_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="pair-safe"):
        round_to_nearest(normal(2, 8), QType.parse(spec), pair_limit=128)


def test_the_pass_follows_the_plan_and_what_it_saw_of_the_inputs() -> None:
    case = net()
    result = pipeline(case.model, case.feeds)
    ctx = result.context
    weights = {
        n.name: g.weight_view(n) for n in result.prepared.nodes if g.weight_view(n) is not None
    }
    assert len(weights) == 2
    for view in weights.values():
        solved = ctx.weights[view.tensor.name]
        assert solved.qtype == S8
        assert worst_pair(solved) <= 128
        seen = ctx.stats[f"{view.node.inputs[0].name}#moments-3"]
        moments = ChannelMoments(*(view.column_statistic(values) for values in seen))
        expected = round_to_nearest(view.matrix(), S8, pair_limit=128, moments=moments)
        np.testing.assert_array_equal(solved.codes, expected.codes)


# ── through the real runtime ─────────────────────────────────────────────────────────────────────

NATIVE = (sys.executable,)
WITHOUT_VNNI = ("qemu-x86_64", "-cpu", "Haswell", sys.executable)


@functools.cache
def measured(python: tuple[str, ...]) -> dict[str, Any]:
    if shutil.which(python[0]) is None:
        pytest.skip(f"{python[0]} is not installed: no other CPU to try than this one")
    done = subprocess.run([*python, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("python", [NATIVE, WITHOUT_VNNI], ids=["this CPU", "AVX2 without VNNI"])
def test_the_worst_activations_give_exactly_what_integers_give(python: tuple[str, ...]) -> None:
    found = measured(python)
    assert len(found["cpu"]) == 14
    assert set(found["cpu"].values()) == {0.0}, found["cpu"]


@pytest.mark.parametrize("python", [NATIVE, WITHOUT_VNNI], ids=["this CPU", "AVX2 without VNNI"])
def test_256_ones_by_256_ones_are_256(python: tuple[str, ...]) -> None:
    for preset, value in measured(python)["ones"].items():
        assert abs(value - 256) <= 1, (preset, value)


@pytest.mark.parametrize("python", [NATIVE, WITHOUT_VNNI], ids=["this CPU", "AVX2 without VNNI"])
def test_rounding_without_the_bound_does_saturate_there(python: tuple[str, ...]) -> None:
    """So that the two tests above can fail."""
    found = measured(python)
    if not found["saturates"]:
        pytest.skip("this CPU adds products in 32 bits: it cannot saturate")
    exact = {name for name, error in found["cpu-vnni"].items() if error == 0}
    assert exact == {"conv 3x3 depthwise"}  # whose kernel adds in 32 bits everywhere


def test_the_other_cpu_does_saturate() -> None:
    assert measured(WITHOUT_VNNI)["saturates"]
