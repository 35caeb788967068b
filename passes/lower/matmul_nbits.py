"""Weights in blocks, multiplied by the kernel that expands them as it goes.

com.microsoft.MatMulNBits(A, B, scales, zero_points, g_idx, bias) computes A · Wᵀ + bias with

    W[n, k] = scales[n, b] · (B[n, k] − zero_points[n, b]),    b = ⌊k / block⌋,

B (N, blocks, bytes of a block) with the codes of low columns in low bits, rows of zero points
filled up to whole bytes, and without them 2^(bits−1) for all. GatherBlockQuantized looks up rows of
a table in the same layout, so that a table and the output layer tied to it are one initializer.

Scales are float16 in the file, behind a Cast, and B is behind a Reshape. Scales that are codes are
two to a byte,

    codes ─ Cast ─ Gather ─▶ pairs ─ Reshape ─ Slice ─▶ k ─ Mul ─▶ scales,    step ─ Cast ─▶ Mul,

Gather reading both codes of a byte as floats in a table of all bytes. ONNX Runtime computes all of
it when it loads the model. With its optimizations off it does not, and multiplies floats exactly: B
must not be an initializer then, for onnxruntime 1.31 would pack it for the fast kernel without the
scales, and be wrong. `g_idx` is wrong with packed zero points and at 2 bits: it is never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnxq.passes.lower.embedding import lower_embedding
from onnxq.passes.lower.insert_qdq import InsertQDQ
from onnxq.passes.lower.stored import lower_stored

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, NodePlan, Pass
from onnxq.qtype import QTensor
from onnxq.super_blocks import scale_codes

SMALLEST_BLOCK = 16  # that the kernels take


@dataclass(frozen=True)
class MatMulNBits(Pass):
    """MatMulNBits and GatherBlockQuantized where weights have blocks; other weights stored.

    For a target of standard operators alone, DequantizeLinear instead.
    """

    name: ClassVar[str] = "matmul-nbits"
    lowers: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: Context) -> int:
        if ctx.target.standard_only:
            return InsertQDQ().apply(graph, ctx)
        maker, changes = g.Maker(graph), 0
        for body in g.subgraphs(graph):
            for node, plan in ctx.plan.quantized(list(body.nodes)):
                changes += lower_weights(body, node, plan, ctx, maker)
        g.tidy(graph)
        return changes


def weights_alone(body: Graph, ctx: Context) -> Iterator[tuple[Node, g.WeightView, int]]:
    """Nodes of a body whose weights alone are quantized, and their kernels' accuracy level."""
    for node, plan in ctx.plan.quantized(list(body.nodes)):
        view = g.weight_view(node)
        if view is not None and plan.weights_alone:
            yield node, view, plan.rule.accuracy_level if plan.rule else 0


def lower_weights(body: Graph, node: Node, plan: NodePlan, ctx: Context, maker: g.Maker) -> int:
    """One node of the plan with its weight as codes, activations float."""
    view = g.weight_view(node)
    if view is None or not plan.weights_alone or view.tensor.name not in ctx.weights:
        return 0
    q = ctx.weights[view.tensor.name]
    if node.op == "Gather":
        if not q.qtype.blocked:
            return lower_embedding(body, node, q, maker)
        return _look_up(body, node, q, maker)
    if not q.qtype.blocked:
        return lower_stored(body, node, ctx.weights, maker)
    if q.qtype.bits == 3:
        raise OnnxqError("no kernel takes 3 bits: put the pass 'expand' before 'matmul-nbits'")
    level = plan.rule.accuracy_level if plan.rule else 0
    if view.batched:
        return _products(body, node, view, q, level, maker)
    operands = Operands.of(body, view.tensor.name, q, view.tensor.dtype, maker)
    return lower_product(body, node, operands, level, maker)


class Product(Protocol):
    """A matrix W (rows, columns) in the form that an operator multiplies with."""

    @property
    def rows(self) -> int: ...

    def multiply(
        self,
        body: Graph,
        x: gs.Tensor,
        bias: gs.Tensor | None,
        accuracy_level: int,
        name: str,
        maker: g.Maker,
    ) -> gs.Variable:
        """x (…, columns) · Wᵀ + bias, (…, rows)."""
        ...


