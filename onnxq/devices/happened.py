"""What a provider did with each node of a model, beside what `check` had said of it."""

from __future__ import annotations

import re

from onnxq import graph as g
from onnxq.devices import units
from onnxq.devices.place import Answer, Place
from onnxq.devices.verdicts import HERE, CheckReport, Verdict
from onnxq.graph import Graph, Node
from onnxq.target import CPU

_ABSORBED = ("Add", "Mul", "Cast", "Relu", "Clip")  # what kernels on codes do beside their own
_COPIED = re.compile(
    r"(_token_\d+|/duplicated\S*|_nhwc|_nchwc)+$"
)  # what the runtime adds to names


def compare(report: CheckReport, graph: Graph, place: Place, answer: Answer) -> None:
    """Fill in what happened to each node, and whether the verdict was right.

    Nodes that the runtime fused into others before it asked the provider are not judged.
    """
    report.ran_on = f"{place.name}, onnxruntime {answer.version}" if answer.version else place.name
    report.error = answer.error
    if not answer.loaded:
        return
    if place.provider == CPU:
        _on_the_cpu(report, graph, answer)
    else:
        _on_a_provider(report, place, answer)


def _on_a_provider(report: CheckReport, place: Place, answer: Answer) -> None:
    placement = {_COPIED.sub("", name): who for name, who in answer.placement.items()}
    placement |= answer.placement
    report.elsewhere = sum(who != place.provider for who in answer.placement.values())
    for verdict in report.verdicts:
        who = placement.get(verdict.node)
        if who is None:
            verdict.agrees = True if verdict.kind == "folded" else None
            verdict.happened = "folded or fused"
            continue
        here = who == place.provider
        verdict.happened = place.name if here else "cpu"
        verdict.agrees = verdict.kind in HERE if here else verdict.kind == "falls back"


def _on_the_cpu(report: CheckReport, graph: Graph, answer: Answer) -> None:
    """From the optimized graph: a kernel computes on codes if one of its first inputs is codes."""
    if answer.optimized is None:
        return
    made = g.load(answer.optimized)
    units.give_types(made)
    by_name = {_COPIED.sub("", node.name): node for node in g.walk(made)}
    by_output = {t.name: node for node in g.walk(made) for t in node.outputs if t.name}
    for body in g.subgraphs(graph):
        for node in body.nodes:
            verdict = next(v for v in report.verdicts if v.node == node.name)
            _judge(verdict, _kernel(body, node, by_name, by_output))


def _kernel(
    body: Graph, node: Node, by_name: dict[str, Node], by_output: dict[str, Node]
) -> Node | None:
    """The node of the optimized graph that does what a node was to do."""
    if node.name in by_name:
        return by_name[node.name]
    for tensor in node.outputs:
        if tensor.name in by_output and by_output[tensor.name].op not in g.QUANTIZERS:
            return by_output[tensor.name]
    after = units.unit(body, node, frozenset(), frozenset()).last.outputs
    readers = [reader for tensor in after for reader in tensor.outputs]
    codes = [reader.outputs[0].name for reader in readers if reader.op == "QuantizeLinear"]
    return next((by_output[name] for name in codes if name in by_output), None)


def _judge(verdict: Verdict, kernel: Node | None) -> None:
    if kernel is None:
        verdict.happened = "folded or fused"
        verdict.agrees = True if verdict.kind == "folded" else None
        return
    on_codes = units.reads_codes(kernel)
    verdict.happened = f"{kernel.op}, on codes" if on_codes else kernel.op
    if verdict.op in g.QUANTIZERS:
        verdict.agrees = verdict.kind == "runs"
    elif on_codes and verdict.op in _ABSORBED and not _is_of(kernel.op, verdict.op):
        verdict.happened = f"part of {kernel.op}"
    else:
        verdict.agrees = verdict.kind == "integer" if on_codes else verdict.kind in HERE[1:]


def _is_of(kernel: str, op: str) -> bool:
    return kernel in (op, f"QLinear{op}")
