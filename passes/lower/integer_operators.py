"""Integer operators of ONNX and com.microsoft, and the float operators that each stands for.

    QLinear⟨op⟩(x_q, s_x, z_x, …, s_y, z_y) = Quantize(op(s_x (x_q − z_x), …); s_y, z_y)

A function here takes what surrounds one operator and gives the integer operator, or says in a
`Refusal` what stands against it. Nothing is computed: scales, zero points and codes are handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Node

_POOLING = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")


class Refusal(Exception):
    """Why an operator keeps its QDQ form, in words for the report."""


@dataclass(frozen=True)
class Real:
    """What a DequantizeLinear or QuantizeLinear says of a tensor: scale · (codes − zero).

    `axis` and `block` are those of the operator; they say nothing where `scale` is one number.
    """

    codes: gs.Tensor
    scale: gs.Constant
    zero: gs.Constant
    axis: int = 1
    block: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.zero.dtype)

    @property
    def per_tensor(self) -> bool:
        return bool(np.size(self.scale.values) == 1)

    @property
    def tensors(self) -> list[gs.Tensor]:
        return [self.codes, self.scale, self.zero]

    @property
    def grid(self) -> list[gs.Tensor]:
        """The scale and zero point alone."""
        return [self.scale, self.zero]

    def same_grid(self, other: Real) -> bool:
        return (
            self.per_tensor
            and other.per_tensor
            and self.dtype == other.dtype
            and bool(np.ravel(self.scale.values) == np.ravel(other.scale.values))
            and bool(np.ravel(self.zero.values) == np.ravel(other.zero.values))
        )


@dataclass(frozen=True)
class Group:
    """One operator with the DequantizeLinear before each input and the QuantizeLinear after it.

    `reals[i]` is None for a float or absent input; `result` is None for a float result.
    """

    node: Node
    opset: int
    reals: tuple[Real | None, ...]
    result: Real | None

    def real(self, slot: int) -> Real:
        """An input as codes with one scale, in eight bits."""
        found = self.reals[slot] if slot < len(self.reals) else None
        if found is None:
            raise Refusal("one of its inputs is float")
        if not found.per_tensor:
            raise Refusal("an activation has more than one scale")
        return _eight_bits(found)

    def out(self) -> Real:
        if self.result is None:
            raise Refusal("its result is read as float")
        return _eight_bits(self.result)

    def matrix(self, slot: int, axis: int, rank: int | None = None) -> Real:
        """A second operand with one scale, or one per slice along `axis`."""
        found = self.reals[slot] if slot < len(self.reals) else None
        if found is None:
            raise Refusal("its weight is float")
        if not found.per_tensor:
            shape = found.codes.shape
            if shape is None or (rank is not None and len(shape) != rank):
                raise Refusal("its weight has scales along an unknown axis")
            if found.block or found.axis % len(shape) != axis % len(shape):
                raise Refusal("the scales of its weight do not lie along its output channels")
        return _eight_bits(found)

    def attributes(self, *names: str) -> dict[str, object]:
        return {name: self.node.attrs[name] for name in names if name in self.node.attrs}


@dataclass(frozen=True)
class Integer:
    """An operator on codes: what to put in the place of a group."""

    op: str
    inputs: list[gs.Tensor]
    attrs: Mapping[str, object]
    domain: str = g.CONTRIB


def _eight_bits(real: Real) -> Real:
    if real.dtype not in (np.uint8, np.int8):
        raise Refusal(f"the integer operators take 8 bits, not {real.dtype}")
    if np.dtype(real.scale.dtype) != np.float32:
        raise Refusal(f"the integer operators take float32 scales, not {real.scale.dtype}")
    return real


def _compatible(x: Real, w: Real, y: Real | None) -> None:
    """The kernels take u8·u8, u8·s8 and s8·s8, and hand on the type of the first."""
    if x.dtype == np.int8 and w.dtype == np.uint8:
        raise Refusal("no kernel multiplies int8 activations by uint8 weights")
    _alike(x, *([y] if y else []))


def _alike(*reals: Real) -> None:
    if len({real.dtype for real in reals}) > 1:
        raise Refusal("its inputs and its result are not of one integer type")


# ── products ─────────────────────────────────────────────────────────────────────────────────────


def conv(group: Group) -> Integer:
    """QLinearConv(x, s, z, w, s, z, s_y, z_y, bias)."""
    x, w, y = group.real(0), group.matrix(1, axis=0), group.out()
    _compatible(x, w, y)
    if len({*np.ravel(w.zero.values).tolist()}) > 1:
        raise Refusal("QLinearConv takes one zero point for all channels of its weight")
    bias = _bias(group, x, w, unit=1.0)
    attrs = group.attributes("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    return Integer("QLinearConv", [*x.tensors, *w.tensors, *y.grid, *bias], attrs, "")


def gemm(group: Group) -> Integer:
    """QGemm(a, s, z, b, s, z, bias, s_y, z_y), y = α s_a s_b (a·b + bias); float without s_y."""
    attrs = group.node.attrs
    alpha, beta = float(attrs.get("alpha", 1.0)), float(attrs.get("beta", 1.0))
    x, w = group.real(0), group.matrix(1, axis=0 if attrs.get("transB", 0) else 1, rank=2)
    y = group.out() if group.result is not None else None
    _compatible(x, w, y)
    bias = _bias(group, x, w, unit=alpha / beta if beta else 0.0)
    if y is not None and not bias:
        bias = [gs.Variable.empty()]
    return Integer(
        "QGemm",
        [*x.tensors, *w.tensors, *bias, *(y.grid if y else [])],
        group.attributes("alpha", "transA", "transB"),
    )


def matmul(group: Group) -> Integer:
    """QLinearMatMul, or MatMulIntegerToFloat where the result is read as float."""
    x, w = group.real(0), group.matrix(1, axis=-1)
    if group.result is None:
        _compatible(x, w, None)
        inputs = [x.codes, w.codes, x.scale, w.scale, x.zero, w.zero]
        return Integer("MatMulIntegerToFloat", inputs, {})
    y = group.out()
    _compatible(x, w, y)
    return Integer("QLinearMatMul", [*x.tensors, *w.tensors, *y.grid], {}, "")


def _bias(group: Group, x: Real, w: Real, unit: float) -> list[gs.Tensor]:
    """The int32 codes of a bias, which must be in units of s_x s_w · unit."""
    if len(group.node.inputs) < 3 or not group.node.inputs[2].name:
        return []
    bias = group.reals[2]
    if bias is None:
        raise Refusal("its bias is float")
    expected = float(np.ravel(x.scale.values)[0]) * np.ravel(w.scale.values).astype(float) * unit
    if bias.dtype != np.int32 or np.any(bias.zero.values):
        raise Refusal("its bias is not int32 around zero")
    if not np.allclose(np.ravel(bias.scale.values), expected, rtol=1e-5, atol=0):
        raise Refusal("its bias is not in units of the product")
    return [bias.codes]


# ── element by element, pools, joins ─────────────────────────────────────────────────────────────


def binary(op: str) -> Callable[[Group], Integer]:
    def lower(group: Group) -> Integer:
        a, b, y = group.real(0), group.real(1), group.out()
        _alike(a, b, y)
        return Integer(op, [*a.tensors, *b.tensors, *y.grid], {})

    return lower


def unary(op: str, *attributes: str) -> Callable[[Group], Integer]:
    def lower(group: Group) -> Integer:
        x, y = group.real(0), group.out()
        _alike(x, y)
        return Integer(op, [*x.tensors, *y.grid], group.attributes(*attributes))

    return lower


def average_pool(group: Group) -> Integer:
    if any(step != 1 for step in group.node.attrs.get("dilations", ())):
        raise Refusal("QLinearAveragePool has no dilations")
    return unary("QLinearAveragePool", *_POOLING)(group)


def softmax(group: Group) -> Integer:
    """Its meaning changed with opset 13, so the operator is told which one it stands for."""
    found = unary("QLinearSoftmax")(group)
    axis = group.node.attrs.get("axis", -1 if group.opset >= 13 else 1)
    return Integer(found.op, found.inputs, {"axis": axis, "opset": group.opset})


def concat(group: Group) -> Integer:
    y = group.out()
    inputs = [group.real(slot) for slot in range(len(group.node.inputs))]
    _alike(y, *inputs)
    tensors = [tensor for real in inputs for tensor in real.tensors]
    return Integer("QLinearConcat", [*y.grid, *tensors], group.attributes("axis"))


# ── movers ───────────────────────────────────────────────────────────────────────────────────────


def move(group: Group) -> Integer:
    """The operator itself, on codes: what it hands on has the scale and zero point it was given."""
    x, y = group.real(0), group.out()
    node = group.node
    if not x.same_grid(y):
        raise Refusal("its result has another scale than its input")
    if node.op == "MaxPool" and (group.opset < 12 or len(node.outputs) > 1):
        raise Refusal("MaxPool takes codes from opset 12 on, and gives no indices of them")
    inputs: list[gs.Tensor] = [x.codes, *node.inputs[1:]]
    if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
        if group.opset < 11:
            raise Refusal("Pad takes codes from opset 11 on")
        fill = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        if fill is not None and not (g.is_constant(fill) and not np.any(fill.values)):
            raise Refusal("it pads with something else than zeros")
        inputs[2:3] = [x.zero]
    return Integer(node.op, inputs, dict(node.attrs), "")


PRODUCTS: dict[str, Callable[[Group], Integer]] = {"Conv": conv, "Gemm": gemm, "MatMul": matmul}
OTHERS: dict[str, Callable[[Group], Integer]] = {
    "Add": binary("QLinearAdd"),
    "Mul": binary("QLinearMul"),
    "Concat": concat,
    "AveragePool": average_pool,
    "GlobalAveragePool": unary("QLinearGlobalAveragePool"),
    "LeakyRelu": unary("QLinearLeakyRelu", "alpha"),
    "Sigmoid": unary("QLinearSigmoid"),
    "Softmax": softmax,
}
RESHAPERS = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
MOVERS = (*RESHAPERS, "Slice", "Split", "MaxPool", "Pad", "Expand", "DepthToSpace", "SpaceToDepth")
LOWERINGS = PRODUCTS | OTHERS | dict.fromkeys(MOVERS, move)
