import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from awkward import gemm
from graphs import MODELS, model, normal, run
from onnx import TensorProto

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.runtime import Session
from onnxq.storage import data_files, file_hash, load_proto, model_size, save_proto
from onnxq.tensors import initializers, other_tensors

X = {"x": normal(2, 512)}


def large() -> onnx.ModelProto:
    text = "(float[n,512] x) => (float[n,8] y) { h = MatMul (x, w) y = MatMul (h, v) }"
    return model(text, w=normal(512, 512), v=normal(512, 8, seed=1))


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model with its weights in weights.bin, in a folder below tmp_path."""
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir()
    onnx.save(large(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_weights_are_read_when_somebody_asks(external: Path) -> None:
    graph = g.load(external)
    (external.parent / "weights.bin").rename(external.parent / "away")
    weights = {t.name: t for t in g.constants(graph)}
    assert tuple(weights["w"].shape) == (512, 512)
    with pytest.raises(OnnxqError, match="cannot be read any more"):
        _ = weights["w"].values
    (external.parent / "away").rename(external.parent / "weights.bin")
    np.testing.assert_array_equal(weights["v"].values, normal(512, 8, seed=1))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_external_weights_are_copied_and_a_rerun_leaves_the_same_size(
    external: Path, tmp_path: Path, elsewhere: bool
) -> None:
    out = (tmp_path if elsewhere else external.parent) / "out.onnx"
    before = file_hash(external), file_hash(external.parent / "weights.bin")
    sizes = []
    for _ in range(3):
        written = g.save(g.load(external), out)
        sizes.append(model_size(out))
        assert written == sizes[-1]
    assert len(set(sizes)) == 1
    assert before == (file_hash(external), file_hash(external.parent / "weights.bin"))
    written_files = sorted(p.name for p in out.parent.iterdir() if p.name.startswith("out"))
    assert len(written_files) == 2
    assert re.fullmatch(r"out\.onnx\.[0-9a-f]{16}\.data", written_files[1])
    expected = run(large(), X)["y"]
    np.testing.assert_array_equal(Session(out, threads=1).run(X)["y"], expected)


def test_a_model_can_be_saved_over_itself(external: Path) -> None:
    expected = run(large(), X)["y"]
    for _ in range(2):
        g.save(g.load(external), external)
        np.testing.assert_array_equal(Session(external, threads=1).run(X)["y"], expected)


def test_one_proto_with_external_weights_opens_in_two_sessions(external: Path) -> None:
    proto = g.to_proto(g.load(external))
    first, second = Session(proto), Session(proto, optimize=False)
    np.testing.assert_allclose(first.run(X)["y"], second.run(X)["y"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "a/../../weights.bin", ""])
def test_external_data_outside_the_folder_is_refused(external: Path, location: str) -> None:
    proto = onnx.load(external, load_external_data=False)
    (external.parents[1] / "weights.bin").write_bytes(bytes(2_000_000))
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    external.write_bytes(proto.SerializeToString())
    with pytest.raises(OnnxqError, match="outside the model's folder"):
        g.load(external)


def test_missing_external_data_is_an_error_that_names_it(external: Path) -> None:
    (external.parent / "weights.bin").unlink()
    with pytest.raises(OnnxqError, match=r"weights\.bin.* is missing"):
        g.load(external)


def test_a_cache_made_of_links_loads(external: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    external.parent.rename(blobs)
    snapshot.mkdir()
    for name in ("m.onnx", "weights.bin"):
        (snapshot / name).symlink_to(blobs / name)
    graph = g.load(snapshot / "m.onnx")
    np.testing.assert_array_equal(next(g.constants(graph)).values, normal(512, 512))


@pytest.mark.parametrize("content", [b"not a model at all", b"", b"\x08\x08"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxqError, match="not an ONNX model"):
        load_proto(path)
    with pytest.raises(OnnxqError, match="there is no file"):
        load_proto(tmp_path / "y.onnx")


@pytest.mark.parametrize("fails", [1, 2])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    external: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    calls = []

    def replace(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == fails:
            raise KeyboardInterrupt
        os.rename(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("onnxq.storage.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        g.save(g.load(external), out)
    assert out.read_bytes() == b"old"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".onnxq")]


def test_small_models_stay_in_one_file_with_the_same_bytes(tmp_path: Path) -> None:
    proto = gemm().model
    for name in ("a.onnx", "b.onnx"):
        assert save_proto(proto, tmp_path / name) == model_size(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    assert file_hash(tmp_path / "a.onnx") == file_hash(tmp_path / "b.onnx")


def test_a_model_too_large_for_one_file_gets_a_data_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxq.storage.ONE_FILE_LIMIT", 1 << 20)
    path = tmp_path / "big.onnx"
    save_proto(large(), path)
    tensors = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
    offsets = [int(e.value) for e in tensors["w"].external_data if e.key == "offset"]
    assert offsets[0] % 4096 == 0
    assert path.stat().st_size < 10_000
    np.testing.assert_array_equal(Session(path, threads=1).run(X)["y"], run(large(), X)["y"])


def test_the_size_of_a_model_is_that_of_its_files() -> None:
    path = MODELS / "digits_cnn.onnx"
    assert model_size(path) == path.stat().st_size


# Every kind of external tensor


def stored(values: Any, kind: int, path: Path, offset: int) -> TensorProto:
    """An external tensor whose bytes are put into a file at `offset`."""
    tensor = onnx.numpy_helper.from_array(np.asarray(values), "w")
    assert tensor.data_type == kind
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(offset)
        file.write(tensor.raw_data)
    size = str(len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", path.name), ("offset", str(offset)), ("length", size)):
        tensor.external_data.add(key=key, value=value)
    return tensor


def reader(tensor: TensorProto, folder: Path) -> Path:
    """A model of opset 25 that hands the tensor on, and reads nothing else."""
    node = onnx.helper.make_node("Identity", [tensor.name], ["y"])
    y = onnx.helper.make_tensor_value_info("y", tensor.data_type, list(tensor.dims))
    graph = onnx.helper.make_graph([node], "g", [], [y], [tensor])
    opset = onnx.helper.make_opsetid("", 23)
    path = folder / "m.onnx"
    proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=11)
    path.write_bytes(proto.SerializeToString())
    return path


KINDS = {
    "FLOAT": np.float32,
    "DOUBLE": np.float64,
    "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16,
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "INT4": ml_dtypes.int4,
    "UINT4": ml_dtypes.uint4,
    "INT8": np.int8,
    "INT64": np.int64,
    "UINT16": np.uint16,
    "BOOL": np.bool_,
    "COMPLEX64": np.complex64,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0, 4096, 3])  # the last fits no type of two bytes and more
def test_external_tensors_of_every_type_and_offset(tmp_path: Path, kind: str, offset: int) -> None:
    values = np.arange(-3, 6).reshape(3, 3).clip(0 if kind[0] in "UB" else None).astype(KINDS[kind])
    tensor = stored(values, TensorProto.DataType.Value(kind), tmp_path / "w.bin", offset)
    path = reader(tensor, tmp_path)
    for name in ("out.onnx", "again.onnx"):
        constant = next(g.constants(g.load(path)))
        found = constant.values
        assert found.flags.aligned
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)
        g.save(g.load(path), tmp_path / name)
        path = tmp_path / name
    whole = onnx.load(path)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(whole.graph.initializer[0]), values)


def test_strings_are_no_external_data(tmp_path: Path) -> None:
    tensor = stored(np.zeros(4, np.int8), TensorProto.INT8, tmp_path / "w.bin", 0)
    tensor.data_type = TensorProto.STRING
    with pytest.raises(OnnxqError, match="'w' holds strings"):
        load_proto(reader(tensor, tmp_path))


def test_an_empty_external_tensor(tmp_path: Path) -> None:
    values = np.zeros((0, 3), np.float32)
    path = reader(stored(values, TensorProto.FLOAT, tmp_path / "w.bin", 0), tmp_path)
    assert next(g.constants(g.load(path))).values.shape == (0, 3)
    g.save(g.load(path), tmp_path / "out.onnx")
    assert load_proto(tmp_path / "out.onnx")


@pytest.mark.parametrize("left_out", ["length", "offset"])
def test_offset_and_length_are_optional(tmp_path: Path, left_out: str) -> None:
    values = normal(5, 5)
    tensor = stored(values, TensorProto.FLOAT, tmp_path / "w.bin", 0)
    entry = next(entry for entry in tensor.external_data if entry.key == left_out)
    tensor.external_data.remove(entry)
    with (tmp_path / "w.bin").open("ab") as file:
        file.write(b"more")  # which is not the tensor's
    path = reader(tensor, tmp_path)
    np.testing.assert_array_equal(next(g.constants(g.load(path))).values, values)
    np.testing.assert_array_equal(Session(path).run({})["y"], values)
    g.save(g.load(path), tmp_path / "out.onnx")
    np.testing.assert_array_equal(Session(tmp_path / "out.onnx").run({})["y"], values)


def test_several_data_files_become_one(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(
        large(), path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    assert len(list(tmp_path.iterdir())) == 3
    assert model_size(path) == sum(file.stat().st_size for file in tmp_path.iterdir())
    g.save(g.load(path), tmp_path / "out.onnx")
    assert len(data_files(tmp_path / "out.onnx")) == 1
    np.testing.assert_array_equal(Session(tmp_path / "out.onnx").run(X)["y"], run(large(), X)["y"])


def everywhere() -> onnx.ModelProto:
    """Weights of the graph, of a body, and in Constant nodes of both and of a function."""
    text = """<ir_version: 10, opset_import: ["": 17, "here": 1]>
    g (float[n,32] x, bool choice) => (float[n,32] y) {
        c = Constant <value = float[1] {0}> ()
        h = MatMul (x, w)
        i = Add (h, c)
        f = here.shifted (i)
        y = If (choice) <
            then_branch = yes () => (float[n,32] a) {
                d = Constant <value = float[1] {0}> ()
                e = Add (f, d)
                a = Add (e, inner)
            },
            else_branch = no () => (float[n,32] b) { b = Identity (f) }
        >
    }
    <domain: "here", opset_import: ["": 17]> shifted (x) => (y) {
        s = Constant <value = float[1] {0}> ()
        y = Add (x, s)
    }"""
    made = onnx.parser.parse_model(text)
    made.graph.initializer.append(onnx.numpy_helper.from_array(normal(32, 32), "w"))
    body = next(node for node in made.graph.node if node.op_type == "If").attribute[0].g
    body.initializer.append(onnx.numpy_helper.from_array(normal(32, seed=1), "inner"))
    for seed, tensor in enumerate(other_tensors(made), 2):
        tensor.CopyFrom(onnx.numpy_helper.from_array(normal(32, seed=seed), tensor.name))
    return made


def test_tensors_are_found_wherever_they_stand(tmp_path: Path) -> None:
    expected = everywhere()
    feed = {"x": normal(2, 32), "choice": np.array(True)}
    path = tmp_path / "m.onnx"
    moved = everywhere()
    with (tmp_path / "w.bin").open("wb") as file:
        for tensor in [*initializers(moved), *other_tensors(moved)]:
            tensor.external_data.add(key="location", value="w.bin")
            tensor.external_data.add(key="offset", value=str(file.tell()))
            tensor.data_location = TensorProto.EXTERNAL
            file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
    path.write_bytes(moved.SerializeToString())
    assert model_size(path) == path.stat().st_size + (32 * 32 + 4 * 32) * 4
    sizes = []
    for _ in range(3):
        graph = g.load(path)
        g.save(graph, tmp_path / "out.onnx")
        sizes.append(model_size(tmp_path / "out.onnx"))
        for source in (tmp_path / "out.onnx", g.to_proto(graph), load_proto(path)):
            if isinstance(source, onnx.ModelProto) and source.graph.initializer[0].external_data:
                continue  # a proto alone does not say where its files are
            found = Session(source).run(feed)["y"]
            np.testing.assert_allclose(found, run(expected, feed)["y"], rtol=1e-5, atol=1e-5)
    assert len(set(sizes)) == 1
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "w.bin").unlink()
    with pytest.raises(OnnxqError, match="is missing"):
        load_proto(path)


def test_typed_values_are_moved_whole(tmp_path: Path) -> None:
    """Tensors that keep their numbers in float_data and int32_data, not in raw_data."""
    w = onnx.helper.make_tensor("w", TensorProto.FLOAT, [600], normal(600).tolist())
    v = onnx.helper.make_tensor("v", TensorProto.INT4, [3001], [k % 8 for k in range(3001)])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [n], [n + "y"]) for n in "wv"],
        "g",
        [],
        [onnx.helper.make_tensor_value_info(t.name + "y", t.data_type, t.dims) for t in (w, v)],
        [w, v],
    )
    opset = onnx.helper.make_opsetid("", 23)
    proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=11)
    save_proto(proto, tmp_path / "m.onnx", limit=0)
    assert (tmp_path / "m.onnx").stat().st_size < 1000
    for before, after in zip((w, v), onnx.load(tmp_path / "m.onnx").graph.initializer, strict=True):
        expected, found = map(onnx.numpy_helper.to_array, (before, after))
        np.testing.assert_array_equal(expected, found)


def sparse(values: Any, indices: Any) -> onnx.ModelProto:
    """y = x + a sparse tensor (2, 3), and the same from a Constant."""
    made = model("(float[2,3] x) => (float[2,3] y) { a = Add (x, s) y = Add (a, c) }",
                 s=normal(2, 3), c=normal(2, 3))  # fmt: skip
    del made.graph.initializer[:]
    tensor = onnx.SparseTensorProto(dims=[2, 3])
    tensor.values.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values, np.float32), "s"))
    tensor.indices.CopyFrom(onnx.numpy_helper.from_array(np.asarray(indices), "i"))
    made.graph.sparse_initializer.append(tensor)
    node = onnx.helper.make_node("Constant", [], ["c"], sparse_value=tensor)
    made.graph.node.insert(0, node)
    return made


@pytest.mark.parametrize("indices", [[1, 5], [[0, 1], [1, 2]]])
def test_sparse_tensors_are_made_dense(tmp_path: Path, indices: Any) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(sparse([4, 7], indices).SerializeToString())
    expected = 2 * np.array([[0, 4, 0], [0, 0, 7]], np.float32)
    for source in (load_proto(path), g.to_proto(g.load(path))):
        feed = {"x": np.zeros((2, 3), np.float32)}
        np.testing.assert_array_equal(run(source, feed)["y"], expected)


@pytest.mark.parametrize("indices", [[1, 6], [-1, 2], [[0, 1], [2, 0]], [1], [1.5, 2.0]])
def test_a_sparse_tensor_that_contradicts_itself_is_refused(tmp_path: Path, indices: Any) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(sparse([4, 7], indices).SerializeToString())
    with pytest.raises(OnnxqError, match="sparse tensor 's' contradicts itself"):
        load_proto(path)


# What the fuzzer found


def broken(change: Callable[[onnx.ModelProto], object], folder: Path) -> Path:
    proto = gemm().model
    change(proto)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.graph.node[0].attribute.add(name="pads", type="INTS"), "is an empty list"),
        (lambda m: m.graph.node[0].attribute.add(name="body", type="GRAPH"), "without a value"),
        (lambda m: m.graph.node[0].attribute.add(name="t", type="TENSOR"), "without a value"),
        (lambda m: m.graph.node[0].attribute.add(name="t", type="TYPE_PROTO"), "cannot keep"),
        (lambda m: m.graph.node[0].attribute.add(name="t"), "cannot keep"),
        (lambda m: m.graph.output[0].type.tensor_type.ClearField("elem_type"), "unknown type 0"),
        (lambda m: m.graph.output[0].ClearField("type"), "of no type"),
        (lambda m: m.graph.value_info.add(name="r").type.__setattr__("denotation", "z"), "no type"),
        (lambda m: m.graph.output[0].type.map_type.SetInParent(), "of the type map"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 64), "unknown type 64"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 0), "unknown type 0"),
    ],
)
def test_what_the_fuzzer_found(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(OnnxqError, match=said):
        load_proto(broken(change, tmp_path))


def test_a_function_called_with_too_many_inputs_is_refused(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "here": 1]>
    g (float[2] x) => (float[2] y) { y = here.same (x, x) }
    <domain: "here", opset_import: ["": 17]> same (x) => (y) { y = Relu (x) }"""
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    with pytest.raises(OnnxqError, match="functions cannot be written out"):
        load_proto(path)
