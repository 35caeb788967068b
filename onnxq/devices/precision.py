"""Where a provider mixes half and single precision in a float graph, and cannot join the two.

A compiler that computes some operators in half precision alone lets what comes before them do so
too, back to the graph's inputs. It stops where an operator on the way has single precision alone.
A tensor is `half` behind an operator that gives halves, `single` behind one that keeps single
precision where nothing before it was half, and else free to become either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.target import Precision


def clashes(
    graph: Graph, there: Collection[str], precision: Mapping[str, Precision]
) -> dict[str, str]:
    """Of the nodes `there`, on the provider, those that get what they cannot take: name → reason.

    Operators without an entry in `precision` hand on what they get.
    """
    found, state = dict[str, str](), dict[str, str]()
    for node in g.walk(graph):
        if node.name not in there or not _is_single(node):
            continue
        kind = operator(node)
        row = precision.get(kind, Precision())
        got = {state.get(tensor.name, "") for tensor in node.inputs}
        if row.takes == "half" and "single" in got:
            found[node.name] = (
                f"{kind} takes half precision, and an operator before it has single precision alone"
            )
        if row.takes == "single" and "half" in got:
            found[node.name] = (
                f"{kind} takes single precision, and an operator before it has half precision alone"
            )
        if row.gives != "free" and {"half", "single"} <= got:
            found[node.name] = f"{kind} gets half and single precision from before it"
        kept = "half" if "half" in got else "single" if "single" in got else ""
        gives = {
            "half": "half",
            "single": "half" if "half" in got else "single",
            "free": "half" if "half" in got and row.takes != "half" else "",
            "same": kept,
        }[row.gives]
        state |= {tensor.name: gives for tensor in node.outputs}
    return found


def operator(node: Node) -> str:
    """Its name; `StridedSlice` of a Slice that leaves some out, as compilers call it."""
    steps = node.inputs[4] if node.op == "Slice" and len(node.inputs) > 4 else None
    if steps is not None and g.is_constant(steps) and np.any(g.values(steps) != 1):
        return "StridedSlice"
    return str(node.op)


def _is_single(node: Node) -> bool:
    return any(tensor.dtype == np.float32 for tensor in (*node.inputs, *node.outputs))
