from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from awkward import ZOO, if_in_loop, if_in_scan, loop_in_if, nested_if, scan_body
from graphs import Array, Feeds, model, normal, samples_of

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.observe import MinMax
from onnxq.tap import Tap

X = normal(2, 4, seed=9)


def brought_out(
    source: onnx.ModelProto, names: Sequence[str], **feed: Any
) -> dict[str, list[Array]]:
    arrays = {name: np.asarray(value) for name, value in feed.items()}
    return Tap(g.load(source), names, threads=1).run(arrays)


def weights_of(source: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in source.graph.initializer}


def assert_values(found: list[Array], expected: Sequence[Array]) -> None:
    assert [value.shape for value in found] == [value.shape for value in expected]
    for value, want in zip(found, expected, strict=True):
        assert value.dtype == want.dtype
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# ── one kind of body at a time ───────────────────────────────────────────────────────────────────


def branches() -> onnx.ModelProto:
    text = """(float[n,4] x, bool choice) => (float[n,4] y) {
        o = Mul (x, x)
        y = If (choice) <
            then_branch = t () => (float[n,4] a) { m = MatMul (o, w) a = Tanh (m) },
            else_branch = e () => (float[n,4] b) { k = Neg (o) b = Abs (k) }
        >
        z = Neg (y)
    }"""
    return model(text, w=normal(4, 4))


@pytest.mark.parametrize("choice", [True, False])
def test_a_branch_that_was_taken_gives_its_value_and_the_other_an_empty_one(choice: bool) -> None:
    source = branches()
    found = brought_out(source, ["m", "a", "k"], x=X, choice=choice)
    m = X**2 @ weights_of(source)["w"]
    nothing = np.zeros(0, np.float32)
    assert_values(found["m"], [m if choice else nothing])
    assert_values(found["a"], [np.tanh(m) if choice else nothing])
    assert_values(found["k"], [nothing if choice else -(X**2)])


def test_inputs_outer_tensors_and_those_of_both_branches_come_together_in_one_run() -> None:
    source = branches()
    names = ["k", "o", "x", "m", "b", "z", "a", "y"]
    found = brought_out(source, names, x=X, choice=False)
    assert set(found) == set(names)
    for name, value in {
        "x": X,
        "o": X**2,
        "k": -(X**2),
        "b": X**2,
        "y": X**2,
        "z": -(X**2),
    }.items():
        assert_values(found[name], [value])
    assert not found["m"][0].size
    assert not found["a"][0].size


def loop(steps: int, **more: Array) -> tuple[onnx.ModelProto, list[Array]]:
    """A Loop, and what its state is before each iteration and after the last."""
    text = """(float[n,4] x, int64 steps) => (float[n,4] y, float[k,n,4] all) {
        y, all = Loop (steps, yes, x) <
            body = b (int64 i, bool go, float[n,4] h)
                => (bool on, float[n,4] next, float[n,4] out) {
                on = Identity (go)
                m = MatMul (h, w)
                next = Tanh (m)
                out = Neg (next)
            }
        >
    }"""
    source = model(text, w=normal(4, 4), yes=np.array(True), **more)
    states = [X]
    for _ in range(steps):
        states.append(np.tanh(states[-1] @ weights_of(source)["w"]))
    return source, states


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_each_iteration_of_a_loop_gives_a_value(steps: int) -> None:
    source, states = loop(steps)
    found = brought_out(source, ["h", "m", "next", "out", "i", "all"], x=X, steps=steps)
    assert_values(found["h"], states[:-1])
    assert_values(found["m"], [h @ weights_of(source)["w"] for h in states[:-1]])
    assert_values(found["next"], states[1:])
    assert_values(found["out"], [-h for h in states[1:]])
    assert_values(found["i"], [np.array(k) for k in range(steps)])
    assert len(found["all"][0]) == steps


def test_a_tensor_may_grow_from_iteration_to_iteration() -> None:
    case = ZOO["loop_that_grows"]()
    x, w = case.feeds[0]["x"], weights_of(case.model)["w"]
    expected, h = [], x
    for _ in range(3):
        expected.append(h @ w)
        h = np.concatenate([h, np.tanh(h @ w)])
    assert [len(m) for m in expected] == [1, 2, 4]
    assert_values(brought_out(case.model, ["m"], x=x)["m"], expected)


