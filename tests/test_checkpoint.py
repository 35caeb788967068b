"""An interrupted run goes on after the last layer that it had solved, and gives the same bytes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import feeds_of, model, normal
from onnxq.passes import Assign, CoordinateDescent

from onnxq import cache
from onnxq.api import quantize
from onnxq.checkpoint import FOLDER, Checkpoint
from onnxq.errors import OnnxqError
from onnxq.qtype import QTensor
from onnxq.recipe import load_recipe
from onnxq.solver import Layer

LAYERS = 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    nodes = [f"h{k + 1} = MatMul (h{k}, w{k})" for k in range(LAYERS)]
    text = f"(float[n,48] h0) => (float[n,48] h{LAYERS}) {{ {' '.join(nodes)} }}"
    weights = {f"w{k}": normal(48, 48, seed=k, scale=0.15) for k in range(LAYERS)}
    path = tmp_path / "model.onnx"
    onnx.save(model(text, **weights), path)
    return path


RECIPE = """
[[pass]]
name = "assign"
form = "weights"
format = "w4:16"
[[pass]]
name = "round-to-nearest"
[[pass]]
name = "coordinate-descent"
[[pass]]
name = "matmul-nbits"
"""


class Stopped(Exception):
    pass


def run(source: Path, tmp_path: Path, *, resume: bool, budget: int = 1 << 30) -> bytes:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    output = tmp_path / "out.onnx"
    quantize(
        source, recipe=recipe, samples=feeds_of(24, h0=(8, 48)), output=output, check=False,
        resume=resume, memory_budget=budget,
    )  # fmt: skip
    return output.read_bytes()


@pytest.mark.parametrize("budget", [1 << 30, 60_000, 1], ids=["one window", "two", "one each"])
@pytest.mark.parametrize("finished", [1, 3])
def test_a_resumed_run_solves_what_is_left_and_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, finished: int
) -> None:
    whole = run(source, tmp_path, resume=False, budget=budget)
    solve, solved = CoordinateDescent.solve, []
    monkeypatch.setattr(cache, "get", lambda name: None)  # so that only the checkpoint remembers

    def stopping(self: CoordinateDescent, layer: Layer) -> QTensor:
        if len(solved) == finished:
            raise Stopped
        solved.append(layer)
        return solve(self, layer)

    monkeypatch.setattr(CoordinateDescent, "solve", stopping)
    with pytest.raises(Stopped):
        run(source, tmp_path, resume=False, budget=budget)
    solved.clear()
    monkeypatch.setattr(
        CoordinateDescent, "solve", lambda self, layer: solved.append(layer) or solve(self, layer)
    )
    assert run(source, tmp_path, resume=True, budget=budget) == whole
    assert len(solved) == LAYERS - finished
    place = cache.folder()
    assert place is not None
    assert not list((place / FOLDER).iterdir())  # done, and nothing left behind


def test_another_recipe_takes_nothing_over(tmp_path: Path) -> None:
    first = Checkpoint.of("model", "recipe", resume=False)
    first.put("gptq", "w", np.ones(3))
    assert Checkpoint.of("model", "other", resume=True).get("gptq", "w") is None
    assert Checkpoint.of("model", "recipe", resume=True).get("gptq", "other") is None
    np.testing.assert_array_equal(
        Checkpoint.of("model", "recipe", resume=True).get("gptq", "w"), np.ones(3)
    )
    assert Checkpoint.of("model", "recipe", resume=False).get("gptq", "w") is None


def test_without_a_cache_there_is_nothing_to_resume_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXQ_CACHE", "off")
    assert Checkpoint.of("model", resume=False).folder is None
    with pytest.raises(OnnxqError, match="set ONNXQ_CACHE to a folder"):
        Checkpoint.of("model", resume=True)


def test_bits_and_blocks_are_changed_where_weights_alone_are_quantized() -> None:
    recipe = load_recipe("int4-rtn").in_blocks(8, None)
    assert [step.format for step in recipe.passes if isinstance(step, Assign)] == ["w8:128"]
    recipe = recipe.in_blocks(None, 32)
    assert [step.format for step in recipe.passes if isinstance(step, Assign)] == ["w8:32"]
    with pytest.raises(OnnxqError, match="presets of weights alone"):
        load_recipe("int8-static").in_blocks(4, None)
