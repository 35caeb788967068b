"""Weights of few bits as operands of the project's own operators, as few bits in memory too.

    4-bit codebook (NF4, k-means)       MatMulCodebook    codes, scales, levels
    3-bit codebook, uniform 3 bits      MatMul3           planes of 2 bits and of 1, scales, levels
    lattice (E8P)                       MatMulLattice     16 bits for eight weights, scales

For targets that allow custom operators. Every model gets the functions that compute them with
standard operators, so one body does for all, all inputs are given: zeros where there is nothing to
subtract or to add. What has none of these forms is left to the passes that come after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnxq.passes.lower.expand import scales_of_codebook
from onnxq.passes.lower.matmul_nbits import lower_product, packed, scales_of, weights_alone

from onnxq import graph as g
from onnxq import ops
from onnxq.codebook import CodebookTensor
from onnxq.graph import Graph
from onnxq.lattice import LatticeTensor
from onnxq.pipeline import Context, Pass
from onnxq.qtype import QTensor

_BITS = {4: "MatMulCodebook", 3: "MatMul3"}
_KINDS = (np.dtype(np.float32), np.dtype(np.float16))  # of activations
_NO_ZERO = np.zeros((1, 1), np.int8)


@dataclass(frozen=True)
class CodebookMatMul(Pass):
    """Codebooks, lattice points and 3-bit codes as operands of onnxq's own operators (--ops)."""

    name: ClassVar[str] = "codebook-matmul"
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        if not ctx.target.custom_operators:
            return 0
        maker, changes = g.Maker(graph), 0
        for body in g.subgraphs(graph):
            known: dict[str, Coded] = {}
            for node, view, level in weights_alone(body, ctx):
                name = view.tensor.name
                if name not in known:
                    coded = _coded(body, view, ctx, maker)
                    if coded is None:
                        continue
                    known[name] = coded
                changes += lower_product(body, node, known[name], level, maker)
        g.tidy(graph)
        return changes


@dataclass(frozen=True)
class Coded:
    """A weight (rows, columns) as what an operator takes between x and the bias."""

    op: str
    tensors: list[gs.Tensor]
    rows: int
    kind: np.dtype[np.generic]  # of x, bias and y

    def multiply(
        self,
        body: Graph,
        x: gs.Tensor,
        bias: gs.Tensor | None,
        accuracy_level: int,
        name: str,
        maker: g.Maker,
    ) -> gs.Variable:
        inputs = [x, *self.tensors, bias or maker.shared("no_bias", np.zeros(1, self.kind))]
        y = maker.emit(body, self.op, inputs, name, accuracy_level=accuracy_level)
        y.inputs[0].domain = ops.DOMAIN
        return y


def _coded(body: Graph, view: g.WeightView, ctx: Context, maker: g.Maker) -> Coded | None:
    """Of a weight whose codes an operator takes; None for any other."""
    name, kind = view.tensor.name, np.dtype(view.tensor.dtype)
    if view.node.op not in ("MatMul", "Gemm") or view.batched or kind not in _KINDS:
        return None
    table = ctx.codebooks.get(name)
    if isinstance(table, LatticeTensor):
        tensors = [maker.shared(f"{name}_points", table.codes), _scales(name, table.scale, maker)]
        return Coded("MatMulLattice", tensors, len(table.codes), kind)
    if isinstance(table, CodebookTensor) and table.bits in _BITS:
        scales = (
            _scales(name, table.scale, maker)
            if isinstance(table.scale, np.ndarray)
            else _in_blocks(body, name, scales_of_codebook(body, view, table, maker), table, maker)
        )
        levels = np.pad(table.levels, (0, (1 << table.bits) - len(table.levels)))
        codes = _codes(name, table.codes, table.bits, table.group, maker)
        no_zero = maker.shared("no_zero_point", _NO_ZERO)
        tensors = [codes, scales, _table(name, levels, maker), no_zero]
        return Coded(_BITS[table.bits], tensors, len(table.codes), kind)
    q = ctx.weights.get(name)
    if q is not None and q.qtype.blocked and q.qtype.bits == 3:
        return Coded("MatMul3", _uniform(body, name, q, kind, maker), len(q.codes), kind)
    return None


def _uniform(
    body: Graph, name: str, q: QTensor, kind: np.dtype[np.generic], maker: g.Maker
) -> list[gs.Tensor]:
    """Evenly spaced levels, around the middle where all zero points are there."""
    codes, zero = q.codes.view(np.uint8), q.zero.view(np.uint8)
    middle = bool((zero == q.qtype.middle).all())
    levels = np.arange(8) - (q.qtype.middle if middle else 0)
    scales = (
        _scales(name, q.scale, maker) if q.step is None else scales_of(body, name, q, kind, maker)
    )
    return [
        _codes(name, codes, 3, q.qtype.group or 0, maker),
        scales,
        _table(name, levels, maker),
        maker.shared(f"{name}_zero_point", _NO_ZERO if middle else zero.astype(np.int8)),
    ]


def _codes(name: str, codes: g.Array, bits: int, block: int, maker: g.Maker) -> gs.Tensor:
    """Codes (out, in) as bytes (out, blocks, bytes of a block), the first in the low bits; of 3
    bits, the low two of a whole block before its high ones."""
    rows, columns = codes.shape
    blocks = -(-columns // block)
    whole = np.pad(codes, ((0, 0), (0, blocks * block - columns))).reshape(-1, block)
    planes = [packed(whole, 4)] if bits == 4 else [packed(whole & 3, 2), packed(whole >> 2, 1)]
    stored = np.concatenate(planes, axis=1).reshape(rows, blocks, -1)
    return maker.shared(f"{name}_quantized", stored)


def _table(name: str, levels: g.Array, maker: g.Maker) -> gs.Tensor:
    return maker.shared(f"{name}_levels", levels.astype(np.int8)[None, None])


def _scales(name: str, scale: g.Array, maker: g.Maker) -> gs.Tensor:
    """In float16 where that says the same."""
    half = scale.astype(np.float16)
    same = np.array_equal(half.astype(scale.dtype), scale)
    return maker.shared(f"{name}_scale", half if same else scale.astype(np.float32))


def _in_blocks(
    body: Graph, name: str, scales: gs.Tensor, q: CodebookTensor, maker: g.Maker
) -> gs.Tensor:
    shape = maker.shared(f"{name}_scale_shape", np.array(q.scales.shape, np.int64))
    return maker.emit(body, "Reshape", [scales, shape], f"{name}_scale")
