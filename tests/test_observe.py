import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Array, normal
from hypothesis import given
from hypothesis import strategies as st

from onnxq.observe import BINS, Histogram, HistogramResult, Loudness, MinMax, Moments, Observer
from onnxq.observe_channels import ChannelExtremes, Halves, Rows

TENSORS = [normal(*shape, seed=k, scale=10.0 ** (k - 2)) for k, shape in enumerate(
    [(1, 3, 4), (1, 5, 4), (1, 7, 4), (2, 1, 4), (1, 1, 4)]
)]  # fmt: skip
MAKERS: dict[str, Callable[[], Observer]] = {
    "MinMax": MinMax,
    "Histogram": Histogram,
    "Moments": lambda: Moments(-1),
    "ChannelExtremes": lambda: ChannelExtremes(-1),
}
orders = st.permutations(range(len(TENSORS)))


def results(observer: Observer) -> list[Array]:
    """What is the same however the tensors came; which of them was the loudest is not."""
    found = observer.result()
    if isinstance(found, HistogramResult):
        return [
            np.asarray(v, np.float64) for v in (found.counts, found.limit, found.low, found.high)
        ]
    return [np.asarray(value, np.float64) for value in found]


def assert_same(left: Observer, right: Observer) -> None:
    for a, b in zip(results(left), results(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def fed(make: Callable[[], Observer], tensors: list[Array]) -> Any:
    observer = make()
    for tensor in tensors:
        observer.update(tensor)
    return observer


@pytest.mark.parametrize("kind", MAKERS)
@given(orders, st.integers(0, len(TENSORS)))
def test_halves_merged_are_the_whole_in_any_order(kind: str, order: list[int], cut: int) -> None:
    make, tensors = MAKERS[kind], [TENSORS[k] for k in order]
    left, right = fed(make, tensors[:cut]), fed(make, tensors[cut:])
    left.merge(right)
    assert_same(left, fed(make, TENSORS))


@pytest.mark.parametrize("kind", MAKERS)
def test_streaming_is_the_same_as_all_at_once(kind: str) -> None:
    """Tensors of 3, 5 and 7 rows, as sentences are."""
    flat = np.concatenate([t.reshape(-1, 4) for t in TENSORS])
    assert_same(fed(MAKERS[kind], TENSORS), fed(MAKERS[kind], [flat]))


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_seen_and_empty_tensors_are_harmless(kind: str) -> None:
    empty, observer = MAKERS[kind](), fed(MAKERS[kind], TENSORS)
    empty.update(np.zeros((0, 4), np.float32))
    before = results(observer)
    observer.merge(empty)
    assert all(np.isfinite(value).all() for value in results(empty))
    for a, b in zip(results(observer), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["MinMax", "Histogram"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(kind: str, bad: float) -> None:
    tensor = TENSORS[0].copy()
    tensor[0, 1, 2] = bad
    with pytest.raises(FloatingPointError):
        MAKERS[kind]().update(tensor)


def test_extremes_are_exact() -> None:
    flat = np.concatenate([t.ravel() for t in TENSORS])
    for kind in (MinMax, Histogram):
        found = fed(kind, TENSORS).result()
        assert (found.low, found.high) == (flat.min(), flat.max())


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30))
def test_widening_loses_no_count_and_no_place(values: list[float]) -> None:
    one_by_one = Histogram()
    for value in values:
        one_by_one.update(np.array([value], np.float32))
    found = one_by_one.result()
    assert found.counts.sum() == len(values)
    assert found.limit >= max(map(abs, values))
    width = 2 * found.limit / BINS
    seen = np.repeat(found.centers, found.counts)
    assert (np.abs(seen - np.sort(np.array(values))) <= width * (0.5 + 1e-3)).all()


def test_a_histogram_is_that_of_numpy() -> None:
    x = normal(50_000)
    found = fed(Histogram, [x[:20_000], x[20_000:]]).result()
    expected, _ = np.histogram(x, BINS, (-found.limit, found.limit))
    assert found.limit <= 2 * np.abs(x).max()
    assert np.abs(found.counts - expected).sum() <= 10  # values on an edge, in float32


def test_a_subsample_of_a_large_tensor_keeps_its_extremes_and_its_shape() -> None:
    x = normal(64, 64, 256)
    x[5, 6, 7] = 77
    found = fed(Histogram, [x]).result()
    assert found.high == 77
    assert found.counts.sum() < x.size / 8
    cumulative = np.cumsum(found.counts) / found.counts.sum()
    for quantile in (0.1, 0.5, 0.9):
        seen = found.centers[np.searchsorted(cumulative, quantile)]
        assert abs(seen - np.quantile(x, quantile)) < 0.15


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_moments_are_the_mean_and_variance_along_an_axis(axis: int) -> None:
    tensors = [normal(4, 4, 4, seed=k) + 1 for k in range(3)]
    mean, variance = fed(lambda: Moments(axis), tensors).result()
    whole = np.stack([np.moveaxis(t, axis, 0).reshape(4, -1) for t in tensors], axis=1)
    np.testing.assert_allclose(mean, whole.mean(axis=(1, 2), dtype=float), rtol=1e-5)
    np.testing.assert_allclose(variance, whole.var(axis=(1, 2), dtype=float), rtol=1e-5)


# ── loudness ─────────────────────────────────────────────────────────────────────────────────────

TENTH = 10**0.005  # half of the tenth of a decibel to which a level is rounded


def levels(seed: int, count: int) -> list[Array]:
    """Samples of many lengths and of all levels from -50 dB to 50 dB."""
    rng = np.random.default_rng(seed)
    return [
        normal(1, int(rng.integers(1, 90)), 4, seed=k, scale=10.0 ** rng.uniform(-2.5, 2.5))
        for k in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 50, 51])
def test_loudness_is_the_median_and_the_mean_of_each_samples_mean_square(count: int) -> None:
    tensors = levels(count, count)
    squares = sorted(float(np.square(t, dtype=np.float64).mean()) for t in tensors)
    median, mean = fed(Loudness, tensors).result()
    middle = squares[(count - 1) // 2]  # of an even number the lower of the two
    assert middle / TENTH <= median <= middle * TENTH
    assert np.mean(squares) / TENTH <= mean <= np.mean(squares) * TENTH


@pytest.mark.parametrize("cut", [0, 1, 20, 40])
def test_loudness_of_two_halves_merged_is_that_of_one_run(cut: int) -> None:
    tensors = levels(7, 20) * 2
    left, right = fed(Loudness, tensors[:cut]), fed(Loudness, tensors[cut:])
    left.merge(right)
    assert left == fed(Loudness, tensors)
    assert left.result() == fed(Loudness, tensors).result()


def test_silence_has_no_loudness_and_does_not_count() -> None:
    silence = np.zeros((1, 3, 4), np.float32)
    assert fed(Loudness, []).result() == (0, 0)
    assert fed(Loudness, [silence, silence[:, :0]]).result() == (0, 0)
    one = np.full((2, 2), 2, np.float32)
    median, mean = fed(Loudness, [silence, one, silence, silence]).result()
    assert median == mean == pytest.approx(4, rel=0.012)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_loudness_of_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(FloatingPointError):
        Loudness().update(np.array([1, bad], np.float32))


def test_loudness_of_large_values_and_of_tiny_ones_overflows_nowhere() -> None:
    for value in (1e-30, 3e38):
        median, _ = fed(Loudness, [np.full(7, value, np.float32)]).result()
        assert median == pytest.approx(value**2, rel=0.012)


def test_loudness_of_a_long_sample_is_that_of_a_part_that_visits_every_channel() -> None:
    x = normal(512, 1024) * (1 + np.arange(1024, dtype=np.float32))
    median, _ = fed(Loudness, [x]).result()
    assert median == pytest.approx(float(np.square(x, dtype=np.float64).mean()), rel=0.05)


# What is kept of 64 samples is what is kept of 4.

MEMORY = """
import sys
import numpy as np
from graphs import model, normal, context
from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.passes import Assign, Calibrate, RoundToNearest
from onnxq.pipeline import peak_mb
from onnxq.samples import input_specs, open_samples

nodes, channels = [], 16
for k in range(12):
    nodes.append(f"c{k} = Conv <pads = [1,1,1,1]> (t{k}, w{k}) t{k + 1} = Relu (c{k})")
kind = f"float[1,{channels},128,128]"
weights = {f"w{k}": normal(channels, channels, 3, 3, scale=0.1, seed=k) for k in range(12)}
made = model(f"({kind} t0) => ({kind} t12) {{ {' '.join(nodes)} }}", **weights)

def calibrate(n):
    def feeds():
        for k in range(n):
            yield {"t0": normal(1, channels, 128, 128, seed=k)}
    ctx = context(samples=open_samples(feeds, input_specs(made)))
    graph = g.load(made)
    g.name_nodes(graph)
    Assign().apply(graph, ctx)
    steps = [Calibrate(method=sys.argv[1]), RoundToNearest()]
    wanted = dict(pair for step in steps for pair in step.observe(graph, ctx).items())
    assert len(wanted) >= 13
    ctx.stats |= observe(graph, wanted, ctx.samples, threads=1)
    for step in steps:
        step.apply(graph, ctx)
    return peak_mb()

print(calibrate(4), calibrate(64))
"""


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_peak_memory_does_not_grow_with_the_samples(method: str) -> None:
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, method], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    four, sixty_four = map(float, done.stdout.split())
    assert sixty_four <= 1.1 * four, f"{four:.0f} MiB at 4 samples, {sixty_four:.0f} at 64"


def test_ranges_of_channels_are_those_along_their_axis() -> None:
    seen = ChannelExtremes(1)
    parts = [normal(2, 3, 5, seed=k) for k in range(4)]
    for x in parts:
        seen.update(x)
    low, high = seen.result()
    whole = np.concatenate(parts)
    np.testing.assert_array_equal(low, whole.min(axis=(0, 2)))
    np.testing.assert_array_equal(high, whole.max(axis=(0, 2)))
    with pytest.raises(FloatingPointError):
        seen.update(np.full((1, 3, 1), np.nan, np.float32))


@pytest.mark.parametrize("sizes", [[5, 3], [40], [7] * 30, [1] * 100])
def test_rows_are_kept_at_even_distances(sizes: list[int]) -> None:
    whole = normal(sum(sizes), 4)
    seen = Rows(-1, keep=16)
    for part in np.split(whole, np.cumsum(sizes)[:-1]):
        seen.update(part[None])
    rows, low, high = seen.result()
    assert len(rows) == min(len(whole), len(rows))
    assert 8 <= len(rows) <= 16
    stride = next(k for k in (1, 2, 4, 8, 16) if len(whole[::k]) <= 16)
    np.testing.assert_array_equal(rows, whole[::stride])
    np.testing.assert_array_equal(low, whole.min(axis=0))
    np.testing.assert_array_equal(high, whole.max(axis=0))


def test_rows_that_are_merged_are_no_more_than_are_kept() -> None:
    one, two = Rows(-1, keep=8), Rows(-1, keep=8)
    for k in range(10):
        one.update(normal(3, 4, seed=k))
        two.update(normal(9, 4, seed=100 + k))
    one.merge(two)
    rows, low, _ = one.result()
    assert 4 <= len(rows) <= 8
    assert np.all(low <= rows.min(axis=0))


def test_halves_take_turns_however_they_are_split() -> None:
    parts = [np.full((2, 1), k, np.float32) for k in range(7)]
    whole = Halves(ChannelExtremes(-1), ChannelExtremes(-1))
    for part in parts:
        whole.update(part)
    for cut in range(8):
        one, two = (Halves(ChannelExtremes(-1), ChannelExtremes(-1)) for _ in range(2))
        for part in parts[:cut]:
            one.update(part)
        for part in parts[cut:]:
            two.update(part)
        one.merge(two)
        assert [r.high.tolist() for r in one.result()] == [[6.0], [5.0]]
    assert [r.high.tolist() for r in whole.result()] == [[6.0], [5.0]]
