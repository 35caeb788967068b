"""The main job on full-size models: `pytest --shared PATH`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import onnxq


def score(shared: Path, *arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, shared / "score" / "score.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_mobilenet_keeps_its_answers(shared: Path, tmp_path: Path) -> None:
    samples, out = tmp_path / "calib.npz", tmp_path / "out.onnx"
    model = shared / "models" / "mobilenet_v1_0.75_224.onnx"
    score(shared, "samples", "imagenet", samples, "--n", "40")
    onnxq.quantize(model, samples=str(samples), output=out)
    found = score(shared, "imagenet", out, "--float", model)
    assert found["agreement"] >= 0.925
    assert found["top1"] >= found["float_top1"] - 0.015


@pytest.mark.parametrize(("preset", "least"), [("int8-dynamic", 0.994), ("int8-static", 0.95)])
def test_sentence_embeddings_stay_where_they_were(
    preset: str, least: float, shared: Path, tmp_path: Path
) -> None:
    samples, out = tmp_path / "samples", tmp_path / "out.onnx"
    model = shared / "models" / "all-MiniLM-L6-v2.onnx"
    score(shared, "samples", "stsb", samples, "--n", "40")
    onnxq.quantize(model, preset, samples=str(samples), output=out)
    assert score(shared, "stsb", out, "--float", model)["cosine"] >= least


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("imagenet", "mobilenet_v1_0.25_224"),
        ("cifar", "cifar10_resnet20"),
        ("kws", "kws_dscnn"),
        ("mnist", "mnist_cntk"),
    ],
)
def test_a_tuned_model_keeps_its_accuracy(
    task: str, model: str, shared: Path, tmp_path: Path
) -> None:
    samples, out = tmp_path / "calib.npz", tmp_path / "out.onnx"
    path = shared / "models" / f"{model}.onnx"
    score(shared, "samples", task, samples, "--n", "200")
    found = onnxq.tune(path, samples=str(samples), max_drop="1%", output=out)
    holding = [c.ratio for c in found.candidates if not c.layers and c.accurate(found.bounds)]
    assert found.chosen.ratio is not None
    assert found.chosen.ratio <= min(ratio for ratio in holding if ratio is not None)
    scored = score(shared, task, out, "--float", path)
    assert scored["top1"] >= 0.99 * scored["float_top1"] - 0.005
