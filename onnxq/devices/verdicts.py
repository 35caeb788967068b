"""What of a model a target runs, node by node, from the target's data alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

from onnxq import graph as g
from onnxq.devices import units
from onnxq.devices.precision import clashes
from onnxq.devices.rows import has_whole_blocks, is_depthwise, is_plain, plain_value, takes
from onnxq.devices.units import Unit
from onnxq.graph import Graph, Node
from onnxq.ops import DOMAIN
from onnxq.target import Support, Target, load_target

Kind = Literal["integer", "runs", "folded", "not fused", "falls back", "will not run"]
KINDS: tuple[Kind, ...] = (
    "integer", "runs", "folded", "not fused", "falls back", "will not run",
)  # fmt: skip
HERE = ("integer", "runs", "not fused")  # those that say: on the provider
_KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft", "com.ms.internal.nhwc", "ai.onnx.ml")


@dataclass
class Verdict:
    """What becomes of a node. `happened` is what did, where somebody ran the model."""

    node: str
    op: str
    kind: Kind
    reason: str = ""
    fix: str = ""
    happened: str = ""
    agrees: bool | None = None


@dataclass
class CheckReport:
    """A verdict for each node, bodies of control flow included, in order."""

    model: str
    target: str
    provider: str
    verdicts: list[Verdict]
    error: str = ""  # what the provider said when it did not run the model
    ran_on: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[Kind, int]:
        counted = Counter(verdict.kind for verdict in self.verdicts)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    @property
    def runs(self) -> bool:
        """Whether the model will load and run there, on the CPU where it has to."""
        return not any(verdict.kind == "will not run" for verdict in self.verdicts)

    @property
    def whole(self) -> bool:
        """Whether the provider takes all of it."""
        return self.runs and not any(verdict.kind == "falls back" for verdict in self.verdicts)

    @property
    def agreement(self) -> tuple[int, int]:
        """Nodes whose verdict was right, and those of which the provider said anything."""
        said = [verdict.agrees for verdict in self.verdicts if verdict.agrees is not None]
        return sum(said), len(said)

    def to_json(self) -> str:
        found = asdict(self) | {"counts": self.counts, "runs": self.runs, "whole": self.whole}
        if self.ran_on:
            found["agreement"] = self.agreement
        return json.dumps(found, indent=2)


def judge(graph: Graph, target: Target, custom_ops: bool = False) -> list[Verdict]:
    """A verdict for each node of a graph and its bodies.

    `custom_ops` says that a library brings the operators of other domains.
    """
    return list(_Judge(graph, target, custom_ops).all())


class _Judge:
    def __init__(self, graph: Graph, target: Target, custom_ops: bool) -> None:
        units.give_types(graph)
        self.graph, self.target, self.custom_ops = graph, target, custom_ops
        self.shapes = g.shapes(graph)
        self.fixed = units.fixed_tensors(graph)
        self.own: frozenset[int] = frozenset()
        self.alone = target.providers[:1] in ((), ("CPUExecutionProvider",))
        rows = [row for rows in target.supports.values() for row in rows]
        self.lists_codes = any(row.codes for row in rows)
        self.lists_types = any(is_plain(row) and not row.fails for row in rows)
        self.cpu = target if self.alone else load_target("cpu")
        self.of_unit: dict[str, Verdict] = {}  # of the quantizers around a layer, by node name

    def all(self) -> Iterator[Verdict]:
        barred = self._dynamic_input() or self._too_small()
        found: dict[int, Verdict] = {}
        for body in g.subgraphs(self.graph):
            self.own = units.own_nodes(body)
            for node in body.nodes:
                if node.op not in units.QUANTIZERS:
                    found[id(node)] = self._verdict(body, node)
        for node in g.walk(self.graph):
            verdict = found.get(id(node)) or self._quantizer(node)
            if barred and verdict.kind in HERE:
                verdict.kind, verdict.reason, verdict.fix = self._elsewhere(node, *barred)
            found[id(node)] = verdict
        for node in g.walk(self.graph):  # control flow goes where its bodies can
            inner = [found[id(inside)].kind for body in g.bodies(node) for inside in body.nodes]
            if "falls back" in inner:
                whole = found[id(node)]
                whole.kind, whole.reason = "falls back", "some of its bodies' nodes do"
        self._clash([found[id(node)] for node in g.walk(self.graph)])
        yield from (found[id(node)] for node in g.walk(self.graph))

    def _clash(self, verdicts: list[Verdict]) -> None:
        """What the provider takes, and cannot join in one precision."""
        there = {v.node for v in verdicts if v.kind in ("runs", "not fused")}
        rows = {op: rows[0] for op, rows in self.target.precision.items()}
        reasons = clashes(self.graph, there, rows)
        for verdict in verdicts:
            if verdict.node in reasons:
                verdict.kind, verdict.fix = "will not run", _QUANTIZE
                verdict.reason = reasons[verdict.node]

    def _dynamic_input(self) -> tuple[str, str] | None:
        """Why nothing runs on a provider that wants fixed shapes, and the fix."""
        if not self.target.fixed_shapes:
            return None
        for tensor in self.graph.inputs:
            for size in tensor.shape or ():
                if not isinstance(size, int):
                    return (
                        f"input {tensor.name!r} has the open dimension {size!r}, and "
                        f"{self.target.name} takes fixed shapes alone",
                        f"quantize with --dim {size}=SIZE",
                    )
        return None

    def _too_small(self) -> tuple[str, str] | None:
        """The same of a provider that takes some operators in larger models alone."""
        nodes = [
            node for node in self.graph.nodes
            if not units.is_folded(node, self.fixed, self.shapes)
            and any(t.outputs or g.is_output(self.graph, t) for t in node.outputs)
        ]  # fmt: skip
        for node in nodes:
            row = self._plain(self._rows(node), node)
            if row is not None and row.among > len(nodes):
                return f"{self.target.name} takes no model as small with {node.op} in it", ""
        return None

    def _rows(self, node: Node) -> list[Support]:
        return [row for row in self.target.supports.get(node.op, ()) if self._fits(row, node)]

    def _verdict(self, body: Graph, node: Node) -> Verdict:
        """Of a node that is no quantizer; notes what becomes of the quantizers around it."""
        made = Verdict(node.name, node.op, "runs")
        if units.is_folded(node, self.fixed, self.shapes):
            made.kind, made.reason = "folded", "computed when the model is loaded"
            return made
        if node.domain == DOMAIN:  # with kernels in the library, or a function of its own
            made.kind = "integer" if units.reads_codes(node) else "runs"
            return made
        if (node.domain or "") not in _KNOWN_DOMAINS:
            return self._foreign(made, node)
        around = units.unit(body, node, self.fixed, self.own)
        rows = self._rows(node)
        if around.quantized and self._in_integers(rows, node, around):
            made.kind = "integer"
            return self._noted(body, node, around, made)
        complete = bool(around.activation and around.result) and not around.reads_float
        plain = self._plain(rows, node)
        if plain is not None and not (self.target.takes_units and complete):
            read = any(t.outputs or g.is_output(body, t) for t in node.outputs)
            if plain.fails and (read or node.op in _LAID_OUT):
                made.kind, made.reason, made.fix = "will not run", plain.fails, _OTHER
                return made
            made.kind = "integer" if units.reads_codes(node) else "runs"
            if complete:
                made.kind = "not fused"
                made.reason = (
                    f"{self.target.name} has no integer form of {node.op} on {around.activation} "
                    "codes: it runs in float between a DequantizeLinear and a QuantizeLinear"
                )
                made.fix = f"quantize with --exclude {node.name}"
            return made
        why = self._why(node, around if complete else None)
        made.kind, made.reason, made.fix = self._elsewhere(node, *why)
        return self._noted(body, node, around, made) if around.quantized else made

    def _noted(self, body: Graph, node: Node, around: Unit, made: Verdict) -> Verdict:
        """The quantizers of a unit go where it goes."""
        for tensor in node.inputs:
            maker = g.producer(tensor)
            if maker is not None and maker.op == "DequantizeLinear":
                self.of_unit[maker.name] = made
        for tensor in around.last.outputs if around.result else ():
            for reader in tensor.outputs:
                self.of_unit[reader.name] = made
        return made

    def _quantizer(self, node: Node) -> Verdict:
        made = Verdict(node.name, node.op, "runs")
        if units.is_folded(node, self.fixed, self.shapes):
            made.kind, made.reason = "folded", "computed when the model is loaded"
            return made
        if node.name in self.of_unit:
            layer = self.of_unit[node.name]
            made.kind = "runs" if layer.kind in HERE else layer.kind
            if made.kind != "runs":
                made.reason = f"goes where {layer.node!r} goes"
            return made
        plain = self._plain(self._rows(node), node)
        if plain is not None and plain.fails:
            made.kind, made.reason, made.fix = "will not run", plain.fails, _OTHER
        if plain is None:
            made.kind, made.reason, made.fix = self._elsewhere(node, *self._why(node, None))
        return made

    def _fits(self, row: Support, node: Node) -> bool:
        shape = self._data_shape(node)
        if row.ranks and shape is not None and not row.ranks[0] <= len(shape) <= row.ranks[-1]:
            return False
        if row.after and not any(
            maker is not None and maker.op in row.after for maker in map(g.producer, node.inputs)
        ):
            return False
        if row.per_tensor and self.shapes.get(node.inputs[1].name):
            return False
        if row.depthwise and not is_depthwise(node, self.shapes.get(node.inputs[1].name)):
            return False
        if row.whole_blocks and not has_whole_blocks(node, shape):
            return False
        if any(
            index < len(node.inputs)
            and node.inputs[index].name
            and id(node.inputs[index]) not in self.fixed
            for index in row.constant
        ):
            return False
        return all(  # what an attribute is by default, runs
            plain_value(node.attrs[key]) in allowed if key in node.attrs else not row.fails
            for key, allowed in row.attributes.items()
        )

    def _data_shape(self, node: Node) -> tuple[int | str | None, ...] | None:
        return self.shapes.get(node.inputs[0].name) if node.inputs else None

    def _plain(self, rows: list[Support], node: Node) -> Support | None:
        """The row by which a node runs as it stands; of a target that lists none, any node does."""
        kind = units.data_type(node)
        found = next((r for r in rows if is_plain(r) and (not kind or kind in r.types)), None)
        if found is None and not self.lists_types:
            return Support(source="the target does not list what it runs")
        return found

    def _in_integers(self, rows: list[Support], node: Node, around: Unit) -> bool:
        if any(takes(row, around, units.data_type(node)) for row in rows):
            return True
        listed = self.lists_codes and not self.target.takes_units  # the CPU's rules have others too
        return not listed and self._has_rule(node, around)

    def _has_rule(self, node: Node, around: Unit) -> bool:
        return any(
            (rule.activation.byte.name if rule.activation else "") == around.activation
            and (rule.weight is None or not around.weight or rule.weight.bits <= 8)
            and (rule.output != "quantized" or bool(around.result))
            for rule in self.target.ops.get(node.op, ())
            if rule.form != "integer"
        )

    def _foreign(self, made: Verdict, node: Node) -> Verdict:
        if not self.custom_ops:
            made.kind = "will not run"
            made.reason = f"{node.op} is an operator of the domain {node.domain!r}"
            made.fix = "give the library that has it: --custom-ops LIB"
        elif not self.alone:
            made.kind, made.reason = "falls back", "custom operators run on the CPU"
        return made

    def _why(self, node: Node, around: Unit | None) -> tuple[str, str]:
        """The reason why a provider does not take a node, and the fix."""
        name, rows = self.target.name, self.target.supports.get(node.op, ())
        kind = units.data_type(node)
        if not rows:
            return f"{name} has no {node.op}", _REPLACE
        if around is not None:
            codes = sorted({code for row in rows for code in row.codes})
            takes = f"takes {', '.join(codes)} there" if codes else "has no integer form of it"
            return (
                f"{node.op} between {around.activation} and {around.result} codes"
                + (f" with {around.weight} weights" if around.weight else "")
                + f": {name} {takes}",
                f"quantize with --target {name}, or --exclude {node.name}",
            )
        types = sorted({kind for row in rows for kind in row.types})
        if kind not in types:
            return f"{name} takes {node.op} of {', '.join(types)}, not of {kind}", _REPLACE
        return f"{name} takes {node.op}, but not of this rank or with these attributes", _REPLACE

    def _elsewhere(self, node: Node, reason: str, fix: str) -> tuple[Kind, str, str]:
        """A provider that does not take a node leaves it to the CPU, if that takes it."""
        if self.alone:
            return "will not run", reason, fix
        rows, kind = self.cpu.supports.get(node.op, ()), units.data_type(node)
        if any(row.fails and kind in row.types for row in rows):
            return "will not run", f"{reason}; nor has the CPU a kernel for it", fix
        return "falls back", reason, fix


_LAID_OUT = ("Conv", "MaxPool")  # anew by the runtime, before it drops what nobody reads
_QUANTIZE = "quantize it, and what is before it, to codes; or take another target"
_OTHER = "replace it by operators that the target has, or take another target"
_REPLACE = "the CPU runs it, at the price of a copy each way; replace it by operators it has"
