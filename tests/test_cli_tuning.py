"""The commands sensitivity and tune as a user meets them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from test_cli import CALIBRATION, DIGITS, complaint, passed

from onnxq.tuning import candidates


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "TIMED", 0.05)
    monkeypatch.setattr("onnxq.tuning.timing.SECONDS", 0.01)


def test_sensitivity_ranks_layers_with_a_bar_for_each() -> None:
    lines = passed("sensitivity", DIGITS, "--data", CALIBRATION, "--measure", 4).splitlines()
    assert lines[0].startswith("KL divergence of logits: distance to the float model, on 4 samples")
    rows = [line for line in lines if "Conv" in line or "Gemm" in line]
    assert len(rows) == 14
    assert "█" * 12 in rows[0]
    shown = [float(re.findall(r"(\S+) nat", row)[0]) for row in rows]
    assert shown == sorted(shown, reverse=True)
    assert re.search(r"29 variants in .* × as many runs of the float model", lines[-1])


def test_sensitivity_gives_json_of_the_layers_asked_for(tmp_path: Path) -> None:
    options = ["--data", CALIBRATION, "--measure", 2, "--metric", "sqnr", "--layers", "Gemm"]
    report = tmp_path / "s.json"
    data = json.loads(passed("sensitivity", DIGITS, *options, "--json", "--report", report))
    measured = [layer for layer in data["layers"] if layer["alone"] is not None]
    assert [layer["op"] for layer in measured] == ["Gemm"]
    assert data["unit"] == "dB"
    assert data["ratio"] > 0
    assert json.loads(report.read_text())["layers"] == data["layers"]
    assert passed("sensitivity", DIGITS, *options, "--quiet") == ""


def test_what_was_measured_is_known_again_unless_it_is_not_wanted() -> None:
    options = ["--data", CALIBRATION, "--measure", 2, "--json"]
    first, second, third = (
        json.loads(passed("sensitivity", DIGITS, *options, *more))
        for more in ([], [], ["--no-cache"])
    )
    assert (first["evaluations"], second["evaluations"], third["evaluations"]) == (29, 0, 29)
    assert first["layers"] == second["layers"] == third["layers"]


def test_tune_writes_a_model_and_its_recipe_and_shows_what_it_tried(tmp_path: Path) -> None:
    model = Path(shutil.copy(DIGITS, tmp_path))
    out = passed("tune", model, "--data", CALIBRATION, "--max-drop", "1%")
    assert out.startswith(f"wrote {tmp_path / 'digits_cnn.tuned.onnx'}")
    assert "→" in out
    assert re.search(r"float +0 % +100 % +1\.0000 .* 1\.00 +505 kB", out)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["digits_cnn.onnx", "digits_cnn.tuned.onnx", "digits_cnn.tuned.toml"]
    recipe = tmp_path / "digits_cnn.tuned.toml"
    passed("quantize", model, "--data", CALIBRATION, "--recipe", recipe, "--samples", 100,
           "-o", tmp_path / "again.onnx", "--quiet")  # fmt: skip
    again = (tmp_path / "again.onnx").read_bytes()
    assert again == (tmp_path / "digits_cnn.tuned.onnx").read_bytes()


def test_tune_refuses_with_one_line(tmp_path: Path) -> None:
    place = ["-o", tmp_path / "q.onnx"]
    assert "give a bound" in complaint("tune", DIGITS, "--data", CALIBRATION, *place)
    bound = ["--max-drop", "1%", *place]
    assert "there are none" in complaint("tune", DIGITS, *bound)
    assert "there is no metric" in complaint(
        "tune", DIGITS, "--data", CALIBRATION, *bound, "--metric", "speed"
    )
    assert "no quantized model holds" in complaint(
        "tune",
        DIGITS,
        "--data",
        CALIBRATION,
        "--max-size",
        "0.01x",
        "--preset",
        "int8-dynamic",
        *place,
    )
    assert "there are none" in complaint("sensitivity", DIGITS)
    assert "matches no node" in complaint(
        "sensitivity", DIGITS, "--data", CALIBRATION, "--layers", "nothing"
    )
    assert list(tmp_path.iterdir()) == []
