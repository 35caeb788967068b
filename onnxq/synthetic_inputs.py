"""What made-up samples of every kind share: the inputs, and what fills those that are no data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

from onnxq.errors import OnnxqError, one_line
from onnxq.feeds import Feed
from onnxq.runtime import Session

SAME_VALUE = {"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}

_INTEGER_TYPES = {TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8}


class Input(NamedTuple):
    """As the runtime declares it; a dimension is a size, a symbol or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    state: bool = False
    constant: int | None = None  # what the graph compares it with

    def sized(self, batch: int, other: int) -> tuple[int, ...]:
        """The shape with the open dimensions filled in."""
        return tuple(
            dim if isinstance(dim, int) else batch if i == 0 or "batch" in str(dim) else other
            for i, dim in enumerate(self.shape)
        )

    def is_a(self, *words: str) -> bool:
        return any(word in self.name.lower() for word in words)

    @property
    def is_state(self) -> bool:
        return (
            self.state
            or self.is_a("cache", "past")
            or (self.is_a("state") and not self.is_a("encoder"))
        )


def open_session(model: onnx.ModelProto, path: Path | None) -> ort.InferenceSession:
    try:
        return Session(path or model).ort
    except OnnxqError as error:
        raise OnnxqError(
            f"{error} (samples cannot be made up with it; --data gives real ones)"
        ) from None


def run(session: ort.InferenceSession, feed: Feed) -> list[Any]:
    try:
        return list(session.run(None, feed))
    except Exception as error:
        raise impossible(error) from error


def impossible(error: Exception) -> OnnxqError:
    reason = one_line(error)[:300]
    return OnnxqError(f"samples cannot be made up for this model ({reason}); give --data")


def declared(value: ort.NodeArg, model: onnx.ModelProto, states: Collection[str] = ()) -> Input:
    names = {"float": "float32", "double": "float64"}
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    try:
        found = Input(
            value.name, np.dtype(names.get(kind, kind)), tuple(value.shape), value.name in states
        )
    except TypeError:
        reason = TypeError(f"input {value.name!r} is a {value.type}")
        raise impossible(reason) from None
    if found.dtype.kind in "iu" and all(dim == 1 for dim in found.shape):
        return found._replace(constant=compared_with(model.graph, value.name))
    return found


def compared_with(
    graph: onnx.GraphProto, name: str, outer: Mapping[str, onnx.TensorProto] | None = None
) -> int | None:
    """The first integer that the graph or a body in it compares `name` with by Equal."""
    constants = {**(outer or {}), **_integers(graph)}
    same = {name}
    for node in graph.node:
        if node.op_type in SAME_VALUE and node.input[0] in same:
            same.add(node.output[0])
        if node.op_type == "Equal" and same & set(node.input):
            for other in set(node.input) & set(constants):
                return int(onnx.numpy_helper.to_array(constants[other]).ravel()[0])
        for attribute in node.attribute:
            for alias in sorted(same):
                found = compared_with(attribute.g, alias, constants)
                if found is not None:
                    return found
    return None


def _integers(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Constants of one value, by name: initializers, and values of Constant nodes."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute:
            value = node.attribute[0]
            if value.name == "value":
                found[node.output[0]] = value.t
            elif value.name in ("value_int", "value_ints"):
                numbers = np.array(value.ints or [value.i], np.int64)
                found[node.output[0]] = onnx.numpy_helper.from_array(numbers)
    return {
        name: tensor
        for name, tensor in found.items()
        if tensor.data_type in _INTEGER_TYPES
        and not uses_external_data(tensor)
        and all(dim == 1 for dim in tensor.dims)
    }


def filled(i: Input, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """What an input gets that is neither image nor token ids."""
    if i.is_state:
        return np.zeros(shape, i.dtype)
    if i.dtype.kind == "b" or i.is_a("mask"):
        return np.ones(shape, i.dtype)
    if i.is_a("position") and i.dtype.kind in "iu" and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=i.dtype), shape).copy()
    if i.dtype.kind in "iu":
        return np.full(shape, i.constant or 0, i.dtype)
    return np.asarray(rng.standard_normal(shape)).astype(i.dtype)
