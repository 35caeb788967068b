"""What float operators do after an integer product, done by fewer of them, or by the product.

    MatMulIntegerToFloat(a, b, s_a, s_b, z_a, z_b, c) = s_a s_b (a − z_a)(b − z_b) + c

1. A scalar that divides or multiplies the product goes into s_a, as attention's 1/√d does.
2. A vector that is added along its last axis becomes c, (N,).
3. GELU by Erf becomes one Gelu. Where `normalize` has left its half to the next weights,
   x(1 + erf(x/√2)) = 2·Gelu(x), exact to the bit: the 2 goes into the constant that follows,
   Q(2y; s) = Q(y; s/2). Where none does, GELU stays: a Mul by 2 takes what the fusion saves.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.graph.attention import Pattern
from onnxq.graph.patterns import find
from onnxq.target import Target

PRODUCT, GELU = "MatMulIntegerToFloat", "Gelu"
_B, _SCALE = 1, 2  # inputs of the product; its bias is the seventh
_INPUTS = 6
_WITHOUT_HALF = 4  # nodes of x(1 + erf(x/√2))


def fuse_epilogues(graph: Graph, target: Target) -> int:
    """Fold what follows products, and write GELU as one operator; the number of folds."""
    maker, changes = g.Maker(graph), 0
    for body in g.subgraphs(graph):
        for product in [n for n in body.nodes if n.op == PRODUCT and n.domain == g.CONTRIB]:
            while _fold_scalar(body, product, maker):
                changes += 1
            changes += _fold_bias(body, product)
    if GELU in target.integer_operators:
        changes += sum(_fuse_gelu(graph, p, maker) for p in find(graph) if p.kind == "gelu")
    return changes


# ── into the product ─────────────────────────────────────────────────────────────────────────────


def _fold_scalar(body: Graph, product: Node, maker: g.Maker) -> bool:
    reader, number = _constant_step(body, product, ("Mul", "Div"))
    scale = product.inputs[_SCALE]
    if reader is None or number is None or not g.is_constant(scale):
        return False
    if len(product.inputs) > _INPUTS or number.size != 1 or number.ndim > 1:
        return False
    factor = np.float64(number.reshape(()))
    old = np.asarray(g.values(scale), np.float64)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        new = (old / factor if reader.op == "Div" else old * factor).astype(np.float32)
    if not np.all(np.isfinite(new)) or np.any(np.abs(new) < np.finfo(np.float32).tiny):
        return False
    product.inputs[_SCALE] = g.constant(maker.name(f"{product.name}_scale"), new)
    _absorb(body, product, reader)
    return True


def _fold_bias(body: Graph, product: Node) -> bool:
    reader, values = _constant_step(body, product, ("Add",))
    columns = product.inputs[_B].shape
    if reader is None or values is None or not columns:
        return False
    if len(product.inputs) > _INPUTS or values.shape != (columns[-1],):
        return False
    product.inputs.append(next(t for t in reader.inputs if g.is_constant(t)))
    _absorb(body, product, reader)
    return True


def _constant_step(
    body: Graph, product: Node, ops: tuple[str, ...]
) -> tuple[Node | None, g.Array | None]:
    """The one reader of a product, and the float32 constant that is its other operand."""
    result = product.outputs[0]
    reader = g.sole_consumer(body, result)
    if reader is None or reader.op not in ops or not g.is_standard(reader):
        return None, None
    if not g.owns(body, reader) or (reader.op == "Div" and reader.inputs[0] is not result):
        return None, None
    other = [t for t in reader.inputs if t is not result]
    if len(other) != 1 or not g.is_constant(other[0]) or other[0].dtype != np.float32:
        return None, None
    return reader, g.values(other[0])


def _absorb(body: Graph, product: Node, reader: Node) -> None:
    """The product makes what its reader made."""
    out = reader.outputs[0]
    reader.inputs.clear()
    reader.outputs.clear()
    product.outputs = [out]
    body.nodes.remove(reader)


# ── GELU ─────────────────────────────────────────────────────────────────────────────────────────


def _fuse_gelu(graph: Graph, gelu: Pattern, maker: g.Maker) -> bool:
    last = gelu.nodes[0] if len(gelu.nodes) == 1 else gelu.output.inputs[0]
    body = next(b for b in g.subgraphs(graph) if g.owns(b, last))
    numbers = [t for node in gelu.nodes for t in node.inputs if g.is_constant(t)]
    if not any(node.op == "Erf" for node in gelu.nodes) or not _is_closed(body, gelu):
        return False
    if any(number.dtype != np.float32 for number in numbers):
        return False
    if len(gelu.nodes) == _WITHOUT_HALF and not _double(body, gelu.output, maker):
        return False
    for node in gelu.nodes:
        if node is not last:
            node.inputs.clear()
            node.outputs.clear()
            body.nodes.remove(node)
    last.op, last.domain, last.attrs, last.inputs = GELU, g.CONTRIB, {}, [gelu.input]
    return True


def _double(body: Graph, tensor: gs.Tensor, maker: g.Maker) -> bool:
    """Have all readers of y read it as 2y, by constants of theirs; False where one has none."""
    steps = [_constant_of(reader) for reader in tensor.outputs]
    if g.is_output(body, tensor) or not steps or None in steps:
        return False
    for reader, slot, factor in filter(None, steps):
        constant = reader.inputs[slot]
        scaled = np.asarray(g.values(constant) * np.float32(factor), np.float32)
        reader.inputs[slot] = g.constant(maker.name(f"{constant.name}_of_gelu"), scaled)
    return True


def _is_closed(body: Graph, gelu: Pattern) -> bool:
    """Whether all stands in one body, and nothing else reads what is made on the way."""
    own = {id(node) for node in gelu.nodes}
    made = [t for node in gelu.nodes for t in node.outputs if t is not gelu.output]
    return all(g.owns(body, node) for node in gelu.nodes) and not any(
        g.is_output(body, t) or any(id(reader) not in own for reader in t.outputs) for t in made
    )


def _constant_of(reader: Node) -> tuple[Node, int, float] | None:
    """The constant in which a reader of 2y can have the 2: its slot, and what becomes of it.

    A QuantizeLinear halves its scale; a Mul by a constant, as SmoothQuant writes it, doubles that.
    """
    if not g.is_standard(reader) or reader.op not in ("QuantizeLinear", "Mul"):
        return None
    slots = [1] if reader.op == "QuantizeLinear" else [0, 1]
    found = [k for k in slots if g.is_constant(reader.inputs[k])]
    if not found or reader.inputs[found[0]].dtype != np.float32:
        return None
    return reader, found[0], 0.5 if reader.op == "QuantizeLinear" else 2.0
