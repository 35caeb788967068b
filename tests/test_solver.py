from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from graphs import Feeds, context, feeds_of, model, normal, samples_of
from onnxq.passes import CoordinateDescent, RoundToNearest

from onnxq import cache, solver
from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Context, NodePlan, Plan
from onnxq.qtype import QTensor, QType, quantize_weight, weight_scale
from onnxq.solver import Layer, WeightSolver

S8 = QType.parse("s8:channel")
TEXT = """(float[n,6] x) => (float[n,5] y) {
    a = MatMul (x, w)
    r = Relu (a)
    b = MatMul (r, w)
    c = MatMul (r, v)
    y = MatMul (c, u)
}"""
WEIGHTS = {"w": normal(6, 6), "v": normal(6, 4, seed=1), "u": normal(4, 5, seed=2)}
FEEDS: Feeds = feeds_of(5, x=(30, 6))


@dataclass(frozen=True)
class Recorded(WeightSolver):
    """Rounds, and remembers what it was given."""

    name: ClassVar[str] = "recorded"
    seen: ClassVar[list[Layer]] = []

    def solve(self, layer: Layer) -> QTensor:
        self.seen.append(layer)
        return quantize_weight(layer.weight, *weight_scale(layer.weight, layer.qtype), layer.qtype)


def planned(feeds: Feeds | None = FEEDS, **fields: int) -> tuple[g.Graph, Context]:
    made = model(TEXT, **WEIGHTS)
    graph = g.load(made)
    g.name_nodes(graph)
    ctx = context(samples=samples_of(made, feeds) if feeds else None, **fields)
    ctx.plan = Plan({n.name: NodePlan(weight=S8) for n in graph.nodes if n.op == "MatMul"})
    Recorded.seen.clear()
    return graph, ctx


@pytest.mark.parametrize("budget", [1 << 30, 2000, 1])
def test_every_weight_is_solved_once_under_the_hessian_of_all_its_inputs(budget: int) -> None:
    graph, ctx = planned(memory_budget=budget)
    assert Recorded().apply(graph, ctx) == 3
    assert set(ctx.weights) == {"w", "v", "u"}
    x = np.concatenate([feed["x"] for feed in FEEDS]).astype(np.float64)
    r = np.maximum(x @ WEIGHTS["w"], 0)
    both = np.concatenate([x, r])  # w is read twice
    for layer, rows in zip(Recorded.seen, (both, r, r @ WEIGHTS["v"]), strict=True):
        expected = rows.T @ rows / len(rows)
        gap = layer.hessian[0] - expected
        np.testing.assert_allclose(np.diagonal(gap), 0, atol=1e-3)
        assert np.linalg.norm(gap) < 0.1 * np.linalg.norm(expected)  # shrunk a little


def test_what_is_solved_stays_solved() -> None:
    graph, ctx = planned()
    Recorded().apply(graph, ctx)
    assert Recorded().apply(graph, ctx) == 0
    assert len(Recorded.seen) == 3


def test_processes_side_by_side_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for worth in (solver.WORTH_PROCESSES, 0):
        monkeypatch.setattr(solver, "WORTH_PROCESSES", worth)
        graph, ctx = planned()
        ctx.threads = 2
        RoundToNearest().apply(graph, ctx)
        with cache.disabled():
            assert CoordinateDescent().apply(graph, ctx) == 3
        found.append({name: ctx.weights[name].codes.tobytes() for name in "wvu"})
    assert found[0] == found[1]


def test_a_solver_gets_the_codes_so_far() -> None:
    graph, ctx = planned()
    q = quantize_weight(WEIGHTS["v"].T, *weight_scale(WEIGHTS["v"].T, S8), S8)
    ctx.weights["v"] = q
    Recorded().apply(graph, ctx)
    starts = [layer.start for layer in Recorded.seen]
    assert starts[0] is None
    np.testing.assert_array_equal(starts[1].codes, q.codes)


def test_no_samples_is_an_error() -> None:
    graph, ctx = planned(None)
    with pytest.raises(OnnxqError, match="needs samples"):
        Recorded().apply(graph, ctx)


def test_the_same_layer_is_solved_once_by_all_runs() -> None:
    for bits in (8, 4):
        codes = []
        for expected in (3, 0):
            graph, ctx = planned()
            ctx.plan = Plan(
                {name: replace(p, weight=replace(S8, bits=bits)) for name, p in ctx.plan.items()}
            )
            assert Recorded().apply(graph, ctx) == 3
            assert len(Recorded.seen) == expected
            codes.append([ctx.weights[name].codes.astype(int).tolist() for name in "wvu"])
        assert codes[0] == codes[1]
