"""Regions of a plan: layers that hand codes to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxq.passes.solve.assign import HEAVY

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Plan
from onnxq.qtype import QParams, quantize


@dataclass(frozen=True)
class Region:
    """Nodes that exchange codes; the float tensors that they read of others, and make for them."""

    nodes: list[Node]
    inputs: list[str]
    outputs: list[str]


def regions(graph: Graph, plan: Plan) -> list[Region]:
    """The connected parts of the plan in the outermost graph that hold a layer."""
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    members = [(node, p) for node, p in plan.quantized(graph.nodes) if p.activation is not None]
    for node, p in members:
        here = find(node.name)
        maker = g.producer(node.inputs[0])
        if maker and not p.inputs and node.op not in HEAVY:  # in the kernel of what it reads
            leader[find(maker.name)] = here
        coded = [node.inputs[slot] for slot in p.inputs] + (list(node.outputs) if p.output else [])
        for tensor in coded:
            leader[find(f"{tensor.name} codes")] = here
    grouped: dict[str, list[Node]] = {}
    for node, _ in members:
        grouped.setdefault(find(node.name), []).append(node)
    return [
        region(nodes, graph)
        for nodes in grouped.values()
        if any(node.op in HEAVY for node in nodes)
    ]


def region(nodes: list[Node], graph: Graph) -> Region:
    """What some nodes read and make."""
    own = {id(node) for node in nodes}
    read = [t for n in nodes for t in n.inputs if t.name and not g.is_constant(t)]
    inputs = [t.name for t in read if id(g.producer(t)) not in own]
    outputs = [
        t.name
        for node in nodes
        for t in node.outputs
        if t.name and (g.is_output(graph, t) or any(id(reader) not in own for reader in t.outputs))
    ]
    return Region(nodes, list(dict.fromkeys(inputs)), outputs)


def between_codes(
    lowered: Graph, feed: Mapping[str, Any], activations: Mapping[str, QParams]
) -> tuple[Graph, dict[str, Any]]:
    """A lowered region without the quantizers at its border, and the codes that it is fed.

    Some kernels quantize as they go, and hand on floats: there is nothing to cut there.
    """
    codes, ends = {}, []
    for pair in lowered.nodes:
        name = pair.outputs[0].name
        if pair.op == "QuantizeLinear" and pair.inputs[0].name in feed:
            params = activations[pair.inputs[0].name]
            x = feed[pair.inputs[0].name]
            kind = g.values(pair.inputs[2]).dtype  # 4-bit codes are bytes to their kernels
            codes[name] = quantize(x, params.scale, params.zero, params.qtype).astype(kind)
        elif pair.op == "DequantizeLinear" and g.is_output(lowered, pair.outputs[0]):
            ends.append(pair.inputs[0].name)
    ends = ends or [t.name for t in lowered.outputs]
    given = codes or dict(feed)
    return g.cut(lowered, {name: value.dtype for name, value in given.items()}, ends), given
