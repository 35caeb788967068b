"""Decide once what becomes of every node: the plan that solvers and lowering follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from onnxq.passes.prepare.normalize import Normalize
from onnxq.passes.solve.fake_quant import refuse_quantized
from onnxq.passes.solve.fork import (
    find_tied_weights,
    fork_mixed_activations,
    fork_shared_weights,
)
from onnxq.passes.solve.integer_planner import FORM as INTEGER
from onnxq.passes.solve.integer_planner import WIDE, IntegerPlanner
from onnxq.passes.solve.planner import FLOAT, HEAVY, MOVERS, Planner, Scheme, Wishes
from onnxq.passes.solve.selectors import Selector, formats_by_node, split
from onnxq.passes.solve.whole_planner import WholePlanner

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph
from onnxq.graph.patterns import find, inside
from onnxq.ops import OPSET
from onnxq.pipeline import Context, Pass
from onnxq.target import Form, Format, Target

__all__ = ["HEAVY", "MOVERS", "Assign"]


@dataclass(frozen=True)
class Assign(Pass):
    """The plan: per node its weight and activation formats, or the reason why it stays float.

    `form` is `static` (activations quantized with calibrated ranges), `dynamic` (at run time),
    `weights` (float activations, weights in blocks that the kernel expands as it multiplies) or
    `integer` (`static`, and nothing stays float that has a rule: see `integer_planner`).
    `format` gives the widths of weights and activations (`w8a8`, `w4a8`, `w8a16`, …; `w8` and `a8`
    leave the other float; `w4:128` is in blocks of 128): of the target's rules, those of these
    widths are taken. Where weights are to be narrower than an operator's kernels take them, they
    get 8 bits, or 4 instead of 3. `layers` holds exceptions, `pattern=format`, of which the last
    that matches wins.
    `include` and `exclude` hold patterns on node names and operator types: globs, or regular
    expressions after `re:`.
    `per_tensor` gives a weight one scale, `symmetric` makes all zero points 0, `power_of_two` all
    scales powers of two: for hardware that knows nothing else.
    `scale_bits` 4 makes the scales of blocks below 8 bits codes under a step per row, where that
    saves bytes: blocks of 32 then cost what blocks of 64 do, and have less error.
    """

    form: Form = "static"
    format: str = "w8a8"
    layers: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    per_tensor: bool = False
    symmetric: bool = False
    power_of_two: bool = False
    scale_bits: int = 16
    name: ClassVar[str] = "assign"
    analysis: ClassVar[bool] = False

    def __post_init__(self) -> None:
        Format.parse(self.format)
        for layer in self.layers:
            split(layer)
        if self.form == "dynamic" and (self.symmetric or self.power_of_two):
            raise OnnxqError(
                "assign.symmetric and assign.power_of_two are for calibrated ranges: activations "
                'quantized as they come are neither; use form = "static"'
            )
        if self.scale_bits not in (4, 16):
            raise OnnxqError(f"assign.scale_bits is 4 or 16, not {self.scale_bits}")
        if self.scale_bits == 4 and (
            self.form != "weights" or self.symmetric or self.power_of_two or self.per_tensor
        ):
            raise OnnxqError(
                "assign.scale_bits = 4 is for weights in asymmetric blocks: use form = "
                '"weights" without symmetric, power_of_two and per_tensor'
            )

    def apply(self, graph: Graph, ctx: Context) -> int:
        if ctx.plan:
            return 0
        refuse_quantized(graph)
        wishes = self._wishes(graph, ctx)
        hidden = {id(body) for body in g.hidden(graph)}
        whole = self._is_whole(ctx)
        if self.form == INTEGER or whole:
            g.infer_types(graph)
        for body in g.subgraphs(graph):
            planner: Planner | IntegerPlanner
            if self.form == INTEGER:
                planner = IntegerPlanner(graph, body, ctx, wishes)
            elif whole:
                planner = WholePlanner(body, ctx, wishes)
            else:
                planner = Planner(body, ctx, wishes)
            planner.hidden = id(body) in hidden
            planner.run()
        done = len(ctx.plan.quantized(g.walk(graph)))
        if not done:
            heavy = [
                ctx.plan[n.name].reason
                for n in g.walk(graph)
                if n.op in HEAVY and n.name in ctx.plan
            ]
            reasons = list(dict.fromkeys(reason for reason in heavy if reason))
            other = "; try --preset int8-static" if self.form == "dynamic" else ""
            raise OnnxqError(
                "nothing in this model can be quantized: "
                + ("; ".join(reasons[:3]) if reasons else "it has no operator with weights")
                + other
            )
        fork_shared_weights(graph, ctx)
        fork_mixed_activations(graph, ctx)
        ctx.tied = find_tied_weights(graph, ctx)
        return done

    def _is_whole(self, ctx: Context) -> bool:
        return ctx.target.whole and self.form == "static"

    def check(self, target: Target) -> None:
        """Raises OnnxqError where the target has no rule for a format that is wanted."""
        wanted = {Format.parse(self.format)} | {split(layer)[1] for layer in self.layers}
        for format in sorted(wanted - {FLOAT}, key=str):
            _check_format(format, self.form, target)

    def _wishes(self, graph: Graph, ctx: Context) -> Wishes:
        """What is wanted of each node, after raising the opset to what can say it."""
        default = Format.parse(self.format)
        formats = {default} | {split(layer)[1] for layer in self.layers}
        self.check(ctx.target)
        standard = self.form != "weights" or ctx.target.standard_only
        standard = standard or any(s.name == "insert-qdq" for s in ctx.lowering)
        least = max(f.opset if standard else f.opset_of_bytes for f in formats)
        if self.form == INTEGER:
            least = max(least, Format(None, WIDE).opset)
        if self.form == "weights" and ctx.target.custom_operators:
            least = max(least, OPSET)  # of the functions that come with such operators
        if graph.opset < least:
            Normalize(least).apply(graph, ctx)
        return Wishes(
            Selector((*self.include, *ctx.include), graph),
            Selector((*self.exclude, *ctx.exclude), graph),
            formats_by_node(self.layers, graph),
            default,
            self.form,
            Scheme(self.per_tensor, self.symmetric, self.power_of_two, ctx.target.unsigned),
            {} if self.form == INTEGER or self._is_whole(ctx) else _delicate(graph),
            self.scale_bits,
        )


def _check_format(format: Format, form: Form, target: Target) -> None:
    """That some rule of the target takes a format."""
    known, whole = target.formats(form), replace(format, block=None)
    if whole not in known:
        others = f", only for {', '.join(sorted(map(str, known)))}" if known else ""
        raise OnnxqError(
            f"target {target.name} has no {form} rule for {whole}{others}; choose another "
            "--target or format"
        )
    rules = [rule for rules in target.ops.values() for rule in rules if rule.form == form]
    same = [rule for rule in rules if rule.weight and rule.weight.bits == format.weight_bits]
    blocks = sorted({size for rule in same for size in rule.blocks})
    if format.block is not None and not any(rule.takes(format) for rule in rules):
        sizes = f"blocks of {', '.join(map(str, blocks))}" if blocks else "no blocks"
        raise OnnxqError(
            f"target {target.name} has {form} rules for {whole} in {sizes}, not in blocks of "
            f"{format.block}"
        )


# SiLU is not among them: convolutional networks hand its codes on at little loss.
_DELICATE = {
    "layernorm": "a layer normalization", "rmsnorm": "an RMS normalization", "gelu": "a GELU",
    "attention": "attention", "rotary": "a rotary embedding",
}  # fmt: skip


def _delicate(graph: Graph) -> dict[str, str]:
    """Element-wise parts of what transformers are made of. Of single operators the target says why,
    of Softmax whether.
    """
    parts = inside([pattern for pattern in find(graph) if len(pattern.nodes) > 1])
    return {
        node.name: _DELICATE[parts[node.name]]
        for node in g.walk(graph)
        if node.op not in (*HEAVY, "Softmax") and parts.get(node.name) in _DELICATE
    }
