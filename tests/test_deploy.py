"""Folders that are ready to ship: what they hold, and that their own smoke test means something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import MODELS, model, normal
from places import place
from typer.testing import CliRunner

import onnxq
from onnxq.cli import app
from onnxq.deploy import KINDS, deploy
from onnxq.deploy.options import SessionOptions
from onnxq.deploy.smoke import STEPS, allowed, nudged
from onnxq.errors import OnnxqError
from onnxq.storage import file_hash, save_proto

DIGITS = MODELS / "digits_cnn.onnx"
CALIBRATION = MODELS / "digits_cnn.calib.npz"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model in 8 bits, of one image at a time."""
    folder = tmp_path_factory.mktemp("digits")
    proto = onnx.load(DIGITS)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, folder / "float.onnx")
    onnxq.quantize(
        folder / "float.onnx", samples=CALIBRATION, output=folder / "digits.onnx", limit=16
    )
    return folder / "digits.onnx"


def options(kind: str) -> dict[str, Any]:
    """What a kind needs of this machine; skips the test where it cannot be had."""
    if kind == "qnn":
        return {"place": place("qnn")}
    if kind == "web":
        python = Path(place("web").command[0])
        return {"runtime": python.parent / "node_modules" / "onnxruntime-web" / "dist"}
    return {}


def smoke_test(folder: Path, kind: str) -> subprocess.CompletedProcess[str]:
    """As a user runs it: from another folder, knowing nothing of onnxq."""
    python = place("qnn").command if kind == "qnn" else (sys.executable,)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [*python, str(folder / "smoke_test.py")]
    return subprocess.run(command, cwd="/", env=clean, capture_output=True, text=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_runs_its_smoke_test_and_says_when_the_answer_is_another(
    digits: Path, tmp_path: Path, kind: str
) -> None:
    made = deploy(digits, kind, tmp_path / "made", samples=CALIBRATION, **options(kind))
    assert made.tested
    assert made.smoke.endswith("PASS")
    folder = Path(shutil.move(tmp_path / "made", tmp_path / "moved"))
    done = smoke_test(folder, kind)
    assert done.returncode == 0
    assert "PASS" in done.stdout.splitlines()
    expected = np.load(folder / "smoke" / "expected-0.npy")
    table = json.loads((folder / "smoke" / "smoke.json").read_text())
    expected.ravel()[-1] += 1.5 * table["outputs"][0]["tolerance"]
    np.save(folder / "smoke" / "expected-0.npy", expected)
    done = smoke_test(folder, kind)
    assert done.returncode == 1
    assert "FAIL" in done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["edge-linux", "mobile"])
def test_integers_alone_must_agree_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "integers.onnx"
    onnxq.quantize(DIGITS, "integer-only", samples=CALIBRATION, output=path, limit=16)
    deploy(path, kind, tmp_path / "made", samples=CALIBRATION)
    table = json.loads((tmp_path / "made" / "smoke" / "smoke.json").read_text())
    assert [row["tolerance"] for row in table["outputs"]] == [0.0]
    assert smoke_test(tmp_path / "made", kind).returncode == 0
    file = tmp_path / "made" / "smoke" / "expected-0.npy"
    expected = np.load(file)
    np.save(file, np.nextafter(expected, np.inf, dtype=expected.dtype))
    assert smoke_test(tmp_path / "made", kind).returncode == 1


def test_a_difference_is_allowed_as_far_as_roundings_go() -> None:
    said = np.array([-1.0, 4.0], np.float32)
    assert allowed(said, [said]) == pytest.approx(STEPS * 5 / 255)
    assert allowed(said, [said, said + np.float32(0.5)]) == pytest.approx(1.0)
    assert allowed(np.array([7]), [np.array([8])]) == 0.0
    assert allowed(np.array([np.nan], np.float32), [np.array([0], np.float32)]) == 0.0


def test_the_last_digits_of_inputs_are_moved_and_no_more() -> None:
    x = normal(100)
    assert 0 < np.abs(nudged(x) / x - 1).max() < 1e-6
    assert (nudged(x) != x).all()
    codes = np.arange(5)
    np.testing.assert_array_equal(nudged(codes), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_readme_tells_what_is_there(digits: Path, tmp_path: Path, kind: str) -> None:
    made = deploy(digits, kind, tmp_path / "made", samples=CALIBRATION)
    text = (tmp_path / "made" / "README.md").read_text()
    assert file_hash(digits) in text
    assert "Cosine of its answers" in text
    assert "data of the model" not in text  # every file has a purpose
    assert "$" not in text.replace("$CHROMIUM", "")
    for name in made.files.keys() - {"README.md"}:
        assert f"`{name.split('/')[0]}" in text
    if kind in ("web", "qnn"):
        assert not made.tested
        assert "It was not run when this folder was made: it needs" in text


def test_mobile_is_in_ort_format_with_the_operators_it_needs(digits: Path, tmp_path: Path) -> None:
    deploy(digits, "mobile", tmp_path / "made", samples=CALIBRATION)
    assert (tmp_path / "made" / "model.ort").read_bytes()[4:8] == b"ORTM"
    operators = (tmp_path / "made" / "required_operators.config").read_text()
    assert 'QLinearConv{"inputs": {"0": ["uint8_t"]}}' in operators
    assert str(tmp_path) not in operators


def test_edge_linux_runs_arrays_of_ones_own(digits: Path, tmp_path: Path) -> None:
    deploy(digits, "edge-linux", tmp_path / "made", samples=CALIBRATION)
    with np.load(CALIBRATION) as arrays:
        image = {name: array[3:4] for name, array in arrays.items()}
    np.savez(tmp_path / "in.npz", **image)
    command = [sys.executable, "made/run.py", "in.npz", "out.npz"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    session = ort.InferenceSession(str(digits), providers=["CPUExecutionProvider"])
    feed = {value.name: image[value.name] for value in session.get_inputs()}
    wanted = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True)
    )
    with np.load(tmp_path / "out.npz") as said:
        for name, array in wanted.items():
            np.testing.assert_array_equal(said[name], array)