@dataclass(frozen=True)
class Operands:
    """What MatMulNBits multiplies with: W (rows, columns) as codes, and how they are packed."""

    tensors: list[gs.Tensor]  # B, scales and, where they are not all in the middle, zero points
    rows: int
    columns: int
    bits: int
    block: int

    @classmethod
    def of(
        cls, body: Graph, name: str, q: QTensor, dtype: np.dtype[Any], maker: g.Maker
    ) -> Operands:
        """Of W (rows, columns) by the name of its tensor, for activations of a type."""
        block, bits = q.qtype.group or 0, q.qtype.bits
        rows, columns = q.codes.shape
        blocks = -(-columns // block)
        whole = np.pad(q.codes.view(np.uint8), ((0, 0), (0, blocks * block - columns)))
        stored = maker.shared(f"{name}_quantized", packed(whole, bits))
        shape = np.array([rows, blocks, block * bits // 8], np.int64)
        codes = maker.emit(body, "Reshape", [stored, maker.shared(f"{name}_shape", shape)], name)
        codes.dtype = np.dtype(np.uint8)
        tensors = [codes, *_grid(body, name, q, dtype, maker)]
        return cls(tensors, rows, columns, bits, block)

    def multiply(
        self,
        body: Graph,
        x: gs.Tensor,
        bias: gs.Tensor | None,
        accuracy_level: int,
        name: str,
        maker: g.Maker,
    ) -> gs.Variable:
        inputs = [x, *self.tensors]
        if bias is not None:
            inputs += [*(gs.Variable.empty() for _ in range(5 - len(inputs))), bias]
        y = maker.emit(
            body, "MatMulNBits", inputs, name, K=self.columns, N=self.rows,
            bits=self.bits, block_size=self.block, accuracy_level=accuracy_level,
        )  # fmt: skip
        y.inputs[0].domain = g.CONTRIB
        return y


def _look_up(body: Graph, node: Node, q: QTensor, maker: g.Maker) -> int:
    view = g.weight_view(node)
    assert view is not None
    name, ids = view.tensor.name, node.inputs[1]
    stored = maker.shared(f"{name}_quantized", packed(q.codes.view(np.uint8), q.qtype.bits))
    q = _in_whole_bytes(q)
    scale, *zero = _grid(body, name, q, view.tensor.dtype, maker)
    rows = maker.emit(
        body, "GatherBlockQuantized", [stored, ids, scale, *zero], node.name,
        bits=q.qtype.bits, block_size=q.qtype.group, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    rows.inputs[0].domain = g.CONTRIB
    g.replace_node(body, node, rows)
    return 1


def _in_whole_bytes(q: QTensor) -> QTensor:
    """The same weights in smaller blocks, of which the zero points of a row fill whole bytes.

    GatherBlockQuantized of onnxruntime 1.24 reads others wrongly (measured).
    """
    columns, block = q.codes.shape[1], q.qtype.group or 0
    while -(-columns // block) * q.qtype.bits % 8 and block > SMALLEST_BLOCK:
        block //= 2
    of = np.arange(0, columns, block) // (q.qtype.group or 1)
    qtype = replace(q.qtype, group=block)
    return replace(q, scale=q.scale[:, of], zero=q.zero[:, of], qtype=qtype)


def _grid(
    body: Graph, name: str, q: QTensor, dtype: np.dtype[Any], maker: g.Maker
) -> list[gs.Tensor]:
    """Scales, in float16 where that is exact, and zero points that are not the middle."""
    scales = scales_of(body, name, q, np.dtype(dtype), maker)
    if (q.zero.view(np.uint8) == q.qtype.middle).all():
        return [scales]
    zeros = packed(q.zero.view(np.uint8), q.qtype.bits)
    return [scales, maker.shared(f"{name}_zero_point", zeros)]


def scales_of(
    body: Graph, name: str, q: QTensor, dtype: np.dtype[Any], maker: g.Maker
) -> gs.Tensor:
    """Scales (out, blocks) of a weight in the type of the activations."""
    if q.step is None:
        return scale_tensor(body, name, q.scale, dtype, maker)
    base = f"{name}_scale"

    def emit(op: str, *inputs: gs.Tensor | g.Array, **attributes: int) -> gs.Variable:
        tensors = [maker.shared(base, a) if isinstance(a, np.ndarray) else a for a in inputs]
        return maker.emit(body, op, tensors, base, **attributes)

    def sizes(*values: int) -> g.Array:
        return np.array(values, np.int64)

    stored = packed(scale_codes(q.scale, q.step).reshape(1, -1), 4)[0]
    codes = emit(
        "Gather",
        codes_of_bytes(4).astype(dtype),
        emit("Cast", stored, to=int(onnx.TensorProto.INT32)),
    )
    if q.scale.size % 2:
        codes = emit("Slice", emit("Reshape", codes, sizes(-1)), sizes(0), sizes(q.scale.size))
    codes = emit("Reshape", codes, sizes(*q.scale.shape))
    scales = emit("Mul", codes, scale_tensor(body, f"{name}_step", q.step[:, None], dtype, maker))
    scales.dtype = dtype
    return scales


def scale_tensor(
    body: Graph, name: str, scale: g.Array, dtype: np.dtype[Any], maker: g.Maker
) -> gs.Tensor:
    """Scales in the type of the activations; float16 in the file where that says the same."""
    half = scale.astype(np.float16)
    if dtype == np.float16 or not np.array_equal(half.astype(scale.dtype), scale):
        return maker.shared(f"{name}_scale", scale.astype(dtype))
    to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
    cast = maker.emit(body, "Cast", [maker.shared(f"{name}_scale", half)], f"{name}_scale", to=to)
    cast.dtype = dtype
    return cast


def lower_product(
    body: Graph, node: Node, operands: Product, accuracy_level: int, maker: g.Maker
) -> int:
    """The product with a matrix of codes in the place of a MatMul or Gemm."""
    x, bias, rest = node.inputs[0], None, None
    alpha, beta = (float(node.attrs.get(key, 1.0)) for key in ("alpha", "beta"))

    def times(tensor: gs.Tensor, factor: float) -> gs.Tensor:
        if factor == 1:
            return tensor
        value = np.asarray(factor, g.dtype(node.inputs[1]))
        return maker.emit(body, "Mul", [tensor, maker.shared(node.name, value)], node.name)

    if node.op == "Gemm":
        if node.attrs.get("transA", 0):
            x = maker.emit(body, "Transpose", [x], node.name, perm=[1, 0])
        if len(node.inputs) > 2 and node.inputs[2].name and beta:
            rest = node.inputs[2]
            if alpha == beta == 1 and g.is_constant(rest) and rest.shape == (operands.rows,):
                bias, rest = rest, None
    y = times(operands.multiply(body, x, bias, accuracy_level, node.name, maker), alpha)
    if rest is not None:
        y = maker.emit(body, "Add", [y, times(rest, beta)], node.name)
    g.replace_node(body, node, y)
    return 1


def _products(
    body: Graph, node: Node, view: g.WeightView, q: QTensor, accuracy_level: int, maker: g.Maker
) -> int:
    """A product for each matrix of a batched weight, joined along a first axis."""
    x, name, out = node.inputs[0], view.tensor.name, view.rows // view.batches
    rank = len(x.shape)
    slices = [x] * view.batches
    if g.products_of_batch(node, x.shape) == "slices":
        sizes = maker.shared(f"{node.name}_sizes", np.ones(view.batches, np.int64))
        split = maker.emit(body, "Split", [x, sizes], node.name, axis=0).inputs[0]
        split.outputs += [gs.Variable(maker.name(f"{node.name}_part")) for _ in slices[1:]]
        slices = list(split.outputs)
    found = []
    for number, part in enumerate(slices):
        rows = slice(number * out, (number + 1) * out)
        step = None if q.step is None else q.step[rows]
        matrix = replace(q, codes=q.codes[rows], scale=q.scale[rows], zero=q.zero[rows], step=step)
        operands = Operands.of(body, f"{name}_{number}", matrix, view.tensor.dtype, maker)
        found.append(operands.multiply(body, part, None, accuracy_level, node.name, maker))
    missing = np.arange(max(0, view.rank - rank))
    if missing.size:
        axes = maker.shared(f"{node.name}_axes", missing)
        found = [maker.emit(body, "Unsqueeze", [y, axes], node.name) for y in found]
    joined = found[0]
    if len(found) > 1:
        joined = maker.emit(body, "Concat", list(found), node.name, axis=0)
    g.replace_node(body, node, joined)
    return 1


def packed(codes: g.Array, bits: int) -> g.Array:
    """Codes (rows, columns) of 2, 4 or 8 bits as bytes, the first in the low bits; rows are filled
    up with zeros to whole bytes.
    """
    each = 8 // bits
    whole = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    parts = whole.reshape(len(codes), -1, each)
    found = parts[:, :, 0].copy()
    for place in range(1, each):
        found |= parts[:, :, place] << np.uint8(bits * place)
    return found


def codes_of_bytes(bits: int) -> g.Array:
    """The codes of `bits` in each byte, the first from the low bits, (256, 8 / bits)."""
    return (np.arange(256)[:, None] >> np.arange(0, 8, bits)) & ((1 << bits) - 1)