def test_a_loop_without_states_or_a_condition() -> None:
    text = """(float[n,4] x, int64 steps) => (float[k,n,4] all) {
        all = Loop (steps, yes) <
            body = b (int64 i, bool go) => (bool on, float[n,4] out) {
                on = Identity (go)
                m = MatMul (x, w)
                out = Neg (m)
            }
        >
    }"""
    source = model(text, w=normal(4, 4), yes=np.array(True))
    source.graph.node[0].input[1] = ""
    m = X @ weights_of(source)["w"]
    assert_values(brought_out(source, ["m"], x=X, steps=2)["m"], [m, m])


def test_a_scan_gives_what_all_its_steps_make_as_one_stacked_value() -> None:
    case = scan_body()
    feed, w = case.feeds[2], weights_of(case.model)
    found = brought_out(case.model, ["state", "step", "m", "a", "next", "out"], **feed)
    states = [feed["h"]]
    for step in feed["x"]:
        states.append(np.tanh(step @ w["w"] + states[-1]))
    expected = {
        "state": np.stack(states[:-1]),
        "step": feed["x"],
        "m": feed["x"] @ w["w"],
        "a": feed["x"] @ w["w"] + np.stack(states[:-1]),
        "next": np.stack(states[1:]),
        "out": np.stack(states[1:]) @ w["v"],
    }
    for name, value in expected.items():
        assert_values(found[name], [value])


def test_a_scan_that_stacks_along_another_axis_and_backwards() -> None:
    text = """(float[n,4] h, float[s,n,4] x) => (float[n,4] last, float[n,s,4] y) {
        last, y = Scan <num_scan_inputs = 1, scan_output_axes = [1], scan_output_directions = [1],
            body = b (float[n,4] state, float[n,4] step) => (float[n,4] next, float[n,4] out) {
                next = Add (state, step)
                out = Neg (next)
            }
        > (h, x)
    }"""
    x = normal(3, 2, 4)
    found = brought_out(model(text), ["next", "out", "y"], h=X, x=x)
    sums = X + np.cumsum(x, axis=0)
    assert_values(found["next"], [sums])
    assert_values(found["out"], [-sums])
    assert_values(found["y"], [-np.swapaxes(sums, 0, 1)[:, ::-1]])


# ── bodies in bodies ─────────────────────────────────────────────────────────────────────────────


def test_branches_inside_a_loop_give_a_value_or_an_empty_one_each_iteration() -> None:
    case = if_in_loop()
    graph, w = g.load(case.model), weights_of(case.model)
    tensors = {node.op: node.inputs[0].name for node in g.walk(graph)}
    early, late = tensors["Sigmoid"], tensors["Tanh"]  # both were k, until they got their own names
    assert early != late
    found = Tap(graph, [early, late, "h"], threads=1).run({"x": X})
    h, expected = X, []
    for i in range(4):
        expected.append(h)
        h = np.tanh(h @ w["w"]) if i > 1 else sigmoid(h @ w["v"])
    nothing = np.zeros(0, np.float32)
    assert_values(found["h"], expected)
    assert_values(found[early], [h @ w["v"] for h in expected[:2]] + [nothing] * 2)
    assert_values(found[late], [nothing] * 2 + [h @ w["w"] for h in expected[2:]])


@pytest.mark.parametrize("choice", [True, False])
def test_a_loop_inside_a_branch_gives_one_value_per_iteration_if_it_runs(choice: bool) -> None:
    case = loop_in_if()
    w = weights_of(case.model)["w"]
    found = brought_out(case.model, ["m", "h", "b"], x=X, choice=choice)
    first = X @ w
    nothing = np.zeros(0, np.float32)
    assert_values(found["m"], [first, np.tanh(first) @ w] if choice else [nothing])
    assert_values(found["h"], [X, np.tanh(first)] if choice else [nothing])
    assert_values(found["b"], [nothing if choice else first])


