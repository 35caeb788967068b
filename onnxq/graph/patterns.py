"""What transformers are made of, recognised in the forms in which exporters write it.

    layernorm   (x − E x) / √(Var x + ε) · γ + β         Ba et al. 2016
    rmsnorm     x / √(E x² + ε) · γ                      Zhang & Sennrich 2019
    gelu        x Φ(x), by Erf, Tanh or x·σ(1.702 x)     Hendrycks & Gimpel 2016
    silu        x σ(x)
    attention   softmax(Q Kᵀ / √d + mask) V              Vaswani et al. 2017
    rotary      x · cos + rotate_half(x) · sin           Su et al. 2021

Each form is an expression, and a node matches if the expression that ends in it does: operands of
Add and Mul in either order, constants by value, a letter the same tensor wherever it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.attention import Kind, Pattern, attention, rotary
from onnxq.graph.walk import (
    Graph,
    Node,
    is_constant,
    is_standard,
    producer,
    subgraphs,
    values,
)
from onnxq.graph.weights import weight_view

Term = tuple["str | float | Term", ...]

# The forms: (operator, operand, ...). A number is a constant of that value, a lower-case letter any
# tensor, `c` a constant, `gain` and `bias` a constant that may also be missing with its operator.
_MEAN: Term = ("ReduceMean", "x")
_CENTRED: Term = ("Sub", "x", _MEAN)
_SQUARES: tuple[Term, ...] = (("Pow", "a", 2.0), ("Mul", "a", "a"))


def _normed(of: str | Term) -> list[Term]:
    """of / √(E of² + ε), in all the ways to divide."""
    made: list[Term] = []
    for square in _SQUARES:
        power = tuple(of if part == "a" else part for part in square)
        root: Term = ("Sqrt", ("Add", ("ReduceMean", power), "c"))
        made += [
            ("Div", of, root),
            ("Mul", of, ("Reciprocal", root)),
            ("Mul", of, ("Div", 1.0, root)),
        ]
        made.append(("Mul", of, ("Pow", ("Add", ("ReduceMean", power), "c"), -0.5)))
    return made


_ERF: list[Term] = [
    ("Erf", ("Div", "x", math.sqrt(2))),
    ("Erf", ("Mul", "x", 1 / math.sqrt(2))),
]
_CUBES: list[Term] = [
    ("Pow", "x", 3.0),
    ("Mul", ("Mul", "x", "x"), "x"),
]
_TANH: list[Term] = [
    ("Tanh", ("Mul", ("Add", "x", ("Mul", cube, 0.044715)), math.sqrt(2 / math.pi)))
    for cube in _CUBES
] + [("Tanh", ("Mul", ("Mul", "x", math.sqrt(2 / math.pi)),
               ("Add", ("Mul", ("Mul", "x", "x"), 0.044715), 1.0)))]  # fmt: skip
_FORMS: list[tuple[Kind, Term]] = [
    *[("layernorm", form) for form in _normed(_CENTRED)],
    *[("rmsnorm", form) for form in _normed("x")],
    *[
        ("gelu", form)
        for inner in (*_ERF, *_TANH)
        for form in (
            ("Mul", ("Mul", "x", ("Add", inner, 1.0)), 0.5),
            ("Mul", ("Mul", "x", 0.5), ("Add", inner, 1.0)),
            ("Mul", "x", ("Mul", ("Add", inner, 1.0), 0.5)),
            ("Mul", "x", ("Add", ("Mul", inner, 0.5), 0.5)),
            ("Mul", "x", ("Add", inner, 1.0)),  # the half is in the next layer's weights
        )
    ],
    ("gelu", ("Mul", "x", ("Sigmoid", ("Mul", "x", 1.702)))),
    ("silu", ("Mul", "x", ("Sigmoid", "x"))),
]  # fmt: skip
_FUSED: dict[str, Kind] = {
    "LayerNormalization": "layernorm",
    "SkipLayerNormalization": "layernorm",
    "SimplifiedLayerNormalization": "rmsnorm",
    "SkipSimplifiedLayerNormalization": "rmsnorm",
    "RMSNormalization": "rmsnorm",
    "Gelu": "gelu",
    "FastGelu": "gelu",
    "QuickGelu": "gelu",
    "Swish": "silu",
    "Attention": "attention",
    "MultiHeadAttention": "attention",
    "RotaryEmbedding": "rotary",
}


def find(graph: Graph) -> list[Pattern]:
    """Every pattern of a graph and its bodies, each node in one at most, larger ones first."""
    taken: set[int] = set()
    found: list[Pattern] = []
    for body in subgraphs(graph):
        for pattern in _matches(body):
            if not any(id(node) in taken for node in pattern.nodes):
                taken |= {id(node) for node in pattern.nodes}
                found.append(pattern)
    return found


def projections(patterns: list[Pattern]) -> set[str]:
    """Names of the layers that make what attention reads, and of those that read its output."""
    names: set[str] = set()
    for pattern in patterns:
        if pattern.kind == "attention":
            own = {id(node) for node in pattern.nodes}
            outside = [
                maker
                for node in pattern.nodes
                for tensor in node.inputs
                if (maker := producer(tensor)) is not None and id(maker) not in own
            ]
            names |= _first_layers(outside, up=True)
            names |= _first_layers(list(pattern.output.outputs), up=False)
    return names


def _first_layers(nodes: list[Node], up: bool) -> set[str]:
    """Names of the first operators with weights on every way, up or down the graph."""
    found: set[str] = set()
    seen: set[int] = set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in ("MatMul", "Gemm") and weight_view(node) is not None:
            found.add(node.name)
        elif up:
            nodes += [maker for t in node.inputs if (maker := producer(t)) is not None]
        else:
            nodes += [reader for t in node.outputs for reader in t.outputs]
    return found


def inside(patterns: list[Pattern]) -> dict[str, Kind]:
    """Node name → kind, of every node in a pattern but MatMul, which stays a layer of its own."""
    return {
        node.name: pattern.kind
        for pattern in patterns
        for node in pattern.nodes
        if node.op != "MatMul"
    }


def _matches(body: Graph) -> Iterator[Pattern]:
    nodes = list(body.nodes)
    for node in nodes:
        if node.op in _FUSED and (is_standard(node) or node.domain == "com.microsoft"):
            yield _fused(node)
    for kind, form in _FORMS:
        for node in nodes:
            if node.op == form[0]:
                for match in _match_node(node, form, _Match()):
                    yield _expression(kind, node, match)
                    break
    for node in nodes:
        if node.op == "Softmax" and is_standard(node) and (made := attention(node)):
            yield made
    for node in nodes:
        if node.op in ("Add", "Concat") and is_standard(node) and (turn := rotary(node)):
            yield turn


# ── expressions ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Match:
    parts: tuple[tuple[Node, Term], ...] = ()  # each node and the term that it matches
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)


def _match_node(node: Node, form: Term, so_far: _Match) -> Iterator[_Match]:
    """All ways in which a node is the root of a form."""
    operands = form[1:]
    if node.op != form[0] or not is_standard(node) or not node.outputs:
        return
    inputs = list(node.inputs)[: len(operands)]
    orders = [inputs, inputs[::-1]] if node.op in ("Add", "Mul") else [inputs]
    for order in orders:
        if len(order) == len(operands):
            begun = _Match((*so_far.parts, (node, form)), so_far.tensors)
            yield from _match_operands(order, operands, begun)


def _match_operands(
    tensors: list[gs.Tensor], terms: tuple[str | float | Term, ...], so_far: _Match
) -> Iterator[_Match]:
    if not terms:
        yield so_far
        return
    for match in _match_term(tensors[0], terms[0], so_far):
        yield from _match_operands(tensors[1:], terms[1:], match)


def _match_term(tensor: gs.Tensor, term: str | float | Term, so_far: _Match) -> Iterator[_Match]:
    if isinstance(term, float):
        if is_constant(tensor) and math.prod(tensor.shape) == 1:
            value = float(np.asarray(values(tensor)).reshape(()))
            if math.isclose(value, term, rel_tol=1e-3):
                yield so_far
    elif isinstance(term, str):
        known = so_far.tensors.get(term)
        if term == "c" and is_constant(tensor):
            yield so_far
        elif term != "c" and known is None and not is_constant(tensor):
            yield _Match(so_far.parts, so_far.tensors | {term: tensor})
        elif known is tensor:
            yield so_far
    else:
        node = producer(tensor)
        if node is not None and any(node is n and term == t for n, t in so_far.parts):
            yield so_far  # a shared part, as x − E x is
        elif node is not None:
            yield from _match_node(node, term, so_far)


def _expression(kind: Kind, node: Node, match: _Match) -> Pattern:
    """The pattern with the gain and bias that follow a normalization."""
    nodes, x = [part for part, _ in match.parts], match.tensors["x"]
    gain = bias = None
    out = node.outputs[0]
    if kind in ("layernorm", "rmsnorm"):
        out, gain = _followed(out, "Mul", nodes)
        out, bias = _followed(out, "Add", nodes) if gain is not None else (out, None)
    return Pattern(kind, tuple(nodes), x, out, gain, bias)


def _followed(out: gs.Tensor, op: str, nodes: list[Node]) -> tuple[gs.Tensor, gs.Constant | None]:
    """What the one reader of a tensor makes of it with a vector, and the vector."""
    if len(out.outputs) == 1 and out.outputs[0].op == op and is_standard(out.outputs[0]):
        reader = out.outputs[0]
        for other in reader.inputs:
            if is_constant(other) and len(other.shape) == 1:
                nodes.append(reader)
                return reader.outputs[0], other
    return out, None


def _fused(node: Node) -> Pattern:
    kind = _FUSED[node.op]
    skip = node.op.startswith("Skip")
    slots = (2, 3) if skip else (1, 2)
    constants = [
        node.inputs[slot] if slot < len(node.inputs) and is_constant(node.inputs[slot]) else None
        for slot in slots
    ]
    gain, bias = constants if kind in ("layernorm", "rmsnorm") else (None, None)
    return Pattern(kind, (node,), node.inputs[0], node.outputs[0], gain, bias)
