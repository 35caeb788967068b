import numpy as np
import pytest
from awkward import ZOO, Case, attention, matmul, moves
from graphs import Array, normal, pipeline, run, samples_of, sqnr
from onnxq.passes.solve.calibrate import (
    CANDIDATES,
    Calibrate,
    Method,
    kl_loss,
    mse_loss,
    percentile_range,
    search_range,
)

from onnxq.observe import Histogram, HistogramResult
from onnxq.qtype import QParams, QType

U8 = QType.parse("u8a")


def histogram(x: Array) -> HistogramResult:
    seen = Histogram()
    seen.update(np.asarray(x, np.float32))
    return seen.result()


BELL = normal(60_000)
HEAVY = np.concatenate([BELL, np.float32([-30, 60])])
RELU = np.maximum(BELL, 0)


@pytest.mark.parametrize("x", [BELL, HEAVY, RELU], ids=["bell", "outliers", "relu"])
def test_percentile_100_is_min_max(x: Array) -> None:
    found = percentile_range(histogram(x), 100)
    assert found == (x.min(), x.max())
    assert found == Calibrate("minmax").range(histogram(x), U8)


@pytest.mark.parametrize("percent", [99.99, 99.9, 99.0, 90.0])
def test_a_percentile_leaves_half_its_tail_on_either_side(percent: float) -> None:
    seen = histogram(HEAVY)
    low, high = percentile_range(seen, percent)
    width = 2 * seen.limit / len(seen.counts)
    tail = (100 - percent) / 2
    expected = np.percentile(HEAVY, [tail, 100 - tail])
    assert np.abs([low, high] - expected).max() <= width
    assert low > HEAVY.min()
    assert high < HEAVY.max()


@pytest.mark.parametrize("spec", ["u8a", "u4a", "s8", "s4"])
@pytest.mark.parametrize("x", [BELL, HEAVY, RELU], ids=["bell", "outliers", "relu"])
def test_mse_is_the_least_of_all_that_were_tried(x: Array, spec: str) -> None:
    """Both ends shrunk together by brute force, and each end by itself around the result."""
    qtype, seen = QType.parse(spec), histogram(x)

    def naive(low: float, high: float) -> float:
        params = QParams.from_range(low, high, qtype)
        total = 0.0
        for centre, count in zip(seen.centers, seen.counts, strict=True):
            if count:
                code = np.clip(
                    np.rint(centre / float(params.scale)) + int(params.zero), qtype.qmin, qtype.qmax
                )
                total += count * ((code - int(params.zero)) * float(params.scale) - centre) ** 2
        return float(total / seen.counts.sum())

    low, high = search_range(seen, qtype, "mse")
    found = naive(low, high)
    used = seen.counts > 0
    x_used, weight = seen.centers[used], seen.counts[used].astype(np.float64)
    assert mse_loss(x_used, weight, low, high, qtype) == pytest.approx(found, rel=1e-9)
    for part in np.arange(1, CANDIDATES + 1) / CANDIDATES:
        both = mse_loss(x_used, weight, seen.low * part, seen.high * part, qtype)
        assert found <= both * (1 + 1e-12)
        assert found <= mse_loss(x_used, weight, low, high * part, qtype) * (1 + 1e-12)
    assert seen.low <= low
    assert high <= seen.high


def test_cutting_an_outlier_is_what_mse_and_entropy_are_for() -> None:
    four = QType.parse("u4a")
    for method in ("mse", "entropy"):
        low, high = search_range(histogram(HEAVY), four, method)
        assert -8 < low < -1.5
        assert 1.5 < high < 8
    x = BELL[:5000].astype(np.float64)
    errors = {}
    for method in ("mse", "minmax"):
        params = QParams.from_range(*Calibrate(method).range(histogram(HEAVY), four), four)
        codes = np.clip(np.rint(x / float(params.scale)) + int(params.zero), 0, 15)
        errors[method] = np.mean(((codes - int(params.zero)) * float(params.scale) - x) ** 2)
    assert errors["mse"] < errors["minmax"] / 5


def test_kl_is_zero_for_what_rounding_keeps_and_grows_with_what_clipping_moves() -> None:
    x, flat = np.linspace(-1, 1, 512), np.ones(512)
    whole = kl_loss(x, flat, -1, 1, U8)
    assert whole == pytest.approx(0, abs=1e-9)
    losses = [kl_loss(x, flat, -part, part, U8) for part in (1, 0.9, 0.8, 0.7)]
    assert losses == sorted(losses)
    assert losses[1] > 0.001


