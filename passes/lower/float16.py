"""Compute in float16 what need not be float32: half the bytes, for devices that are built for it.

Every tensor has one type, that of what makes it; a Cast stands where an island of float32 (see
`islands`) begins or ends. Inputs and outputs of the model keep their types. Weights are rounded to
float16: what is beyond its range becomes its largest number, and what would become zero its
smallest, for an ε in a denominator must not. Samples say where activations would overflow.

ONNX Runtime's own converter (`onnxruntime.transformers.float16`) is not used: it writes Casts for
bodies of control flow into the outermost graph, wraps each operator that it leaves out in Casts of
its own, knows no ranges, and reads external weights into the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnxq.passes.lower.islands import (
    FLOAT,
    HALF,
    half_slots,
    infer_types,
    is_float32,
    is_typeless,
    islands,
)
from onnxq.passes.solve.selectors import Selector

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.observe import Observer
from onnxq.pipeline import Context, Pass

LARGEST = float(np.finfo(np.float16).max)
TINY = float(np.finfo(np.float16).tiny)  # what is smaller has fewer digits
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
_KEY = "#float16"
_CODE = {FLOAT: int(onnx.TensorProto.FLOAT), HALF: int(onnx.TensorProto.FLOAT16)}
_FLOAT_BY_DEFAULT = ("RandomNormal", "RandomUniform")  # where they do not say what they make


@dataclass(frozen=True)
class Float16(Pass):
    """float32 to float16, but for islands of what would overflow or lose too much.

    `io` converts the model's inputs and outputs too. With samples, activations are measured, and
    where they come near the largest float16 stay float32.
    """

    io: bool = False
    name: ClassVar[str] = "float16"
    lowers: ClassVar[bool] = True

    def observe(self, graph: Graph, ctx: Context) -> Mapping[str, Observer]:
        if ctx.samples is None:
            return {}
        typed = g.copy(graph)
        infer_types(typed, ctx.target)
        unseen = {name for body in g.hidden(typed) for name in body.tensors()}
        return {
            f"{name}{_KEY}": LargestFinite()
            for name, tensor in g.tensors(typed).items()
            if name not in unseen and is_float32(tensor) and not g.is_constant(tensor)
        }

    def apply(self, graph: Graph, ctx: Context) -> int:
        infer_types(graph, ctx.target)
        excluded = Selector(ctx.exclude, graph)
        seen = {k.removesuffix(_KEY): v for k, v in ctx.stats.items() if k.endswith(_KEY)}
        kept = islands(graph, ctx.target, excluded, seen)
        converter = _Converter(graph, ctx, set(kept), self.io)
        changes = converter.run()
        for node in g.walk(graph):
            if id(node) in kept and not (node.name in ctx.plan and ctx.plan[node.name].quantized):
                ctx.report.skip(node.name, node.op, kept[id(node)])
        if not changes and not ctx.plan and (self.name, "") not in ctx.solved:
            raise OnnxqError(
                "nothing here can become float16: "
                + (next(iter(kept.values()), "the model has no float32 tensor"))
            )
        ctx.solved.add((self.name, ""))
        if changes and ctx.samples is None:
            ctx.report.warn(
                "no samples: it was not measured which activations would overflow float16; give "
                "real ones with --data"
            )
        return changes


@dataclass
class LargestFinite:
    """The largest finite magnitude; a mask's −∞ is float16's as well."""

    largest: float = 0.0

    def update(self, x: NDArray[Any]) -> None:
        finite = x[np.isfinite(x)]
        self.largest = max(self.largest, float(np.abs(finite).max(initial=0)))

    def merge(self, other: LargestFinite) -> None:
        self.largest = max(self.largest, other.largest)

    def result(self) -> float:
        return self.largest


def to_half(values: NDArray[Any]) -> NDArray[np.float16]:
    """Values in float16; what is finite stays so, and what is not zero stays so.

    >>> to_half(np.array([1e9, -1e-12, 0.5, -np.inf], np.float32)).tolist()
    [65504.0, -5.960464477539063e-08, 0.5, -inf]
    """
    clamped = np.where(np.isfinite(values), np.clip(values, -LARGEST, LARGEST), values)
    half = clamped.astype(np.float16)
    smallest = np.copysign(np.float16(SMALLEST), half)
    return np.where((half == 0) & (values != 0), smallest, half)


@dataclass
class _Converter:
    """One graph with its bodies; `kept` are the ids of nodes that stay float32."""

    graph: Graph
    ctx: Context
    kept: set[int]
    io: bool
    halved: set[int] = field(default_factory=set)  # ids of tensors that were float32
    casts: dict[tuple[int, int], gs.Variable] = field(default_factory=dict)
    changes: int = 0

    def run(self) -> int:
        bodies = list(g.subgraphs(self.graph))
        self.maker = g.Maker(self.graph)
        self.islands = {id(n) for b in bodies for n in b.nodes if id(n) in self.kept}
        self._constants(bodies)
        for body in bodies:
            for node in body.nodes:
                self._make_half(node)
        if self.io:
            self._half(*(t for t in self.graph.inputs if is_float32(t)))
        for body in bodies:
            for slot in range(len(body.outputs)):
                self._give_out(body, slot)
        for body in bodies:
            for node in list(body.nodes):
                self._read(body, node)
        for body in bodies:
            for node in list(body.nodes):
                ends = {id(t) for t in (*node.inputs, *node.outputs)}
                if g.is_idle_cast(node) and ends & self.halved:
                    self.changes += g.bypass(body, node)
        if self.changes:
            g.tidy(self.graph)
        return self.changes

    def _half(self, *tensors: gs.Tensor) -> None:
        for tensor in tensors:
            tensor.dtype = HALF
            self.halved.add(id(tensor))
            self.changes += 1

    def _slots(self, node: Node) -> tuple[list[bool], list[bool]]:
        """Which inputs a node reads as float16, and which outputs it makes of that type."""
        slots = half_slots(node, self.graph.opset, self.ctx.target)
        if id(node) in self.islands or slots is None:
            return [False] * len(node.inputs), [False] * len(node.outputs)
        return slots

    def _constants(self, bodies: list[Graph]) -> None:
        """Weights that are read as float16 alone change; others get a twin in float16."""
        narrow: dict[int, list[tuple[Node, int]]] = {}
        wide = {g.values_id(t) for body in bodies for t in body.outputs if g.is_constant(t)}
        tensors: dict[int, list[gs.Constant]] = {}
        for node in g.walk(self.graph):
            may_be_half = self._slots(node)[0]
            for slot, tensor in enumerate(node.inputs):
                if g.is_constant(tensor) and is_float32(tensor):
                    key = g.values_id(tensor)
                    tensors.setdefault(key, []).append(tensor)
                    if may_be_half[slot]:
                        narrow.setdefault(key, []).append((node, slot))
                    else:
                        wide.add(key)
        self.changes += len(narrow)
        for key, places in narrow.items():
            first = tensors[key][0]
            half = self._rounded(first)
            if key in wide:
                twin = self.maker.constant(f"{first.name}_half", half)
                for node, slot in places:
                    node.inputs[slot] = twin
                continue
            g.set_values(first, half)
            for tensor in tensors[key][1:]:
                g.share_values(tensor, first)

    def _rounded(self, tensor: gs.Constant) -> NDArray[np.float16]:
        values = g.values(tensor)
        finite = np.abs(values[np.isfinite(values)])
        beyond = int((finite > LARGEST).sum())
        if beyond:
            self.ctx.report.warn(
                f"{beyond} of the values of {tensor.name!r} were beyond the range of float16 and "
                f"became ±{LARGEST:.0f}"
            )
        if values.size > 1 and 0 < finite.max(initial=0) < TINY:
            self.ctx.report.warn(
                f"the values of {tensor.name!r} are all below {TINY:.1g}, of which float16 keeps "
                "few digits; --exclude what reads it to keep that in float32"
            )
        return to_half(values)

    def _make_half(self, node: Node) -> None:
        made = [
            tensor
            for tensor, half in zip(node.outputs, self._slots(node)[1], strict=True)
            if half and is_float32(tensor)
        ]
        if not made:
            return
        self._half(*made)
        for key in ("to", "dtype"):
            if node.attrs.get(key) == _CODE[FLOAT]:
                node.attrs[key] = _CODE[HALF]
        if node.op in _FLOAT_BY_DEFAULT:
            node.attrs.setdefault("dtype", _CODE[HALF])
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            values = np.zeros(1, np.float32) if value is None else g.values(value)
            node.attrs["value"] = g.constant(f"{node.name}_value", to_half(values))

    def _give_out(self, body: Graph, slot: int) -> None:
        """An output of the model or of a body has the type that it had, `io` apart."""
        tensor = body.outputs[slot]
        wanted = HALF if self.io and body is self.graph else FLOAT
        if id(tensor) not in self.halved and not is_float32(tensor):
            return
        node = g.producer(tensor)
        if g.dtype(tensor) == wanted or g.is_constant(tensor):
            return
        self.changes += 1
        if node is None or not g.owns(body, node):  # from outside of a body
            body.outputs[slot] = self._cast(body, tensor, wanted)
            return
        inner = gs.Variable(self.maker.name(f"{tensor.name}_inner"), dtype=g.dtype(tensor))
        if id(tensor) in self.halved:
            self.halved.remove(id(tensor))
            self.halved.add(id(inner))
        node.outputs[node.outputs.index(tensor)] = inner
        for reader in list(tensor.outputs):
            g.replace_input(reader, tensor, inner)
        name = self.maker.name(f"{tensor.name}_Cast")
        body.nodes.append(gs.Node("Cast", name, {"to": _CODE[wanted]}, [inner], [tensor]))
        self.islands.add(id(body.nodes[-1]))
        tensor.dtype = wanted

    def _read(self, body: Graph, node: Node) -> None:
        """Casts before inputs of the other type."""
        if is_typeless(node):
            return
        for slot, half in enumerate(self._slots(node)[0]):
            tensor = node.inputs[slot]
            if g.is_constant(tensor) or not tensor.name:
                continue
            if half and is_float32(tensor):
                node.inputs[slot] = self._cast(body, tensor, HALF)
            elif not half and id(tensor) in self.halved:
                node.inputs[slot] = self._cast(body, tensor, FLOAT)

    def _cast(self, body: Graph, tensor: gs.Tensor, kind: np.dtype[Any]) -> gs.Variable:
        key = id(tensor), id(body)
        if key not in self.casts:
            self.casts[key] = self.maker.emit(body, "Cast", [tensor], tensor.name, to=_CODE[kind])
            self.casts[key].dtype = kind
            self.changes += 1
        return self.casts[key]
