"""What a report has of single layers."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import feeds_of, model, normal, pipeline
from rich.console import Console

import onnxq
from onnxq.details import MOST_NEIGHBOURS, few, record_details, weight_record
from onnxq.distribution import coarser, distribution
from onnxq.layers import record_layers
from onnxq.observe import Histogram
from onnxq.qtype import QTensor, QType, quantize_weight, weight_scale
from onnxq.report import Report
from onnxq.show_samples import show_ranges

TWO = "(float[n,8] x) => (float[n,4] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"


def codes(weight: np.ndarray, text: str, shrink: float = 1.0) -> QTensor:
    qtype = QType.parse(text)
    scale, zero = weight_scale(weight, qtype)
    return quantize_weight(weight, (scale * shrink).astype(np.float32), zero, qtype)


def test_every_value_is_counted_once() -> None:
    found = distribution(values := normal(50, 40))
    assert sum(found.counts) == values.size
    assert (found.low, found.high) == (values.min(), values.max())


def test_a_coarser_histogram_counts_the_same_values_where_they_are() -> None:
    fine, values = Histogram(), normal(4000, seed=3) + 2
    fine.update(values)
    seen = fine.result()
    found = coarser(seen.counts, -seen.limit, seen.limit)
    edges = np.linspace(found.low, found.high, len(found.counts) + 1)
    assert len(found.counts) <= 64
    assert sum(found.counts) == values.size
    assert found.low <= values.min() <= found.low + 0.1
    expected = np.histogram(values, edges)[0]
    assert np.abs(expected - found.counts).sum() <= 4  # float32 rounding at the edges


@pytest.mark.parametrize("text", ["s8:channel", "s8", "u8a:channel", "s4:16", "u4a:16"])
def test_the_share_that_clips_is_that_of_what_rounding_moves_far(text: str) -> None:
    weight = normal(12, 40, seed=1)
    made = codes(weight, text, shrink=0.5)
    rounding = np.abs(weight - made.dequantize())
    group = made.qtype.group if made.qtype.blocked else None
    scale = np.abs(made.scale if made.scale.ndim else made.scale.reshape(1, 1))
    wide = np.repeat(scale, group, axis=1)[:, :40] if group else scale.reshape(-1, 1)
    expected = (rounding > wide / 2 * 1.0001).mean()
    found = weight_record("w", weight, made)
    assert found.clipped == pytest.approx(expected, abs=1e-3)
    assert found.clipped > 0.05
    assert weight_record("w", weight, codes(weight, text)).clipped <= 0.01
    whole = made.dequantize()
    assert found.low is not None
    assert found.high is not None
    assert found.low <= whole.min() + 1e-6
    assert found.high >= whole.max() - 1e-6


def test_scales_are_those_of_the_channels() -> None:
    weight = normal(12, 40, seed=1)
    made = codes(weight, "s8:channel")
    assert weight_record("w", weight, made).scales == pytest.approx(made.scale.tolist())
    assert len(weight_record("w", weight, codes(weight, "s8")).scales) == 1
    blocks = codes(weight, "s4:16")
    assert weight_record("w", weight, blocks).scales == pytest.approx(
        np.abs(blocks.scale).max(axis=1)
    )


def test_of_many_scales_the_largest_of_neighbours_are_kept() -> None:
    scales = np.random.default_rng(0).uniform(size=1000)
    kept = few(scales)
    assert len(kept) <= 64
    assert max(kept) == scales.max()


def test_a_layer_has_its_neighbours_inputs_and_weight() -> None:
    made = model(TWO, w=normal(8, 16), v=normal(16, 4, seed=1))
    report = quantized(made, details=True)
    first, second = (layer for layer in report.layers if layer.op == "MatMul")
    assert first.after
    assert first.name in second.before or set(first.after) & set(second.before)
    assert first.inputs == ["x"]
    assert [weight.channels for weight in first.weights] == [16]
    known = {record.tensor: record for record in report.ranges}
    assert all(known[name].values for layer in (first, second) for name in layer.inputs)


def test_of_a_recurrent_layer_both_weights_are_shown() -> None:
    case = ZOO["lstm"]()
    result = pipeline(case.model, case.feeds, "int8-dynamic")
    record_layers(result, result.report)
    record_details(result, result.report)
    (found,) = (layer.weights for layer in result.report.layers if layer.op == "LSTM")
    assert [weight.name for weight in found] == ["w", "r"]


PRESETS = ("int8-static", "integer-only", "int4-rtn", "int4-qdq", "nf4", "int3", "int2", "w4a8")


@pytest.mark.parametrize(
    ("name", "preset"), [(name, PRESETS[turn % len(PRESETS)]) for turn, name in enumerate(ZOO)]
)
def test_details_are_had_of_every_graph(name: str, preset: str) -> None:
    case = ZOO[name]()
    if preset in case.refused:
        pytest.skip("refused")
    result = pipeline(case.model, case.feeds, preset)
    record_layers(result, result.report)
    record_details(result, result.report)
    known = {layer.name for layer in result.report.layers}
    for layer in result.report.layers:
        assert {*layer.before, *layer.after} <= known - {layer.name}
        for weight in layer.weights:
            assert sum(weight.values.counts) > 0
            assert len(weight.scales) <= 64
    for before in result.report.layers:
        for after in result.report.layers:
            if before.name in after.before and len(before.after) < MOST_NEIGHBOURS:
                assert after.name in before.after
    assert Report.from_json(result.report.to_json()) == result.report


def test_nothing_of_it_is_measured_unasked() -> None:
    report = quantized(model(TWO, w=normal(8, 16), v=normal(16, 4, seed=1)))
    assert all(not layer.weights and not layer.before for layer in report.layers)
    assert all(record.values is None for record in report.ranges)


def test_validation_reads_ranges_off_the_codes_of_a_model(tmp_path: Path) -> None:
    """Where a ReLU is in the codes' lower end, they are compared with what the ReLU gave."""
    paths = tmp_path / "m.onnx", tmp_path / "q.onnx"
    text = """(float[1,2,8,8] x) => (float[1,3,4,4] y) {
        h = Conv (x, w) r = Relu (h) y = Conv (r, v) }"""
    onnx.save(model(text, w=normal(8, 2, 3, 3), v=normal(3, 8, 3, 3, seed=1)), paths[0])
    samples = feeds_of(24, x=(1, 2, 8, 8))
    report = onnxq.quantize(paths[0], samples=samples, output=paths[1], latency_check=False).report
    expected = report.ranges
    assert not [node for node in onnx.load(paths[1]).graph.node if node.op_type == "Relu"]
    report = onnxq.validate(*paths, samples=samples, details=True)
    found = {record.tensor: record for record in report.ranges}
    assert {"x", "r"} <= set(found) <= {record.tensor for record in expected}
    for record in (one for one in expected if one.tensor in found):
        same = found[record.tensor]
        assert (same.low, same.high) == pytest.approx((record.low, record.high))
        assert same.calibration_low is None
        assert same.validation_high >= record.validation_high - 1e-6  # more samples
        assert same.values is not None
        assert same.validation_clipped < 0.01
    assert [layer.inputs for layer in report.layers if layer.op == "Conv"] == [["x"], ["r"]]
    assert not any("calibration" in warning for warning in report.warnings)
    assert Report.from_json(report.to_json()) == report
    assert "codes" in rendered(replace(report, ranges=[replace(found["x"], finding="clipped")]))


def rendered(report: Report) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        show_ranges(report, console)
    return capture.get()


def quantized(made: object, **options: object) -> onnxq.Report:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        onnx.save(made, path)
        samples = feeds_of(24, x=(1, 8))
        return onnxq.quantize(path, samples=samples, write=False, **options).report
