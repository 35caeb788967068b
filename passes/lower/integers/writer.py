"""Writes a planned body with integers alone: walks its units and keeps each tensor's codes.

Where a float tensor is asked for as codes, a QuantizeLinear makes them, and where an operator that
stays float or the world reads codes, a DequantizeLinear: at the borders of the model and nowhere
else, if every operator has an integer form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import ArrayLike, NDArray
from onnxq.passes.lower.integers.grid import Codes, Grid, Refusal, bits_above, factor
from onnxq.passes.solve.integer_planner import SIZES, is_factor
from onnxq.passes.solve.units import Unit, units

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.ops import DOMAIN, MOST_SHIFT
from onnxq.ops.dyadic import dyadic
from onnxq.pipeline import Context

MANY = 4096  # numbers that are worth a node to save bytes
_FLOAT32 = np.dtype(np.float32)


@dataclass
class Group:
    """One unit with the tail that its requantization takes in: what a lowering is given."""

    unit: Unit
    tail: tuple[Node, ...]
    writer: Writer

    @property
    def node(self) -> Node:
        return self.unit.node

    @property
    def last(self) -> Node:
        return self.tail[-1] if self.tail else self.node

    @property
    def base(self) -> str:
        return self.last.name

    @property
    def opset(self) -> int:
        return int(self.writer.graph.opset)

    def codes(self, slot: int = 0) -> Codes:
        """An input as codes. Raises Refusal for a constant one."""
        tensor = self.unit.inputs[0] if self.unit.pattern else self.node.inputs[slot]
        if g.is_constant(tensor):
            raise Refusal("a constant stands where it multiplies codes")
        return self.writer.codes(tensor)

    @property
    def grid(self) -> Grid:
        """Of the result, within the bounds of a Relu or Clip behind it."""
        whole = Grid.of(self.writer.ctx.activations[self.last.outputs[0].name])
        return whole.bounded(g.clip_bounds(self.last) if self.tail else None)

    # ── nodes ────────────────────────────────────────────────────────────────────────────────────

    def emit(self, op: str, inputs: Iterable[gs.Tensor], **attrs: object) -> gs.Variable:
        """A standard operator."""
        return self.writer.maker.emit(self.writer.body, op, list(inputs), self.base, **attrs)

    def call(self, op: str, inputs: Iterable[gs.Tensor], **attrs: object) -> gs.Variable:
        """A function of onnxq's."""
        made = self.emit(op, inputs, **attrs)
        made.inputs[0].domain = DOMAIN
        return made

    def cast(self, x: gs.Tensor, dtype: Any) -> gs.Variable:
        made = self.emit("Cast", [x], to=_code(np.dtype(dtype)))
        made.dtype = np.dtype(dtype)
        return made

    def constant(self, values: ArrayLike, dtype: Any, what: str) -> gs.Tensor:
        """An initializer; many numbers are stored in as few bytes as hold them, behind a Cast."""
        held = np.asarray(values).astype(dtype)
        name = f"{what}_{held}" if not held.ndim else f"{self.base}_{what}"
        kind = held.dtype if held.size < MANY else narrowest(held)
        stored = self.writer.maker.shared(name, held.astype(kind))
        return stored if kind == held.dtype else self.cast(stored, held.dtype)

    def codes_of(self, real: ArrayLike, grid: Grid | None = None) -> gs.Tensor:
        """Codes of constants."""
        grid = grid or self.grid
        return self.constant(grid.quantize(real), grid.dtype, "codes")

    def zero(self, codes: Codes) -> gs.Tensor:
        return self.constant(codes.grid.zero, codes.grid.dtype, f"zero_{codes.grid.dtype}")

    def ends(self, grid: Grid | None = None) -> list[gs.Tensor]:
        """The last three operands of a function: zero point, lowest and highest code."""
        grid = grid or self.grid
        zero = self.constant(grid.zero, grid.dtype, f"zero_{grid.dtype}")
        return [zero, *(self.constant(end, np.int64, "code") for end in (grid.low, grid.high))]

    def scaling(
        self,
        real: ArrayLike,
        bits: int = 31,
        common: bool = False,
        most_shift: int = MOST_SHIFT,
    ) -> tuple[gs.Tensor, gs.Tensor]:
        """Multiplier and shift of real factors."""
        multiplier, shift = dyadic(factor(real), bits, common, most_shift)
        return (
            self.constant(multiplier, np.int64, "multiplier"),
            self.constant(shift, np.uint64, "shift"),
        )

    def requantize(
        self,
        x: gs.Tensor,
        zero: gs.Tensor,
        real: ArrayLike,
        grid: Grid | None = None,
        reach: int = 2**16,
    ) -> gs.Variable:
        """clip(z_y + (x − zero) · real / s_y); `real` is what one step of x is worth.

        `reach` bounds |x − zero|, so that its product with the multiplier stays below 2⁶¹ and with
        half of 2^shift, at most 2⁶⁰, added below 2⁶².
        """
        grid = grid or self.grid
        bits = min(31, 61 - bits_above(reach))
        multiplier, shift = dyadic(factor(np.asarray(real, np.float64) / grid.scale), bits)
        shifts = self.constant(shift, np.uint64, "shift")
        if np.all(multiplier == 1):
            return self.call("ShiftRequantize", [x, zero, shifts, *self.ends(grid)])
        factors = self.constant(multiplier, np.int64, "multiplier")
        return self.call("Requantize", [x, zero, factors, shifts, *self.ends(grid)])

    def shape(self, tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
        return self.writer.shapes.get(tensor.name)

    @property
    def gain(self) -> float:
        """The product of the constant factors behind a product."""
        result = 1.0
        for node in self.tail:
            if is_factor(node):
                slot = 1 if g.is_constant(node.inputs[1]) else 0
                number = float(g.values(node.inputs[slot]).reshape(()))
                result = result / number if node.op == "Div" else result * number
        return result

    @property
    def vector(self) -> NDArray[np.float64] | None:
        """The constant vector that is added to a product."""
        for node in self.tail:
            if not is_factor(node) and g.clip_bounds(node) is None:
                constant = next(t for t in node.inputs if g.is_constant(t))
                return np.asarray(g.values(constant), np.float64).reshape(-1)
        return None


Lower = Callable[[Group], "gs.Variable | list[gs.Variable]"]


@dataclass
class Writer:
    """One graph or body. `left` are the nodes that stay float, with the reason."""

    graph: Graph
    body: Graph
    ctx: Context
    maker: g.Maker
    lowerings: dict[str, Lower]
    shapes: dict[str, tuple[int | str | None, ...]]
    made: dict[str, Codes] = field(default_factory=dict)  # by the name of the float tensor
    lowered: set[str] = field(default_factory=set)  # of those, what no float operator makes now
    left: dict[str, str] = field(default_factory=dict)
    tails: set[str] = field(default_factory=set)  # nodes that belong to the operator before them

    def run(self) -> int:
        """Returns the number of nodes that became integer."""
        found = units(self.graph, self.body)
        outputs = {t.name for t in self.body.outputs}
        done: list[Node] = []
        for unit in found:
            plan = self.ctx.plan.get(unit.node.name)
            if plan is None or not plan.quantized:
                if unit.op == "Identity" and unit.node.outputs[0].name in self.ctx.activations:
                    done += self._lower(Group(unit, (), self))  # a copy in the narrow format
                continue
            if unit.node.name in self.tails:
                continue
            if unit.op not in self.lowerings:
                self.left[unit.node.name] = f"no integer form of {unit.op} is known"
            else:
                done += self._lower(Group(unit, self._tail(unit.node), self))
        self._remove(done)
        self._dequantize(outputs)
        return len(done)

    def _remove(self, nodes: list[Node]) -> None:
        gone = {id(node) for node in nodes}
        for node in nodes:
            node.inputs.clear()
            node.outputs.clear()
        self.body.nodes[:] = [node for node in self.body.nodes if id(node) not in gone]

    def _tail(self, node: Node) -> tuple[Node, ...]:
        tail: list[Node] = []
        while g.is_float(node.outputs[0]) and not self.ctx.plan[node.name].output:
            reader = g.sole_consumer(self.body, node.outputs[0])
            if reader is None:
                break
            tail.append(reader)
            node = reader
        self.tails |= {n.name for n in tail}
        return tuple(tail)

    def _lower(self, group: Group) -> list[Node]:
        before, made = len(self.body.nodes), dict(self.made)
        try:
            results = self.lowerings[group.unit.op](group)
        except Refusal as refusal:
            self._remove(self.body.nodes[before:])
            self.made = made
            for node in (*group.unit.nodes, *group.tail):
                self.left[node.name] = str(refusal)
            return []
        results = results if isinstance(results, list) else [results]
        for tensor, result in zip(group.last.outputs, results, strict=False):
            params = self.ctx.activations.get(tensor.name)
            is_place = result.dtype == np.int64  # whose type nobody knew where nobody reads it
            if params is None or is_place:  # what is no float, as of a comparison, keeps its name
                _rename(result, tensor)
                continue
            result.dtype = Grid.of(params).dtype
            self.made[tensor.name] = Codes(result, Grid.of(params))
            self.lowered.add(tensor.name)
        return [*group.unit.nodes, *group.tail]

    def codes(self, tensor: gs.Tensor) -> Codes:
        """The codes of a float tensor; those that nobody has made yet are quantized here."""
        if tensor.name not in self.made:
            params = self.ctx.activations.get(tensor.name)
            if params is None:
                raise Refusal(f"the range of {tensor.name!r} is not known")
            grid = Grid.of(params)
            self.made[tensor.name] = Codes(self.quantize(tensor, grid), grid)
        return self.made[tensor.name]

    def quantize(self, x: gs.Tensor, grid: Grid) -> gs.Variable:
        """The codes of a float tensor."""
        name = x.name
        kind = g.dtype(x)
        if kind is not None and kind != np.float32:
            x = self.maker.emit(self.body, "Cast", [x], name, to=_code(_FLOAT32))
        stored = np.uint8 if grid.narrow else np.int16
        scale = self.maker.shared(f"{name}_scale", np.asarray(grid.scale, np.float32))
        zero = self.maker.shared(f"{name}_zero_point", np.asarray(grid.zero, stored))
        codes = self.maker.emit(self.body, "QuantizeLinear", [x, scale, zero], name)
        if not grid.narrow:
            codes = self.maker.emit(self.body, "Cast", [codes], name, to=_code(np.dtype(np.int32)))
        codes.dtype = grid.dtype
        return codes

    def _dequantize(self, outputs: set[str]) -> None:
        """Float tensors for those who still read them, under their own names."""
        tensors = g.tensors(self.graph)
        own = {id(node) for node in self.body.nodes}
        for name, codes in self.made.items():
            tensor = tensors.get(name)
            if tensor is None or name not in self.lowered:
                continue
            for reader in list(tensor.outputs):
                if reader.op in SIZES and id(reader) in own:
                    g.replace_input(reader, tensor, codes.tensor)
            if not tensor.outputs and name not in outputs:
                continue
            scale = self.maker.shared(f"{name}_scale", np.asarray(codes.grid.scale, np.float32))
            operands = [codes.tensor, scale]
            if codes.grid.narrow:
                zero = np.asarray(codes.grid.zero, np.uint8)
                operands.append(self.maker.shared(f"{name}_zero_point", zero))
            real = self.maker.emit(self.body, "DequantizeLinear", operands, name)
            kind = g.dtype(tensor)
            if kind is not None and kind != np.float32:
                real = self.maker.emit(self.body, "Cast", [real], name, to=_code(kind))
            real.inputs[0].outputs[0] = tensor


def narrowest(values: NDArray[Any]) -> np.dtype[Any]:
    """The smallest type of 8, 16 or 32 bits that holds integers, or the one that they have."""
    ends = int(values.min()), int(values.max())
    for kind in (np.uint8, np.int8, np.int16, np.int32):
        limits = np.iinfo(kind)
        if limits.min <= ends[0] and ends[1] <= limits.max:
            return np.dtype(kind)
    return values.dtype


def _rename(result: gs.Variable, tensor: gs.Variable) -> None:
    """Let the node that makes `result` make `tensor` instead."""
    maker = tensor.inputs[0]
    maker.outputs[maker.outputs.index(tensor)] = gs.Variable(f"{tensor.name}_float")
    node = result.inputs[0]
    node.outputs[node.outputs.index(result)] = tensor


def _code(dtype: np.dtype[Any]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
