"""Compute in float32, the type that integer kernels take their scales in.

float16 and bfloat16 are subsets of float32, so a model of either type means the same when it is
computed in float32, but for roundings that it is spared. All of it changes; only the model's own
inputs and outputs keep their types, behind a Cast, and so does what a custom operator reads and
makes. A model in float64 may need its precision elsewhere: there only layers with weights change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.graph import Graph, Node
from onnxq.pipeline import Context, Pass

_NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_NARROW_CODES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_TYPE_ATTRIBUTES = ("to", "dtype")
_FLOAT = int(onnx.TensorProto.FLOAT)
_KNOWN_DOMAINS = ("com.microsoft", "ai.onnx.ml")  # their operators take float32 as well


@dataclass(frozen=True)
class Widen(Pass):
    """float16 and bfloat16 to float32 inside the model; float64 around layers with weights."""

    name: ClassVar[str] = "widen"

    def apply(self, graph: Graph, ctx: Context) -> int:
        bodies = list(g.subgraphs(graph))
        if not any(_concerns(body) for body in bodies):
            return 0
        maker, changes = g.Maker(graph), 0
        g.infer_types(graph)
        casts = {
            id(node) for body in bodies for node in body.nodes
            if _is_cast(node) and not g.is_idle_cast(node)
        }  # fmt: skip
        for body in bodies:
            changes += _custom_operators(body, maker)
        changes += _inputs(graph, maker) + _outputs(graph, maker)
        kept = {id(t) for t in (*graph.inputs, *graph.outputs)} | _custom_tensors(bodies)
        for body in bodies:
            changes += _types(body, kept)
        for body in bodies:
            for node in list(body.nodes):
                changes += _layer_in_double(body, node, maker)
                # Not left to the runtime: 1.31 loses tensors that bodies read behind such a Cast.
                if id(node) in casts and g.is_idle_cast(node):
                    changes += g.bypass(body, node)
        if changes:
            g.tidy(graph)
        return changes


def _concerns(body: Graph) -> bool:
    """Whether anything in a body is of another floating-point type than float32."""
    others = (*_NARROW, np.dtype(np.float64))
    kinds = {g.dtype(tensor) for tensor in body.tensors().values()}
    if any(kind is not None and kind in others for kind in kinds):  # NumPy's None is float64
        return True
    return any(n.attrs.get(key) in _NARROW_CODES for n in body.nodes for key in _TYPE_ATTRIBUTES)


def _is_narrow(tensor: gs.Tensor) -> bool:
    return g.dtype(tensor) in _NARROW


def _cast(body: Graph, x: gs.Tensor, to: int, maker: g.Maker) -> gs.Variable:
    out = maker.emit(body, "Cast", [x], x.name, to=to)
    out.dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to))
    return out


def _code(tensor: gs.Tensor) -> int:
    kind = g.dtype(tensor)
    assert kind is not None
    return int(onnx.helper.np_dtype_to_tensor_dtype(kind))


def _is_custom(node: Node) -> bool:
    return not g.is_standard(node) and node.domain not in _KNOWN_DOMAINS


def _is_cast(node: Node | None) -> bool:
    return node is not None and node.op == "Cast"


def _is_made_for_custom(tensor: gs.Tensor) -> bool:
    """Whether a Cast makes a tensor that nothing reads in float32."""
    return _is_cast(g.producer(tensor)) and all(
        _is_custom(r) or _is_cast(r) for r in tensor.outputs
    )


def _custom_tensors(bodies: list[Graph]) -> set[int]:
    """What custom operators read and make, which keeps its type."""
    return {
        id(t) for body in bodies for node in body.nodes if _is_custom(node)
        for t in (*node.inputs, *node.outputs)
    }  # fmt: skip


def _custom_operators(body: Graph, maker: g.Maker) -> int:
    """A Cast before each narrow input of a custom operator, and one after each narrow output."""
    changes = 0
    for node in [n for n in body.nodes if _is_custom(n)]:
        for slot, tensor in enumerate(node.inputs):
            if tensor.name and _is_narrow(tensor) and not _is_made_for_custom(tensor):
                node.inputs[slot] = _cast(body, tensor, _code(tensor), maker)
                changes += 1
        for tensor in node.outputs:
            changes += _read_wide(body, tensor, maker, but=_is_custom)
    return changes


def _read_wide(
    body: Graph, tensor: gs.Tensor, maker: g.Maker, but: Callable[[Node], bool] = lambda node: False
) -> int:
    """A Cast after a narrow tensor for all its readers, but Casts and those that `but` spares."""
    readers = [r for r in tensor.outputs if not _is_cast(r) and not but(r)]
    if not _is_narrow(tensor) or not readers:
        return 0
    wide = _cast(body, tensor, _FLOAT, maker)
    for reader in readers:
        g.replace_input(reader, tensor, wide)
    return 1


def _inputs(graph: Graph, maker: g.Maker) -> int:
    """A Cast after each narrow input, and after constants that are outputs, for what reads them."""
    ends = (*graph.inputs, *filter(g.is_constant, graph.outputs))
    return sum(_read_wide(graph, tensor, maker) for tensor in ends)


def _outputs(graph: Graph, maker: g.Maker) -> int:
    """Every narrow output of the model comes out of a Cast that is there for it alone."""
    changes = 0
    for tensor in graph.outputs:
        node = g.producer(tensor)
        if not _is_narrow(tensor) or node is None or (_is_cast(node) and not tensor.outputs):
            continue
        wide = gs.Variable(maker.name(f"{tensor.name}_wide"), dtype=tensor.dtype)
        node.outputs[node.outputs.index(tensor)] = wide
        for reader in list(tensor.outputs):
            g.replace_input(reader, tensor, wide)
        name = maker.name(f"{tensor.name}_Cast")
        graph.nodes.append(gs.Node("Cast", name, {"to": _code(tensor)}, [wide], [tensor]))
        changes += 1
    return changes


def _types(body: Graph, kept: set[int]) -> int:
    """Constants, declared types and the attributes that name a type."""
    changes = 0
    for tensor in (*body.tensors().values(), *body.inputs, *body.outputs):
        if id(tensor) not in kept and _is_narrow(tensor):
            changes += 1
            if g.is_constant(tensor):
                _make_wide(tensor)
            else:
                tensor.dtype = np.dtype(np.float32)
    for node in body.nodes:
        if _is_custom(node) or any(id(t) in kept for t in node.outputs):
            continue
        for key, value in node.attrs.items():
            if key in _TYPE_ATTRIBUTES and value in _NARROW_CODES:
                node.attrs[key] = _FLOAT
                changes += 1
            elif g.is_constant(value) and _is_narrow(value):
                _make_wide(value)
                changes += 1
    return changes


def _make_wide(tensor: gs.Constant) -> None:
    g.set_values(tensor, g.values(tensor).astype(np.float32))


def _layer_in_double(body: Graph, node: Node, maker: g.Maker) -> int:
    """A layer with float64 weights, but an embedding, becomes float32 between Casts."""
    double = np.dtype(np.float64)
    views = g.weight_views(node)
    if node.op == "Gather" or not any(g.dtype(view.tensor) == double for view in views):
        return 0
    for slot, tensor in enumerate(node.inputs):
        if g.is_constant(tensor) and g.dtype(tensor) == double:
            values = g.values(tensor).astype(np.float32)
            node.inputs[slot] = maker.constant(f"{tensor.name}_float32", values)
        elif slot == 4 and node.op in g.RECURRENT:
            continue  # lengths, which are integers
        elif tensor.name and g.dtype(tensor) in (double, None) and not g.is_constant(tensor):
            node.inputs[slot] = _cast(body, tensor, _FLOAT, maker)
    for slot, tensor in enumerate(node.outputs):
        if tensor.name:
            single = gs.Variable(maker.name(f"{tensor.name}_float32"), dtype=np.dtype(np.float32))
            node.outputs[slot] = single
            name, to = maker.name(f"{tensor.name}_Cast"), {"to": int(onnx.TensorProto.DOUBLE)}
            body.nodes.append(gs.Node("Cast", name, to, [single], [tensor]))
    return 1
