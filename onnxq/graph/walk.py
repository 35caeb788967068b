"""The graph type, and what can be asked of its nodes and tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.logger import G_LOGGER

Array = NDArray[Any]
Graph: TypeAlias = gs.Graph
Node: TypeAlias = gs.Node

G_LOGGER.severity = G_LOGGER.ERROR  # its warnings are of no use to whoever reads ours
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
RANDOM = (
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial",
    "Bernoulli",
)  # fmt: skip
_STANDARD_DOMAINS = (None, "", "ai.onnx")
CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators


def subgraphs(graph: Graph) -> Iterator[Graph]:
    """The graph and every If, Loop and Scan body inside it, outermost first."""
    yield graph
    for node in graph.nodes:
        for body in bodies(node):
            yield from subgraphs(body)


def bodies(node: Node) -> list[Graph]:
    """The graphs inside a control-flow node, one level deep."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def hidden(graph: Graph, in_scan: bool = False) -> Iterator[Graph]:
    """Bodies inside the body of a Scan, whose tensors cannot be brought out (see `Tap`)."""
    for node in graph.nodes:
        for body in bodies(node):
            if in_scan:
                yield from subgraphs(body)
            else:
                yield from hidden(body, node.op == "Scan")


def walk(graph: Graph) -> Iterator[Node]:
    """Every node, bodies of control flow included, in order."""
    for inner in subgraphs(graph):
        yield from inner.nodes


def constants(graph: Graph) -> Iterator[gs.Constant]:
    """Every initializer that some node reads, each once."""
    seen: set[int] = set()
    for node in walk(graph):
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def tensors(graph: Graph) -> dict[str, gs.Tensor]:
    """Every tensor by name, those of bodies included."""
    found: dict[str, gs.Tensor] = {}
    for body in subgraphs(graph):
        found = body.tensors() | found
    return found


def is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


def dtype(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """A tensor's element type; ml_dtypes' where NumPy has none, None where it is unknown."""
    if isinstance(tensor.dtype, int):
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype))
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


def is_float(tensor: gs.Tensor) -> bool:
    """float16, float32, float64 or bfloat16."""
    kind = dtype(tensor)
    return kind is not None and (kind.kind == "f" or kind.name == "bfloat16")


def values(tensor: gs.Constant) -> Array:
    """The values of an initializer, read now and kept by nobody; not to be written to."""
    held = tensor._values
    if not isinstance(held, gs.ir.tensor.LazyValues):
        return np.asarray(tensor.values)
    proto = held.tensor
    kind = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    if (
        proto.raw_data and kind.kind in "fiu" and sys.byteorder == "little"
    ):  # no copy, let alone two
        return np.frombuffer(proto.raw_data, kind).reshape(proto.dims)
    return np.asarray(held.load())


def values_id(tensor: gs.Constant) -> int:
    """The same for initializers that share their values, as those of a graph and its bodies do."""
    return id(tensor._values)


def is_standard(node: Node) -> bool:
    return node.domain in _STANDARD_DOMAINS


def is_idle_cast(node: Node) -> bool:
    """A Cast to the type that its input has."""
    if node.op != "Cast" or not is_standard(node):
        return False
    kind = dtype(node.inputs[0])
    return kind is not None and onnx.helper.np_dtype_to_tensor_dtype(kind) == node.attrs["to"]


def producer(tensor: gs.Tensor) -> Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def owns(graph: Graph, node: Node) -> bool:
    """Whether a node stands in this very graph, not in a body or in what encloses it."""
    return any(node is own for own in graph.nodes)


def is_output(graph: Graph, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in graph.outputs)


def sole_consumer(graph: Graph, tensor: gs.Tensor) -> Node | None:
    """The one node that reads a tensor, or None when several do or the world does."""
    if is_output(graph, tensor) or len(tensor.outputs) != 1:
        return None
    return tensor.outputs[0]
