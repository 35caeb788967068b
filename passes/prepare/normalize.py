"""One spelling for what models spell in many ways, so that later passes see weights as weights.

Laws, each leaving the function as it is:
1. Constant nodes become initializers.
2. Identity, and Dropout at inference, disappear.
3. Transpose, Reshape, Squeeze, Unsqueeze, Flatten and Cast of an initializer are computed now.
4. The opset rises to what the target or the recipe needs, local functions are inlined on load.
5. Every node gets a name of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Pass
from onnxq.runtime import Session

_FOLDED = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"}


@dataclass(frozen=True)
class Normalize(Pass):
    """Constants to initializers, reshaped weights folded, no-ops removed, opset raised.

    `opset` is the least that the operators of later passes need; 0 leaves that to the target.
    """

    opset: int = 0
    name: ClassVar[str] = "normalize"

    def apply(self, graph: Graph, ctx: Context) -> int:
        changes = g.name_nodes(graph)
        least = max(self.opset, ctx.target.opset)
        if graph.opset < least:
            _adopt(graph, g.raise_opset(graph, least))
            changes += 1 + g.name_nodes(graph)
        for body in g.subgraphs(graph):
            for node in list(body.nodes):
                changes += (
                    _constant_to_initializer(body, node)
                    or _remove_no_op(body, node)
                    or _fold_constant_input(body, node)
                )
        g.tidy(graph)
        return changes


def _adopt(graph: Graph, other: Graph) -> None:
    """Give `graph` the contents of `other`."""
    graph.__dict__.update(other.__dict__)


def _constant_to_initializer(graph: Graph, node: Node) -> bool:
    if node.op != "Constant" or not node.outputs:
        return False
    old = node.outputs[0]
    if g.is_output(graph, old):
        return False
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        new = g.renamed(value, old.name)
    else:
        key = next(
            (
                k
                for k in ("value_float", "value_int", "value_floats", "value_ints")
                if k in node.attrs
            ),
            None,
        )
        if key is None:
            return False
        dtype = np.float32 if "float" in key else np.int64
        new = gs.Constant(old.name, np.asarray(node.attrs[key], dtype))
    _replace_everywhere(old, new)
    node.outputs.clear()
    graph.nodes.remove(node)
    return True


def _replace_everywhere(old: gs.Tensor, new: gs.Tensor) -> None:
    for reader in list(old.outputs):
        g.replace_input(reader, old, new)


def _remove_no_op(graph: Graph, node: Node) -> bool:
    if not g.is_standard(node) or node.op not in ("Identity", "Dropout"):
        return False
    if node.op == "Dropout":
        mask_used = len(node.outputs) > 1 and (
            node.outputs[1].outputs or g.is_output(graph, node.outputs[1])
        )
        training = node.inputs[2:3] and not (
            g.is_constant(node.inputs[2]) and not node.inputs[2].values
        )
        if mask_used or training:
            return False
    return g.bypass(graph, node)


def _fold_constant_input(graph: Graph, node: Node) -> bool:
    """Evaluate a node that only moves or casts an initializer, through ONNX Runtime itself."""
    if node.op not in _FOLDED or not g.is_standard(node) or g.is_output(graph, node.outputs[0]):
        return False
    inputs = [t for t in node.inputs if t.name]
    if not all(g.is_constant(t) for t in inputs):
        return False
    old = node.outputs[0]
    lone = gs.Graph(
        [gs.Node(node.op, node.name, dict(node.attrs),
                 [t.copy() for t in node.inputs], [gs.Variable(old.name)])],
        [], [gs.Variable(old.name)], opset=graph.opset,
    )  # fmt: skip
    lone.outputs = [lone.nodes[0].outputs[0]]
    model = gs.export_onnx(lone, do_type_check=False)
    model.ir_version = g.minimum_ir_version(graph.opset)
    folded = Session(model, optimize=False).run({})[old.name]
    new = gs.Constant(old.name, folded)
    _replace_everywhere(old, new)
    node.outputs.clear()
    node.inputs.clear()
    graph.nodes.remove(node)
    return True
