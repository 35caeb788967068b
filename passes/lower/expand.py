"""Codes that no kernel takes, as few bits in the file as they have: expanded at load.

ONNX Runtime computes what is constant when a session starts. So a few standard operators turn what
is stored into the operand B of MatMulNBits, which has 4 or 8 bits a weight (see `matmul_nbits`):

    3 bits      low pairs of bits, 4 to a byte ─ Gather ─┐
                high bits, 8 to a byte ─ Gather ─────────┴ BitwiseOr ─▶ codes, 2 to a byte
    codebook    codes, 2 or 4 to a byte ─ Gather ─▶ levels + zero point, 1 or 2 to a byte
    then        ─ Pad to whole blocks ─ Reshape ─▶ B

Each Gather reads a table of 256 rows, what becomes of each byte. Levels between -8 and 7 need a B
of 4 bits, others one of 8. Scales in 8 bits become floats by Cast, Mul and Add. Every step is
exact; with the runtime's optimizations off the same happens in each run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnxq.passes.lower.lattice import LatticeWriter
from onnxq.passes.lower.matmul_nbits import (
    Operands,
    codes_of_bytes,
    lower_product,
    packed,
    scale_tensor,
    scales_of,
    weights_alone,
)

from onnxq import graph as g
from onnxq.codebook import CodebookTensor, ScaleCodes, in_super_blocks
from onnxq.graph import Graph
from onnxq.lattice import LatticeTensor
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QTensor

_INT32 = int(onnx.TensorProto.INT32)


@dataclass(frozen=True)
class Expand(Pass):
    """Codebooks, lattice points and 3-bit codes, expanded at load; all else is left."""

    name: ClassVar[str] = "expand"
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        maker, changes = g.Maker(graph), 0
        for body in g.subgraphs(graph):
            writer, lattice = _Writer(body, maker), LatticeWriter(body, maker)
            known: dict[str, Operands] = {}
            for node, view, level in weights_alone(body, ctx):
                name = view.tensor.name
                found = ctx.codebooks.get(name)
                if isinstance(found, LatticeTensor):
                    changes += lattice.lower(node, view, found, level)
                    continue
                if name not in known:
                    operands = writer.operands(view, ctx)
                    if operands is None:
                        continue
                    known[name] = operands
                changes += lower_product(body, node, known[name], level, maker)
        g.tidy(graph)
        return changes


@dataclass(frozen=True)
class _Writer:
    """Writes the expansion of weights into one graph or body."""

    body: Graph
    maker: g.Maker

    def operands(self, view: g.WeightView, ctx: Context) -> Operands | None:
        """Of a weight that has a codebook or codes of 3 bits; None for any other."""
        if view.node.op not in ("MatMul", "Gemm"):
            return None
        table = ctx.codebooks.get(view.tensor.name)
        if isinstance(table, CodebookTensor):
            return self._codebook(view, table)
        q = ctx.weights.get(view.tensor.name)
        if q is not None and q.qtype.blocked and q.qtype.bits == 3:
            return self._three_bits(view, q)
        return None

    def _codebook(self, view: g.WeightView, q: CodebookTensor) -> Operands:
        name, bits = view.tensor.name, kernel_bits(q.levels)
        levels = (q.levels.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
        filled = np.pad(levels, (0, (1 << q.bits) - len(levels)))
        if q.bits == 3:
            codes = self._three(name, q.codes, 0)
            codes = self._look_up(name, codes, np.pad(filled, (0, 8)), 4, bits)
        else:
            codes = self._look_up(name, self._stored(name, q.codes, q.bits), filled, q.bits, bits)
        tensors = [
            self._blocks(name, codes, q.scales.shape, q.group, bits),
            scales_of_codebook(self.body, view, q, self.maker),
        ]
        rows, columns = q.codes.shape
        return Operands(tensors, rows, columns, bits, q.group)

    def _three_bits(self, view: g.WeightView, q: QTensor) -> Operands:
        """As codes of 4 bits; those of a symmetric format around the middle of 4 bits."""
        name, group = view.tensor.name, q.qtype.group or 0
        codes, zero = q.codes.view(np.uint8), q.zero.view(np.uint8)
        middle = bool((zero == q.qtype.middle).all())
        wide = self._three(name, codes, 8 - q.qtype.middle if middle else 0)
        dtype = np.dtype(view.tensor.dtype)
        tensors = [
            self._blocks(name, wide, q.scale.shape, group, 4),
            scales_of(self.body, name, q, dtype, self.maker),
        ]
        if not middle:
            tensors.append(self.maker.shared(f"{name}_zero_point", packed(zero, 4)))
        rows, columns = codes.shape
        return Operands(tensors, rows, columns, 4, group)

    def _three(self, name: str, codes: g.Array, offset: int) -> gs.Tensor:
        """Codes of 3 bits from two planes, plus 0 or 4, two to a byte: (out, bytes)."""
        whole = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
        planes = ((whole & 3, 2, np.arange(4)), (whole >> 2, 1, np.array([0, 4]) + offset))
        low, high = (
            self._look_up(name, self._stored(name, plane, bits), values.astype(np.uint8), bits, 4)
            for plane, bits, values in planes
        )
        both = self.maker.emit(self.body, "BitwiseOr", [low, high], name)
        both.dtype, both.shape = low.dtype, low.shape
        return both

    def _stored(self, name: str, codes: g.Array, bits: int) -> gs.Tensor:
        return self.maker.shared(f"{name}_{bits}_bits", packed(codes, bits))

    def _look_up(
        self, name: str, codes: gs.Tensor, values: g.Array, bits: int, wide: int
    ) -> gs.Tensor:
        """Codes of `bits` (out, bytes) as what `values` says of each, in `wide` bits."""
        index = self.maker.emit(self.body, "Cast", [codes], name, to=_INT32)
        if wide == 8:  # the table would be the most of a small layer: it is made at load too
            places = self.maker.shared("codes_of_bytes", codes_of_bytes(bits).astype(np.int32))
            levels = self.maker.shared(f"{name}_levels", values)
            table = self.maker.emit(self.body, "Gather", [levels, places], f"{name}_table")
        else:
            table = self.maker.shared(f"{name}_table", byte_table(values, bits, wide))
        found = self.maker.emit(self.body, "Gather", [table, index], name)
        rows, columns = codes.shape
        return self._reshaped(name, found, (rows, columns * wide // bits))

    def _blocks(
        self, name: str, codes: gs.Tensor, blocks: tuple[int, ...], group: int, bits: int
    ) -> gs.Tensor:
        """B (out, blocks, bytes of a block) of rows that may lack the end of their last block."""
        shape = (*blocks, group * bits // 8)
        lacking = shape[1] * shape[2] - codes.shape[1]
        if lacking:
            pads = self.maker.shared(f"{name}_pads", np.array([0, 0, 0, lacking], np.int64))
            codes = self.maker.emit(self.body, "Pad", [codes, pads], name)
        return self._reshaped(name, codes, shape)

    def _reshaped(self, name: str, tensor: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
        to = self.maker.shared(f"{name}_shape", np.array(shape, np.int64))
        found = self.maker.emit(self.body, "Reshape", [tensor, to], name)
        found.shape = shape
        return found


def scales_of_codebook(
    body: Graph, view: g.WeightView, q: CodebookTensor, maker: g.Maker
) -> gs.Tensor:
    """Scales in the type of the weight, in the order of (out, blocks)."""
    name, dtype, scale = view.tensor.name, np.dtype(view.tensor.dtype), q.scale
    if not isinstance(scale, ScaleCodes):
        return scale_tensor(body, name, scale, dtype, maker)
    shared, base = maker.shared, f"{name}_scale"

    def emit(op: str, *inputs: gs.Tensor, **attributes: int) -> gs.Variable:
        return maker.emit(body, op, list(inputs), base, **attributes)

    codes, count = in_super_blocks(scale.codes), scale.codes.size
    real = emit("Cast", shared(f"{base}_codes", codes), to=int(onnx.TensorProto.FLOAT))
    for op, values in (("Mul", scale.step[:, None]), ("Add", scale.mean)):
        real = emit(op, real, shared(f"{base}_{op}", values))
    flat = emit("Reshape", real, shared(f"{base}_shape", np.array([codes.size], np.int64)))
    flat.shape = (codes.size,)
    if count < codes.size:
        ends = (shared(f"{base}_ends", np.array([n], np.int64)) for n in (0, count))
        flat = emit("Slice", flat, *ends)
    if dtype != np.float32:
        flat = emit("Cast", flat, to=int(onnx.helper.np_dtype_to_tensor_dtype(dtype)))
    flat.dtype = dtype
    return flat


def kernel_bits(levels: g.Array) -> int:
    """Of the B that can hold these levels around its middle."""
    return 4 if levels.min() >= -8 and levels.max() <= 7 else 8


def byte_table(values: g.Array, bits: int, wide: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What a byte of codes of `bits` becomes, the first in the low bits: the `values` of its codes,
    in `wide` bits each, (256, bytes).
    """
    return packed(values[codes_of_bytes(bits)], wide)
