"""More bits for the weights that the model's answers need them for most.

Every weight of the plan is rounded as planned, alone, and the model runs with it: what that does to
the outputs, noise over signal, is the weight's loss. An option with b more bits has codes 2ᵇ times
as fine, and loses 4ᵇ times less. A knapsack over losses and bytes then takes the best choice within
the bytes that there are: Σ bytes ≤ bits · Σ weights / 8.

The model is loaded once. Its weights are initializers that are inputs as well, so that a run can be
given another value for one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq import verify
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.knapsack import front
from onnxq.pipeline import Context, NodePlan, Pass
from onnxq.qtype import QType
from onnxq.runtime import Session
from onnxq.target import Format

SAMPLES = 8  # that losses are measured on


@dataclass(frozen=True)
class MixBits(Pass):
    """`wide` bits for some weights in blocks, so that all take `bits` on average, scales included.

    Needs codes; those of the weights that get more bits are dropped, for the next round-to-nearest.
    """

    bits: float = 5.0
    wide: int = 8
    name: ClassVar[str] = "mix-bits"
    needs_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 32:
            raise OnnxqError(f"mix-bits.bits is an average number of bits, not {self.bits}")

    def apply(self, graph: Graph, ctx: Context) -> int:
        if ctx.samples is None:
            raise OnnxqError(f"the pass {self.name!r} needs samples, and there are none")
        items = [] if (self.name, "") in ctx.solved else self._items(graph, ctx)
        ctx.solved.add((self.name, ""))
        if not items:
            return 0
        losses = self._losses(items, graph, ctx)
        costs = [[item.bytes(item.narrow), item.bytes(item.wide)] for item in items]
        choices = front(losses, costs)
        budget = self.bits * sum(item.count for item in items) / 8
        chosen = next((choice for choice in choices if choice.cost <= budget), choices[-1])
        widened = [item for item, option in zip(items, chosen.options, strict=True) if option]
        for item in widened:
            for node in item.nodes:
                ctx.plan[node.name] = replace(ctx.plan[node.name], weight=item.wide)
            for name in item.names:
                del ctx.weights[name]
        return len(widened)

    def _items(self, graph: Graph, ctx: Context) -> list[Item]:
        """Weights of the outermost graph in blocks; those that are tied are one."""
        own = {id(node) for node in graph.nodes}
        found: dict[str, Item] = {}
        for node, plan in ctx.plan.quantized(g.walk(graph)):
            view = g.weight_view(node)
            if view is None or plan.weight is None or not plan.weight.blocked:
                continue
            name, wide = view.tensor.name, self._wide(node, plan, ctx)
            if wide is None or id(node) not in own or name not in ctx.weights:
                continue
            key = "tied" if name in ctx.tied else name
            item = found.setdefault(key, Item(plan.weight, wide, [], [], 0, 0))
            item.nodes.append(node)
            if name not in item.names:
                item.names.append(name)
            item.rows, item.columns = view.rows, math.prod(view.tensor.shape) // view.rows
        return list(found.values())

    def _wide(self, node: Node, plan: NodePlan, ctx: Context) -> QType | None:
        """The format with more bits, if the target runs it and it is more."""
        assert plan.weight is not None
        format = Format(self.wide, block=plan.weight.group)
        rule = ctx.target.rule(node, "weights", format)
        if rule is None or plan.weight.bits >= self.wide:
            return None
        return replace(plan.weight, bits=self.wide, scale_bits=16)

    def _losses(self, items: Sequence[Item], graph: Graph, ctx: Context) -> list[list[float]]:
        """What each item does to the outputs in either format."""
        assert ctx.samples is not None
        model = g.to_proto(graph)
        stored = {t.name: t for t in model.graph.initializer}
        given = {value.name for value in model.graph.input}
        for name in {name for item in items for name in item.names} - given:
            tensor = stored[name]
            shaped = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            model.graph.input.append(shaped)
        session = Session(model, threads=ctx.threads)
        feeds = verify.take(ctx.samples, SAMPLES)
        reference = verify.Recorded(session, feeds)
        losses = []
        for done, item in enumerate(items):
            ctx.progress(self.name, done, len(items))
            rounded = _Rounded(session, item.rounded(ctx))
            compared = verify.compare(reference, rounded, feeds).values()
            seen = [c.error_energy / c.reference_energy for c in compared if c.reference_energy]
            loss = math.fsum(seen)
            losses.append([loss, loss / 4 ** (item.wide.bits - item.narrow.bits)])
        return losses


@dataclass
class Item:
    """Weights that get the same bits, and the nodes that read them."""

    narrow: QType
    wide: QType
    nodes: list[Node]
    names: list[str]
    rows: int
    columns: int

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def bytes(self, qtype: QType) -> float:
        """Of codes, scales and zero points."""
        blocks = self.rows * -(-self.columns // (qtype.group or 1))
        zeros = 0 if qtype.symmetric else qtype.bits
        steps = 0 if qtype.scale_bits == 16 else 16 * self.rows
        return (self.count * qtype.bits + blocks * (qtype.scale_bits + zeros) + steps) / 8

    def rounded(self, ctx: Context) -> dict[str, NDArray[Any]]:
        """The weights as their codes have them, in the layout of the model."""
        views = {node.inputs[v.slot].name: v for node in self.nodes for v in g.weight_views(node)}
        return {
            name: views[name].from_matrix(ctx.weights[name].dequantize()).astype(
                views[name].tensor.dtype
            )
            for name in self.names
        }  # fmt: skip


class _Rounded(Session):
    """A session that runs with other values for some weights."""

    def __init__(self, session: Session, weights: Mapping[str, NDArray[Any]]) -> None:
        self.__dict__.update(session.__dict__)
        self.weights = weights

    def run(
        self, feed: Mapping[str, NDArray[Any]], names: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        return super().run({**feed, **self.weights}, names)
