"""Points of E8P as the operands of MatMulNBits: 2 bits a weight in the file, 4 when loaded.

A coordinate is k/2 + ¼ with k in -6 … 5 (see `onnxq.lattice`), so that of a row with scale s

    ŵ x = s/2 · Σ k_i x_i + s/4 · Σ x_i:

a product with codes k + 8 around 8, and a sum of the inputs beside it. ONNX Runtime makes B when it
loads the model, from what is stored:

    256 patterns · signs ∓ ¼ ─▶ table of all points, 4 bytes each, once
    codes, 16 bits ─ Gather ─▶ 4 bytes for eight weights ─ Pad to whole blocks ─ Reshape ─▶ B
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnxq.passes.lower.add_low_rank import add_product
from onnxq.passes.lower.matmul_nbits import Operands, lower_product

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.lattice import SIZE, LatticeTensor, odd, patterns, signs

FLOAT, INT32, UINT8 = (
    int(t) for t in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.UINT8)
)


class LatticeWriter:
    """Writes points of E8P into one graph or body."""

    def __init__(self, body: Graph, maker: g.Maker) -> None:
        self.body, self.maker = body, maker
        self._table: gs.Tensor | None = None
        self._columns: dict[tuple[int, np.dtype[np.generic]], gs.Tensor] = {}
        self._known: dict[str, tuple[Operands, gs.Tensor]] = {}

    def lower(self, node: Node, view: g.WeightView, q: LatticeTensor, level: int) -> int:
        """MatMulNBits and a sum of inputs in the place of a MatMul or Gemm."""
        name = view.tensor.name
        if name not in self._known:
            self._known[name] = self._operands(view, q)
        operands, row = self._known[name]
        quarters = self._quarters(q.columns, np.dtype(view.tensor.dtype))
        add_product(self.body, node, [quarters, row], f"{node.name}_sum", self.maker)
        return lower_product(self.body, node, operands, level, self.maker)

    def _operands(self, view: g.WeightView, q: LatticeTensor) -> tuple[Operands, gs.Tensor]:
        """What the kernel multiplies with, and the scales s (1, out)."""
        name, dtype = view.tensor.name, np.dtype(view.tensor.dtype)
        blocks = -(-q.columns // q.group)
        index = self._emit("Cast", [self.maker.shared(f"{name}_points", q.codes)], name, to=INT32)
        codes = self._emit("Gather", [self._points(), index], name)
        lacking = blocks * q.group // SIZE - q.codes.shape[1]
        if lacking:
            ends = np.array([0, 0, 0, 0, lacking, 0], np.int64)
            pads = self.maker.shared(f"{name}_pads", ends)
            codes = self._emit("Pad", [codes, pads], name)
        codes = self._reshaped(codes, (len(q.codes), blocks, q.group // 2), name)
        row = self._scale(q, dtype, name)
        column = self._reshaped(row, (len(q.codes), 1), name)
        half = self.maker.shared("half", np.full((1, 1), 0.5, dtype))
        shape = self.maker.shared("scales_shape", np.array([len(q.codes), blocks], np.int64))
        scales = self._emit("Expand", [self._emit("Mul", [column, half], name), shape], name)
        scales.dtype = dtype
        return Operands([codes, scales], len(q.codes), q.columns, 4, q.group), row

    def _quarters(self, columns: int, dtype: np.dtype[np.generic]) -> gs.Tensor:
        """¼ for each input, (columns, 1)."""
        if (columns, dtype) not in self._columns:
            one = self.maker.shared("quarter", np.full((1, 1), 0.25, dtype))
            shape = self.maker.shared("column_shape", np.array([columns, 1], np.int64))
            self._columns[columns, dtype] = self._emit("Expand", [one, shape], "quarters")
        return self._columns[columns, dtype]

    def _scale(self, q: LatticeTensor, dtype: np.dtype[np.generic], name: str) -> gs.Tensor:
        halves = q.scale.astype(np.float16)[None]
        if dtype == np.float16 or not np.array_equal(halves[0], q.scale):
            return self.maker.shared(f"{name}_scale", q.scale[None].astype(dtype))
        to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
        return self._emit("Cast", [self.maker.shared(f"{name}_scale", halves)], name, to=to)

    def _points(self) -> gs.Tensor:
        """The bytes of all points, (65536, 4): codes k + 8, low columns in low bits."""
        if self._table is None:
            twice = (2 * patterns()).astype(np.uint8)[:, None]
            size = self._stored("e8p_patterns", twice)
            sign = self._stored("e8p_signs", signs())
            parity = self.maker.constant("e8p_parity", odd().astype(np.int32))
            signed = self._emit("Mul", [size, self._emit("Gather", [sign, parity], "e8p")], "e8p")
            signed = self._reshaped(signed, (256, 128, 1, SIZE), "e8p")
            offset = np.array([[8], [7]], np.float32)
            both = self._emit("Add", [signed, self.maker.constant("e8p_shifts", offset)], "e8p")
            pairs = self._reshaped(both, (1 << 16, SIZE // 2, 2), "e8p")
            places = self.maker.constant("e8p_places", np.array([[1], [16]], np.float32))
            table = self._emit("MatMul", [pairs, places], "e8p")
            table = self._reshaped(table, (1 << 16, SIZE // 2), "e8p")
            self._table = self._emit("Cast", [table], "e8p", to=UINT8)
        return self._table

    def _stored(self, name: str, values: g.Array) -> gs.Tensor:
        return self._emit("Cast", [self.maker.constant(name, values)], name, to=FLOAT)

    def _reshaped(self, tensor: gs.Tensor, shape: tuple[int, ...], name: str) -> gs.Tensor:
        to = self.maker.shared(f"{name}_shape", np.array(shape, np.int64))
        return self._emit("Reshape", [tensor, to], name)

    def _emit(self, op: str, inputs: list[gs.Tensor], base: str, **attrs: object) -> gs.Variable:
        return self.maker.emit(self.body, op, inputs, base, **attrs)
