"""The tensors of a model file, wherever they stand, and the data files that hold some of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
)

from onnxq.errors import OnnxqError

_NARROW = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}  # bits of one number
_BITS = {number: _NARROW[name] for name, number in TensorProto.DataType.items() if name in _NARROW}


_LARGEST_DENSE = 1 << 31  # bytes of a sparse tensor written out


def every_node(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those of the bodies of If, Loop and Scan among them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in bodies(attribute):
                yield from every_node(body.node)


def bodies(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The model's graph and every body in it."""
    yield model.graph
    for attribute in _attributes(model):
        yield from bodies(attribute)


def initializers(model: ModelProto) -> Iterator[TensorProto]:
    """Of the graph and of every body in it."""
    for graph in graphs(model):
        yield from graph.initializer


def other_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """What is no initializer: attributes, such as a Constant's value, and sparse tensors."""
    sparse = [tensor for graph in graphs(model) for tensor in graph.sparse_initializer]
    for attribute in _attributes(model):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            sparse.append(attribute.sparse_tensor)
        sparse += attribute.sparse_tensors
    for tensor in sparse:
        yield tensor.values
        yield tensor.indices


def _attributes(model: ModelProto) -> Iterator[AttributeProto]:
    for scope in (model.graph, *model.functions):
        for node in every_node(scope.node):
            yield from node.attribute
    for function in model.functions:
        yield from function.attribute_proto


def is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def nbytes(tensor: TensorProto) -> int:
    """Bytes that the tensor's dimensions and type ask for, packed as in a file.

    Raises OnnxqError where they ask for none that can be: an unknown type, a negative size.
    """
    if any(dim < 0 for dim in tensor.dims):
        raise OnnxqError(f"tensor {tensor.name!r} has a negative size: {list(tensor.dims)}")
    try:
        bits = _BITS.get(tensor.data_type) or 8 * numpy_dtype(tensor).itemsize
    except KeyError:
        raise OnnxqError(
            f"tensor {tensor.name!r} has the unknown type {tensor.data_type}"
        ) from None
    return (math.prod(tensor.dims) * bits + 7) // 8


def numpy_dtype(tensor: TensorProto) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))


@dataclass(frozen=True)
class Extent:
    """Where in which file the bytes of an external tensor are."""

    tensor: str
    path: Path
    offset: int
    length: int

    def pieces(self, size: int = 1 << 24) -> Iterator[bytes]:
        """The bytes, some at a time."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.length
            while left > 0:
                piece = file.read(min(size, left))
                if not piece:
                    raise OnnxqError(f"external data {str(self.path)!r} ends in {self.tensor!r}")
                yield piece
                left -= len(piece)

    def mapped(self) -> NDArray[np.uint8]:
        """The bytes as they are in the file, not yet read."""
        try:
            return np.memmap(self.path, np.uint8, "r", self.offset, (self.length,))
        except (OSError, ValueError) as error:
            raise OnnxqError(
                f"external data {str(self.path)!r} of {self.tensor!r} cannot be read any more "
                f"({error}); start again"
            ) from None


def extent(tensor: TensorProto, folder: Path) -> Extent:
    """Of an external tensor of a model in `folder`.

    Raises OnnxqError for a location outside the folder, a missing file, and for an offset or
    length that is no number, does not fit the tensor or lies beyond the file. Absolute locations
    are for tensors of a graph in memory: `load_proto` lets none in.
    """
    where = {entry.key: entry.value for entry in tensor.external_data}
    location = Path(where.get("location", ""))
    if not location.parts or ".." in location.parts:
        raise escapes(tensor, str(location) if location.parts else "")
    path = folder / location
    if not path.is_file():
        raise OnnxqError(
            f"external data {str(path)!r} of tensor {tensor.name!r} is missing; put it there"
        )
    if tensor.data_type == TensorProto.STRING:
        raise OnnxqError(f"tensor {tensor.name!r} holds strings, which cannot be external data")
    wanted = nbytes(tensor)
    offset, length = (_number(tensor, where, k) for k in ("offset", "length"))
    length = wanted if length is None else length
    if length != wanted:
        raise OnnxqError(
            f"external data of tensor {tensor.name!r} has {length} bytes where its shape "
            f"{list(tensor.dims)} needs {wanted}; export the model again"
        )
    size = path.stat().st_size
    if (offset or 0) + length > size:
        raise OnnxqError(
            f"external data {str(path)!r} is too short: tensor {tensor.name!r} ends at byte "
            f"{(offset or 0) + length} of {size}; the file was cut off or belongs elsewhere"
        )
    return Extent(tensor.name, path, offset or 0, length)


def escapes(tensor: TensorProto, location: str) -> OnnxqError:
    return OnnxqError(
        f"tensor {tensor.name!r} wants external data at {location!r}, outside the model's folder; "
        "refused: put the data file itself beside the model"
    )


def _number(tensor: TensorProto, where: dict[str, str], key: str) -> int | None:
    text = where.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise OnnxqError(
            f"external data of tensor {tensor.name!r} has the {key} {text[:40]!r}, which is no "
            "number of bytes; export the model again"
        )
    return int(text)


def read_in(tensor: TensorProto, folder: Path) -> None:
    """Put an external tensor's bytes into the tensor itself."""
    tensor.raw_data = b"".join(extent(tensor, folder).pieces())
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def make_dense(model: ModelProto) -> None:
    """Write sparse initializers, and Constants that hold a sparse tensor, as ordinary ones.

    Raises OnnxqError where a sparse tensor contradicts itself or is too large for that.
    """
    for graph in graphs(model):
        graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
        graph.ClearField("sparse_initializer")
    for node in every_node(model.graph.node):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.type == AttributeProto.SPARSE_TENSOR:
                attribute.t.CopyFrom(_dense(attribute.sparse_tensor))
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", AttributeProto.TENSOR


def _dense(sparse: SparseTensorProto) -> TensorProto:
    """Indices are positions in the flat tensor, (count,), or one per dimension, (count, rank)."""
    name, shape = sparse.values.name, tuple(sparse.dims)
    whole = TensorProto(name=name, data_type=sparse.values.data_type, dims=shape)
    if nbytes(whole) > _LARGEST_DENSE:
        raise OnnxqError(f"the sparse tensor {name!r} is too large; export it dense")
    try:
        indices = onnx.numpy_helper.to_array(sparse.indices)
        at = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
        values = onnx.numpy_helper.to_array(sparse.values)
        dense = np.zeros(math.prod(shape), values.dtype)
        if at.size and at.min() < 0:
            raise IndexError("a negative index")
        dense[at] = values.reshape(at.shape)
    except (ValueError, IndexError, TypeError, KeyError) as error:
        raise OnnxqError(
            f"the sparse tensor {name!r} contradicts itself ({error}); export it dense"
        ) from None
    return onnx.numpy_helper.from_array(dense.reshape(shape), name)
