import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import MODELS, gemm, model, normal, run

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.runtime import Session
from onnxq.storage import file_hash, load_proto, model_size, save_proto

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
