"""Model files: load with external data left on disk, save so that a file is whole or not there."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import weakref
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray
from onnx import TensorProto

from onnxq import wellformed
from onnxq.errors import OnnxqError, one_line
from onnxq.scratch import scratch
from onnxq.tensors import (
    Extent,
    escapes,
    extent,
    initializers,
    is_external,
    make_dense,
    nbytes,
    numpy_dtype,
    other_tensors,
    read_in,
)

ONE_FILE_LIMIT = 1_800_000_000  # bytes; protobuf stops at 2 GiB, graph and metadata included
_PROTOBUF_LIMIT = 1 << 31
_INLINE_LIMIT = 1024  # smaller tensors stay in the model file, where shape inference can see them
_ALIGNMENT = 4096  # of a tensor in the data file, so that a runtime can memory-map it
_VALUES = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


class ExternalValues(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """Values that stay in their external data file until somebody reads them."""

    def __init__(self, tensor: TensorProto, folder: Path) -> None:
        """Raises OnnxqError where the file is missing or does not hold the tensor."""
        super().__init__(tensor)
        self.extent = extent(tensor, folder)
        self._mapped: weakref.ref[NDArray[Any]] | None = None
        for entry in tensor.external_data:  # the graph may be saved to another folder
            if entry.key == "location":
                entry.value = str(self.extent.path.absolute())

    def load(self) -> NDArray[Any]:
        if not self.extent.length:
            return np.empty(tuple(self.tensor.dims), numpy_dtype(self.tensor))
        raw = self._mapped() if self._mapped else None
        if raw is None:  # while somebody holds the file's mapping, all share it
            raw = self.extent.mapped()
            self._mapped = weakref.ref(raw)
        return self._as_tensor(raw)

    def read(self) -> NDArray[Any]:
        """The values in memory of their own, which is free again once they are dropped."""
        return self._as_tensor(np.frombuffer(b"".join(self.extent.pieces()), np.uint8))

    def _as_tensor(self, raw: NDArray[Any]) -> NDArray[Any]:
        dtype = numpy_dtype(self.tensor)
        if self.extent.length < np.prod(self.tensor.dims) * dtype.itemsize:  # packed numbers
            packed = TensorProto(dims=self.tensor.dims, data_type=self.tensor.data_type)
            packed.raw_data = raw.tobytes()
            return onnx.numpy_helper.to_array(packed)
        values = np.asarray(raw.view(dtype).reshape(tuple(self.tensor.dims)))
        return values if values.flags.aligned else values.copy()


def load_proto(path: str | Path, keep: Sequence[tuple[str, str]] = ()) -> onnx.ModelProto:
    """Read a model; external initializers stay in their files, which are checked.

    The data files must lie in the folder of the model, or in that of the file which the model is a
    link to: caches keep models as links into a folder of blobs. Where links lead elsewhere, be it
    by a folder on the way, they are refused, as ONNX Runtime does.

    Functions of the model are written out in its graph, but for those to `keep`, by domain and
    name; sparse tensors are made dense, constants of nodes that are external are read in.

    Raises OnnxqError for what is no model, and for a model that cannot mean anything.
    """
    path = Path(path)
    model = _parsed(path)
    try:
        return _prepared(model, path, keep)
    except OnnxqError as error:
        raise OnnxqError(f"{str(path)!r}: {error}") from error


def _prepared(
    model: onnx.ModelProto, path: Path, keep: Sequence[tuple[str, str]]
) -> onnx.ModelProto:
    if model.functions:
        model = _without_functions(model, keep)
    for tensor in other_tensors(model):
        if is_external(tensor):
            _contained(tensor, path)
            read_in(tensor, path.parent)
    make_dense(model)
    wellformed.check(model)
    for tensor in initializers(model):
        if is_external(tensor):
            _contained(tensor, path)
    return model


def _without_functions(model: onnx.ModelProto, keep: Sequence[tuple[str, str]]) -> onnx.ModelProto:
    """The model's own functions written out where they are called, but for those to `keep`."""
    wellformed.check_functions(model)
    try:
        return onnx.inliner.inline_selected_functions(model, list(keep), exclude=True)
    except Exception as error:
        reason = one_line(error)
        raise OnnxqError(
            f"the model's functions cannot be written out in its graph ({reason}); export it again "
            "without functions"
        ) from None


