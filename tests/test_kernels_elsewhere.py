"""Models with operators of onnxq in other places than its own process: kernels where the library
fits, functions elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import MODELS, Array, sqnr
from places import place
from typer.testing import CliRunner

import onnxq
from onnxq import graph as g
from onnxq import ops
from onnxq.cli import app
from onnxq.deploy import deploy
from onnxq.devices import Job, Place, ask
from onnxq.devices import place as places
from onnxq.errors import OnnxqError
from onnxq.ops.library import FILE, MISSING, find_library
from onnxq.runtime import Session, without_kernels
from onnxq.target import load_target

needs_library = pytest.mark.skipif(find_library() is None, reason="needs the library of kernels")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one MatMulCodebook, of one image at a time."""
    folder = tmp_path_factory.mktemp("digits")
    proto = onnx.load(MODELS / "digits_cnn.onnx")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, folder / "float.onnx")
    samples = MODELS / "digits_cnn.calib.npz"
    out = folder / "digits.onnx"
    onnxq.quantize(folder / "float.onnx", "nf4", samples=samples, output=out, ops=True)
    return out


@pytest.fixture(scope="module")
def feed() -> dict[str, Array]:
    samples = np.load(MODELS / "digits_cnn.calib.npz")
    return {name: samples[name][:1] for name in samples.files}


def by_functions(model: Path, feed: dict[str, Array]) -> Array:
    with without_kernels():
        return Session(model).run(feed)["logits"]


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        "onnxq.runtime",
        "onnxq.devices.place",
        "onnxq.devices.check",
        "onnxq.api.quantization",
    ):
        monkeypatch.setattr(f"{module}.find_library", lambda: None)
    monkeypatch.setattr(sys.modules["onnxq.deploy.deploy"], "find_library", lambda: None)
    monkeypatch.setattr("onnxq.ops.library.find_library", lambda: None)


# ── places ───────────────────────────────────────────────────────────────────────────────────────


@needs_library
def test_this_cpu_runs_the_kernels(digits: Path, feed: dict[str, Array]) -> None:
    (answer,) = ask(Place.parse("cpu"), [Job(digits, [feed], profile=True)])
    assert answer.error == ""
    assert "MatMulCodebook" in {kernel.op for kernel in answer.kernels}
    np.testing.assert_array_equal(answer.outputs[0]["logits"], Session(digits).run(feed)["logits"])


