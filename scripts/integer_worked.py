"""Values of an integer block worked out by hand, with Python's integers alone.

Each function takes a value that the runtime gave, shows how it comes about, line by line, and
asserts that it is what those lines give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from integer_block import Array, Block

from onnxq.ops import EXP_BITS, EXP_FRACTION, UNIT_BITS
from onnxq.ops.normalization import ROOT_BITS
from onnxq.ops.transcendental import ERF_A, ERF_B, EXP_A, EXP_B, EXP_C, EXP_DROP


def rounded(value: int, shift: int) -> int:
    """⌊value / 2^shift + 1/2⌋"""
    return (2 * value + (1 << shift)) >> (shift + 1)


def divided(value: int, divisor: int) -> int:
    return (2 * value + divisor) // (2 * divisor)


def convolution(block: Block) -> list[str]:
    """One value behind the last convolution, where its sum is negative, and behind the Add."""
    (add,) = block.named("IntegerAdd")
    conv = block.named("ConvInteger")[-1]
    bias_add, requantize = block.readers(conv.output[0])[0], block.named("Requantize")[-1]
    sums, total = (block.values[node.output[0]] for node in (bias_add, add))
    inside = np.zeros_like(sums, bool)
    inside[..., 1:-1, 1:-1] = True  # away from the padding
    there = (sums < 0) & (total > 0) & (total < 255) & inside
    _, c, i, j = map(int, np.argwhere(there)[0])

    x = block.values[conv.input[0]][0, :, i - 1 : i + 2, j - 1 : j + 2].astype(int)
    w = block.values[conv.input[1]][c].astype(int)
    z_x, z_w = (int(block.constant(conv, f"{name}_zero_point")) for name in "xw")
    products = (x - z_x) * (w - z_w)
    most = int(np.argmax(np.abs(products.sum(axis=(1, 2)))))
    bias = int(block.constant(bias_add, "B")[c].item())
    acc = int(products.sum()) + bias
    lines = [
        f"output channel {c}, row {i}, column {j}",
        f"q_x of input channel {most}   {spread(x[most])}",
        f"q_w                     {spread(w[most])}",
        f"Σ (q_x - {z_x}) (q_w - {z_w})  = {products[most].sum()}, and over all {len(x)} channels"
        f" {products.sum()}",
        f"+ bias {bias}  = {acc}",
    ]
    assert acc == sums[0, c, i, j]
    code = scaled(block, requantize, acc, (0, c, i, j), lines)
    lines.append(f"IntegerAdd of that, b, and of a = {block.values[add.input[0]][0, c, i, j]}")
    sides = []
    for side, value in (("a", int(block.values[add.input[0]][0, c, i, j])), ("b", code)):
        zero, m = (int(block.constant(add, f"{side}_{what}")) for what in ("zero", "multiplier"))
        sides.append((value - zero) * m)
        lines.append(f"({value} - {zero}) · {m}  = {sides[-1]}")
    finished(block, add, sum(sides), (0, c, i, j), lines)
    return lines


def softmax(block: Block) -> list[str]:
    """Some shares of a row of attention: the largest, a middling and a masked one."""
    (node,) = block.named("IntegerSoftmax")
    add = block.before(node, "IntegerAdd")
    y = block.values[node.output[0]][0, 0, 0]
    codes = [int(v) for v in block.values[node.input[0]][0, 0, 0]]
    m, n, levels = (int(block.constant(node, what)) for what in ("multiplier", "shift", "levels"))
    largest = max(codes)
    ps = [min(rounded((largest - v) * m, n), ((EXP_BITS + 2) << EXP_FRACTION) - 1) for v in codes]
    es = []
    for p in ps:
        z, f = divmod(p, 1 << EXP_FRACTION)
        es.append(((EXP_A * (EXP_B - f) ** 2 >> EXP_DROP) + EXP_C) >> z)
    shares = [divided(e * levels, sum(es)) for e in es]
    assert np.array_equal(shares, y.astype(int)), "y_zero is 0 and nothing saturates"
    order = np.argsort(-np.asarray(codes), kind="stable")
    seen = len(codes) - codes.count(min(codes))
    masks = block.values[dict(block.operands(add))["b"]].reshape(-1)
    rows = [
        [str(k), str(block.values[add.input[0]][0, 0, 0, k]), str(masks[k]), str(codes[k]),
         str(ps[k]), str(ps[k] >> EXP_FRACTION), str(ps[k] & ((1 << EXP_FRACTION) - 1)), str(es[k]),
         str(shares[k])]
        for k in (int(order[0]), int(order[seen // 4]), int(order[seen // 2]), int(order[-1]))
    ]  # fmt: skip
    head = ["key", "score", "mask", "x", "p", "z", "f", "e", "y"]
    return [
        f"head 0, query 0, {len(codes)} keys of which {seen} are there; max x = {largest}, "
        f"m = {m}, n = {n}, Σ e = {sum(es)}, levels = {levels}",
        *columns([head, *rows]),
    ]


def layer_norm(block: Block) -> list[str]:
    """One channel of the first token."""
    node = block.named("IntegerLayerNormalization")[0]
    y = block.values[node.output[0]][0, 0]
    x = [int(v) for v in block.values[node.input[0]][0, 0]]
    channel = int(np.argwhere((y > 0) & (y < 255))[0].item())
    epsilon = int(block.constant(node, "epsilon"))
    m, offset = (
        int(at(block.constant(node, what), (channel,))) for what in ("multiplier", "offset")
    )
    length, total, squares = len(x), sum(x), sum(v * v for v in x)
    variance = length * squares - total * total + epsilon
    d = length * x[channel] - total
    k = ROOT_BITS if variance < 1 << (62 - 2 * ROOT_BITS) else 0
    root = math.isqrt(variance << 2 * k)
    n = divided(d << (UNIT_BITS + k), root)
    lines = [
        f"token 0, channel {channel}: x = {x[channel]}, N = {length}",
        f"Σx = {total}, Σx² = {squares}",
        f"d = {length} · {x[channel]} - ({total})  = {d}",
        f"V = {length} · {squares} - ({total})² + {epsilon}  = {variance}",
        f"⌊√(V · 2^{2 * k})⌋  = {root}" if k else f"⌊√V⌋  = {root}",
        f"n = ⌊{d} · 2^{UNIT_BITS + k} / {root} + 1/2⌋  = {n}",
        f"{n} · {m} + {offset}  = {n * m + offset}",
    ]
    finished(block, node, n * m + offset, (0, 0, channel), lines)
    return lines


def gelu(block: Block) -> list[str]:
    """The first negative number with a share in the result."""
    (node,) = block.named("IntegerGelu")
    zero = int(block.constant(node, "x_zero"))
    y_zero = int(block.constant(node, "y_zero"))
    codes, y = block.values[node.input[0]], block.values[node.output[0]].astype(int)
    place = tuple(map(int, np.argwhere((codes < zero) & (y > 0) & (y < y_zero - 2))[0]))
    x = int(codes[place]) - zero
    names = ("in_multiplier", "in_shift", "multiplier")
    inner, shift, m = (int(block.constant(node, name)) for name in names)
    u = min(rounded(abs(x) * inner, shift), ERF_B)
    size = (1 << UNIT_BITS) - rounded(ERF_A * (u - ERF_B) ** 2, 2 * UNIT_BITS)
    gate = (1 << UNIT_BITS) + (size if x > 0 else -size)
    lines = [
        f"token {place[1]}, channel {place[2]}: x - x_zero = {x}",
        f"u = ⌊{abs(x)} · {inner} / 2^{shift} + 1/2⌋  = {u}",
        f"|erf| = {1 << UNIT_BITS} - ⌊{ERF_A} · ({u} - {ERF_B})² / 2^{2 * UNIT_BITS} + 1/2⌋"
        f"  = {size}",
        f"{x} · ({1 << UNIT_BITS} - {size}) · {m}  = {x * gate * m}",
    ]
    finished(block, node, x * gate * m, place, lines)
    return lines


# ── the end that all have ────────────────────────────────────────────────────────────────────────


def scaled(
    block: Block, node: onnx.NodeProto, x: int, place: tuple[int, ...], lines: list[str]
) -> int:
    m = int(at(block.constant(node, "multiplier"), place[1:]))
    lines.append(f"{x} · {m}  = {x * m}")
    return finished(block, node, x * m, place, lines)


def finished(
    block: Block, node: onnx.NodeProto, value: int, place: tuple[int, ...], lines: list[str]
) -> int:
    """Shift, zero point and saturation of a scaled value: the code that the runtime gave."""
    n = int(at(block.constant(node, "shift"), place[1:]))
    zero, low, high = (int(block.constant(node, what)) for what in ("y_zero", "low", "high"))
    shifted = rounded(value, n)
    code = min(max(zero + shifted, low), high)
    lines += [
        f"⌊{value} / 2^{n} + 1/2⌋  = {shifted}",
        f"clip({zero} + {shifted}, {low}, {high})  = {code}",
    ]
    assert code == block.values[node.output[0]][place], (lines, place)
    return code


def at(constant: Array, place: tuple[int, ...]) -> Any:
    """The element of a constant that is broadcast to `place`, whose last axes it has."""
    last = place[len(place) - constant.ndim :]
    return constant[tuple(i if n > 1 else 0 for i, n in zip(last, constant.shape, strict=True))]


def spread(window: Array) -> str:
    return " ".join(f"{v:4d}" for v in window.reshape(-1))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
