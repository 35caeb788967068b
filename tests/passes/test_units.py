"""What counts as one function, as an exporter wrote it."""

from __future__ import annotations

import numpy as np
from graphs import Array, model, normal
from onnxq.passes.solve.units import units

from onnxq import graph as g

NORM = """m = ReduceMean <keepdims = 1> (x, last) d = Sub (x, m) s = Mul (d, d)
    v = ReduceMean <keepdims = 1> (s, last) e = Add (v, eps) r = Sqrt (e) n = Div (d, r)
    t = Mul (n, g) y = Add (t, b)"""
WEIGHTS: dict[str, Array] = {
    "last": np.array([-1]), "eps": np.float32(1e-5), "g": normal(8), "b": normal(8),
}  # fmt: skip


def found(text: str, **weights: Array) -> list[tuple[str, int, list[str]]]:
    graph = g.load(model(text, 21, **weights))
    return [(u.op, len(u.nodes), [t.name for t in u.inputs]) for u in units(graph, graph)]


def test_a_normalization_that_is_spelled_out_is_one_unit() -> None:
    text = f"(float[n,8] x) => (float[n,8] z) {{ {NORM} z = Neg (y) }}"
    assert found(text, **WEIGHTS) == [("LayerNormalization", 9, ["x"]), ("Neg", 1, ["y"])]


def test_what_others_read_inside_is_none() -> None:
    """The mean itself is wanted elsewhere, so that it must be made."""
    text = f"(float[n,8] x) => (float[n,8] y, float[n,1] m) {{ {NORM} }}"
    ops = [op for op, _, _ in found(text, **WEIGHTS)]
    assert "LayerNormalization" not in ops
    assert len(ops) == 9


def test_an_operator_is_a_unit_of_the_tensors_that_are_not_constant() -> None:
    text = "(float[n,8] x) => (float[n,8] y) { s = Mul (x, x) y = Add (w, s) }"
    assert found(text, w=normal(8)) == [("Mul", 1, ["x"]), ("Add", 1, ["s"])]


def test_units_of_a_body_are_its_own() -> None:
    text = """(float[n,8] x, bool c) => (float[n,8] y) {
        y = If (c) <
            then_branch = a () => (float[n,8] p) { s = Sigmoid (x) p = Mul (x, s) },
            else_branch = b () => (float[n,8] q) { q = Neg (x) }
        >
    }"""
    graph = g.load(model(text, 21))
    assert [[u.op for u in units(graph, body)] for body in g.subgraphs(graph)] == [
        ["If"], ["Swish"], ["Neg"],
    ]  # fmt: skip
