"""Attention and rotary embedding, whose parts are found one from the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from onnxq.graph.walk import Node, is_constant, is_standard, producer

Kind = Literal["layernorm", "rmsnorm", "gelu", "silu", "attention", "rotary"]
MASKS = ("Mul", "Div", "Add", "Where", "Cast")  # between the scores and their Softmax


@dataclass(frozen=True)
class Pattern:
    """One match: `nodes` compute `output` from `input`.

    Of attention, `input` are the scores before scale and mask. `gain` and `bias` are the constants
    of a normalization that has them, (channels,).
    """

    kind: Kind
    nodes: tuple[Node, ...]
    input: gs.Tensor
    output: gs.Tensor
    gain: gs.Constant | None = None
    bias: gs.Constant | None = None


def attention(softmax: Node) -> Pattern | None:
    """Scores, scale and mask, Softmax, and the product with the values."""
    nodes = [softmax]
    tensor = softmax.inputs[0]
    while (node := producer(tensor)) is not None and node.op in MASKS and is_standard(node):
        nodes.append(node)
        products = [t for t in node.inputs if _leads_to_product(t)]
        if not products:
            return None
        tensor = products[0]
    if node is None or node.op != "MatMul" or any(is_constant(t) for t in node.inputs):
        return None
    readers = [n for n in softmax.outputs[0].outputs if n.op == "MatMul"]
    if not readers or readers[0].inputs[0] is not softmax.outputs[0]:
        return None
    nodes = [node, *reversed(nodes), readers[0]]
    return Pattern("attention", tuple(nodes), tensor, readers[0].outputs[0])


def _leads_to_product(tensor: gs.Tensor) -> bool:
    """Whether a tensor is the product of two activations, scaled and masked perhaps."""
    node = producer(tensor)
    for _ in range(len(MASKS) + 1):
        if node is None:
            return False
        if node.op == "MatMul":
            return not any(is_constant(t) for t in node.inputs)
        if node.op not in MASKS:
            return False
        node = next((m for m in _makers(node.inputs) if m.op in ("MatMul", *MASKS)), None)
    return False


def rotary(node: Node) -> Pattern | None:
    """x·cos + rotate_half(x)·sin; or of two halves, Concat(a·cos − b·sin, b·cos + a·sin)."""
    makers = _makers(node.inputs)
    if len(makers) != 2 or len(node.inputs) != 2:
        return None
    return _whole(node, makers) if node.op == "Add" else _halves(node, makers)


def _whole(node: Node, makers: list[Node]) -> Pattern | None:
    if any(maker.op != "Mul" for maker in makers):
        return None
    for plain, turned in (makers, makers[::-1]):
        for x in plain.inputs:
            for half in turned.inputs:
                rotated = _rotation(half, x)
                if rotated:
                    return Pattern("rotary", (*rotated, plain, turned, node), x, node.outputs[0])
    return None


def _rotation(half: gs.Tensor, x: gs.Tensor) -> list[Node] | None:
    """The nodes of rotate_half(x) = Concat(−x₂, x₁)."""
    concat = producer(half)
    if concat is None or concat.op != "Concat" or len(concat.inputs) != 2:
        return None
    minus, first = producer(concat.inputs[0]), producer(concat.inputs[1])
    if minus is None or first is None or minus.op != "Neg":
        return None
    parts = _makers([concat.inputs[1], minus.inputs[0]])
    if len(parts) < 2 or any(n.op not in ("Slice", "Split") or n.inputs[0] is not x for n in parts):
        return None
    return list({id(n): n for n in (*parts, minus, concat)}.values())


def _halves(node: Node, makers: list[Node]) -> Pattern | None:
    minus, plus = makers
    if minus.op != "Sub" or plus.op != "Add":
        return None
    products = _makers([*minus.inputs, *plus.inputs])
    if len(products) < 4 or any(product.op != "Mul" for product in products):
        return None
    factors = [{id(t) for t in product.inputs} for product in products]
    a_cos, b_sin, *others = factors
    for one, two in (others, others[::-1]):  # of a·cos, b·sin, a·sin, b·cos each pair shares one
        pairs = ((a_cos, one), (a_cos, two), (b_sin, one), (b_sin, two))
        if all(len(p & q) == 1 for p, q in pairs) and not a_cos & b_sin and not one & two:
            nodes = (*products, minus, plus, node)
            splits = [n for n in _makers(products[0].inputs) if n.op == "Split"]
            x = (splits[0] if splits else products[0]).inputs[0]
            return Pattern("rotary", (*splits, *nodes), x, node.outputs[0])
    return None


def _makers(tensors: Iterable[gs.Tensor]) -> list[Node]:
    """The nodes that make tensors, of those that some node makes."""
    return [maker for tensor in tensors if (maker := producer(tensor)) is not None]
