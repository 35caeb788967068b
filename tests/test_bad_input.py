"""Bad input through the command line: one line that says what is wrong and what to do, exit code 1
or 2, no traceback, and nothing left in the output folder."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from awkward import attention, conv_bn_relu6, gemm, if_body
from graphs import MODELS, model, normal
from onnx import TensorProto, helper
from typer.testing import CliRunner

import onnxq
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.storage import save_proto

DIGITS = MODELS / "digits_cnn.onnx"
CALIBRATION = MODELS / "digits_cnn.calib.npz"
INPUT = next(iter(np.load(CALIBRATION)))

Arguments = list[object]


def complaint(arguments: Arguments, out: Path) -> str:
    """What is said of `onnxq quantize ARGUMENTS -o out/q.onnx`, in this process."""
    command = [str(a) for a in ("quantize", *arguments)]
    if "-o" not in command:
        command += ["-o", str(out / "q.onnx")]
    before = snapshot(out)
    done = CliRunner().invoke(app, command)
    assert done.exit_code in (1, 2), done.output
    assert done.stdout == ""
    assert snapshot(out) == before, "something was left in the output folder"
    return one_line(done.stderr) if done.exit_code == 1 else done.stderr


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("onnxq: error: ")
    assert "fault of onnxq" not in stderr, stderr
    return stderr


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder to write to; inputs are beside it."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# Model files. Each function makes one in a folder and returns its path.


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def large() -> onnx.ModelProto:
    text = "(float[n,64] x) => (float[n,8] y) { h = MatMul (x, w) y = MatMul (h, v) }"
    return model(text, w=normal(64, 64), v=normal(64, 8, seed=1))


def external(folder: Path, **changed: str | None) -> Path:
    """Weights in m.bin; `changed` replaces what the model says of where w is in it."""
    path = folder / "m.onnx"
    onnx.save(large(), path, save_as_external_data=True, location="m.bin", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == "w")
    where = {e.key: e.value for e in tensor.external_data} | changed
    del tensor.external_data[:]
    for key, value in where.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return saved(proto, folder)


def truncated(folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(DIGITS.read_bytes()[:-100])
    return path


def text_file(folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    return path


def empty_file(folder: Path) -> Path:
    path = folder / "m.onnx"
    path.touch()
    return path


def a_folder(folder: Path) -> Path:
    return folder


def missing(folder: Path) -> Path:
    return folder / "none.onnx"


def cyclic(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.node[0].input[0] = proto.graph.node[1].output[0]
    return saved(proto, folder)


def cyclic_through_a_body(folder: Path) -> Path:
    proto = if_body().model
    proto.graph.node[0].input[0] = "y"
    return saved(proto, folder)


def dangling(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.node[2].input[1] = "nowhere"
    return saved(proto, folder)


def made_twice(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.node[0].output[0] = proto.graph.node[1].output[0]
    return saved(proto, folder)


def stored_twice(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.initializer.append(proto.graph.initializer[0])
    return saved(proto, folder)


def wrong_dimensions(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.initializer[0].dims[0] += 1
    return saved(proto, folder)


def negative_dimensions(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.initializer[0].dims[0] = -16
    return saved(proto, folder)


def no_outputs(folder: Path) -> Path:
    proto = gemm().model
    del proto.graph.output[:]
    return saved(proto, folder)


def no_inputs(folder: Path) -> Path:
    return saved(model("() => (float[3] y) { y = Relu (c) }", c=normal(3)), folder)


def no_opset(folder: Path) -> Path:
    proto = gemm().model
    del proto.opset_import[:]
    return saved(proto, folder)


def not_utf8(folder: Path) -> Path:
    path = saved(gemm().model, folder)
    path.write_bytes(path.read_bytes().replace(b"Gemm", b"Ge\xff\xfe"))
    return path


def no_text(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.node[0].attribute.append(helper.make_attribute("note", b"\xff\xfe"))
    return saved(proto, folder)


def a_sequence(folder: Path) -> Path:
    proto = gemm().model
    kind = proto.graph.input[0].type
    kind.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    return saved(proto, folder)


def unknown_operator(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.node[0].op_type = "Gemmm"
    return saved(proto, folder)


def unknown_domain(folder: Path) -> Path:
    proto = gemm().model
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    return saved(proto, folder)


def too_new(folder: Path) -> Path:
    proto = gemm().model
    proto.opset_import[0].version = 999
    return saved(proto, folder)


def calls_itself(folder: Path) -> Path:
    text = """<ir_version: 8, opset_import: ["": 17, "here": 1]>
    g (float[2] x) => (float[2] y) { y = here.twice (x) }
    <domain: "here", opset_import: ["": 17, "here": 1]> twice (x) => (y) { y = here.twice (x) }"""
    return saved(onnx.parser.parse_model(text), folder)


def laughs_a_billion_times(folder: Path) -> Path:
    """Thirty functions, each calling the one before it twice."""
    functions = "\n".join(
        f'<domain: "here", opset_import: ["": 17, "here": 1]> f{k} (x) => (y) '
        f"{{ a = here.f{k - 1} (x) y = here.f{k - 1} (a) }}"
        for k in range(1, 31)
    )
    text = f"""<ir_version: 8, opset_import: ["": 17, "here": 1]>
    g (float[2] x) => (float[2] y) {{ y = here.f30 (x) }}
    <domain: "here", opset_import: ["": 17]> f0 (x) => (y) {{ y = Relu (x) }} {functions}"""
    return saved(onnx.parser.parse_model(text), folder)


def nan_weights(folder: Path) -> Path:
    weights = normal(4, 4, seed=1)
    weights[2, 3] = np.nan
    text = "(float[n,4] x) => (float[n,4] y) { h = MatMul (x, good) y = MatMul (h, bad) }"
    return saved(model(text, good=normal(4, 4), bad=weights), folder)


def infinite_weights(folder: Path) -> Path:
    proto = conv_bn_relu6().model
    weight = next(t for t in proto.graph.initializer if t.name == "v")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] = -np.inf
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "v"))
    return saved(proto, folder)


def nan_in_a_constant_node(folder: Path) -> Path:
    proto = model("(float[n,4] x) => (float[n,4] y) { y = MatMul (x, w) }", w=normal(4, 4) * np.nan)
    weight = proto.graph.initializer.pop()
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    return saved(proto, folder)


def location_not_utf8(folder: Path) -> Path:
    path = external(folder)
    path.write_bytes(path.read_bytes().replace(b"m.bin", b"\xff.bin"))
    return path


def missing_data_file(folder: Path) -> Path:
    path = external(folder)
    (folder / "m.bin").unlink()
    return path


def short_data_file(folder: Path) -> Path:
    path = external(folder)
    with (folder / "m.bin").open("r+b") as file:
        file.truncate(1000)
    return path


def data_above(folder: Path) -> Path:
    (folder.parent / "secret.bin").write_bytes(bytes(1 << 16))
    return external(folder, location="../secret.bin")


def data_above_by_a_detour(folder: Path) -> Path:
    (folder / "sub").mkdir()
    (folder.parent / "secret.bin").write_bytes(bytes(1 << 16))
    return external(folder, location="sub/../../secret.bin")


def data_at_an_absolute_path(folder: Path) -> Path:
    return external(folder, location=str((folder / "m.bin").absolute()))


def data_behind_a_linked_folder(folder: Path) -> Path:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret.bin").write_bytes(bytes(1 << 16))
    (folder / "sub").symlink_to(elsewhere)
    return external(folder, location="sub/secret.bin")


def data_behind_a_link(folder: Path) -> Path:
    (folder.parent / "secret.bin").write_bytes(bytes(1 << 16))
    (folder / "linked.bin").symlink_to(folder.parent / "secret.bin")
    return external(folder, location="linked.bin")


def data_in_a_folder(folder: Path) -> Path:
    (folder / "sub").mkdir()
    return external(folder, location="sub")


def no_location(folder: Path) -> Path:
    return external(folder, location=None)


def negative_offset(folder: Path) -> Path:
    return external(folder, offset="-4096")


def offset_beyond_the_file(folder: Path) -> Path:
    return external(folder, offset="1000000")


def offset_beyond_all_bounds(folder: Path) -> Path:
    return external(folder, offset="9" * 40)


def offset_no_number(folder: Path) -> Path:
    return external(folder, offset="first")


def negative_length(folder: Path) -> Path:
    return external(folder, length="-1")


def length_no_number(folder: Path) -> Path:
    return external(folder, length="1e3")


def wrong_length(folder: Path) -> Path:
    return external(folder, length="16")


def data_outside_in_a_body(folder: Path) -> Path:
    (folder.parent / "secret.bin").write_bytes(bytes(1 << 16))
    proto = if_body().model
    branch = proto.graph.node[1].attribute[1].g
    constant = branch.node[0].attribute[0].t
    constant.ClearField("float_data")
    constant.data_location = TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="../secret.bin")
    return saved(proto, folder)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (truncated, "not an ONNX model, or cut off"),
        (text_file, "not an ONNX model"),
        (empty_file, "not an ONNX model"),
        (a_folder, "holds no ONNX file; make one with"),
        (missing, "there is no model"),
        (cyclic, "the graph has a cycle: node"),
        (cyclic_through_a_body, "the graph has a cycle: node 'h' (MatMul)"),
        (dangling, "reads 'nowhere', which nothing makes"),
        (made_twice, "the tensor name 'r' is given 2 times"),
        (stored_twice, "the tensor name 'w1' is given 2 times"),
        (wrong_dimensions, "tensor 'w1' of shape [17, 12] holds 768 bytes where it needs 816"),
        (negative_dimensions, "tensor 'w1' has a negative size"),
        (no_outputs, "the model has no outputs"),
        (no_inputs, "the model has no inputs"),
        (no_opset, "does not say which opset"),
        (not_utf8, "not UTF-8"),
        (no_text, "attribute 'note' whose text is not UTF-8"),
        (a_sequence, "'x' is a sequence; only tensors can be fed"),
        (unknown_operator, "has no operator Gemmm in opset 13"),
        (unknown_domain, "no operator Gemm of the domain 'com.example'; give the library"),
        (too_new, "999"),
        (calls_itself, "function here:twice calls itself"),
        (laughs_a_billion_times, "stand for 1073741824 nodes"),
        (nan_weights, "weight 'bad' of node 'y' (MatMul) holds nan at [2, 3]"),
        (infinite_weights, "weight 'v' of node 'y' (Conv) holds -inf at [0, 0, 0, 0]"),
        (nan_in_a_constant_node, "weight 'w' of node 'y' (MatMul) holds nan at [0, 0]"),
        (location_not_utf8, "not UTF-8"),
        (missing_data_file, "m.bin' of tensor 'w' is missing"),
        (short_data_file, "m.bin' is too short: tensor 'w' ends at byte 16384 of 1000"),
        (data_above, "'../secret.bin', outside the model's folder"),
        (data_above_by_a_detour, "outside the model's folder"),
        (data_at_an_absolute_path, "outside the model's folder"),
        (data_behind_a_linked_folder, "'sub/secret.bin', outside the model's folder"),
        (data_behind_a_link, "'linked.bin', outside the model's folder"),
        (data_in_a_folder, "is missing"),
        (no_location, "outside the model's folder"),
        (negative_offset, "the offset '-4096', which is no number of bytes"),
        (offset_beyond_the_file, "is too short: tensor 'w' ends at byte 1016384"),
        (offset_beyond_all_bounds, "the offset '999"),
        (offset_no_number, "the offset 'first'"),
        (negative_length, "the length '-1'"),
        (length_no_number, "the length '1e3'"),
        (wrong_length, "has 16 bytes where its shape [64, 64] needs 16384"),
        (data_outside_in_a_body, "outside the model's folder"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_model(make: Callable[[Path], Path], said: str, out: Path) -> None:
    folder = out.parent / "model"
    folder.mkdir()
    path = make(folder)
    assert said in complaint([path], out)
    with pytest.raises(OnnxqError):
        onnxq.quantize(path, output=out / "q.onnx")
    for command in (["inspect", path], ["validate", path, DIGITS], ["bench", path, DIGITS]):
        again = CliRunner().invoke(app, list(map(str, command)))
        if again.exit_code:  # to look at a model asks less of it
            one_line(again.stderr)


def test_nodes_in_any_order_are_accepted(tmp_path: Path) -> None:
    case = attention()
    nodes = list(case.model.graph.node)
    del case.model.graph.node[:]
    case.model.graph.node.extend(reversed(nodes))
    path = saved(case.model, tmp_path)
    result = onnxq.quantize(path, samples=case.feeds, output=tmp_path / "q.onnx")
    assert result.report.verified
    onnx.checker.check_model(tmp_path / "q.onnx")


def test_a_cache_made_of_links_is_quantized(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1a2b" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    external(blobs)
    for name, blob in (("m.onnx", "c0ffee"), ("m.bin", "facade")):
        (blobs / name).rename(blobs / blob)
        (snapshot / name).symlink_to(Path("../../../blobs") / blob)
    command = ["quantize", snapshot / "m.onnx", "--preset", "int8-dynamic", "--quiet"]
    command += ["-o", tmp_path / "q.onnx"]
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output


# Samples


def digits(number: int = 8) -> np.ndarray[Any, Any]:
    return np.load(CALIBRATION)[INPUT][:number]


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "samples.npz"
    np.savez(path, **arrays)
    return path


def other_name(folder: Path) -> object:
    return npz(folder, pixels=digits())


def other_dtype(folder: Path) -> object:
    return npz(folder, **{INPUT: digits().astype(np.int8)})


def other_shape(folder: Path) -> object:
    return npz(folder, **{INPUT: digits()[..., :-1]})


def no_samples(folder: Path) -> object:
    return npz(folder, **{INPUT: digits(0)})


def nan_samples(folder: Path) -> object:
    values = digits().astype(np.float32)
    values[3, 0, 0] = np.nan
    return npz(folder, **{INPUT: values})


def string_samples(folder: Path) -> object:
    return npz(folder, **{INPUT: digits().astype(str)})


def object_samples(folder: Path) -> object:
    return npz(folder, **{INPUT: np.array([None, {}], object)})


def damaged_npz(folder: Path) -> object:
    path = npz(folder, **{INPUT: digits()})
    path.write_bytes(path.read_bytes()[:-200])
    return path


def not_npz(folder: Path) -> object:
    path = folder / "samples.npz"
    path.write_text("1, 2, 3")
    return path


def empty_folder(folder: Path) -> object:
    return folder


def raising(folder: Path) -> object:
    return "bad_sources:raising"


def yielding_nothing(folder: Path) -> object:
    return "bad_sources:yielding_nothing"


def yielding_numbers(folder: Path) -> object:
    return "bad_sources:yielding_numbers"


def missing_function(folder: Path) -> object:
    return "bad_sources:none"


def missing_module(folder: Path) -> object:
    return "no_such_module:samples"


SOURCES = """
def raising():
    yield from ()
    raise RuntimeError("the disk\\nis gone")

