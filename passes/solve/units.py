"""What one integer function stands for: an operator, or the operators in which an exporter spelled
a normalization or an activation function out.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.graph.attention import Pattern
from onnxq.graph.patterns import find

# The operator that each pattern is; the spelling and providers' own operators come in many forms.
NAMES = {
    "layernorm": "LayerNormalization",
    "rmsnorm": "RMSNormalization",
    "gelu": "Gelu",
    "silu": "Swish",
}
_MORE_THAN_THE_FUNCTION = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "FastGelu")


@dataclass(frozen=True)
class Unit:
    """`nodes` in order, of which the last makes the result; `pattern` where they are several."""

    op: str
    nodes: tuple[Node, ...]
    pattern: Pattern | None = None

    @property
    def node(self) -> Node:
        return self.nodes[-1]

    @property
    def inputs(self) -> list[gs.Tensor]:
        """The tensors that are not constant, each once; of a pattern the one that it is a function
        of.
        """
        if self.pattern is not None:
            return [self.pattern.input]
        read = {id(t): t for t in self.node.inputs if t.name and not g.is_constant(t)}
        return list(read.values())


def units(graph: Graph, body: Graph) -> list[Unit]:
    """The nodes of a body as units, in their order."""
    own = {id(node) for node in body.nodes}
    whole: dict[int, Unit] = {}  # by the id of the node that makes the result
    inside: set[int] = set()
    for pattern in find(graph):
        if pattern.kind in NAMES and id(pattern.nodes[0]) in own and _is_closed(body, pattern):
            maker = g.producer(pattern.output)
            others = tuple(node for node in pattern.nodes if node is not maker)
            assert maker is not None
            whole[id(maker)] = Unit(NAMES[pattern.kind], (*others, maker), pattern)
            inside |= {id(node) for node in others}
    return [
        whole.get(id(node), Unit(node.op, (node,))) for node in body.nodes if id(node) not in inside
    ]


def _is_closed(body: Graph, pattern: Pattern) -> bool:
    """Whether it is the function alone, and nothing else reads what is made within it."""
    if pattern.nodes[0].op in _MORE_THAN_THE_FUNCTION:
        return False
    own = {id(node) for node in pattern.nodes}
    return all(
        id(reader) in own and not g.is_output(body, tensor)
        for node in pattern.nodes
        for tensor in node.outputs
        if tensor is not pattern.output
        for reader in tensor.outputs
    )
