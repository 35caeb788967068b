"""Ranges in validation beside those of calibration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Array, model, normal, pipeline

import onnxq
from onnxq.observe import Extremes, Histogram, MinMax
from onnxq.qtype import QParams, QType
from onnxq.report import PassRecord, RangeRecord, Report
from onnxq.sample_checks import Clipping, compare_ranges, record_of, warn_of_ranges

U8A = QType.parse("u8a")
S8 = QType.parse("s8")


def layers() -> onnx.ModelProto:
    text = "(float[n,16] x) => (float[n,4] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"
    return model(text, w=np.eye(16, 32, dtype=np.float32), v=normal(32, 4, seed=1))


def uniform(n: int, low: float, high: float, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(low, high, (n, 16)).astype(np.float32)


def feeds(x: Array) -> list[dict[str, Array]]:
    return [{"x": row[None]} for row in x]


def record(
    calibration: list[Array],
    validation: list[Array],
    qtype: QType = U8A,
    codes: tuple[float, float] | None = None,
    synthesised: bool = False,
) -> RangeRecord:
    seen = MinMax()
    for x in calibration:
        seen.update(x)
    extremes = seen.result()
    params = QParams.from_range(*(codes or (extremes.low, extremes.high)), qtype)
    clipping = Clipping(*params.range, float(params.scale))
    for x in validation:
        clipping.update(x)
    return record_of("t", params, extremes, clipping, synthesised)


# ── one tensor ───────────────────────────────────────────────────────────────────────────────────


def test_the_share_is_that_of_the_values_no_code_reaches() -> None:
    validation = [uniform(1, -1, 3, seed) for seed in range(12)]
    found = record([uniform(1, -1, 2, seed) for seed in range(50, 90)], validation)
    values = np.concatenate(validation)
    step = (found.high - found.low) / 255
    expected = ((values > found.high + step) | (values < found.low - step)).mean()
    assert 0.2 < expected < 0.4
    assert found.validation_clipped == expected
    assert found.validation_high == values.max()
    assert found.calibration_high <= 2
    assert found.finding == "clipped"


@pytest.mark.parametrize("qtype", [U8A, S8, QType.parse("u4a")])
def test_what_calibration_itself_saw_is_not_clipped(qtype: QType) -> None:
    """However the zero point is rounded: the ends of the codes move by it."""
    for seed in range(20):
        seen = [normal(4, 50, seed=100 * seed + k) + 0.3 for k in range(6)]
        found = record(seen, seen, qtype)
        assert (found.validation_clipped, found.clipped_runs, found.finding) == (0, 0, "")


def test_findings() -> None:
    calibration = [uniform(1, 0, 1, seed) for seed in range(20)]
    like = [uniform(1, 0, 1, seed) for seed in range(30, 46)]
    far = np.full((1, 16), 9, np.float32)
    assert record(calibration, like).finding == ""
    assert record(calibration, [*like[:-1], like[-1] * 2]).finding == "wider"
    assert record(calibration, [x * 1.2 for x in like]).finding == "clipped"
    assert record(calibration, [x * 0.1 for x in like]).finding == "narrower"
    assert record(calibration, [x * 0.1 for x in like[:4]]).finding == ""  # too few to say
    alone = record([*calibration[:7], far, *calibration[7:]], like)
    assert (alone.finding, alone.set_by) == ("one sample", 7)


def test_one_sample_of_many_that_goes_a_little_beyond_is_chance() -> None:
    calibration = [uniform(1, 0, 1, seed) for seed in range(20)]
    like = [uniform(1, 0, 1, seed) for seed in range(30, 46)]
    found = record(calibration, [*like[:-1], np.full((1, 16), 1.2, np.float32)])
    assert found.validation_clipped > 0.05
    assert found.finding == ""


def test_codes_wider_than_what_was_seen_are_no_mismatch() -> None:
    """Probabilities, symmetric codes of positive values, and what shares a scale."""
    little = [uniform(1, 0, 0.1, seed) for seed in range(20)]
    assert record(little, little[:16], codes=(0, 1)).finding == ""
    assert record(little, little[:16], S8).finding == ""
    assert record(little, [-x for x in little[:16]], S8).finding == ""


def test_made_up_samples_name_nothing() -> None:
    calibration = [uniform(1, 0, 1, seed) for seed in range(20)]
    found = record(calibration, [9 * x for x in calibration], synthesised=True)
    assert found.validation_clipped > 0.5
    assert (found.finding, found.set_by) == ("", None)


def test_what_a_method_clips_by_choice_is_counted_in_calibration() -> None:
    seen = Histogram()
    values = [normal(1, 4000, seed=seed) for seed in range(10)]
    for x in values:
        seen.update(x)
    params = QParams.from_range(-1.5, 1.5, U8A)
    found = record_of("t", params, seen.result(), Clipping(*params.range, float(params.scale)))
    expected = (np.abs(values) > 1.5 + 3 / 255).mean()
    assert found.calibration_clipped == pytest.approx(expected, abs=0.005)
    assert found.calibration_high == np.max(values)


def test_infinite_and_missing_values() -> None:
    seen = Clipping(-1.0, 1.0, 0.1)
    for x in (np.zeros((0, 3)), np.array([0.5, np.inf, -np.inf, 0.0]), np.full(2, np.nan)):
        seen.update(x.astype(np.float32))
    assert (seen.seen_low, seen.seen_high) == (0, 0.5)
    assert (seen.outside, seen.values, seen.runs) == (2, 6, 2)


# ── a model ──────────────────────────────────────────────────────────────────────────────────────


def test_a_tensor_that_exceeds_its_range_is_named_with_its_share(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(layers(), path)
    calibration, unseen = uniform(60, -1, 1), uniform(16, -1, 2, seed=1)
    report = onnxq.quantize(
        path,
        samples={"x": np.concatenate([calibration, unseen])},
        limit=60,
        settings=["calibrate.method=minmax"],
        latency_check=False,
        write=False,
        threads=1,
    ).report
    found = {r.tensor: r for r in report.ranges}
    step = (found["x"].high - found["x"].low) / 255
    assert found["x"].validation_clipped == (unseen > found["x"].high + step).mean() > 0.3
    assert found["x"].finding == "clipped"
    assert found["x"].validation_high == unseen.max()
    assert report.ranges[0].finding
    (warning,) = [w for w in report.warnings if w.startswith("calibration saw too little")]
    assert repr(report.ranges[0].tensor) in warning
    assert f"{100 * report.ranges[0].validation_clipped:.2g} %" in warning
    assert "method=minmax" not in warning
    assert Report.from_json(report.to_json()) == report


def test_samples_alike_raise_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(layers(), path)
    report = onnxq.quantize(
        path, samples={"x": uniform(76, -1, 1)}, limit=60, latency_check=False, write=False
    ).report
    assert {r.tensor for r in report.ranges} >= {"x", "r"}
    assert not any(r.finding for r in report.ranges)
    assert not [w for w in report.warnings if w.startswith("calibration saw")]


def test_dynamic_and_made_up_runs_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(layers(), path)
    options = {"latency_check": False, "write": False}
    dynamic = onnxq.quantize(path, "int8-dynamic", samples={"x": uniform(30, -1, 1)}, **options)
    assert dynamic.report.ranges == []
    made_up = onnxq.quantize(path, **options).report
    assert made_up.ranges
    assert not any(r.finding for r in made_up.ranges)


def test_tensors_in_bodies_are_compared() -> None:
    text = """(float[n,16] x, bool choice) => (float[n,4] y) {
        y = If (choice) <
            then_branch = yes () => (float[n,4] a) {
                h = MatMul (x, w)
                r = Relu (h)
                a = MatMul (r, v)
            },
            else_branch = no () => (float[n,4] b) { b = MatMul (x, u) }
        >
    }"""
    weights = {"w": np.eye(16, 32), "v": normal(32, 4), "u": normal(16, 4)}
    source = model(text, **{name: w.astype(np.float32) for name, w in weights.items()})
    given = [f | {"choice": np.array(k % 2 == 0)} for k, f in enumerate(feeds(uniform(20, -1, 1)))]
    result = pipeline(source, given)
    wide = [feed | {"x": 1.3 * feed["x"]} for feed in given]
    found = {r.tensor: r for r in compare_ranges(result, wide, synthesised=False)}
    assert found["r"].finding == "clipped"
    taken = np.stack([np.maximum(feed["x"], 0) for feed in wide[::2]])
    assert found["r"].validation_high == taken.max()
    step = found["r"].high / 255
    assert (
        found["r"].validation_clipped == (taken > found["r"].high + step).mean() / 2
    )  # r is (32,)


def test_what_stays_float_after_all_is_left_out() -> None:
    result = pipeline(layers(), feeds(uniform(20, -1, 1)))
    result.context.plan.clear()
    assert compare_ranges(result, feeds(uniform(4, -1, 1)), synthesised=False) == []


# ── the warning ──────────────────────────────────────────────────────────────────────────────────

BASE = RangeRecord("t", -1, 1, -1, 1, 0.0, -1, 1, 0.0, 0)


def warned(*records: RangeRecord, method: str = "percentile") -> str:
    report = Report(ranges=list(records))
    report.passes.append(PassRecord("calibrate", {"method": method}, 1, 0.0, 0.0))
    warn_of_ranges(report)
    return " ".join(report.warnings)


def test_one_line_names_the_worst_and_how_many_more() -> None:
    clipped = replace(
        BASE,
        tensor="a",
        validation_clipped=0.031,
        clipped_runs=9,
        validation_high=3,
        finding="clipped",
    )
    text = warned(clipped, replace(clipped, tensor="b"), replace(clipped, tensor="c"))
    assert "'a' clips 3.1 % of its values" in text
    assert "2 more tensors" in text
    assert "--set calibrate.method=minmax" in text
    assert "method=minmax" not in warned(clipped, method="minmax")
    assert "1 more tensor like it" in warned(clipped, clipped)


def test_what_a_method_clips_by_choice_is_no_warning() -> None:
    chosen = replace(
        BASE, validation_clipped=0.03, calibration_clipped=0.025, clipped_runs=9, finding="clipped"
    )
    assert warned(chosen) == ""
    assert warned(replace(chosen, calibration_clipped=0.001))


def test_a_single_wide_sample_is_no_warning() -> None:
    assert warned(replace(BASE, clipped_runs=1, validation_high=2.5, finding="wider")) == ""
    assert warned(replace(BASE, clipped_runs=3, validation_high=2.5, finding="wider"))


def test_idle_codes_are_a_warning() -> None:
    idle = replace(BASE, validation_low=-0.1, validation_high=0.1, finding="narrower")
    assert "calibration saw more than there is: the codes of 't'" in warned(idle)


def test_extremes_of_few_samples_set_no_range_alone() -> None:
    params = QParams.from_range(0, 9, U8A)
    assert record_of("t", params, Extremes(0.0, 9.0), Clipping(0.0, 9.0, 0.1)).set_by is None
