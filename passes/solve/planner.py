"""What becomes of each node of a graph, or why it stays float.

1. Operators with weights, and MatMul of two activations, become integer where the target has a
   rule for them and the user did not exclude them.
2. The rest (Add, Concat, pooling, …) is worth it only where its inputs are codes already: each
   quantize and dequantize that would have to be added costs more than integer arithmetic saves.
3. Operators that only move values pass codes on, with the scale they came with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs
from onnxq.passes.solve.selectors import Selector

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, NodePlan
from onnxq.qtype import QType
from onnxq.target import Form, Format, OpRule

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", *g.RECURRENT)
MOVERS = (
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad",
    "MaxPool", "Expand", "DepthToSpace", "SpaceToDepth", "Identity",
)  # fmt: skip
SHORTEST_ROW = 16
SHORT_ROWS = f"rows of fewer than {SHORTEST_ROW}: a scale for each would cost what it saves"
FLOAT_INPUTS = "its inputs are float: quantizing them would cost more than it saves"
HIDDEN = "in a body inside a Scan, where its activations cannot be observed"
BATCH_FIRST = "its batch stands first (layout 1), which the integer kernel does not know"
FLOAT = Format()
SMALL_TABLE = 1024  # rows: of positions or token types, read by every token, worth few bytes
BLOCK = 128  # weights that share a scale where the recipe does not say how many
EXPANSION = 1 << 9  # bytes that the operators take by which codes of scales become floats
CONSTANT_OPERAND = "one operand is constant: its rounding would cost accuracy"


def fitting_block(columns: int, wanted: int, rule: OpRule, scale_bits: int = 16) -> int:
    """The smallest block whose codes and scales take no more bytes than the wanted one's.

    Kernels want whole blocks, so that a width which is no multiple is filled up: of 172 columns in
    blocks of 128 a quarter of the codes would say nothing. There smaller blocks, which err less,
    are free.
    """
    bits = rule.weight.bits if rule.weight else 8

    def stored(block: int) -> float:
        count = -(-columns // block)
        return count * block * bits / 8 + count * scale_bits / 8 + -(-count * bits // 8)

    return min(block for block in rule.blocks if stored(block) <= stored(wanted))


def saved_by_codes(rows: int, blocks: int) -> int:
    """Bytes that scales of 4 bits under a float16 step take less than those of 16 bits."""
    return rows * (12 * blocks - 16) // 8


@dataclass(frozen=True)
class Scheme:
    """What a device asks of all scales and zero points."""

    per_tensor: bool = False
    symmetric: bool = False
    power_of_two: bool = False
    unsigned: bool = False  # activations, whose zero point is then the middle of their codes

    def format(self, qtype: QType) -> QType:
        """A format with the scales and zero points of this scheme."""
        if self.symmetric:  # kernels for blocks take unsigned codes
            qtype = replace(qtype, signed=qtype.signed or not qtype.blocked, symmetric=True)
        return replace(qtype, power_of_two=True) if self.power_of_two else qtype

    def of(self, rule: OpRule) -> OpRule:
        """The rule with its formats in this scheme."""
        weight, activation = (q and self.format(q) for q in (rule.weight, rule.activation))
        if self.unsigned and activation is not None and rule.activation is not None:
            activation = replace(activation, signed=rule.activation.signed)
        if weight is not None and self.per_tensor:
            weight = replace(weight, group=None)
        return replace(rule, weight=weight, activation=activation)


@dataclass(frozen=True)
class Wishes:
    """What recipe and user want of each node."""

    include: Selector
    exclude: Selector
    formats: dict[str, Format]
    default: Format
    form: Form
    scheme: Scheme
    patterns: dict[str, str]  # node name → what it is a part of, where 8 bits hurt
    scale_bits: int = 16  # of blocks of weights below 8 bits

    def format(self, node: Node) -> Format:
        return self.formats.get(node.name, self.default)

    def why_float(self, node: Node) -> str:
        """Why a node is left float whatever the target runs; "" where it is not."""
        if self.exclude(node):
            return "excluded by the user"
        if self.include and node.op in HEAVY and not self.include(node):
            return "not among the included"
        if self.format(node) == FLOAT:
            return "left float by the recipe"
        if node.name in self.patterns and node.name not in self.formats:
            return f"part of {self.patterns[node.name]}, which 8 bits between its steps would hurt"
        return ""


class Planner:
    """Plans one graph; a body by itself, for codes do not cross its border.

    In a `hidden` one activations cannot be observed.
    """

    hidden = False

    def __init__(self, graph: Graph, ctx: Context, wishes: Wishes) -> None:
        self.graph, self.ctx, self.wishes = graph, ctx, wishes
        self.form, self.scheme = wishes.form, wishes.scheme
        self.own = {id(node) for node in graph.nodes}
        self._shapes: dict[str, tuple[int | str | None, ...]] = {}
        self.coded: dict[str, QType] = {}  # tensors that are handed on as codes
        self.wanted = self._find_wanted()

    def run(self) -> None:
        for node in self.graph.nodes:
            plan = self._plan(node)
            if plan is None:
                continue
            self.ctx.plan[node.name] = plan
            if plan.output and plan.activation:
                self.coded |= {t.name: plan.activation for t in node.outputs}
            if not plan.quantized:
                self.ctx.report.skip(node.name, node.op, plan.reason)

    def _plan(self, node: Node) -> NodePlan | None:
        if not g.is_standard(node):
            return None
        if node.op in MOVERS:
            return self._mover(node)
        if node.op in HEAVY:
            return self._heavy(node)
        return None if self.form == "weights" else self._light(node)

    def _heavy(self, node: Node) -> NodePlan | None:
        rule = self.rule(node)
        if rule is None:
            why = self._refusal(node)
            return NodePlan(reason=why) if why else None
        view = g.weight_view(node)
        if node.op == "Gather" and math.prod(node.inputs[0].shape[1:]) < SHORTEST_ROW:
            return NodePlan(reason=SHORT_ROWS)
        if rule.activation is None:  # weights alone, as in an embedding table
            return NodePlan(weight=rule.weight, rule=rule)
        if node.op in g.RECURRENT:  # its kernel quantizes activations as they come
            return NodePlan(weight=rule.weight, activation=rule.activation, rule=rule)
        slots = (0,) if view else (0, 1)
        fused = self._fused(node, rule)
        hands_on_codes = rule.output == "quantized" or (
            rule.output == "any" and node.outputs[0].name in self.wanted
        )
        return NodePlan(
            weight=rule.weight if view else None,
            activation=rule.activation,
            inputs=slots,
            output=hands_on_codes and fused is None,
            rule=rule,
        )

    def _light(self, node: Node) -> NodePlan | None:
        """Element-wise operators, pooling, activations."""
        maker = g.producer(node.inputs[0]) if node.inputs else None
        if maker is not None and (rule := self._fusing_rule(node, maker)) is not None:
            codes = rule.output == "quantized" or node.outputs[0].name in self.wanted
            return NodePlan(activation=rule.activation, output=codes, rule=rule) if codes else None
        rule = self.rule(node)
        if rule is None:
            worth_a_word = node.op in self.ctx.target.ops or node.op in self.ctx.target.left_float
            return NodePlan(reason=self._refusal(node)) if worth_a_word else None
        moving = [i for i, t in enumerate(node.inputs) if t.name and not g.is_constant(t)]
        fixed = [t for t in node.inputs if g.is_constant(t)]
        if not moving or not all(node.inputs[i].name in self.coded for i in moving):
            return NodePlan(reason=FLOAT_INPUTS)
        if fixed and node.op in ("Add", "Mul", "Concat"):
            return NodePlan(reason=CONSTANT_OPERAND)
        alone = self._fused(node, rule) is None
        return NodePlan(activation=rule.activation, inputs=tuple(moving), output=alone, rule=rule)

    def _mover(self, node: Node) -> NodePlan | None:
        source = node.inputs[0].name if node.inputs else ""
        if source not in self.coded or self.form != "static" or self.wishes.why_float(node):
            return None
        if node.op == "Pad" and (
            node.attrs.get("mode", "constant") != "constant"
            or (len(node.inputs) > 2 and node.inputs[2].name
                and not (g.is_constant(node.inputs[2]) and not g.values(node.inputs[2]).any()))
        ):  # fmt: skip
            return None
        codes = self.coded[source]  # moved as they are
        rule = self.ctx.target.rule(node, self.form, Format(None, codes.bits, float8=codes.float8))
        if rule is None:
            return None
        if not any(t.name in self.wanted for t in node.outputs):
            return None
        return NodePlan(activation=codes, inputs=(0,), output=True, rule=rule)

    def rule(self, node: Node) -> OpRule | None:
        """The target's rule for a node that the user wants quantized."""
        if self.wishes.why_float(node):
            return None
        rule = self._of_target(node)
        if rule is not None and (self._unseen(rule, node) or _is_batch_first(rule, node)):
            return None
        if rule is None or node.op not in HEAVY:
            return rule
        has_weight = g.weight_view(node) is not None
        if not has_weight and (node.op != "MatMul" or rule.weight is not None):
            return None
        return rule if has_weight or not any(g.is_constant(t) for t in node.inputs) else None

    def _of_target(self, node: Node) -> OpRule | None:
        """The target's rule for the format that is wished for, in the recipe's scheme."""
        format = self.wishes.format(node)
        if self.form == "weights" and format.weight_bits and self._wants_bytes(node, format):
            format = replace(format, weight_bits=8)
        if self.form == "weights" and format.block is None:
            format = replace(format, block=self.wishes.default.block or BLOCK)
        rule = self.ctx.target.rule(node, self.form, format)
        if rule is None and format.weight_bits == 3:
            format = replace(format, weight_bits=4)
            rule = self.ctx.target.rule(node, self.form, format)
        view = g.weight_view(node)
        if rule is not None and rule.blocks and view and not self._has_rows(view):
            rule = None
        if rule is None and (format.block or (format.weight_bits or 8) < 8):
            format = replace(format, weight_bits=8, block=None)
            rule = self.ctx.target.rule(node, self.form, format)
        if rule is not None and rule.blocks and rule.weight and view:
            columns = math.prod(view.tensor.shape) // view.rows
            block = fitting_block(columns, format.block or BLOCK, rule)
            weight = replace(rule.weight, group=block)
            if self.wishes.scale_bits < 16 and weight.bits < 8 and not weight.symmetric:
                block = fitting_block(columns, format.block or BLOCK, rule, self.wishes.scale_bits)
                if saved_by_codes(view.rows, -(-columns // block)) > EXPANSION:
                    weight = replace(weight, group=block, scale_bits=self.wishes.scale_bits)
            rule = replace(rule, weight=weight)
        if rule is not None and node.op in g.RECURRENT and rule.activation is not None:
            if rule.weight is None:
                return None
            if self.scheme.symmetric or self.scheme.power_of_two:  # and as they come
                rule = rule.only(Format(rule.weight.bits))
        return None if rule is None else self.scheme.of(rule)

    def _wants_bytes(self, node: Node, format: Format) -> bool:
        """Whether a table gets 8 bits whatever the recipe says: a small one, or one of which the
        rows end within a byte, which the kernel would not see.
        """
        if node.op != "Gather" or g.weight_view(node) is None:
            return False
        rows, columns = node.inputs[0].shape[0], math.prod(node.inputs[0].shape[1:])
        chosen = node.name in self.wishes.formats
        return bool((rows < SMALL_TABLE and not chosen) or columns * (format.weight_bits or 8) % 8)

    def _has_rows(self, view: g.WeightView) -> bool:
        """Whether a weight is matrices of rows to the operator, which blocks lie along."""
        if view.node.op == "Gather":
            return view.rank == 2
        x = view.node.inputs[0]
        return not view.batched or bool(g.products_of_batch(view.node, self._shape(x)))

    def _shape(self, tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
        """The shape of a tensor as declared, or else as it follows from what makes it."""
        if tensor.shape is None:
            self._shapes = self._shapes or g.shapes(self.graph)
            tensor.shape = self._shapes.get(tensor.name)
        return None if tensor.shape is None else tuple(tensor.shape)

    def _refusal(self, node: Node) -> str:
        if why := self.wishes.why_float(node):
            return why
        if node.op == "Gather" and g.weight_view(node) is None:
            return ""
        rule = self._of_target(node)
        if rule is not None and self._unseen(rule, node):
            return HIDDEN
        if rule is not None and _is_batch_first(rule, node):
            return BATCH_FIRST
        if node.op in g.RECURRENT and self.wishes.format(node).weight_bits is None:
            return "its kernel quantizes activations only together with weights"
        if node.op in g.RECURRENT and g.weight_view(node) is None:
            return "its weights are computed, not constant"
        if node.op == "MatMul" and g.weight_view(node) is None:
            if any(g.is_constant(t) for t in node.inputs):
                return "its constant operand is the left one, or a vector"
            if self.form == "dynamic":
                return "a product of two activations: dynamic quantization needs a constant weight"
            if self.form == "weights":
                return "a product of two activations: it has no weights"
        return self.ctx.target.why_float(node, self.form, self.wishes.format(node))

    def _unseen(self, rule: OpRule, node: Node) -> bool:
        """Whether a rule wants ranges of activations that cannot be observed."""
        own = node.op in g.RECURRENT or rule.activation is None
        return self.hidden and self.form == "static" and not own

    def _fused(self, node: Node, rule: OpRule) -> Node | None:
        reader = g.sole_consumer(self.graph, node.outputs[0])
        return reader if reader is not None and reader.op in rule.fuses else None

    def _fusing_rule(self, node: Node, maker: Node) -> OpRule | None:
        """The rule by which `maker` takes this activation function into its own kernel."""
        plan = self.ctx.plan.get(maker.name)
        if plan is None or plan.rule is None or plan.activation is None:
            return None
        if self.wishes.why_float(node):
            return None
        return plan.rule if self._fused(maker, plan.rule) is node else None

    def _find_wanted(self) -> set[str]:
        """Tensors whose every reader wants codes, directly or through what passes them on."""
        wanted: set[str] = set()
        for node in reversed(self.graph.nodes):
            for tensor in node.outputs:
                read_by_bodies = any(id(reader) not in self.own for reader in tensor.outputs)
                if node.op in MOVERS and read_by_bodies:
                    wanted.add(tensor.name)  # onnxruntime 1.31 crashes otherwise, see below
                if g.is_output(self.graph, tensor) or not tensor.outputs:
                    continue
                if all(self._wants_codes(reader, wanted) for reader in tensor.outputs):
                    wanted.add(tensor.name)
        return wanted

    def _wants_codes(self, reader: Node, wanted: set[str]) -> bool:
        """A reader in a body counts as one that does: the runtime crashes where it finds a
        DequantizeLinear before what moves values into a body, and codes moved there are as good.
        """
        if id(reader) not in self.own:
            return True
        rule = self.rule(reader) if g.is_standard(reader) else None
        if reader.op in HEAVY:
            return rule is not None and rule.activation is not None
        passes_on = rule is not None or reader.op in ("Relu", "Clip")
        return passes_on and all(t.name in wanted for t in reader.outputs)


def _is_batch_first(rule: OpRule, node: Node) -> bool:
    """A recurrence that its integer kernel, which has no attribute `layout`, would misread."""
    return rule.activation is not None and node.op in g.RECURRENT and bool(node.attrs.get("layout"))
