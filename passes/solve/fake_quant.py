"""Constants behind QuantizeLinear and DequantizeLinear: finding them, reading them, their codes.

Quantization-aware training leaves float weights behind a pair ("fake quantization"):

    W ─▶ QuantizeLinear(s, z) ─▶ [Clip] ─▶ DequantizeLinear(s, z) ─▶ Conv, Gemm, MatMul, Gather, …

A quantized model has codes there in place of W and QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.graph import Graph, Node
from onnxq.qtype import QType

Array = NDArray[Any]
_DOMAINS = (None, "", "ai.onnx", "com.microsoft")


def is_quantizer(node: Node) -> bool:
    return node.op == "QuantizeLinear" and node.domain in _DOMAINS


def is_dequantizer(node: Node | None) -> bool:
    return node is not None and node.op == "DequantizeLinear" and node.domain in _DOMAINS


def read(tensor: gs.Constant) -> Array:
    """A constant's values. `tensor.values` would keep them, which breaks 4-bit ones on export."""
    values = tensor._values
    lazy = isinstance(values, gs.ir.tensor.LazyValues)
    return np.asarray(values.load() if lazy else values)


@dataclass(frozen=True)
class Grid:
    """Scale, zero point and axis of a QuantizeLinear or DequantizeLinear, as constants.

    `scale` and `zero` have one number, one per slice along `axis`, or one per block of it.
    """

    scale: Array
    zero: Array
    axis: int
    block: int

    @property
    def per_tensor(self) -> bool:
        return self.scale.size == 1

    @property
    def qtype(self) -> QType:
        signed, bits = format_of(self.zero.dtype)
        middle = 0 if signed else 1 << (bits - 1)
        symmetric = bool(np.all(self.zero.astype(np.int64) == middle))
        group = None if self.per_tensor else (self.block or -1)
        return QType(bits, signed, symmetric, group)

    def spread(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Scale (float32) and zero point (int64), broadcastable to a tensor of this shape."""
        scale, zero = self.scale.astype(np.float32), self.zero.astype(np.int64)
        if self.per_tensor:
            return scale.reshape(()), zero.reshape(())
        axis = self.axis % len(shape)
        if self.block:
            return tuple(  # type: ignore[return-value]
                np.repeat(a, self.block, axis).take(range(shape[axis]), axis) for a in (scale, zero)
            )
        lined = tuple(-1 if k == axis else 1 for k in range(len(shape)))
        return scale.reshape(lined), zero.reshape(lined)


def grid(node: Node) -> Grid | None:
    """The grid of a QuantizeLinear or DequantizeLinear; None where it is computed in the graph."""
    scale = node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if not g.is_constant(scale) or (zero is not None and not g.is_constant(zero)):
        return None
    values = read(scale)
    zeros = read(zero) if zero is not None else np.zeros(values.shape, _default_type(node))
    if zeros.dtype.name.startswith("float") or values.dtype.kind != "f":
        return None  # float8
    axis, block = (int(node.attrs.get(k, d)) for k, d in (("axis", 1), ("block_size", 0)))
    return Grid(values, zeros, axis, block)


def _default_type(node: Node) -> np.dtype[Any]:
    """The type of codes where no zero point says it."""
    if is_quantizer(node):
        wanted = int(node.attrs.get("output_dtype", 0)) or onnx.TensorProto.UINT8
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(wanted))
    return np.dtype(node.inputs[0].dtype or np.uint8)


def format_of(dtype: np.dtype[Any]) -> tuple[bool, int]:
    """Whether an integer type is signed, and its bits; ml_dtypes' 2 and 4 bits too."""
    name = dtype.name
    return not name.startswith("u"), int(name.removeprefix("u").removeprefix("int"))


def quantize_linear(values: Array, to: Grid) -> Array:
    """What ONNX QuantizeLinear gives: round half to even, add the zero point, saturate."""
    signed, bits = format_of(to.zero.dtype)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    scale, zero = to.spread(values.shape)
    codes = np.rint(values.astype(np.float32) / scale).astype(np.float64) + zero
    return np.clip(codes, low, high).astype(to.zero.dtype)


def dequantize_linear(codes: Array, by: Grid) -> NDArray[np.float32]:
    scale, zero = by.spread(codes.shape)
    return ((codes.astype(np.int64) - zero).astype(np.float32) * scale).astype(np.float32)


def fake_codes(dequantizer: Node) -> tuple[gs.Constant, Array] | None:
    """The float constant that a DequantizeLinear gets through QuantizeLinear, and its codes."""
    clips: list[Node] = []
    maker = g.producer(dequantizer.inputs[0])
    while maker is not None and maker.op in ("Clip", "Identity") and g.is_standard(maker):
        clips.append(maker)
        maker = g.producer(maker.inputs[0])
    if maker is None or not is_quantizer(maker):
        return None
    source, onto = maker.inputs[0], grid(maker)
    if not g.is_constant(source) or np.dtype(source.dtype).kind != "f" or onto is None:
        return None
    if len(source.shape) < 1 and not onto.per_tensor:
        return None
    codes = quantize_linear(read(source), onto)
    for clip in reversed(clips):
        for tensor, bound in zip(clip.inputs[1:3], (np.maximum, np.minimum), strict=False):
            if tensor.name and not g.is_constant(tensor):
                return None
            if tensor.name:
                codes = bound(codes, read(tensor).astype(codes.dtype))
    return source, codes


def stored(tensor: gs.Tensor) -> Array | None:
    """The real values (float) of a constant, seen through fake or true quantization and Transpose.

    None for what depends on the model's inputs.
    """
    if g.is_constant(tensor):
        return read(tensor)
    maker = g.producer(tensor)
    if maker is None:
        return None
    if maker.op == "Transpose" and g.is_standard(maker):
        inner = stored(maker.inputs[0])
        return None if inner is None else np.transpose(inner, maker.attrs.get("perm"))
    if not is_dequantizer(maker):
        return None
    by = grid(maker)
    if by is None:
        return None
    found = fake_codes(maker)
    if found is not None:
        return dequantize_linear(found[1], by)
    codes = maker.inputs[0]
    return dequantize_linear(read(codes), by) if g.is_constant(codes) else None


def twin(node: Node, replaced: dict[int, Array] | None = None) -> Node:
    """A copy of a node by itself whose constants are float constants, quantized or not.

    What asks for a node's float weight (`weight_view`, a target's rules) gets an answer of it.
    `replaced` gives other values to some slots.
    """
    inputs: list[gs.Tensor] = []
    for slot, tensor in enumerate(node.inputs):
        values = (replaced or {}).get(slot)
        if values is None and g.is_constant(tensor):
            inputs.append(g.renamed(tensor, tensor.name))  # not read from its file
            continue
        values = stored(tensor) if values is None and tensor.name else values
        if values is None:
            inputs.append(gs.Variable(tensor.name, dtype=tensor.dtype, shape=tensor.shape))
        else:
            inputs.append(gs.Constant(tensor.name, values))
    outputs = [gs.Variable(tensor.name) for tensor in node.outputs]
    return gs.Node(node.op, node.name, dict(node.attrs), inputs, outputs, domain=node.domain)


def without_fake_quant(graph: Graph) -> Graph:
    """The float function that training started from: a copy without its pairs.

    A pair that makes an output of the model stays: the output keeps its name.
    """
    bare = g.copy(graph)
    for body in g.subgraphs(bare):
        for node in [n for n in body.nodes if is_dequantizer(n)]:
            pair = [node]
            while (maker := g.producer(pair[-1].inputs[0])) is not None:
                if not is_quantizer(maker) and maker.op not in ("Clip", "Identity"):
                    break
                pair.append(maker)
                if is_quantizer(maker):
                    break
            if is_quantizer(pair[-1]):
                for reader in list(node.outputs[0].outputs):
                    g.replace_input(reader, node.outputs[0], pair[-1].inputs[0])
    g.tidy(bare)
    return bare


def is_trained(graph: Graph) -> bool:
    """Whether some float weight of a model is fake-quantized."""
    return any(is_dequantizer(node) and fake_codes(node) is not None for node in g.walk(graph))


def refuse_quantized(graph: Graph) -> None:
    """Raises OnnxqError for a model that has been quantized or trained for it: once is enough."""
    nodes = list(g.walk(graph))
    if is_trained(graph):
        raise OnnxqError(
            "this model comes from quantization-aware training (QuantizeLinear around float "
            "weights): use --preset qat"
        )
    done = [
        n for n in nodes
        if is_quantizer(n) or is_dequantizer(n) or n.op.startswith("QLinear")
        or n.op in ("ConvInteger", "MatMulInteger")
    ]  # fmt: skip
    if done:
        raise OnnxqError(
            f"this model is quantized already (it has {done[0].op}): quantize the float model it "
            "was made from"
        )
