"""The layers of a model as the report lists them: what each costs and became."""

from __future__ import annotations

import math

import numpy as np

from onnxq import graph as g
from onnxq import verify
from onnxq.passes.solve.assign import HEAVY
from onnxq.passes.solve.fake_quant import twin
from onnxq.pipeline import Result
from onnxq.report import LayerRecord, Report

REFUSED = "the model was refused as a whole"


def record_layers(result: Result, report: Report) -> None:
    """One record per layer of the float model that has weights or multiplies activations."""
    left = {record.name: record for record in report.layers}
    context = result.context
    report.layers = []
    report.parameters = sum(
        math.prod(t.shape)
        for t in {t.name: t for t in g.constants(result.prepared)}.values()
        if g.is_float(t) and len(t.shape) >= 1
    )
    counted: set[str] = set()
    halves = {
        node.name for node in g.walk(result.graph)
        if any(g.dtype(t) == np.float16 for t in node.outputs)
    }  # fmt: skip
    for node in g.walk(result.prepared):
        record = left.get(node.name)
        plan = context.plan.get(node.name)
        if node.op not in HEAVY and record is None:
            continue
        if node.op == "Gather" and g.weight_view(node) is None:
            continue
        form, reason = "float", record.reason if record else REFUSED
        if plan is not None and plan.quantized:
            view = g.weight_view(node)
            table = context.codebooks.get(view.tensor.name) if view else None
            weight = table.format if table else plan.weight
            formats = [f"w {weight}"] if weight else []
            formats += [f"a {plan.activation}"] if plan.activation else []
            form = ", ".join(formats)
            reason = record.reason if record else ""
        elif record is None and node.name in halves:
            form, reason = "float16", ""
        report.layers.append(
            LayerRecord(
                name=node.name,
                op=node.op,
                form=form,
                reason=reason,
                output=next((t.name for t in node.outputs if t.name), ""),
                parameters=parameters(node, counted),
            )
        )


def parameters(node: g.Node, counted: set[str]) -> int:
    """Numbers in a node's floating-point constants. One that several layers share counts for the
    first of them; `counted` are those that have been.
    """
    own = {
        t.name: math.prod(t.shape) for t in twin(node).inputs
        if g.is_constant(t) and t.name and g.is_float(t) and t.name not in counted
    }  # fmt: skip
    counted |= set(own)
    return sum(own.values())


def macs(node: g.Node, given: tuple[int, ...], output: tuple[int, ...]) -> int:
    """Multiply-accumulates of a layer, from its first input's and its output's shape."""
    node = twin(node)
    view = g.weight_view(node)
    if node.op == "Gather":
        return 0
    if node.op in g.RECURRENT:  # X is (steps, batch, in)
        steps = math.prod(given[:2])
        return steps * sum(math.prod(v.tensor.shape) for v in g.weight_views(node))
    if view is None:
        return math.prod(output) * (given[-1] if node.op == "MatMul" and given else 0)
    if node.op == "ConvTranspose":
        return math.prod(output) * view.tensor.shape[0] // view.groups
    if node.op == "Conv":
        return math.prod(output) * math.prod(view.tensor.shape[1:])
    return math.prod(output) * int(view.tensor.shape[view.block_axis])


def count_macs(result: Result, report: Report, feed: verify.Feed) -> None:
    """Multiply-accumulates of each layer on one sample, into the report."""
    layers = {r.output: r for r in report.layers if r.op in HEAVY}
    shapes = verify.shapes(result.prepared, list(layers), feed)
    nodes = {node.name: node for node in g.walk(result.prepared)}
    for output, record in layers.items():
        if output in shapes and record.name in nodes:
            node = nodes[record.name]
            record.macs = macs(node, shapes.get(node.inputs[0].name, ()), shapes[output])
