"""One initializer per way in which a weight is read, one tensor per format of an activation."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph
from onnxq.pipeline import Context
from onnxq.qtype import QType


def fork_shared_weights(graph: Graph, ctx: Context) -> None:
    """A weight that several nodes read in different ways becomes one initializer per way."""
    namer = g.Namer(graph)
    ways: dict[str, dict[object, gs.Constant]] = {}
    for node, plan in ctx.plan.quantized(g.walk(graph)):
        if plan.weight is None:
            continue
        limit = plan.rule.pair_limit if plan.rule else None
        for view in g.weight_views(node):
            way = (node.op, view.axis, view.groups, plan.weight, limit)
            known = ways.setdefault(view.tensor.name, {})
            if known and way not in known:
                fork = g.renamed(view.tensor, namer(f"{view.tensor.name}_fork"))
                node.inputs[view.slot] = known[way] = fork
            else:
                known.setdefault(way, view.tensor)
                node.inputs[view.slot] = known[way]


def fork_mixed_activations(graph: Graph, ctx: Context) -> None:
    """A tensor has the format in which it is handed on, or else that of its first reader. Readers
    of another format read a copy, an Identity: every tensor then has one format.
    """
    planned = ctx.plan.quantized(g.walk(graph))
    formats: dict[str, QType] = {}
    for node, plan in planned:
        if plan.output and plan.activation:
            formats |= {tensor.name: plan.activation for tensor in node.outputs}
    maker = g.Maker(graph)
    for body in g.subgraphs(graph):
        copies: dict[tuple[str, QType], gs.Variable] = {}
        for node, plan in ctx.plan.quantized(list(body.nodes)):
            for slot in plan.inputs:
                tensor, wanted = node.inputs[slot], plan.activation
                if wanted is None or formats.setdefault(tensor.name, wanted) == wanted:
                    continue
                key = tensor.name, wanted
                if key not in copies:
                    copies[key] = maker.emit(body, "Identity", [tensor], f"{tensor.name}_{wanted}")
                    copies[key].dtype = tensor.dtype
                node.inputs[slot] = copies[key]
    g.sort(graph)
