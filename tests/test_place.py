"""Models run in other processes, Pythons, providers; what dies there costs one answer."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from places import PROVIDERS, place

from onnxq import quantize
from onnxq.devices import Job, Place, ask
from onnxq.devices.place import Answer, is_emulated
from onnxq.errors import OnnxqError

X = {"x": np.arange(-6, 6, dtype=np.float32).reshape(3, 4)}


def relu(op: str = "Relu") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        f (float[3, 4] x) => (float[3, 4] y) {{ h = Neg (x)  y = {op} (h) }}"""
    )


def fake(tmp_path: Path, code: str) -> Place:
    """The CPU provider in a Python that runs `code` before the worker."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport runpy, sys\n{code}\nsys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script.chmod(0o755)
    return Place.parse(f"cpu@{script}")


def test_it_brings_back_outputs_kernels_placement_and_time() -> None:
    job = Job(relu(), [X, {"x": -X["x"]}], seconds=0.01, profile=True, optimized=True)
    (answer,) = ask(Place.parse("cpu"), [job])
    assert answer.error == ""
    assert answer.loaded
    assert answer.providers == ("CPUExecutionProvider",)
    np.testing.assert_array_equal(answer.outputs[0]["y"], np.maximum(-X["x"], 0))
    np.testing.assert_array_equal(answer.outputs[1]["y"], np.maximum(X["x"], 0))
    assert {k.op for k in answer.kernels} == {"Neg", "Relu"}
    assert set(answer.placement.values()) == {"CPUExecutionProvider"}
    assert len(answer.latencies_ms) >= 5
    assert answer.optimized is not None
    assert [n.op_type for n in answer.optimized.graph.node] == ["Neg", "Relu"]


def test_a_model_that_does_not_load_says_so_and_others_run() -> None:
    bad, good = ask(Place.parse("cpu"), [Job(relu("NoSuchOperator"), [X]), Job(relu(), [X])])
    assert "NoSuchOperator" in bad.error
    assert not bad.loaded
    assert good.error == ""


def test_a_crash_costs_one_answer(tmp_path: Path) -> None:
    died = tmp_path / "died"
    code = f"""
import os, onnxruntime
Session = onnxruntime.InferenceSession
def crashing(path, *rest, **more):
    if 'job-1' in path:
        open({str(died)!r}, 'a').write('x')
        print('the driver is gone', file=sys.stderr, flush=True)
        os._exit(9)
    return Session(path, *rest, **more)
onnxruntime.InferenceSession = crashing
"""
    answers = ask(fake(tmp_path, code), [Job(relu(), [X])] * 3)
    assert [bool(a.error) for a in answers] == [False, True, False]
    assert answers[1].stage == "crash"
    assert answers[1].error == "the process ended with exit code 9: the driver is gone"
    assert died.read_text() == "x"


def test_a_job_that_hangs_costs_one_answer(tmp_path: Path) -> None:
    code = """
import time, onnxruntime
Session = onnxruntime.InferenceSession
def hanging(path, *rest, **more):
    if 'job-0' in path: time.sleep(60)
    return Session(path, *rest, **more)
onnxruntime.InferenceSession = hanging
"""
    slow, quick = ask(fake(tmp_path, code), [Job(relu(), [X])] * 2, patience=3)
    assert "longer than 3 s" in slow.error
    assert quick.error == ""


@pytest.mark.parametrize(
    ("ep", "message"),
    [
        ("opnvino", "there is no execution provider 'opnvino'; nearest: openvino"),
        ("cpu@/no/such/python", "/no/such/python does not run onnxruntime: No such file"),
        (
            f"cpu@{sys.executable} -S -E",
            "does not run onnxruntime: the process ended with exit code 1",
        ),
    ],
)
def test_a_place_that_does_not_work_is_an_error(ep: str, message: str) -> None:
    with pytest.raises(OnnxqError, match=message):
        ask(Place.parse(ep), [Job(relu(), [X])])


def test_a_provider_that_is_not_installed_is_an_answer() -> None:
    (answer,) = ask(Place.parse("coreml"), [Job(relu(), [X])])
    assert answer.error.startswith("this onnxruntime has no CoreMLExecutionProvider; it has")
    assert not answer.loaded


@pytest.mark.parametrize("name", PROVIDERS)
def test_every_place_runs_a_model(name: str) -> None:
    (answer,) = ask(place(name), [Job(relu(), [X])])
    assert answer.error == ""
    np.testing.assert_allclose(answer.outputs[0]["y"], np.maximum(-X["x"], 0), rtol=1e-3)


def test_arm64_is_arm64(tmp_path: Path) -> None:
    script = tmp_path / "say.py"
    script.write_text("import platform; print(platform.machine())")
    assert os.popen(f"{place('arm64').command[0]} {script}").read().strip() == "aarch64"


def test_a_provider_that_is_plugged_in_takes_every_session_of_a_process() -> None:
    """Once registered it stands among the available ones, and needs its device all the same."""
    job = Job(relu(), [X])
    for answer in ask(place("qnn"), [job, job]):
        assert set(answer.placement.values()) == {"QNNExecutionProvider"}


def test_rivals_are_timed_in_turns_with_a_model() -> None:
    job = Job(relu(), [X], seconds=0.01, rivals=[(relu("Sigmoid"), X)])
    (answer,) = ask(Place("CPUExecutionProvider"), [job])
    assert not answer.error
    assert len(answer.latencies_ms) >= 5
    assert [len(times) for times in answer.rivals_ms] == [len(answer.latencies_ms)]
    assert answer.machine == platform.machine()


@pytest.mark.parametrize("name", ["web", "arm64"])
def test_integers_alone_are_the_same_bits_everywhere(name: str, tmp_path: Path) -> None:
    models = Path(__file__).parents[1] / "models"
    quantize(
        models / "digits_cnn.onnx", "integer-only", samples=models / "digits_cnn.calib.npz",
        output=tmp_path / "q.onnx", check=False,
    )  # fmt: skip
    with np.load(models / "digits_cnn.test.npz") as arrays:
        feed = {"image": arrays["image"][:8]}
    job = Job(tmp_path / "q.onnx", [feed])
    here, there = (
        ask(at, [job])[0].outputs[0]["logits"] for at in (Place.parse("cpu"), place(name))
    )
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize(
    ("provider", "here", "answered", "emulated"),
    [
        ("cpu", "x86_64", "x86_64", False),
        ("cpu", "x86_64", "aarch64", True),
        ("cpu", "x86_64", "", False),  # a page in a browser
        ("qnn", "x86_64", "x86_64", True),
        ("qnn", "aarch64", "aarch64", False),
    ],
)
def test_what_plays_a_device_is_told_from_it(
    provider: str, here: str, answered: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: here)
    assert is_emulated(Place.parse(provider), Answer(machine=answered)) is emulated
