"""What one model has and another has not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import MODELS, feeds_of, model, normal
from rich.console import Console
from typer.testing import CliRunner

import onnxq
from onnxq.cli import app
from onnxq.diff import Difference, Stretch, diff
from onnxq.show_diff import sentences, show_diff

PLAIN = "(float[n,4] x) => (float[n,4] y) { h = MatMul (x, w) r = Relu (h) y = Add (r, b) }"


def saved(folder: Path, name: str, made: onnx.ModelProto) -> Path:
    onnx.save(made, folder / name)
    return folder / name


def plain(text: str = PLAIN, **weights: np.ndarray) -> onnx.ModelProto:
    return model(text, **{"w": normal(4, 4), "b": normal(4, seed=1), **weights})


def changed(tmp_path: Path, other: onnx.ModelProto) -> Difference:
    return diff(saved(tmp_path, "a.onnx", plain()), saved(tmp_path, "b.onnx", other))


def shown(found: Difference) -> str:
    console = Console(width=80, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        show_diff(found, console)
    return capture.get()


def test_a_model_is_the_same_as_itself(tmp_path: Path) -> None:
    found = changed(tmp_path, plain())
    assert found.same
    assert sentences(found) == ["The models have the same structure and the same parameters."]


def test_what_was_fused_is_found_between_the_tensors_of_one_name(tmp_path: Path) -> None:
    other = plain(
        "(float[n,4] x) => (float[n,4] y) { r = LeakyRelu <alpha: float = 0.0> (x) y = Add (r, b) }"
    )
    found = changed(tmp_path, other)
    assert found.stretches == [Stretch(["MatMul", "Relu"], ["LeakyRelu"], 1, "r")]
    assert {(o.name, o.before, o.after) for o in found.operators} >= {
        ("MatMul", 1, 0), ("LeakyRelu", 0, 1), ("Add", 1, 1),
    }  # fmt: skip
    assert any("MatMul, Relu became LeakyRelu" in line for line in sentences(found))


def test_attributes_parameters_and_the_interface_are_compared(tmp_path: Path) -> None:
    text = "(float[n,4] x) => (float[n,k] y) {{ y = Softmax <axis: int = {}> (x) }}"
    first = saved(tmp_path, "1.onnx", model(text.format(1)))
    second = saved(tmp_path, "2.onnx", model(text.format(0), opset=17))
    found = diff(first, second)
    assert found.stretches[0].attributes == ["Softmax.axis: 1 → 0"]
    assert found.interface == ["opset of ai.onnx: 13 → 17"]
    weights = changed(tmp_path, plain(w=normal(4, 4, seed=9), b=normal(1, 4)))
    assert [(p.name, p.after) for p in weights.parameters] == [
        ("b", "float32[1, 4]"), ("w", "float32[4, 4], other values"),
    ]  # fmt: skip
    wider = plain("(float[n,4] x, float[n] z) => (float[n,4] y) { h = MatMul (x, w) r = Relu (h) "
                  "y = Add (r, b) }")  # fmt: skip
    assert changed(tmp_path, wider).interface == ["input z: none → float32[n]"]


def test_nodes_in_bodies_count(tmp_path: Path) -> None:
    text = (
        "(float[n,4] x, bool c) => (float[n,4] y) {{ y = If (c) <then_branch = t () => "
        "(float[n,4] a) {{ a = {} (x) }}, else_branch = e () => (float[n,4] d) "
        "{{ d = Identity (x) }}> }}"
    )
    files = [saved(tmp_path, f"{op}.onnx", model(text.format(op))) for op in ("Relu", "Abs")]
    assert diff(*files).stretches == [Stretch(["Relu"], ["Abs"], 1, "a")]


def test_a_constant_is_a_parameter_whether_a_node_makes_it_or_not(tmp_path: Path) -> None:
    text = "(float[4] x) => (float[4] y) { b = Constant <value = float[2] {1, 2}> () y = Neg (x) }"
    first = saved(tmp_path, "1.onnx", model(text))
    second = saved(tmp_path, "2.onnx", model("(float[4] x) => (float[4] y) { y = Neg (x) }"))
    found = diff(first, second)
    assert found.operators[0].name == "Neg"
    assert [(t.name, t.before, t.after) for t in found.types] == [("float32", 2, 0)]


def test_names_that_are_not_shared_are_said_to_tell_little(tmp_path: Path) -> None:
    other = plain("(float[n,4] x) => (float[n,4] q) { p = MatMul (x, w) o = Relu (p) q = Neg (o) }")
    assert any("Only 0 of 3 tensors" in line for line in sentences(changed(tmp_path, other)))


def test_a_quantized_model_is_told_in_words_and_fits_a_terminal(tmp_path: Path) -> None:
    source = MODELS / "digits_cnn.onnx"
    place = tmp_path / "q.onnx"
    samples = feeds_of(8, x=(1, 1, 8, 8))
    name = onnx.load(source).graph.input[0].name
    onnxq.quantize(source, samples=[{name: f["x"]} for f in samples], output=place)
    found = diff(source, place)
    text = shown(found)
    assert "smaller" in text
    assert "New operators: DequantizeLinear, QuantizeLinear" in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert json.loads(found.to_json())["same"] is False


def test_the_command_prints_words_or_json(tmp_path: Path) -> None:
    files = [str(saved(tmp_path, f"{n}.onnx", plain(w=normal(4, 4, seed=n)))) for n in (1, 2)]
    words = CliRunner().invoke(app, ["diff", *files])
    assert words.exit_code == 0
    assert "float32[4, 4], other values" in " ".join(words.output.split())
    data = json.loads(CliRunner().invoke(app, ["diff", *files, "--json"]).stdout)
    assert data["parameters"][0]["name"] == "w"
    missing = CliRunner().invoke(app, ["diff", files[0], str(tmp_path / "no.onnx")])
    assert missing.exit_code == 1


@pytest.mark.parametrize("width", [40, 80])
def test_long_names_fit(tmp_path: Path, width: int) -> None:
    found = changed(tmp_path, plain(w=normal(4, 4, seed=9)))
    found.parameters[0].name = "a_long_name" * 20
    found.stretches = [Stretch(["Conv"] * 30 + ["Relu", "Add"] * 9, ["QLinearConv"], 3, "x" * 99)]
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        show_diff(found, console)
    tables = capture.get().partition("What became")[2]
    assert max(map(len, tables.splitlines())) <= max(width, 60)