def test_zeros_of_relu_do_not_decide_the_entropy_range() -> None:
    seen, few = histogram(np.abs(BELL)), histogram(np.abs(BELL))
    few.counts[len(few.counts) // 2] += 10_000_000
    assert search_range(few, U8, "entropy") == search_range(seen, U8, "entropy")


@pytest.mark.parametrize("value", [3.0, -3.0])
@pytest.mark.parametrize("method", ["percentile", "entropy", "mse", "minmax"])
def test_one_value_alone_is_its_own_range(method: Method, value: float) -> None:
    low, high = Calibrate(method).range(histogram(np.full(9, value)), U8)
    reached = QParams.from_range(low, high, U8).range
    assert sum(reached) == pytest.approx(value, rel=1e-3)


# ── in a pipeline ────────────────────────────────────────────────────────────────────────────────


def truth(case: Case, name: str) -> Array:
    """A tensor of the float model over all samples, flat."""
    import onnx

    shown = onnx.ModelProto()
    shown.CopyFrom(case.model)
    shown.graph.output.append(onnx.ValueInfoProto(name=name))
    return np.concatenate([run(shown, f)[name].ravel() for f in samples_of(case.model, case.feeds)])


@pytest.mark.parametrize("make", [matmul, attention])
def test_min_max_ranges_over_lengths_3_5_7_are_those_of_all_samples(make: object) -> None:
    case = make()  # type: ignore[operator]
    result = pipeline(case.model, case.feeds, settings=["calibrate.method=minmax"])
    assert result.context.activations
    for name, params in result.context.activations.items():
        values = truth(case, name)
        expected = QParams.from_range(float(values.min()), float(values.max()), U8)
        assert (params.scale, params.zero) == (expected.scale, expected.zero), name


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_every_method_calibrates_a_whole_model(method: str) -> None:
    case = matmul()
    settings = [f"calibrate.method={method}"]
    result = pipeline(case.model, case.feeds, settings=settings)
    for params in result.context.activations.values():
        assert 0 < float(params.scale) < 1
    feed = case.feeds[0]
    exact, rounded = run(case.model, feed)["y"], run(result.graph, feed)["y"]
    assert sqnr(rounded, exact) > (18 if method == "entropy" else 30)  # which cuts most, of so few


def test_what_only_moves_values_keeps_their_scale() -> None:
    case = moves()
    result = pipeline(case.model, case.feeds)
    params = result.context.activations
    assert {"r", "p", "a", "b", "t", "f"} <= set(params)
    for name in ("p", "a", "b"):
        assert params[name] is params["r"]
    for name in ("t", "f"):
        assert params[name] is params["j"]


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_range_that_one_sample_sets_is_named_with_the_sample(method: str) -> None:
    case = matmul()
    feeds = [*case.feeds, *case.feeds]
    feeds[5] = {"x": feeds[5]["x"] * np.float32(50)}
    settings = [f"calibrate.method={method}"]
    warnings = pipeline(case.model, feeds, settings=settings).report.warnings
    assert any("sample 5 alone sets the range of 'x'" in warning for warning in warnings)
    assert not pipeline(case.model, case.feeds, settings=settings).report.warnings


def test_probabilities_of_codes_keep_the_range_that_they_may_take() -> None:
    """An integer Softmax wraps around beyond its scale; a float one does not."""
    case = ZOO["softmax_of_codes"]()
    ranges = pipeline(case.model, case.feeds).context.activations
    assert {n: np.round(p.range, 3).tolist() for n, p in ranges.items() if n in "stu"} == {
        "u": [0.0, 1.0]
    }
    excluded = pipeline(
        case.model, case.feeds, settings=["assign.exclude=Conv"]
    ).context.activations
    assert 0.1 < excluded["u"].range[1] < 0.999


def test_a_softmax_of_codes_does_not_wrap_where_it_is_surer_than_in_the_samples() -> None:
    case = ZOO["softmax_of_codes"]()
    result = pipeline(case.model, [{"x": feed["x"] / 4} for feed in case.feeds])
    surer = {"x": case.feeds[0]["x"]}
    assert sqnr(run(result.graph, surer)["y"], run(result.graph, surer, False)["y"]) > 25
