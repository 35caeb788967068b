"""Optional passes are kept where they make the outputs better, and only there."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from graphs import feeds_of, model, normal

import onnxq
from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Context, Pass
from onnxq.recipe import Recipe, load_recipe, parse_recipe
from onnxq.report import Report


def ranged() -> onnx.ModelProto:
    """One input channel is a hundred times louder than the others, whose weights make up for it."""
    weight = normal(8, 6)
    weight[0] /= 100
    text = "(float[n,8] x) => (float[n,6] y) { y = MatMul (x, w) }"
    return model(text, w=weight)


@dataclass(frozen=True)
class Balance(Pass):
    """Divides the loud channel before the product and multiplies its weights."""

    factor: float = 100.0
    name: ClassVar[str] = "balance"

    def apply(self, graph: g.Graph, ctx: Context) -> int:
        (node,) = (n for n in graph.nodes if n.op == "MatMul")
        if node.inputs[0].name != "x":
            return 0
        scale = np.ones(8, np.float32)
        scale[0] = self.factor
        maker = g.Maker(graph)
        weight = g.values(node.inputs[1]) * scale[:, None]
        node.inputs[1] = maker.constant("balanced", weight)
        node.inputs[0] = maker.emit(graph, "Div", [node.inputs[0], maker.constant("s", scale)], "x")
        g.sort(graph)
        return 1


@dataclass(frozen=True)
class Fail(Pass):
    name: ClassVar[str] = "fail"

    def apply(self, graph: g.Graph, ctx: Context) -> int:
        raise OnnxqError("it cannot be")


def feeds() -> list[dict[str, np.ndarray]]:
    found = feeds_of(16, x=(4, 8))
    for feed in found:
        feed["x"][:, 0] *= 100
    return found


def recipe(*optional: Pass) -> Recipe:
    base = load_recipe("int8-static")
    steps = [s for s in base.passes if s.name != "spare-slow"]
    at = next(i for i, step in enumerate(steps) if step.name == "assign")
    names = frozenset(step.name for step in optional)
    return replace(base, passes=(*steps[:at], *optional, *steps[at:]), optional=names)


def quantized(tmp_path: Path, chosen: Recipe) -> onnxq.Result:
    onnx.save(ranged(), tmp_path / "m.onnx")
    return onnxq.quantize(tmp_path / "m.onnx", recipe=chosen, samples=feeds())


def test_what_helps_is_kept_and_the_report_says_by_how_much(tmp_path: Path) -> None:
    report = quantized(tmp_path, recipe(Balance())).report
    (trial,) = report.trials
    assert trial.kept
    assert trial.with_db is not None
    assert trial.with_db > trial.without_db + 10
    assert "balance" in [step.name for step in report.passes]
    assert "optional" not in report.recipe
    assert Report.from_json(report.to_json()).trials == report.trials


def test_what_harms_is_left_out(tmp_path: Path) -> None:
    report = quantized(tmp_path, recipe(Balance(factor=1e-3))).report
    (trial,) = report.trials
    assert not trial.kept
    assert "balance" not in [step.name for step in report.passes]
    assert "balance" not in report.recipe


def test_what_fails_is_left_out_with_its_reason(tmp_path: Path) -> None:
    report = quantized(tmp_path, recipe(Fail(), Balance())).report
    assert [(t.name, t.kept, t.reason) for t in report.trials] == [
        ("fail", False, "it cannot be"),
        ("balance", True, ""),
    ]


def test_a_recipe_says_which_passes_are_optional_and_reads_it_back() -> None:
    text = load_recipe("int8-static").text.replace(
        'name = "spare-quiet"', 'name = "spare-quiet"\noptional = true'
    )
    chosen = parse_recipe("mine", text)
    assert chosen.optional == {"spare-quiet"}
    assert parse_recipe("mine", chosen.text) == chosen


def test_optional_is_yes_or_no() -> None:
    with pytest.raises(OnnxqError, match="optional"):
        parse_recipe("mine", '[[pass]]\nname = "widen"\noptional = 3')
