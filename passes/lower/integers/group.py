"""What a lowering is given, and the nodes that it writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnxq.passes.lower.integers.grid import Codes, Grid, Refusal, bits_above, factor
from onnxq.passes.solve.integer_planner import is_factor
from onnxq.passes.solve.units import Unit

from onnxq import graph as g
from onnxq.graph import Node
from onnxq.ops import DOMAIN, MOST_SHIFT
from onnxq.ops.dyadic import dyadic

if TYPE_CHECKING:
    from onnxq.passes.lower.integers.writer import Writer

MANY = 4096  # numbers that are worth a node to save bytes


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
        made = self.emit("Cast", [x], to=type_code(dtype))
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


def narrowest(values: NDArray[Any]) -> np.dtype[Any]:
    """The smallest type of 8, 16 or 32 bits that holds integers, or the one that they have."""
    ends = int(values.min()), int(values.max())
    for kind in (np.uint8, np.int8, np.int16, np.int32):
        limits = np.iinfo(kind)
        if limits.min <= ends[0] and ends[1] <= limits.max:
            return np.dtype(kind)
    return values.dtype


def type_code(dtype: DTypeLike) -> int:
    """ONNX's number of an element type."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
