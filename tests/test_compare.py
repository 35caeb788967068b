"""validate --ep: what ran where, what it said, and what is an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from places import PROVIDERS, place
from test_cli import CALIBRATION, DIGITS, passed, run
from test_disagreement import FAKE, ROUND, two_layers

from onnxq.api import validate
from onnxq.devices import Place
from onnxq.devices.compare import compare_places, output_scales
from onnxq.errors import OnnxqError
from onnxq.report import Latency, ProviderRecord, Report

PRETENDS = """
import onnxruntime
available = onnxruntime.get_available_providers()
onnxruntime.get_available_providers = lambda: ["OpenVINOExecutionProvider", *available]
Session = onnxruntime.InferenceSession
def without(path, *rest, providers, **more):
    return Session(path, *rest, providers=["CPUExecutionProvider"], **more)
onnxruntime.InferenceSession = without
"""
DIES = """
import os, onnxruntime
def dying(*arguments, **more):
    print("the driver is gone", file=sys.stderr, flush=True)
    os._exit(9)
onnxruntime.InferenceSession = dying
"""

PLAYS = """
import platform
platform.machine = lambda: "sparc64"
"""


def fake(tmp_path: Path, code: str) -> str:
    """A Python whose onnxruntime is another."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport runpy, sys\n{code}\nsys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "digits.onnx"
    passed("quantize", DIGITS, "--data", CALIBRATION, "--samples", 16, "--no-verify", "-q",
           "--output", path)  # fmt: skip
    return path


def validated(quantized: Path, *arguments: object) -> tuple[int, str, str]:
    result = run("validate", DIGITS, quantized, "--data", CALIBRATION, "--samples", 4, *arguments)
    return result.exit_code, result.stdout, result.stderr


def test_the_cpu_says_the_same_bits_and_runs_every_node(quantized: Path) -> None:
    code, out, _ = validated(quantized, "--ep", "cpu", "--json")
    (record,) = json.loads(out)["providers"]
    assert code == 0
    assert record["same_bits"]
    assert record["elsewhere"] == 0
    assert record["nodes"] > 0
    assert record["against_cpu"][0]["cosine"] == pytest.approx(1)
    assert record["disagreement"] is None
    assert record["ratio"] > 0


def test_what_plays_another_machine_is_not_timed(quantized: Path, tmp_path: Path) -> None:
    ep = f"cpu@{fake(tmp_path, PLAYS)}"
    code, out, _ = validated(quantized, "--ep", ep, "--json")
    (record,) = json.loads(out)["providers"]
    assert code == 0
    assert record["same_bits"]
    assert (record["latency"], record["ratio"]) == (None, None)
    assert "not timed: what answered emulates the device" in validated(quantized, "--ep", ep)[1]


def test_what_falls_back_is_an_error_after_the_table(quantized: Path, tmp_path: Path) -> None:
    ep = f"openvino@{fake(tmp_path, PRETENDS)}"
    code, out, err = validated(quantized, "--ep", ep)
    assert code == 1
    assert "Execution providers" in out
    (line,) = err.strip().splitlines()
    assert line.startswith(f"onnxq: error: {ep}: ")
    assert "ran on another provider, the first '" in line
    code, out, err = validated(quantized, "--ep", ep, "--allow-fallback")
    assert (code, err) == (0, "")


def test_a_provider_that_dies_has_its_line_and_others_run(quantized: Path, tmp_path: Path) -> None:
    dead = f"cpu@{fake(tmp_path, DIES)}"
    code, out, err = validated(quantized, "--ep", dead, "--ep", "cpu", "--ep", "coreml")
    assert code == 1
    assert f"onnxq: error: {dead}: the process ended with exit code 9: the driver is gone" in err
    assert "onnxq: error: coreml: this onnxruntime has no CoreMLExecutionProvider" in err
    assert len(err.strip().splitlines()) == 2
    assert "same bits" in out


def test_where_and_why_it_differs_is_in_the_table_and_in_the_report(tmp_path: Path) -> None:
    made, feed = two_layers(0.0113)
    path, report = tmp_path / "model.onnx", tmp_path / "report.json"
    onnx.save(made, path)
    np.savez(tmp_path / "s.npz", **feed)  # type: ignore[arg-type]
    ep = f"cpu@{fake(tmp_path, FAKE + ROUND.format('r = Floor (d)'))}"
    result = run("validate", path, path, "--data", tmp_path / "s.npz", "--ep", ep,
                 "--report", report)  # fmt: skip
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "first differs at a (Conv): " in said
    assert "off by 1 step: it rounds down" in said
    loaded = Report.from_json(report.read_text())
    (record,) = loaded.providers
    assert record.disagreement is not None
    assert record.disagreement.why == "rounds down"
    assert record.steps is not None
    assert record.steps >= 1
    assert json.loads(loaded.to_json()) == json.loads(report.read_text())


def test_a_model_that_does_not_run_here_is_an_error(tmp_path: Path) -> None:
    made, feed = two_layers(0.0113)
    onnx.save(made, tmp_path / "model.onnx")
    other = tmp_path / "other.onnx"
    del made.graph.node[-1].input[:]
    onnx.save(made, other)
    with pytest.raises(OnnxqError, match="does not run on the CPU"):
        compare_places(tmp_path / "model.onnx", other, [feed], {"cpu": Place.parse("cpu")})


def test_outputs_that_stand_for_codes_have_a_step() -> None:
    made, _ = two_layers(0.0113)
    assert output_scales(made) == {"y": 0.25}


def test_a_provider_without_fallback_has_no_problem() -> None:
    assert ProviderRecord("a", nodes=3, latency=Latency(1, 1, 1)).problem() == ""
    two = ProviderRecord("a", elsewhere=2, first_elsewhere="'x' (Conv)")
    assert two.problem() == "2 nodes ran on another provider, the first 'x' (Conv)"
    assert two.problem(allow_fallback=True) == ""


@pytest.mark.parametrize("name", sorted(PROVIDERS))
def test_every_place_says_nearly_what_the_cpu_says(name: str, quantized: Path) -> None:
    where = place(name)
    ep = f"{where.name}@{' '.join(where.command)}"
    report = validate(DIGITS, quantized, samples=str(CALIBRATION), limit=4, ep=[ep])
    (record,) = report.providers
    assert record.error == ""
    assert min(o.cosine for o in record.against_cpu) > 0.99
