"""One spelling for what models spell in many ways, so that later passes see weights as weights.

Laws, each leaving the function as it is:
1. Constant nodes become initializers.
2. Identity, Dropout at inference, and Cast to the type that a tensor has disappear.
3. What is computed from initializers alone is computed now, unless it would grow.
4. An If whose condition is known, as it often is once shapes are fixed, becomes the branch taken.
5. The opset rises to what the target or the recipe needs.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Pass
from onnxq.runtime import Session

_NOT_FOLDED = {
    "Expand", "Tile", "ConstantOfShape", "Range", "OneHot", "EyeLike", "Resize", "Upsample", "Pad",
    *g.QUANTIZERS, *g.RANDOM, "Optional",
    "If", "Loop", "Scan", "SequenceConstruct", "SequenceInsert", "SplitToSequence",
}  # fmt: skip
_AT_ONCE = 1 << 26  # bytes of initializers to compute with in one session


@dataclass(frozen=True)
class Normalize(Pass):
    """Constants to initializers, reshaped weights folded, no-ops removed, opset raised.

    `opset` is the least that the operators of later passes need; 0 leaves that to the target.
    """

    opset: int = 0
    name: ClassVar[str] = "normalize"

    def apply(self, graph: Graph, ctx: Context) -> int:
        changes, least = 0, max(self.opset, ctx.target.opset)
        if graph.opset < least:
            _adopt(graph, g.raise_opset(graph, least))
            changes += 1
        changes += _take_known_branches(graph)
        folded: dict[object, gs.Constant] = {}  # by contents: bodies often compute one thing twice
        for body in g.subgraphs(graph):
            for node in list(body.nodes):
                changes += _constant_to_initializer(body, node) or _remove_no_op(body, node)
            changes += _fold_constants(body, folded)
        g.tidy(graph)
        return changes


def _adopt(graph: Graph, other: Graph) -> None:
    """Give `graph` the contents of `other`."""
    graph.__dict__.update(other.__dict__)


def _take_known_branches(graph: Graph) -> int:
    """Put the branch that is always taken in the place of its If; how many Ifs went."""
    if not any(node.op == "If" for node in graph.nodes):
        return 0
    other = g.resolved(graph, kinds="iub")  # floats are folded by the runtime, to its last bit
    gone = sum(node.op == "If" for node in g.walk(graph))
    gone -= sum(node.op == "If" for node in g.walk(other))
    if gone:
        _adopt(graph, other)
    return gone


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
    if g.is_idle_cast(node):
        return g.bypass(graph, node)
    if not g.is_standard(node) or node.op not in ("Identity", "Dropout"):
        return False
    if node.op == "Dropout":
        mask_used = len(node.outputs) > 1 and (
            node.outputs[1].outputs or g.is_output(graph, node.outputs[1])
        )
        training = node.inputs[2:3] and not (
            g.is_constant(node.inputs[2]) and not g.values(node.inputs[2])
        )
        if mask_used or training:
            return False
    return g.bypass(graph, node)


def _fold_constants(graph: Graph, known: dict[object, gs.Constant]) -> int:
    """Compute, through ONNX Runtime itself, what depends on nothing but initializers."""
    makers: dict[str, Node] = {}  # of what is known, by tensor
    for node in graph.nodes:
        fixed = all(g.is_constant(t) or t.name in makers or not t.name for t in node.inputs)
        if fixed and _is_foldable(graph, node):
            makers |= {t.name: node for t in node.outputs}
    folded = {id(node) for node in makers.values()}
    frontier = [
        tensor
        for node in graph.nodes
        if id(node) in folded
        for tensor in node.outputs
        if any(id(reader) not in folded for reader in tensor.outputs)
    ]
    while frontier:
        group: list[gs.Tensor] = []
        size = 0
        while frontier and (not group or size < _AT_ONCE):
            group.append(frontier.pop(0))
            size += _weight_behind(group[-1], makers)
        for name, values in _computed(graph, group, makers).items():
            old = next(tensor for tensor in group if tensor.name == name)
            key = (values.dtype, values.shape, hashlib.sha256(values.tobytes()).digest())
            _replace_everywhere(old, known.setdefault(key, g.constant(name, values)))
    for node in [node for node in graph.nodes if id(node) in folded]:
        node.inputs.clear()
        node.outputs.clear()
        graph.nodes.remove(node)
    return len(folded)


def _is_foldable(graph: Graph, node: Node) -> bool:
    if not g.is_standard(node) or node.op in _NOT_FOLDED or not any(t.name for t in node.inputs):
        return False
    if any(g.is_output(graph, t) for t in node.outputs):
        return False
    kinds = [g.dtype(t) for t in node.inputs if g.is_constant(t)]
    return all(kind is not None and kind.kind in "fiub" for kind in kinds)


def _ancestors(tensor: gs.Tensor, makers: dict[str, Node]) -> list[Node]:
    """The nodes behind a tensor, each once."""
    found: dict[int, Node] = {}
    pending = [tensor]
    while pending:
        node = makers.get(pending.pop().name)
        if node is not None and id(node) not in found:
            found[id(node)] = node
            pending += node.inputs
    return list(found.values())


def _weight_behind(tensor: gs.Tensor, makers: dict[str, Node]) -> int:
    """Bytes of the initializers that a tensor is computed from."""
    return sum(
        math.prod(t.shape) * (kind.itemsize if (kind := g.dtype(t)) else 1)
        for node in _ancestors(tensor, makers)
        for t in node.inputs
        if g.is_constant(t)
    )


def _computed(
    graph: Graph, tensors: list[gs.Tensor], makers: dict[str, Node]
) -> dict[str, g.Array]:
    nodes = {id(n): n for tensor in tensors for n in _ancestors(tensor, makers)}
    copies: dict[str, gs.Tensor] = {}

    def copied(tensor: gs.Tensor) -> gs.Tensor:
        return copies.setdefault(tensor.name, tensor.copy()) if tensor.name else tensor.copy()

    lone = gs.Graph(
        [
            gs.Node(
                n.op, n.name, dict(n.attrs), [copied(t) for t in n.inputs],
                [copied(t) for t in n.outputs],
            )
            for n in nodes.values()
        ],
        [], [copies[t.name] for t in tensors], opset=graph.opset,
    )  # fmt: skip
    g.sort(lone)
    model, weights = g.to_proto_without_weights(lone)
    for output in model.graph.output:  # the runtime infers them
        output.ClearField("type")
    return Session(model, optimize=False, initializers=weights).run({})
