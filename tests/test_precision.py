"""Half and single precision in a float graph of a provider that cannot join the two."""

from __future__ import annotations

import pytest
from graphs import model, normal

from onnxq import graph as g
from onnxq.devices.verdicts import judge
from onnxq.target import load_target

NPU = load_target("qnn-htp")


def refused(*ops: str) -> list[str]:
    """The operators that will not run on the NPU, of a chain of these."""
    second = {"Sub": ", c", "Add": ", c", "Mul": ", c", "MatMul": ", w"}
    names = ["x", *(f"t{k}" for k in range(len(ops) - 1)), "y"]
    lines = [
        f"{names[k + 1]} = {op}({names[k]}{second.get(op, '')})" for k, op in enumerate(ops)
    ]  # fmt: skip
    text = f"(float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y) {{ {' '.join(lines)} }}"
    graph = g.load(model(text, c=normal(1, 6), w=normal(6, 6)))
    return [verdict.op for verdict in judge(graph, NPU) if verdict.kind == "will not run"]


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        (("Sub",), []),
        (("Sub", "MatMul"), ["MatMul"]),  # the product takes halves, the difference gives none
        (("Sub", "Relu", "MatMul"), ["MatMul"]),  # a Relu hands on what it gets
        (("Sub", "Add", "MatMul"), []),  # an Add takes either
        (("MatMul", "Sub", "MatMul"), []),  # behind a product the difference is of halves too
        (("Relu", "MatMul", "Sub"), []),
        (("Sub", "Mul", "MatMul"), ["Mul"]),
    ],
)  # fmt: skip
def test_what_takes_halves_stops_behind_single_precision(
    ops: tuple[str, ...], expected: list[str]
) -> None:
    """As measured on the simulator: every one of these loads or fails just so."""
    assert refused(*ops) == expected
