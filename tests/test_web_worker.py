"""A page in a browser as a place: every type goes there and back, and what fails costs one job."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import model, normal
from places import place

from onnxq.devices import Job, Place, ask, browser
from onnxq.devices.browser import Site, within
from onnxq.devices.web_worker import _data
from onnxq.storage import save_proto

TYPES = ["float32", "float16", "double", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
TYPES += ["int64", "uint64", "bool"]


@pytest.fixture(scope="module")
def page() -> Place:
    return place("web")


def identity(kind: str, *shape: int) -> onnx.ModelProto:
    dims = f"[{','.join(map(str, shape))}]" if shape else ""
    name = "float" if kind == "float32" else kind
    return model(f"({name}{dims} x) => ({name}{dims} y) {{ y = Identity (x) }}", opset=21)


def test_every_type_goes_there_and_back(page: Place) -> None:
    dtypes = [np.dtype("float64" if kind == "double" else kind) for kind in TYPES]
    values = np.array([[0, 1, 3], [-4, 100, 7]])
    feeds: list[dict[str, Any]] = [{"x": values.astype(dtype)} for dtype in dtypes]
    jobs = [Job(identity(kind, 2, 3), [feed]) for kind, feed in zip(TYPES, feeds, strict=True)]
    scalar = Job(identity("float32"), [{"x": np.array(2.5, np.float32)}])
    for feed, answer in zip(feeds, ask(page, jobs), strict=True):
        assert answer.error == ""
        assert answer.outputs[0]["y"].dtype == feed["x"].dtype
        np.testing.assert_array_equal(answer.outputs[0]["y"], feed["x"])
    (answer,) = ask(page, [scalar])
    assert answer.outputs[0]["y"].shape == ()
    assert answer.outputs[0]["y"] == 2.5


def test_a_job_that_fails_costs_no_other(page: Place) -> None:
    unknown = identity("float32", 4)
    unknown.graph.node[0].op_type = "NoSuchOperator"
    huge = model(
        "(float[1] x) => (float[n,m] y) { y = Expand (x, s) }", s=np.array([100_000, 100_000])
    )
    one, four = {"x": np.ones(1, np.float32)}, {"x": np.ones(4, np.float32)}
    bfloat16 = Job(identity("bfloat16", 1), [{"x": np.ones(1, ml_dtypes.bfloat16)}])
    library = Job(identity("float32", 4), [four], custom_ops=["twice.so"])
    good = Job(identity("float32", 4), [four, four], threads=1, seconds=0.01)
    answers = ask(page, [Job(unknown, [four]), Job(huge, [one]), bfloat16, library, good])
    assert "NoSuchOperator" in answers[0].error
    assert not answers[0].loaded
    assert answers[1].error
    assert answers[1].stage == "run"
    assert answers[2].error
    assert "no libraries of custom operators" in answers[3].error
    assert answers[4].error == ""
    assert len(answers[4].outputs) == 2
    assert len(answers[4].latencies_ms) >= 5
    assert answers[4].providers == ("CPUExecutionProvider",)


def test_another_provider_is_an_answer(page: Place) -> None:
    qnn = Place("QNNExecutionProvider", page.command)
    (answer,) = ask(qnn, [Job(identity("float32", 1), [{"x": np.ones(1, np.float32)}])])
    assert "onnxruntime-web has no QNNExecutionProvider" in answer.error


def test_weights_in_a_file_of_their_own_go_there(page: Place, tmp_path: Path) -> None:
    made = model("(float[n,64] x) => (float[n,8] y) { y = MatMul (x, w) }", w=normal(64, 8))
    save_proto(made, tmp_path / "model.onnx", limit=100)
    (answer,) = ask(page, [Job(tmp_path / "model.onnx", [{"x": normal(2, 64)}])])
    assert answer.error == ""
    np.testing.assert_allclose(answer.outputs[0]["y"], normal(2, 64) @ normal(64, 8), rtol=1e-4)


@pytest.mark.parametrize("length", [5, 127, 128, 200])
def test_the_files_beside_a_model_are_found(tmp_path: Path, length: int) -> None:
    name = "d" * length
    made = model("(float[n,64] x) => (float[n,8] y) { y = MatMul (x, w) }", w=normal(64, 8))
    onnx.save(
        made, tmp_path / "m.onnx", save_as_external_data=True, location=name, size_threshold=0
    )
    assert _data(tmp_path / "m.onnx") == [name]


def test_webgpu_is_a_provider_of_the_page(page: Place) -> None:
    gpu = Place("WebGpuExecutionProvider", page.command)
    quantized = model(
        "(float[8,64] x) => (float[8,64] y) { q = QuantizeLinear (x, s, z)"
        " y = DequantizeLinear (q, s, z) }",
        s=np.float32(0.1),
        z=np.uint8(128),
    )
    alone = {"session.disable_cpu_ep_fallback": "1"}
    square = model("(float[8,64] x) => (float[8,64] y) { y = Mul (x, x) }")
    feed = {"x": normal(8, 64)}
    whole, apart, together = ask(
        gpu, [Job(square, [feed], config=alone), Job(quantized, [feed], config=alone),
              Job(quantized, [feed])],
    )  # fmt: skip
    assert whole.error == ""
    np.testing.assert_allclose(whole.outputs[0]["y"], feed["x"] ** 2, rtol=1e-5)
    assert "assigned to the default CPU EP" in apart.error
    assert together.error == ""


def test_a_page_that_holds_no_connection_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "_PULSE", 0.01)
    monkeypatch.setattr(browser, "_GRACE", 0.3)
    with Site(lambda path: b"page", lambda path, body: body) as site:
        with urlopen(f"{site.url}/alive") as held:
            time.sleep(0.6)
            assert held.status == 200
            assert not site.lost
        deadline = time.monotonic() + 20
        while not site.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        assert site.lost


def test_pages_come_with_what_threads_need_and_files_from_their_folder_alone(
    tmp_path: Path,
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "a.mjs").write_text("1")
    (tmp_path / "secret").write_text("2")
    site = Site(lambda path: within(tmp_path / "site", path), lambda path, body: body)
    with site:
        with urlopen(f"{site.url}/a.mjs?x=1") as answer:
            assert answer.read() == b"1"
            assert answer.headers["Content-Type"] == "text/javascript"
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        for path in ("/../secret", "/none", "/"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(site.url + path)


def test_8_bits_do_not_saturate_in_a_page(page: Place) -> None:
    """255 · 127, 256 times: pairs of them exceed 16 bits, in which other kernels add."""
    x, w = np.full((1, 256), 255, np.uint8), np.full((256, 4), 127, np.int8)
    text = "(uint8[1,256] x) => (int32[1,4] y) { y = MatMulInteger (x, w) }"
    (answer,) = ask(page, [Job(model(text, w=w), [{"x": x}])])
    np.testing.assert_array_equal(answer.outputs[0]["y"], np.full((1, 4), 256 * 255 * 127))