@pytest.mark.parametrize("choice", [True, False])
def test_a_branch_inside_a_branch(choice: bool) -> None:
    case = nested_if()
    graph, w = g.load(case.model), weights_of(case.model)
    names = {n.op: n.inputs[0].name for n in g.walk(graph) if n.op in ("Relu", "Sigmoid")}
    found = Tap(graph, [*names.values(), "r"], threads=1).run({"x": X, "choice": np.array(choice)})
    h = X @ w["w"]
    nothing = np.zeros(0, np.float32)
    assert_values(found[names["Relu"]], [h if choice else nothing])
    assert_values(found["r"], [np.maximum(h, 0) if choice else nothing])
    assert_values(found[names["Sigmoid"]], [nothing if choice else X @ w["u"]])


def test_a_scan_inside_a_loop_gives_a_stack_per_iteration() -> None:
    text = """(float[n,4] h, float[s,n,4] x) => (float[n,4] y) {
        y = Loop (two, yes, h) <
            body = b (int64 i, bool go, float[n,4] outer) => (bool on, float[n,4] last) {
                on = Identity (go)
                last = Scan <num_scan_inputs = 1,
                    body = c (float[n,4] state, float[n,4] step) => (float[n,4] next) {
                        next = Add (state, step)
                    }
                > (outer, x)
            }
        >
    }"""
    x = normal(3, 2, 4)
    found = brought_out(
        model(text, two=np.array(2), yes=np.array(True)), ["next", "outer"], h=X, x=x
    )
    first = X + np.cumsum(x, axis=0)
    assert_values(found["next"], [first, first[-1] + np.cumsum(x, axis=0)])
    assert_values(found["outer"], [X, first[-1]])


# ── types, weights, the graph itself ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("choice", [True, False])
def test_values_keep_their_types(choice: bool) -> None:
    text = """(float[n,4] x, bool choice) => (float[n,4] y) {
        y = If (choice) <
            then_branch = t () => (float[n,4] a) {
                half = Cast <to = 10> (x)
                whole = Cast <to = 7> (half)
                positive = Greater (x, zero)
                a = Cast <to = 1> (whole)
            },
            else_branch = e () => (float[n,4] b) { b = Neg (x) }
        >
    }"""
    graph = g.load(model(text, zero=np.float32(0)))
    g.infer_types(graph)
    found = Tap(graph, ["half", "whole", "positive"], threads=1).run(
        {"x": X, "choice": np.array(choice)}
    )
    half = X.astype(np.float16)
    for name, want in (("half", half), ("whole", half.astype(np.int64)), ("positive", X > 0)):
        assert_values(found[name], [want if choice else want[:0, 0]])


def test_a_large_weight_that_a_body_reads_is_there() -> None:
    text = """(float[n,300] x, bool choice) => (float[n,300] y) {
        y = If (choice) <
            then_branch = t () => (float[n,300] a) { m = MatMul (x, w) a = Neg (m) },
            else_branch = e () => (float[n,300] b) { b = MatMul (x, w) }
        >
    }"""
    w, x = normal(300, 300, scale=0.1), normal(2, 300, seed=1)
    found = brought_out(model(text, w=w), ["m"], x=x, choice=True)
    np.testing.assert_allclose(found["m"][0], x @ w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [branches, lambda: loop(0)[0], lambda: scan_body().model])
def test_the_graph_stays_as_it_is(make: Any) -> None:
    graph = g.load(make())
    before = g.to_proto(graph).SerializeToString(deterministic=True)
    names = [t.name for node in g.walk(graph) for t in node.outputs]
    Tap(graph, names, threads=1)
    assert g.to_proto(graph).SerializeToString(deterministic=True) == before


def test_a_tensor_that_is_nowhere_is_an_error_that_names_it() -> None:
    with pytest.raises(OnnxqError, match=r"^cannot observe 'nobody': the graph has no tensor of"):
        Tap(g.load(branches()), ["m", "nobody"])


def test_a_body_inside_a_scan_cannot_be_looked_into() -> None:
    graph = g.load(if_in_scan().model)
    assert Tap(graph, ["s", "next"], threads=1).sequences.keys() == {"s", "next"}
    with pytest.raises(OnnxqError, match=r"^cannot observe 'u': it is in a body inside a Scan$"):
        Tap(graph, ["s", "u"])


