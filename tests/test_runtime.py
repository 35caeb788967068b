"""Custom operators, compiled here, in every session that onnxq makes; what sessions refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import feeds_of, model, normal, run
from typer.testing import CliRunner

import onnxq
from onnxq import graph as g
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.runtime import Session, custom_ops
from onnxq.storage import save_proto

SOURCE = Path(__file__).with_name("custom_op.c")
X = {"x": normal(2, 3, 8, 8)}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """test.onnxq:Twice, y = 2 x."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    suffix = ".dylib" if sysconfig.get_platform().startswith("macosx") else ".so"
    path = tmp_path_factory.mktemp("library") / f"twice{suffix}"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(SOURCE)], check=True)
    return path


def with_twice(opset: int = 13) -> onnx.ModelProto:
    """Conv → Twice → … → MatMul."""
    made = model(
        """(float[n,3,8,8] x) => (float[n,6] y) {
            c = Conv <pads = [1,1,1,1]> (x, w)
            t = Identity (c)
            p = MaxPool <kernel_shape = [8,8]> (t)
            f = Flatten (p)
            y = MatMul (f, v)
        }""",
        opset=opset,
        w=normal(32, 3, 3, 3, scale=0.4),
        v=normal(32, 6, seed=1),
    )
    made.graph.node[1].op_type, made.graph.node[1].domain = "Twice", "test.onnxq"
    made.graph.node[1].attribute.append(onnx.helper.make_attribute("note", "kept as it is"))
    made.opset_import.append(onnx.helper.make_opsetid("test.onnxq", 1))
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "twice.onnx"
    onnx.save(with_twice(), path)
    return path


def test_the_library_computes(library: Path) -> None:
    text = "(float[n,4] x) => (float[n,4] y) { y = Identity (x) }"
    made = model(text)
    made.graph.node[0].op_type, made.graph.node[0].domain = "Twice", "test.onnxq"
    made.opset_import.append(onnx.helper.make_opsetid("test.onnxq", 1))
    with custom_ops([library]):
        session = Session(made)
    np.testing.assert_array_equal(session.run({"x": normal(3, 4)})["y"], 2 * normal(3, 4))


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic"])
@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("opset", [11, 13])
def test_a_model_with_a_custom_operator_is_quantized_and_verified(
    library: Path, path: Path, preset: str, data: bool, opset: int
) -> None:
    onnx.save(with_twice(opset), path)
    samples = feeds_of(8, x=(1, 3, 8, 8)) if data else None
    out = path.with_name("q.onnx")
    result = onnxq.quantize(path, preset, samples=samples, output=out, custom_ops=[library])
    assert result.report.verified
    assert result.report.outputs[0].cosine > 0.99
    node = next(n for n in onnx.load(out).graph.node if n.op_type == "Twice")
    assert node.domain == "test.onnxq"
    assert node.attribute[0].s == b"kept as it is"
    quantized = [layer.op for layer in result.report.layers if layer.form != "float"]
    assert quantized == (["Conv", "MatMul"] if preset == "int8-static" else ["MatMul"])


def test_every_command_takes_the_library(library: Path, path: Path) -> None:
    out, data = path.with_name("q.onnx"), path.with_name("samples.npz")
    np.savez(data, x=normal(64, 3, 8, 8))
    folder = path.parent / "folder"
    folder.mkdir()
    shutil.copy(path, folder)
    (folder / "config.json").write_text("{}", "utf-8")
    for command in (
        ["quantize", path, "-o", out, "--quiet"],
        ["validate", path, out, "--json"],
        ["inspect", path, "--json"],
        ["bench", path, out, "--seconds", "0.1", "--json"],
        ["deploy", out, "--for", "edge-linux", "-o", out.with_name("edge")],
        ["sensitivity", path, "--data", data, "--json"],
        ["tune", path, "--data", data, "--max-drop", "90%", "--preset", "int8-static", "--quiet"],
        ["quantize", path.parent / "folder", "--quiet"],
    ):
        arguments = [*map(str, command), "--custom-ops", str(library)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        if command[0] == "inspect":  # counted by running it
            assert all(layer["macs"] for layer in json.loads(done.stdout)["layers"][:1])


def test_a_library_is_forgotten_afterwards(library: Path, path: Path) -> None:
    with custom_ops([library]):
        Session(path)
    with pytest.raises(OnnxqError, match=r"Twice of the domain 'test\.onnxq'.*--custom-ops"):
        Session(path)


def test_what_is_no_library_is_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(OnnxqError, match="there is no custom-operator library"):
        onnxq.quantize(path, custom_ops=[tmp_path / "none.so"])
    with pytest.raises(OnnxqError, match=r"custom_op\.c' is no custom-operator library"):
        onnxq.inspect(path, custom_ops=[SOURCE])


def test_external_weights_in_a_body_run_beside_weights_in_memory(tmp_path: Path) -> None:
    text = """(float[n,300] x, bool choice) => (float[n,300] y) {
        h = MatMul (x, w)
        y = If (choice) <
            then_branch = yes () => (float[n,300] a) { a = Add (h, bias) },
            else_branch = no () => (float[n,300] b) { b = Identity (h) }
        >
    }"""
    whole = model(text, w=normal(300, 300), bias=normal(300, seed=1))
    whole.graph.node[1].attribute[0].g.initializer.append(whole.graph.initializer.pop())
    path = tmp_path / "m.onnx"
    save_proto(whole, path, limit=0)
    feed = {"x": normal(2, 300), "choice": np.array(True)}
    light, weights = g.to_proto_without_weights(g.load(path))
    assert list(weights) == ["w"]
    for proto, given in ((light, weights), (g.to_proto(g.load(path)), None)):
        found = Session(proto, initializers=given).run(feed)
        np.testing.assert_allclose(found["y"], run(whole, feed)["y"], rtol=1e-4, atol=1e-4)