@pytest.mark.parametrize("kind", ["edge-linux", "mobile", "web"])
def test_weights_in_files_of_their_own_come_along(tmp_path: Path, kind: str) -> None:
    made = model("(float[n,64] x) => (float[n,8] y) { y = MatMul (x, w) }", w=normal(64, 8))
    save_proto(made, tmp_path / "model.onnx", limit=100)
    assert len(list(tmp_path.iterdir())) == 2
    deploy(tmp_path / "model.onnx", kind, tmp_path / "made", **options(kind))
    for path in tmp_path.glob("model.onnx*"):
        path.unlink()
    assert smoke_test(tmp_path / "made", kind).returncode == 0


def test_a_model_of_the_npu_is_compiled_whole_or_a_script_does_it(
    digits: Path, tmp_path: Path
) -> None:
    deploy(digits, "qnn", tmp_path / "here", samples=CALIBRATION, **options("qnn"))
    operators = [n.op_type for n in onnx.load(tmp_path / "here" / "model_ctx.onnx").graph.node]
    assert "EPContext" in operators
    deploy(digits, "qnn", tmp_path / "there", samples=CALIBRATION)
    assert smoke_test(tmp_path / "there", "qnn").returncode != 0
    command = [*place("qnn").command, "make_context.py"]
    subprocess.run(command, cwd=tmp_path / "there", check=True, capture_output=True)
    assert smoke_test(tmp_path / "there", "qnn").returncode == 0


def test_the_page_is_sent_what_it_asks_for_and_nothing_else(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("no")
    deploy(digits, "web", tmp_path / "made", samples=CALIBRATION)
    code = "import smoke_test as s; print(s.get('/'), s.get('/../secret'), s.get('/model.js'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "made", capture_output=True, text=True
    )
    folder = (tmp_path / "made").resolve()
    assert done.stdout.split() == [str(folder / "index.html"), "None", str(folder / "model.js")]


def test_nothing_is_there_when_the_smoke_test_fails(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = import_module("onnxq.deploy.deploy")

    def strict(*arguments: Any) -> Any:
        made = make_smoke(*arguments)
        return replace(
            made,
            outputs={k: v + 1 for k, v in made.outputs.items()},
            tolerance=dict.fromkeys(made.outputs, 0.0),
        )

    make_smoke = program.make_smoke
    monkeypatch.setattr(program, "make_smoke", strict)
    with pytest.raises(OnnxqError, match=r"the smoke test fails here: .* FAIL; nothing written"):
        deploy(digits, "edge-linux", tmp_path / "made", samples=CALIBRATION)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    deploy(digits, "edge-linux", tmp_path / "made", samples=CALIBRATION)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OnnxqError, match="holds something; empty it or choose another"):
        deploy(digits, "mobile", tmp_path / "made", samples=CALIBRATION)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_is_told_in_a_line(digits: Path, tmp_path: Path) -> None:
    for kind, more, message in (
        ("moblie", {}, "there is no kind 'moblie' of deployment; nearest: mobile"),
        ("web", {"runtime": tmp_path}, "is no dist folder of onnxruntime-web: no ort.wasm"),
        ("web", {"custom_ops": [DIGITS]}, "is no custom-operator library"),
        ("web", {"output": tmp_path / "no" / "where"}, "there is no folder .*no' to write to"),
    ):
        with pytest.raises(OnnxqError, match=message):
            deploy(digits, kind, **{"output": tmp_path / "made", **more})
    with pytest.raises(OnnxqError, match="the NPU takes fixed shapes alone"):
        deploy(DIGITS, "qnn", tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_session_options_are_the_same_in_every_language() -> None:
    given = SessionOptions("CPUExecutionProvider", config={"a.b": '"1"'}, custom_ops=("x.so",))
    assert json.loads(given.to_json())["config"] == {"a.b": '"1"'}
    for language in ("py", "cpp", "kt", "swift"):
        entry, library = given.code(language).splitlines()
        assert '"a.b"' in entry
        assert r'"\"1\""' in entry
        assert "x.so" in library or language == "swift"


def test_the_command(digits: Path, tmp_path: Path) -> None:
    command = ["deploy", str(digits), "--for", "edge-linux", "--data", str(CALIBRATION)]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "a")])
    assert done.exit_code == 0
    assert "smoke_test.py" in done.stdout
    assert "PASS" in done.stdout
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "b"), "--json"])
    assert json.loads(done.stdout)["tested"] is True
    for wrong in (["--ep", "cpu"], ["--runtime", "x"], ["--ep-option", "x"]):
        done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "c"), *wrong])
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1