@needs_library
@pytest.mark.parametrize("lie", [{"machine": "riscv64"}, {"library": "/nowhere/libonnxq_ops.so"}])
def test_where_the_library_does_not_fit_functions_do(
    digits: Path, feed: dict[str, Array], lie: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = places._kernels
    monkeypatch.setattr(places, "_kernels", lambda *given: real(*given) | lie)
    (answer,) = ask(Place.parse("cpu"), [Job(digits, [feed], profile=True)])
    assert answer.error == ""
    assert "MatMulCodebook" not in {kernel.op for kernel in answer.kernels}
    np.testing.assert_allclose(
        answer.outputs[0]["logits"], by_functions(digits, feed), rtol=1e-4, atol=1e-4
    )


def test_models_without_such_operators_ask_for_no_library() -> None:
    float_model = onnx.load(MODELS / "digits_cnn.onnx")
    assert places._kernels(Place.parse("cpu"), [float_model]) == {}


@pytest.mark.parametrize("name", ["openvino", "arm64", "web"])
def test_other_places_run_the_functions(name: str, digits: Path, feed: dict[str, Array]) -> None:
    (answer,) = ask(place(name), [Job(digits, [feed])])
    assert answer.error == ""
    assert sqnr(answer.outputs[0]["logits"], by_functions(digits, feed)) > 40


# ── check ────────────────────────────────────────────────────────────────────────────────────────


@needs_library
def test_check_says_that_the_cpu_has_kernels(digits: Path) -> None:
    report = onnxq.check(digits, target="cpu", run=True)
    (verdict,) = (v for v in report.verdicts if v.op == "MatMulCodebook")
    assert (verdict.kind, verdict.agrees) == ("integer", True)
    assert not report.warnings


@pytest.mark.parametrize("target", ["web-wasm", "qnn-htp", "openvino"])
def test_check_says_that_functions_are_slow(target: str, digits: Path) -> None:
    report = onnxq.check(digits, target=target)
    assert "MatMulCodebook" not in {v.op for v in report.verdicts}
    (warning,) = (w for w in report.warnings if "operators of onnxq" in w)
    assert warning.startswith(f"{target} has no kernels")
    assert "float weights in memory" in warning


def test_check_without_a_library(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    report = onnxq.check(digits, target="cpu", run=True)
    assert any(w.startswith("cpu has no kernels") for w in report.warnings)
    assert report.error == ""


# ── deploy ───────────────────────────────────────────────────────────────────────────────────────


@needs_library
def test_edge_linux_ships_the_library(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    made = deploy(digits, "edge-linux", folder, samples=MODELS / "digits_cnn.calib.npz")
    assert made.tested
    assert (folder / FILE).is_file()
    assert json.loads((folder / "session.json").read_text("utf-8"))["custom_ops"] == [FILE]
    assert f'register_custom_ops_library(str(HERE / "{FILE}"))' in (
        folder / "session.py"
    ).read_text("utf-8")
    (note,) = made.notes
    assert note.startswith(f"`{FILE}` was built for ")
    assert note in (folder / "README.md").read_text("utf-8")


@needs_library
def test_edge_linux_keeps_operators_of_a_model_with_external_weights(
    digits: Path, tmp_path: Path
) -> None:
    proto = onnx.load(digits)
    weights = tmp_path / "weights.bin"
    first = next(t for t in proto.graph.initializer if len(t.raw_data) > 64)
    weights.write_bytes(first.raw_data)
    first.ClearField("raw_data")
    first.data_location = onnx.TensorProto.EXTERNAL
    first.external_data.add(key="location", value=weights.name)
    onnx.save(proto, tmp_path / "digits.onnx")
    deploy(tmp_path / "digits.onnx", "edge-linux", tmp_path / "edge")
    shipped = onnx.load(tmp_path / "edge" / "model.onnx")
    assert "MatMulCodebook" in {node.op_type for node in shipped.graph.node}
    assert "MatMulCodebook" in {function.name for function in shipped.functions}


def test_edge_linux_without_a_library_is_refused(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_library(monkeypatch)
    with pytest.raises(OnnxqError, match="no library of them was built here to ship with it"):
        deploy(digits, "edge-linux", tmp_path / "edge")
    assert not (tmp_path / "edge").exists()


def test_phones_run_the_functions(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mobile"
    made = deploy(digits, "mobile", folder, samples=MODELS / "digits_cnn.calib.npz")
    assert made.tested
    assert not (folder / FILE).exists()
    assert "ai.onnxq" not in (folder / "required_operators.config").read_text("utf-8")


# ── users ────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_library_quantize_warns_and_functions_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_library(monkeypatch)
    out = tmp_path / "out.onnx"
    result = onnxq.quantize(MODELS / "digits_cnn.onnx", "int2", ops=True, output=out)
    assert result.report.verified
    assert MISSING in result.report.warnings
    with pytest.raises(OnnxqError, match="no library of kernels was built when onnxq"):
        ops.library_path()


def test_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    about = json.loads(run(app, ["ops", "--json"]).output)
    assert about["operators"] == list(ops.OPERATORS)
    assert about["library"] == (str(find_library()) if find_library() else None)
    for name in ("ops", "targets"):
        assert run(app, [name, "--help"]).exit_code == 0
    without_library(monkeypatch)
    assert json.loads(run(app, ["ops", "--json"]).output)["library"] is None
    shown = run(app, ["targets", "show", "cpu"]).output
    assert shown.splitlines()[-1] == f"# operators of onnxq's own (--ops): {MISSING}"
    assert "--ops" not in run(app, ["targets", "show", "qnn-htp"]).output


def test_a_target_may_allow_them_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "cpu"\nsummary = "mine"\ncustom_operators = true\n', "utf-8")
    assert load_target(str(file)).custom_operators
    result = onnxq.quantize(
        MODELS / "digits_cnn.onnx", "nf4", target=str(file), write=False, check=False
    )
    assert "MatMulCodebook" in {node.op for node in g.walk(result.graph)}


def test_a_library_that_does_not_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / FILE
    broken.write_bytes(b"no library")
    monkeypatch.setattr("onnxq.ops.library.find_library", lambda: broken)
    ops.library.build.cache_clear()
    with pytest.raises(OnnxqError, match=r"cannot be used: .*; install onnxq again"):
        ops.library.build()
    ops.library.build.cache_clear()
