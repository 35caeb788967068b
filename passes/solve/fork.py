"""One initializer per way in which a weight is read, one tensor per format of an activation."""

from __future__ import annotations

import math

import numpy as np
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
        if plan.handed_on:
            formats |= {tensor.name: plan.handed_on for tensor in node.outputs}
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


def find_tied_weights(graph: Graph, ctx: Context) -> set[str]:
    """Tables and output layers that hold one matrix, by the names of their initializers.

    Rounded alike they are stored once, which is worth more than codes that suit the output layer.
    """
    planned = [
        (view, plan.weight)
        for node, plan in ctx.plan.quantized(g.walk(graph))
        for view in g.weight_views(node)
        if plan.weight is not None and plan.weight.blocked
    ]
    tables = [(view, qtype) for view, qtype in planned if view.node.op == "Gather"]
    tied: set[str] = set()
    for table, qtype in tables:
        for view, other in planned:
            size = (view.rows, math.prod(view.tensor.shape))
            if view.node.op == "Gather" or other != qtype:
                continue
            if size == (table.rows, math.prod(table.tensor.shape)) and np.array_equal(
                view.matrix(), table.matrix()
            ):
                tied |= {table.tensor.name, view.tensor.name}
    return tied
