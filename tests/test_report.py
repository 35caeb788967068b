import json

import pytest

from onnxq.distribution import Distribution, WeightRecord
from onnxq.report import (
    GroupRecord,
    Latency,
    LayerRecord,
    OutputRecord,
    PassRecord,
    RangeRecord,
    Report,
)


def full() -> Report:
    return Report(
        model="m.onnx",
        verified=True,
        passes=[PassRecord("assign", {"form": "static"}, 3, 0.5, 100.0)],
        layers=[
            LayerRecord("a", "Conv", "w s8", output="a", parameters=30, macs=5, sqnr_db=30.0,
                        contribution=0.1, inputs=["x"], after=["b"],
                        weights=[WeightRecord("w", Distribution(-1, 1, [1, 2]), 2, [0.1], -1, 1)]),
            LayerRecord("b", "Conv", "w s8", output="b", parameters=60, macs=5, sqnr_db=10.0,
                        contribution=0.3),
            LayerRecord("c", "Softmax", "float", "costs accuracy", parameters=10, macs=10),
            LayerRecord("d", "Conv", "w s8", output="d", sqnr_db=5.0, contribution=0.1),
        ],
        outputs=[OutputRecord("y", 0.99, 20.0, 0.9)],
        ranges=[RangeRecord("x", -1, 1, -1, 1, 0.0, -2, 1, 0.01, 5, None, "clipped",
                            Distribution(-2, 1, [3, 4]))],
        groups=[GroupRecord("me", "y", 9, 0.1, 0.02, 0.9, 0.99, 20.0, True)],
        float_latency=Latency(2.0, 1.5, 2.5),
        environment={"cpu": "x"},
        warnings=["w"],
    )  # fmt: skip


def test_layers_are_ranked_by_what_they_do_to_the_output() -> None:
    assert [layer.name for layer in full().ranked] == ["b", "d", "a"]


def test_shares_count_quantized_layers() -> None:
    report = full()
    assert report.share("parameters") == pytest.approx(0.9)
    assert report.share("macs") == pytest.approx(0.5)
    assert Report().share("macs") is None


def test_json_returns_as_the_same_report() -> None:
    report = full()
    data = json.loads(report.to_json())
    assert data["parameters_quantized"] == pytest.approx(0.9)
    assert data["quantized_latency"] is None
    assert Report.from_json(report.to_json()) == report


def test_a_report_from_before_ranges_and_groups_were_kept_is_read() -> None:
    data = json.loads(full().to_json())
    del data["ranges"], data["groups"]
    assert Report.from_json(json.dumps(data)).groups == []


@pytest.mark.parametrize("text", ["{}", "[]", "no", '{"passes": [], "layers": [1], "outputs": []}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Report.from_json(text)


def test_warnings_and_reasons_are_kept_once() -> None:
    report = Report()
    for _ in range(2):
        report.warn("slow")
        report.skip("s", "Softmax", "costs accuracy")
    assert report.warnings == ["slow"]
    assert [(r.name, r.form, r.reason) for r in report.layers] == [("s", "float", "costs accuracy")]