def yielding_nothing():
    return iter(())

def yielding_numbers():
    yield 3
"""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (other_name, "'pixels'"),
        (other_dtype, "what came is int8"),
        (other_shape, "the model expects"),
        (no_samples, "holds no samples; give at least one"),
        (nan_samples, "sample 3 (counted from 0): tensor 'image' holds nan"),
        (string_samples, "what came is str"),
        (object_samples, "the model expects"),
        (damaged_npz, "cannot read"),
        (not_npz, "cannot read"),
        (empty_folder, "holds no .npz file"),
        (raising, "failed with RuntimeError: the disk is gone"),
        (yielding_nothing, "gives no samples"),
        (yielding_numbers, "is a int"),
        (missing_function, "has no 'none'"),
        (missing_module, "no_such_module"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_samples(
    make: Callable[[Path], object], said: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out.parent / "bad_sources.py").write_text(SOURCES)
    monkeypatch.syspath_prepend(str(out.parent))
    folder = out.parent / "samples"
    folder.mkdir()
    assert said.replace("'image'", repr(INPUT)) in complaint([DIGITS, "--data", make(folder)], out)


# Recipes, targets, settings, selectors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[[pass]]\nname = 'smooth'", "there is no pass 'smooth'"),
        (b"[[pass]]\nname = 'assign'\ncolour = 1", "assign has no field 'colour'"),
        (b"[[pass]]\nname = 'assign'\nform = 3", "assign.form is one of static, dynamic"),
        (b"[[pass]]\nname = 'calibrate'\npercentile = 'all'", "calibrate.percentile wants float"),
        (b"[[pass]\nname", "is not valid TOML"),
        (b"[[pass]]\nname = '\xff'", "is not UTF-8 text"),
        (b"", "has no [[pass]]"),
        (b"pass = 'normalize'", "write [[pass]] above each"),
        (b"[[pass]]\nname = ['assign']", "needs a name"),
    ],
)
def test_a_bad_recipe(text: bytes, said: str, out: Path) -> None:
    path = out.parent / "mine.toml"
    path.write_bytes(text)
    assert said in complaint([DIGITS, "--recipe", path], out)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"summary = 'x'\nbase = '../presets/int8-static'", "there is no target '../presets"),
        (b"summary = 'x'\nbase = 3", "base wants str"),
        (b"summary = 'x'\n[[rule]]\nops = 'Conv'\nform = 'quick'\nsource = ''", "static, dynamic"),
        (b"summary = 'x'\n[[rule]]\nops = ['Conv']\nform = 'static'\nsource = ''\nweight = 's9'",
         "'s9' is no number format"),
        (b"summary = 'x'\n[[rule]]\nform = 'static'\nsource = ''", "lacks the key 'ops'"),
        (b"summary = 'x'\n[[rule]]\nops = ['Conv']\nform = 'static'", "lacks the key 'source'"),
        (b"summary = 'x'\nopset = -1", "there is no opset -1"),
        (b"summary = 'x'\nsession = 'fast'", "session is a table"),
        (b"summary = 'x'\ncolour = 'red'", "has no field 'colour'"),
        (b"", "lacks the key 'summary'"),
        (b"\xff", "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_bad_target(text: bytes, said: str, out: Path) -> None:
    path = out.parent / "mine.toml"
    path.write_bytes(text)
    assert said in complaint([DIGITS, "--data", CALIBRATION, "--target", path], out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "none.toml"], "there is no recipe file 'none.toml'"),
        (["--recipe", "."], "there is no preset '.'"),
        (["--recipe", "{folder}"], "is a folder; name a .toml file"),
        (["--preset", "int8"], "there is no preset 'int8'; nearest: int"),
        (["--target", "gpu"], "there is no target 'gpu'"),
        (["--target", "{folder}"], "is a folder; name a .toml file"),
        (["--set", "calibrate.method"], "--set wants pass.field=value"),
        (["--set", "=3"], "--set wants pass.field=value"),
        (["--set", "calibrat.method=mse"], "nearest: calibrate"),
        (["--set", "calibrate.metod=mse"], "nearest: method"),
        (["--set", "calibrate.name=mse"], "'name' is none"),
        (["--set", "calibrate.percentile=nan"], "percentile"),
        (["--exclude", "Gem"], "nearest: Gemm"),
        (["--include", "re:("], "re:("),
        (["--include", "nothing*"], "nothing*"),
        (["--exclude", "*"], "nothing in this model can be quantized"),
        (["--custom-ops", "none.so"], "there is no custom-operator library 'none.so'"),
        (["--custom-ops", __file__], "is no custom-operator library"),
        (["--samples", "0"], "Invalid value"),
    ],
)  # fmt: skip
def test_a_bad_option(options: list[str], said: str, out: Path) -> None:
    folder = out.parent / "folder.toml"
    folder.mkdir()
    arguments = [option.format(folder=folder) for option in options]
    assert said in complaint([DIGITS, "--data", CALIBRATION, *arguments], out)


# Outputs


def test_an_output_that_cannot_be(out: Path) -> None:
    file = out.parent / "file"
    file.touch()
    data = ["--data", CALIBRATION, "--no-verify"]
    assert "there is no folder" in complaint([DIGITS, *data, "-o", file / "q.onnx"], out)
    assert "there is no folder" in complaint([DIGITS, *data, "-o", out / "no" / "q.onnx"], out)
    assert "is a folder; name a file" in complaint([DIGITS, *data, "-o", out], out)
    name = "q" * 300 + ".onnx"
    assert "too long" in complaint([DIGITS, *data, "-o", out / name], out)


@pytest.mark.parametrize("how", ["same", "symlink", "hard link", "spelling", "folder link"])
def test_the_output_is_the_input(how: str, out: Path) -> None:
    path = Path(shutil.copy(DIGITS, out))
    output = {
        "same": path,
        "symlink": out / "s.onnx",
        "hard link": out / "h.onnx",
        "spelling": out / ".." / "out" / "." / path.name,
        "folder link": out.parent / "also" / path.name,
    }[how]
    match how:
        case "symlink":
            output.symlink_to(path)
        case "hard link":
            os.link(path, output)
        case "folder link":
            output.parent.symlink_to(out)
    said = complaint([path, "--data", CALIBRATION, "-o", output], out)
    assert "the output would replace the input; choose another --output" in said


def test_the_output_is_the_inputs_data(out: Path) -> None:
    path = external(out)
    assert "replace the input's data" in complaint([path, "-o", out / "m.bin"], out)
    save_proto(large(), out / "q.onnx", limit=0)  # whose data file a rerun would remove
    (out / "q.onnx").rename(out / "old.onnx")
    assert "replace the input's data" in complaint([out / "old.onnx", "-o", out / "q.onnx"], out)


# In a process of its own


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnxq.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, **options
    )


def test_a_full_disk(out: Path) -> None:
    """A limit on file sizes fails a write half way, as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    old = out / "q.onnx"
    old.write_bytes(b"old")
    arguments = ["quantize", DIGITS, "--data", CALIBRATION, "--no-verify", "-o", old, "--quiet"]
    done = process(*arguments, preexec_fn=limit, cwd=out.parent)
    assert done.returncode == 1
    assert f"cannot write '{old}': File too large" in one_line(done.stderr)
    assert snapshot(out) == {"q.onnx": b"old"}
    assert [p.name for p in out.iterdir()] == ["q.onnx"]


def test_a_bad_model_and_its_traceback(out: Path) -> None:
    path = truncated(out.parent)
    done = process("quantize", path, "-o", out / "q.onnx")
    assert done.returncode == 1
    one_line(done.stderr)
    shown = process("--debug", "quantize", path, "-o", out / "q.onnx")
    assert shown.returncode == 1
    assert shown.stderr.startswith("Traceback")
    assert shown.stderr.splitlines()[-1].startswith("onnxq: error: ")
    assert list(out.iterdir()) == []
