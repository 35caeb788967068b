"""What of a model a target runs, node by node, from the target's data alone."""

from __future__ import annotations

from collections.abc import Iterator

from onnxq import graph as g
from onnxq.devices import units
from onnxq.devices.rows import fits, is_plain, takes
from onnxq.devices.units import Unit
from onnxq.devices.verdicts import HERE, Kind, Verdict
from onnxq.graph import Graph, Node, patterns
from onnxq.ops import DOMAIN
from onnxq.target import Support, Target, load_target

_KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft", "com.ms.internal.nhwc", "ai.onnx.ml")


def judge(graph: Graph, target: Target, custom_ops: bool = False) -> list[Verdict]:
    """A verdict for each node of a graph and its bodies.

    `custom_ops` says that a library brings the operators of other domains.
    """
    loaded = g.resolved(graph)
    found = {verdict.node: verdict for verdict in _Judge(loaded, target, custom_ops).all()}
    gone = "of a branch that is not taken, or computed when the model is loaded"
    return [
        found.get(node.name) or Verdict(node.name, node.op, "folded", gone)
        for node in g.walk(graph)
    ]


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
        self.of_gelu = {  # the runtime makes one operator of it
            id(node) for pattern in patterns.find(graph) if pattern.kind == "gelu"
            for node in pattern.nodes if node.op == "Erf"
        }  # fmt: skip
        self.of_unit: dict[str, Verdict] = {}  # of the quantizers around a layer, by node name

    def all(self) -> Iterator[Verdict]:
        found = self._each()
        barred = self._dynamic_input() or self._too_small()
        for node in g.walk(self.graph):
            verdict = found[id(node)]
            if barred and verdict.kind in HERE:
                verdict.kind, verdict.reason, verdict.fix = self._elsewhere(node, *barred)
            yield verdict

    def _each(self) -> dict[int, Verdict]:
        """Verdicts by the node's id, each node taken for itself and for the layer it is part of."""
        found: dict[int, Verdict] = {}
        for body in g.subgraphs(self.graph):
            self.own = units.own_nodes(body)
            for node in body.nodes:
                if node.op not in g.QUANTIZERS:
                    found[id(node)] = self._verdict(body, node)
        for node in g.walk(self.graph):
            if id(node) not in found:
                found[id(node)] = self._quantizer(node)
        self._control_flow(found)
        if self.target.takes_units:
            self._quantizers_alone(found)
        return found

    def _control_flow(self, found: dict[int, Verdict]) -> None:
        """It goes where its bodies can, and takes them along where a provider takes units alone."""
        nodes = [*g.walk(self.graph)]
        for node in reversed(nodes):
            inner = [{found[id(inside)].kind for inside in body.nodes} for body in g.bodies(node)]
            if not any("falls back" in kinds for kinds in inner):
                continue
            whole, why = found[id(node)], self.target.lacks.get("parts-of-bodies")
            if why and whole.kind in HERE and any("falls back" in k and k & {*HERE} for k in inner):
                whole.kind, whole.reason, whole.fix = "will not run", why, _OTHER
            else:
                whole.kind, whole.reason = "falls back", "some of its bodies' nodes do"
        for node in nodes if self.target.takes_units else ():
            for inside in (inside for body in g.bodies(node) for inside in body.nodes):
                verdict = found[id(inside)]
                if found[id(node)].kind == "falls back" and verdict.kind in HERE:
                    verdict.kind, verdict.reason = "falls back", f"goes where {node.name!r} goes"

    def _quantizers_alone(self, found: dict[int, Verdict]) -> None:
        """No provider of units takes a quantizer without a neighbour to go with it."""
        for node in g.walk(self.graph):
            verdict = found[id(node)]
            if node.op not in g.QUANTIZERS or verdict.kind not in HERE:
                continue
            if node.op == "DynamicQuantizeLinear":
                beside = node.outputs[0].outputs  # what multiplies its codes
            else:
                beside = [maker for tensor in node.inputs for maker in tensor.inputs]
                beside += [reader for tensor in node.outputs for reader in tensor.outputs]
            if not any(id(n) in found and found[id(n)].kind in HERE for n in beside):
                verdict.kind, verdict.reason = "falls back", "none of its neighbours runs there"

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
        """The same of a provider that takes some operators first in larger models alone."""
        nodes = [
            node for node in self.graph.nodes
            if not units.is_folded(node, self.fixed, self.shapes)
            and not (node.op == "Pad" and units.is_fused_padding(self.graph, node))
            and any(t.outputs or g.is_output(self.graph, t) for t in node.outputs)
        ]  # fmt: skip
        if not nodes:
            return None
        node = units.first(nodes)
        row = self._plain(self._rows(node), node)
        if row is not None and row.among > len(nodes):
            return f"{self.target.name} takes no model as small with {node.op} first in it", ""
        return None

    def _rows(self, node: Node) -> list[Support]:
        op = "Gelu" if id(node) in self.of_gelu else node.op
        rows = self.target.supports.get(op, ())
        return [row for row in rows if fits(row, node, self.shapes)]

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
        plain = self._plain(rows, node)
        barred = plain is None or bool(plain.fails or plain.after)  # as it stands, so between codes
        barred &= self.target.takes_units
        if around.quantized and not barred and self._in_integers(rows, node, around):
            made.kind = "integer"
            return self._noted(body, node, around, made)
        complete = bool(around.activation and around.result) and not around.reads_float
        if plain is not None and (plain.fails or not (self.target.takes_units and complete)):
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
        plain = self._plain(self._rows(node), node)
        if plain is not None and plain.fails:
            made.kind, made.reason, made.fix = "will not run", plain.fails, _OTHER
        elif node.name in self.of_unit:
            layer = self.of_unit[node.name]
            made.kind = "runs" if layer.kind in HERE else layer.kind
            if made.kind != "runs":
                made.reason = f"goes where {layer.node!r} goes"
        elif plain is None:
            made.kind, made.reason, made.fix = self._elsewhere(node, *self._why(node, None))
        return made

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
_OTHER = "replace it by operators that the target has, or take another target"
_REPLACE = "the CPU runs it, at the price of a copy each way; replace it by operators it has"
