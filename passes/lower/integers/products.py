"""Convolutions and matrix products: int32 sums of 8-bit products, a bias in their unit, then

    q_y = clip(z_y + round(M (Σ (q_x − z_x)(q_w − z_w) + q_b))),  M = s_x s_w / s_y,

Jacob et al. 2018, eqs. 4–7, one M per output channel. Weights are written as uint8 around 128: on
CPUs without VNNI the kernels add products of int8 weights in 16 bits, and saturate.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnxq.passes.lower.integers.grid import Codes, Grid, Refusal, bits_above, terms
from onnxq.passes.lower.integers.group import Group
from onnxq.passes.solve.quantize_bias import bias_key

from onnxq import graph as g
from onnxq.ops.dyadic import dyadic
from onnxq.qtype import QTensor

_INT32 = 2**31
_PRODUCT = 255 * 255


def conv(group: Group) -> gs.Variable:
    node, x = group.node, group.codes(0)
    weight, scale = quantized_weight(group)
    channels = (-1, *(1,) * (weight.rank - 2))
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    attrs = {name: node.attrs[name] for name in names if name in node.attrs}
    sums = group.emit("ConvInteger", [x.tensor, *weight.operands(x, group)], **attrs)
    bias = _bias(group, len(weight.matrix))
    return finish(group, sums, x.grid.scale * scale, bias, weight.reach(x), channels)


def gemm(group: Group) -> gs.Variable:
    """y = α A B + β c. The codes of the bias are in units of α s_a s_b."""
    node, x = group.node, group.codes(0)
    weight, scale = quantized_weight(group)
    if node.attrs.get("transB", 0):
        weight = Weight(weight.matrix, np.ascontiguousarray(weight.stored.T), weight.name)
    data = x.tensor
    if node.attrs.get("transA", 0):
        data = group.emit("Transpose", [data], perm=[1, 0])
        data.dtype = x.grid.dtype
    sums = group.emit("MatMulInteger", [data, *weight.operands(x, group)])
    unit = x.grid.scale * scale * float(node.attrs.get("alpha", 1.0))
    beta = float(node.attrs.get("beta", 1.0))
    if not np.all(unit):
        raise Refusal("its alpha is 0")
    if beta and len(node.inputs) > 2 and node.inputs[2].name and bias_key(node) is None:
        if g.is_constant(node.inputs[2]):
            matrix = beta * np.asarray(g.values(node.inputs[2]), np.float64)
            return finish(group, sums, unit, None, weight.reach(x), (-1,), matrix)
        return _with_computed_bias(group, sums, unit, weight.reach(x), beta)
    bias = _bias(group, len(weight.matrix)) if beta else None
    return finish(group, sums, unit, bias, weight.reach(x), (-1,))


def _with_computed_bias(
    group: Group,
    sums: gs.Variable,
    unit: NDArray[np.float64],
    reach: NDArray[np.int64],
    beta: float,
) -> gs.Variable:
    """The sums and the codes of the bias, each by a multiplier, rounded once."""
    if group.vector is not None or np.max(reach) >= _INT32:
        raise Refusal("its bias is computed, and more is added to it")
    c, grid, gain = group.codes(2), group.grid, group.gain
    own = np.broadcast_to(np.abs(unit) * np.sign(unit), np.shape(unit)) * gain / grid.scale
    ratios = terms(np.concatenate([own.reshape(-1), [beta * c.grid.scale * gain / grid.scale]]))
    bits = 59 - bits_above(max(int(np.max(reach)), 2**16))
    multipliers, shift = dyadic(ratios, min(bits, 44), common=True)
    operands: list[gs.Tensor] = []
    for codes, zero, multiplier in (
        (sums, group.constant(0, np.int32, "zero_int32"), multipliers[:-1].reshape(own.shape)),
        (c.tensor, group.zero(c), multipliers[-1]),
    ):
        operands += [codes, zero, group.constant(multiplier, np.int64, "multiplier")]
    shifts = group.constant(shift, np.uint64, "shift")
    return group.call("IntegerAdd", [*operands, shifts, *group.ends()])


def matmul(group: Group) -> gs.Variable:
    """By a weight, or of two activations."""
    if g.weight_view(group.node) is None:
        x, other = _operand(group, 0), _operand(group, 1)
        operands = [x.tensor, other.tensor, group.zero(x), group.zero(other)]
        _check_length(group)
        sums = group.emit("MatMulInteger", operands)
        return finish(group, sums, np.asarray(x.grid.scale * other.grid.scale), None, None, (-1,))
    x = group.codes(0)
    weight, scale = quantized_weight(group)
    sums = group.emit("MatMulInteger", [x.tensor, *weight.operands(x, group)])
    return finish(group, sums, x.grid.scale * scale, None, weight.reach(x), (-1,))


def _operand(group: Group, slot: int) -> Codes:
    """An operand of a product of two tensors; a constant that is no weight has one scale."""
    tensor = group.node.inputs[slot]
    if not g.is_constant(tensor):
        return group.codes(slot)
    real = np.asarray(g.values(tensor), np.float64)
    grid = Grid(float(np.abs(real).max(initial=0)) / 127 or 1.0, 128, 1, 255)
    return Codes(group.constant(grid.quantize(real), np.uint8, "codes"), grid)


class Weight:
    """Codes around zero: `matrix` (out, in) and as the operator stores them."""

    def __init__(self, matrix: NDArray[np.int64], stored: NDArray[np.int64], name: str) -> None:
        self.matrix, self.stored, self.name = matrix, stored, name

    @property
    def rank(self) -> int:
        return self.stored.ndim

    def operands(self, x: Codes, group: Group) -> list[gs.Tensor]:
        """The second operand of an integer product and both zero points."""
        held = (self.stored + 128).astype(np.uint8)
        codes = group.writer.maker.shared(f"{self.name}_quantized", held)
        return [codes, group.zero(x), group.constant(128, np.uint8, "zero_uint8")]

    def reach(self, x: Codes) -> NDArray[np.int64]:
        """The largest sum that each row can make, (out,)."""
        return np.abs(self.matrix).sum(axis=1) * x.grid.reach


def quantized_weight(group: Group) -> tuple[Weight, NDArray[np.float64]]:
    """A node's weight with its scale () or (out,). Raises Refusal where it has no codes."""
    view = g.weight_view(group.node)
    q = None if view is None else group.writer.ctx.weights.get(view.tensor.name)
    if view is None or q is None:
        raise Refusal("its weight is not quantized")
    if q.scale.ndim > 1:
        raise Refusal("its weight has scales by block, which no integer product adds up")
    centered = _centered(q)
    if centered.min(initial=0) < -128 or centered.max(initial=0) > 127:
        raise Refusal("its weight has codes of more than 8 bits around their zero point")
    stored = np.asarray(view.from_matrix(centered))
    return Weight(centered, stored, view.tensor.name), np.asarray(q.scale, np.float64)


