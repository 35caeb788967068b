import gc
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from graphs import model, normal, run

from onnxq import graph as g
from onnxq import spool
from onnxq.errors import OnnxqError
from onnxq.qtype import QTensor, QType, quantize_weight, weight_scale
from onnxq.spool import LARGE, Weights, spooled
from onnxq.storage import ExternalValues

S8 = QType.parse("s8:channel")


def files() -> set[Path]:
    """Those on disk now, and no longer those of what is only waiting to be collected."""
    gc.collect()
    return set() if spool._folder is None else set(spool._folder.iterdir())


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "int64", "bool", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 3, 2)])
def test_what_is_read_back_is_what_was_written(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.asarray(100 * normal(*shape), np.float32).astype(dtype)
    lazy = spooled("w", values)
    for again in (lazy.load(), lazy.read()):
        assert (again.dtype, again.shape) == (values.dtype, shape)
        np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize("view", [lambda a: a.T, lambda a: a[::2, 1:], lambda a: a[::-1]])
def test_views_are_written_as_they_look(view: Any) -> None:
    values = view(normal(6, 5))
    np.testing.assert_array_equal(spooled("w", values).read(), values)


def test_a_file_goes_with_the_last_that_refers_to_it() -> None:
    before = files()
    lazy = spooled("w", normal(9, 9))
    twin = gs.Constant("w", lazy)
    (path,) = files() - before
    assert path.stat().st_size == 4 * 81
    del lazy
    assert path in files()
    del twin
    assert path not in files()


def test_copies_of_a_graph_share_one_file() -> None:
    w = normal(1024, 1025)
    source = model("(float[n,1024] x) => (float[n,1025] y) { y = MatMul (x, w) }", w=w)
    before = files()
    graph = g.load(source)
    g.set_values(next(g.constants(graph)), w)
    (path,) = files() - before
    copies = [g.copy(graph) for _ in range(3)]
    assert files() - before == {path}
    del graph
    for twin in copies:
        np.testing.assert_array_equal(g.values(next(g.constants(twin))), w)
    renamed = g.renamed(next(g.constants(copies[0])), "v")
    del copies, twin
    np.testing.assert_array_equal(g.values(renamed), w)
    assert files() - before == {path}
    del renamed
    assert files() == before


def test_large_constants_are_on_disk_and_small_ones_are_not() -> None:
    large, small = np.ones(LARGE, np.int8), np.ones(LARGE - 1, np.int8)
    assert isinstance(g.constant("w", large)._values, ExternalValues)
    assert not isinstance(g.constant("w", small)._values, ExternalValues)
    truth = np.ones(LARGE, bool)  # of which nothing is known to be gained
    np.testing.assert_array_equal(g.values(g.constant("w", truth)), truth)


def test_a_graph_with_weights_on_disk_runs_and_can_be_saved(tmp_path: Path) -> None:
    w = normal(1024, 1025, scale=0.1)
    source = model("(float[n,1024] x) => (float[n,1025] y) { y = MatMul (x, w) }", w=w)
    graph = g.load(source)
    g.set_values(next(g.constants(graph)), 2 * w)
    x = normal(2, 1024, seed=1)
    g.save(graph, tmp_path / "m.onnx")
    for made in (graph, g.load(tmp_path / "m.onnx")):
        np.testing.assert_allclose(run(made, {"x": x})["y"], 2 * x @ w, rtol=1e-3, atol=1e-4)


def test_spooled_values_are_not_held_in_memory() -> None:
    tracemalloc.start()
    try:
        values = np.ones(1 << 24, np.float32)  # 64 MiB
        constant = g.constant("w", values)
        assert tracemalloc.get_traced_memory()[0] > 1 << 26
        del values
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
        first = float(g.values(constant)[0])
        assert first == 1
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_values_that_are_read_live_as_long_as_somebody_uses_them() -> None:
    lazy = spooled("w", normal(100, 100))
    loaded = lazy.load()
    copied = lazy.read()
    del lazy
    gc.collect()
    for values in (loaded, copied):
        np.testing.assert_array_equal(values, normal(100, 100))


def test_nothing_is_left_when_the_process_ends(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from onnxq.graph import constant; "
        "kept = constant('w', np.ones(1 << 23, np.int8)); "
        "import pathlib, os; print(len(list(pathlib.Path(os.environ['TMPDIR']).rglob('*.bin'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal
import numpy as np
from onnxq import spool
from onnxq.errors import OnnxqError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    spool.spooled("w", np.ones(6 << 20, np.int8))
except OnnxqError as error:
    print(error)
print(len(list(spool._folder.iterdir())))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_a_full_disk_is_one_line_that_says_what_to_do() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True)
    assert not done.stderr
    said, left = done.stdout.splitlines()
    assert said.startswith("no room for 6 MiB in '")
    assert said.endswith("; set TMPDIR to a folder with more")
    assert left == "0"


# ── weights by name ──────────────────────────────────────────────────────────────────────────────


def quantized(rows: int, columns: int, spec: QType = S8) -> QTensor:
    w = np.tile(normal(1, columns), (rows, 1))
    return quantize_weight(w, *weight_scale(w, spec), spec)


def assert_same(found: QTensor, expected: QTensor) -> None:
    assert found.qtype == expected.qtype
    for part in ("codes", "scale", "zero"):
        one, other = getattr(found, part), getattr(expected, part)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_weights_are_a_mapping() -> None:
    before, weights = files(), Weights()
    small, large = quantized(4, 5), quantized(2048, 2049)
    weights["small"], weights["large"] = small, large
    assert list(weights) == ["small", "large"]
    assert len(weights) == 2
    assert "large" in weights
    assert "other" not in weights
    assert weights.get("other") is None
    with pytest.raises(KeyError, match="other"):
        weights["other"]
    for name, expected in (("small", small), ("large", large)):
        assert_same(weights[name], expected)
    assert_same(dict(weights.items())["large"], large)
    assert len(files() - before) == 1
    del weights["large"]
    assert list(weights) == ["small"]
    with pytest.raises(KeyError):
        del weights["large"]
    assert files() == before


def test_a_small_weight_stays_as_it_was_given() -> None:
    weights, small = Weights(), quantized(4, 5)
    weights["w"] = small
    assert weights["w"] is small
    assert weights["w"].codes is small.codes


def test_a_weight_that_is_replaced_is_gone() -> None:
    before, weights = files(), Weights()
    large, larger, small = quantized(2048, 2048), quantized(2048, 2049), quantized(4, 5)
    for q, on_disk in ((large, 1), (larger, 1), (small, 0), (large, 1)):
        weights["w"] = q
        assert_same(weights["w"], q)
        assert len(files() - before) == on_disk
    assert len(weights) == 1


@pytest.mark.parametrize("text", ["s4", "u4a:32"])
def test_codes_of_less_than_a_byte_come_back(text: str) -> None:
    weights, q = Weights(), quantized(2048, 2048, QType.parse(text))
    weights["w"] = q
    assert_same(weights["w"], q)


def test_codes_of_large_weights_are_not_held_in_memory() -> None:
    tracemalloc.start()
    try:
        weights = Weights()
        weights["w"] = QTensor(
            np.ones((1 << 13, 1 << 13), np.int8), np.float32(1), np.int8(0), QType.parse("s8")
        )
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
        assert weights["w"].codes.sum() == 1 << 26
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_full_disk_while_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OnnxqError("no room")

    def refuse(*_: object) -> None:
        raise full

    weights = Weights()
    monkeypatch.setattr(spool, "spooled", refuse)
    with pytest.raises(OnnxqError, match="no room"):
        weights["w"] = quantized(2048, 2048)
    assert "w" not in weights