def _parsed(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise OnnxqError(f"{str(path)!r} is a folder; name the .onnx file in it")
    if not path.is_file():
        raise OnnxqError(f"there is no file {str(path)!r}")
    if path.stat().st_size >= _PROTOBUF_LIMIT:
        raise OnnxqError(f"{str(path)!r} is not an ONNX model: those are smaller than 2 GiB")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        reason = one_line(error)
        raise OnnxqError(f"{str(path)!r} is not an ONNX model, or cut off ({reason})") from None
    if not model.graph.node and not model.graph.output:
        raise OnnxqError(f"{str(path)!r} is not an ONNX model, or has an empty graph")
    wellformed.check_text(model)
    return model


def _contained(tensor: TensorProto, model: Path) -> Extent:
    """The extent of an external tensor of a model's file, if that may be read."""
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    if Path(location).is_absolute():
        raise escapes(tensor, location)
    found = extent(tensor, model.parent)
    allowed = {model.parent.resolve(), model.resolve().parent}
    if not any(found.path.resolve().is_relative_to(folder) for folder in allowed):
        raise escapes(tensor, location)
    return found


def save_proto(model: onnx.ModelProto, path: str | Path, *, limit: int | None = None) -> int:
    """Write a model whole or not at all, weights beside it when they exceed `limit` bytes.

    The data file is `<name>.<hash of its content>.data`: a model never points into data that are
    not its own. It gets its place first, then the model replaces the older one in one rename, then
    data files of older models go, and so do those that a killed run left behind. At no moment does
    the model lack its data.

    External tensors are copied file to file. The given model stays as it is. Returns the bytes
    written. Raises OnnxqError when they cannot be written.
    """
    path = Path(path)
    tensors = list(filter(_movable, initializers(model)))
    limit = ONE_FILE_LIMIT if limit is None else limit
    external = any(map(is_external, tensors)) or sum(map(nbytes, tensors)) > limit
    try:
        with scratch(path.parent) as folder:
            staged, data = folder / "model", folder / "data"
            place = None
            if external:
                model, place = _with_data_file(model, path, data)
            staged.write_bytes(_serialized(model, path))
            written = sum(file.stat().st_size for file in folder.iterdir())
            _place(staged, path, data, place)
    except OSError as error:
        raise OnnxqError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return written


def _serialized(model: onnx.ModelProto, path: Path) -> bytes:
    try:
        return bytes(model.SerializeToString(deterministic=True))
    except (EncodeError, ValueError):
        raise OnnxqError(
            f"{str(path)!r} would exceed 2 GiB without its weights; constants in nodes may be "
            "what is large: make initializers of them"
        ) from None


def _place(staged: Path, path: Path, data: Path, place: Path | None) -> None:
    """Put the staged files where they belong, the model last, and remove older data files."""
    new = place is not None and not place.exists()
    try:
        if place is not None:
            os.replace(data, place)
        os.replace(staged, path)
    except BaseException:
        if new and place is not None:
            place.unlink(missing_ok=True)
        raise
    for older in data_files(path):
        if older != place:
            older.unlink(missing_ok=True)


def data_files(path: Path) -> list[Path]:
    """Files beside a model that hold weights which `save_proto` wrote for it."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    return [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]


def _movable(tensor: TensorProto) -> bool:
    return is_external(tensor) or (
        tensor.data_type != TensorProto.STRING and nbytes(tensor) > _INLINE_LIMIT
    )


def _with_data_file(given: onnx.ModelProto, path: Path, data: Path) -> tuple[onnx.ModelProto, Path]:
    """The model with its weights moved to the file `data`, and where beside `path` that belongs."""
    model = onnx.ModelProto()
    model.CopyFrom(given)
    with data.open("wb") as file:
        writer = _Hashed(file)
        moved = [
            (tensor, *_append(tensor, writer, path.parent))
            for tensor in filter(_movable, initializers(model))
        ]
    place = path.with_name(f"{path.name}.{writer.sha256.hexdigest()[:16]}.data")
    for tensor, offset, length in moved:
        for field in _VALUES:
            tensor.ClearField(field)
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", place.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return model, place


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, piece: bytes) -> None:
        self.file.write(piece)
        self.sha256.update(piece)
        self.size += len(piece)


def _append(tensor: TensorProto, data: _Hashed, folder: Path) -> tuple[int, int]:
    """Write a tensor's bytes; where they begin, and how many there are."""
    data.write(bytes(-data.size % _ALIGNMENT))
    offset = data.size
    if is_external(tensor):
        for piece in extent(tensor, folder).pieces():
            data.write(piece)
    else:
        data.write(tensor.raw_data or _packed(tensor))
    return offset, data.size - offset


def _packed(tensor: TensorProto) -> bytes:
    return bytes(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data)


def model_size(path: str | Path) -> int:
    """Bytes on disk, external data included. Raises OnnxqError for what is no model."""
    path = Path(path)
    return path.stat().st_size + sum(file.stat().st_size for file in data_paths(path))


def data_paths(path: Path) -> set[Path]:
    """The data files that a model reads. Raises OnnxqError for what is no model."""
    if path.is_file() and not _mentions(path, b"location"):  # the key of each external tensor
        return set()
    model = _parsed(path)
    return {
        extent(tensor, path.parent).path
        for tensor in chain(initializers(model), other_tensors(model))
        if is_external(tensor)
    }


def _mentions(path: Path, text: bytes) -> bool:
    """Whether a file holds some bytes: found quicker than a large model is parsed."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            return held.find(text) >= 0


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