# ── ranges ───────────────────────────────────────────────────────────────────────────────────────


def ranges(source: onnx.ModelProto, feeds: Feeds, *names: str) -> dict[str, Any]:
    observers = {name: MinMax() for name in names}
    return observe(g.load(source), observers, samples_of(source, feeds), threads=1)


def test_ranges_inside_a_loop_are_those_of_the_graph_unrolled() -> None:
    unrolled = """(float[n,4] h0) => (float[n,4] h3) {
        m0 = MatMul (h0, w) h1 = Tanh (m0)
        m1 = MatMul (h1, w) h2 = Tanh (m1)
        m2 = MatMul (h2, w) h3 = Tanh (m2)
    }"""
    source, _ = loop(3)
    inputs = [normal(2, 4, seed=k, scale=k + 1) for k in range(4)]
    feeds: Feeds = [{"x": x, "steps": np.array(3)} for x in inputs]
    inside = ranges(source, feeds, "h", "m", "next", "out")
    flat_names = [f"{kind}{k}" for kind in "hm" for k in range(3)] + ["h3"]
    flat = ranges(model(unrolled, w=normal(4, 4)), [{"h0": x} for x in inputs], *flat_names)
    for name, parts in {
        "h": ["h0", "h1", "h2"], "m": ["m0", "m1", "m2"], "next": ["h1", "h2", "h3"]
    }.items():  # fmt: skip
        low = min(flat[part].low for part in parts)
        high = max(flat[part].high for part in parts)
        np.testing.assert_allclose(inside[name], (low, high), rtol=1e-5)
    np.testing.assert_allclose(
        inside["out"], (-inside["next"].high, -inside["next"].low), rtol=1e-6
    )


def test_ranges_inside_a_branch_are_those_of_the_samples_that_took_it() -> None:
    source = branches()
    feeds: Feeds = [
        {"x": normal(2, 4, seed=k) + 5 * (k % 2), "choice": np.array(k % 2 == 0)} for k in range(6)
    ]
    found = ranges(source, feeds, "m", "k", "o")
    w = weights_of(source)["w"]
    m = np.stack([feed["x"] ** 2 @ w for feed in feeds if feed["choice"]])
    k = np.stack([-(feed["x"] ** 2) for feed in feeds if not feed["choice"]])
    o = np.stack([feed["x"] ** 2 for feed in feeds])
    for name, values in (("m", m), ("k", k), ("o", o)):
        np.testing.assert_allclose(found[name], (values.min(), values.max()), rtol=1e-5)


@dataclass
class Shapes:
    """An observer of shapes alone."""

    seen: list[tuple[int, ...]] = field(default_factory=list)

    def update(self, x: Array) -> None:
        self.seen.append(x.shape)

    def merge(self, other: "Shapes") -> None:
        self.seen += other.seen

    def result(self) -> list[tuple[int, ...]]:
        return self.seen


def test_a_branch_that_was_not_taken_is_not_shown_to_observers() -> None:
    graph = g.load(branches())
    feeds: Feeds = [{"x": normal(n, 4), "choice": np.array(n % 2 == 0)} for n in range(1, 5)]
    found = observe(graph, {"m": Shapes(), "k": Shapes()}, samples_of(branches(), feeds))
    assert found == {"m": [(2, 4), (4, 4)], "k": [(1, 4), (3, 4)]}


def test_infinity_in_one_iteration_is_found_and_named() -> None:
    text = """(float[n,4] x) => (float[n,4] y) {
        y = Loop (three, yes, x) <
            body = b (int64 i, bool go, float[n,4] h) => (bool on, float[n,4] next) {
                on = Identity (go)
                e = Exp (h)
                next = Mul (e, hundred)
            }
        >
        z = Log (y)
    }"""
    source = model(text, three=np.array(3), yes=np.array(True), hundred=np.full(4, 100, np.float32))
    with pytest.raises(OnnxqError, match="makes 'e' NaN or infinite"):
        ranges(source, [{"x": np.zeros((2, 4), np.float32)}], "e")
