"""What a tensor is computed from, as one hash: equal hashes, equal values on equal inputs.

    H(input) = its name        H(constant) = its content
    H(output i of a node) = hash(operator, attributes, H of its inputs, i)

Names of nodes and of inner tensors do not count, and neither does what else stands in the graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.storage import ExternalValues

_contents: dict[int, tuple[Any, str]] = {}  # id of values → a reference to them, their hash


def digests(graph: g.Graph) -> dict[str, str]:
    """The hash of every tensor of a sorted graph by name, those of bodies included."""
    found = {t.name: _hash("input", t.name) for t in graph.inputs}
    _walk(graph, found, dict(found), "")
    return found


def _walk(graph: g.Graph, found: dict[str, str], scope: dict[str, str], place: str) -> None:
    """`scope` maps the names that can be read here; it grows by those made here.

    `place` tells a body from others: the same node in another branch runs on other samples.
    """
    for node in graph.nodes:
        inputs = [_of(tensor, scope) for tensor in node.inputs]
        inner = [(key, body) for key, body in node.attrs.items() if isinstance(body, gs.Graph)]
        own = _hash(place, node.op, node.domain or "", _attributes(node), *inputs)
        for key, body in inner:  # what the bodies compute, whatever their inputs are
            own = _hash(own, key, *_outputs(body, scope, key))
        for key, body in inner:  # what their tensors are, now that all they depend on is known
            given = {t.name: _hash(own, key, str(i)) for i, t in enumerate(body.inputs)}
            found |= given
            _walk(body, found, scope | given, _hash(own, key))
        for number, tensor in enumerate(node.outputs):
            if tensor.name:
                found[tensor.name] = scope[tensor.name] = _hash(own, str(number))


def _outputs(body: g.Graph, scope: Mapping[str, str], key: str) -> list[str]:
    own = {**scope, **{t.name: _hash(key, str(i)) for i, t in enumerate(body.inputs)}}
    _walk(body, {}, own, key)
    return [_of(tensor, own) for tensor in body.outputs]


def _of(tensor: gs.Tensor, scope: Mapping[str, str]) -> str:
    if g.is_constant(tensor):
        return content(tensor)
    return scope.get(tensor.name, "") if tensor.name else "none"


def _attributes(node: g.Node) -> str:
    return repr(sorted((k, _text(v)) for k, v in node.attrs.items() if not isinstance(v, gs.Graph)))


def _text(value: Any) -> str:
    if isinstance(value, gs.Constant):
        return content(value)
    if isinstance(value, onnx.TensorProto):
        return hashlib.sha256(value.SerializeToString(deterministic=True)).hexdigest()
    return repr(value)


def content(tensor: gs.Constant) -> str:
    """The hash of a constant's type, shape and values, made once for each array.

    Values in an external file stand for themselves by the file's path, time and size: to read
    gigabytes would take longer than what the hash is there to spare.
    """
    held = tensor._values
    seen = _contents.get(id(held))
    if seen is not None and seen[0]() is held:
        return seen[1]
    sha = hashlib.sha256(repr((str(g.dtype(tensor)), tuple(tensor.shape))).encode())
    if isinstance(held, ExternalValues):
        where, status = held.extent, held.extent.path.stat()
        place = (str(where.path.resolve()), where.offset, where.length)
        sha.update(repr((*place, status.st_mtime_ns, status.st_size)).encode())
    elif isinstance(held, gs.ir.tensor.LazyValues) and held.tensor.raw_data:
        sha.update(held.tensor.raw_data)
    else:
        array = g.values(tensor)
        strings = array.dtype.kind in "OUS"  # whose bytes are addresses
        sha.update(repr(array.tolist()).encode() if strings else array.tobytes())
    with contextlib.suppress(TypeError):  # of values that nothing could tell the end of
        _contents[id(held)] = weakref.ref(held), sha.hexdigest()
    return sha.hexdigest()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