def _centered(q: QTensor) -> NDArray[np.int64]:
    zero = q.zero.astype(np.int64)
    codes: NDArray[np.int64] = q.codes.astype(np.int64) - (zero[:, None] if zero.ndim else zero)
    return codes


def _bias(group: Group, channels: int) -> NDArray[np.int64] | None:
    """The codes of a Conv's or Gemm's own bias (out,), as `quantize-bias` made them."""
    inputs = group.node.inputs
    if len(inputs) < 3 or not inputs[2].name:
        return None
    q = group.writer.ctx.weights.get(bias_key(group.node) or "")
    if q is None:
        raise Refusal("its bias is no constant vector")
    return np.broadcast_to(q.codes[:, 0].astype(np.int64), channels)


def finish(
    group: Group,
    sums: gs.Variable,
    unit: NDArray[np.float64],
    bias: NDArray[np.int64] | None,
    reach: NDArray[np.int64] | None,
    channels: tuple[int, ...],
    real_bias: NDArray[np.float64] | None = None,
) -> gs.Variable:
    """Bias and requantization of int32 sums in `unit` (() or (out,)).

    The sums stay within int32 whatever the activations are: `reach` bounds them. A real bias is
    (out,), or for all rows a matrix of its own.
    """
    for vector in (group.vector, real_bias):
        if vector is None:
            continue
        added = np.rint(vector / unit)
        if np.abs(added).max(initial=0) >= _INT32 / 2:
            raise Refusal("its bias does not fit into 32 bits in the unit of its products")
        bias = added.astype(np.int64) + (0 if bias is None else bias)
    most = (0 if reach is None else reach) + (0 if bias is None else np.abs(bias))
    if np.max(most) >= _INT32:
        raise Refusal("its sums can exceed 32 bits: it adds up too many products")
    if bias is not None:
        held = bias.reshape(channels) if bias.ndim == 1 and bias.size > 1 else bias
        held = held.reshape(-1)[:1] if held.size == 1 else held
        sums = group.emit("Add", [sums, group.constant(held, np.int32, "bias")])
    real = unit * group.gain
    real = real.reshape(channels) if real.ndim else real
    reach_of_all = int(np.max(most)) if reach is not None else _INT32
    nothing = group.constant(0, np.int32, "zero_int32")
    return group.requantize(sums, nothing, real, reach=reach_of_all)


def _check_length(group: Group) -> None:
    shape = group.shape(group.node.inputs[0])
    if shape and isinstance(shape[-1], int) and shape[-1] * _PRODUCT >= _INT32:
        raise Refusal("its sums can exceed 32 bits: it adds up too many products")


LOWERINGS = {"Conv": conv, "Gemm": gemm, "MatMul": matmul}
