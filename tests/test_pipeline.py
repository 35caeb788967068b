from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from awkward import matmul, residual
from graphs import ops, run, samples_of

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.observe import MinMax, Observer
from onnxq.pipeline import Context, Pass, Pipeline
from onnxq.recipe import load_recipe
from onnxq.report import Report
from onnxq.samples import Samples
from onnxq.target import load_target

CPU = load_target("cpu")


@dataclass(frozen=True)
class Watch(Pass):
    """Asks for one tensor and remembers what it got."""

    tensor: str = "x"
    seen: list[Any] = field(default_factory=list, compare=False)
    name: ClassVar[str] = "watch"
    analysis: ClassVar[bool] = True

    def observe(self, graph: g.Graph, ctx: Context) -> dict[str, Observer]:
        return {self.tensor: MinMax()}

    def apply(self, graph: g.Graph, ctx: Context) -> int:
        self.seen.append(ctx.stats[self.tensor])
        return 0


@dataclass(frozen=True)
class Break(Pass):
    how: str = ""
    name: ClassVar[str] = "break"

    def apply(self, graph: g.Graph, ctx: Context) -> int:
        first, *_, last = graph.nodes
        if self.how == "twice":
            last.outputs[0].name = first.outputs[0].name
        elif self.how == "missing":
            last.inputs[0] = gs.Variable("nowhere")
        elif self.how == "circle":
            first.inputs[0] = last.outputs[0]
        return 1


@dataclass(frozen=True)
class Nothing(Pass):
    name: ClassVar[str] = "nothing"

    def apply(self, graph: g.Graph, ctx: Context) -> int:
        return 0


def passes(*steps: Pass, samples: bool = True, **options: Any):  # type: ignore[no-untyped-def]
    case = matmul()
    graph = g.load(case.model)
    feeds = samples_of(case.model, case.feeds) if samples else None
    return Pipeline(steps).run(graph, feeds, CPU, **options), graph, case


@pytest.fixture
def inferences(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each run over the samples has read; the first looks at one, to open them."""
    runs: list[int] = []
    original = Samples.__iter__

    def counted(self: Samples):  # type: ignore[no-untyped-def]
        runs.append(0)
        for feed in original(self):
            runs[-1] += 1
            yield feed

    monkeypatch.setattr(Samples, "__iter__", counted)
    monkeypatch.setenv("ONNXQ_CACHE", "off")  # which reads the samples once, to know them again
    return runs


def test_neighbouring_analyses_share_one_run_over_the_samples(inferences: list[int]) -> None:
    first, second, third = Watch("x"), Watch("a"), Watch("y")
    passes(first, second, Nothing(), third)
    assert inferences[1:] == [4, 4]
    assert first.seen[0] != second.seen[0] != third.seen[0]


def test_what_was_measured_is_not_measured_again(inferences: list[int]) -> None:
    passes(Watch("x"), Nothing(), Watch("x"))
    assert inferences[1:] == [4]


def test_a_pass_without_observers_reads_no_sample(inferences: list[int]) -> None:
    passes(Nothing())
    assert not inferences[1:]


def test_samples_that_are_wanted_and_not_there_are_an_error() -> None:
    with pytest.raises(OnnxqError, match="the pass 'watch' needs samples"):
        passes(Watch("x"), samples=False)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("twice", "two nodes write 'a'"),
        ("missing", "reads 'nowhere', which nothing makes"),
        ("circle", "left a broken graph"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_named_with_those_before_it(how: str, message: str) -> None:
    with pytest.raises(OnnxqError, match=message) as error:
        passes(Nothing(), Watch("x"), Break(how))
    assert "the pass 'break' left a broken graph" in str(error.value)
    assert "passes before it: nothing, watch" in str(error.value)


def test_the_given_graph_is_not_changed() -> None:
    result, graph, case = passes(Break(""), Nothing())
    assert result.graph is not graph
    x = case.feeds[0]
    np.testing.assert_array_equal(run(graph, x)["y"], run(case.model, x)["y"])


def test_every_pass_is_recorded_with_its_settings_and_cost() -> None:
    report = Report()
    result, _, _ = passes(Watch("a"), Break(""), report=report)
    assert result.report is report
    watched, broken = report.passes
    assert (watched.name, watched.settings["tensor"], watched.changes) == ("watch", "a", 0)
    assert (broken.name, broken.changes) == ("break", 1)
    assert watched.seconds > 0
    assert watched.peak_mb > 20


def test_progress_names_the_passes_and_counts_the_samples() -> None:
    calls: list[tuple[str, int, int]] = []
    passes(Nothing(), Watch("a"), progress=lambda *call: calls.append(call))
    assert ("nothing", 0, 2) in calls
    assert ("watch", 1, 2) in calls
    assert ("calibrate", 4, 4) in calls


def test_prepared_is_the_float_graph_of_the_plan() -> None:
    from onnxq.recipe import load_recipe

    case = residual()
    samples = samples_of(case.model, case.feeds)
    result = load_recipe("int8-static").pipeline.run(g.load(case.model), samples, CPU)
    assert set(result.context.plan) <= {node.name for node in result.prepared.nodes}
    assert "QuantizeLinear" not in {node.op for node in result.prepared.nodes}
    expected = run(case.model, case.feeds[0])["y"]
    np.testing.assert_allclose(run(result.prepared, case.feeds[0])["y"], expected, rtol=1e-5)


@dataclass(frozen=True)
class Foresee(Pass):
    """Keeps what `quantized` says that the model will become."""

    seen: list[onnx.ModelProto] = field(default_factory=list, compare=False)
    name: ClassVar[str] = "foresee"
    analysis: ClassVar[bool] = True

    def apply(self, graph: g.Graph, ctx: Context) -> int:
        before = g.to_proto(graph).SerializeToString(), set(ctx.weights)
        self.seen.append(g.to_proto(ctx.quantized(graph)))
        assert (g.to_proto(graph).SerializeToString(), set(ctx.weights)) == before
        return 0


@pytest.mark.parametrize("preset", ["int8-static", "int8-static-qoperator", "int8-dynamic"])
def test_the_quantized_form_can_be_had_before_lowering(preset: str) -> None:
    steps, foresee = list(load_recipe(preset).passes), Foresee()
    first = next(i for i, step in enumerate(steps) if step.lowers)
    done, _, case = passes(*steps[:first], foresee, *steps[first:])
    (foreseen,) = foresee.seen
    assert ops(foreseen) == ops(done.to_proto())
    expected, actual = (run(m, case.feeds[0]) for m in (done.to_proto(), foreseen))
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)
