"""Model files: load with external data left on disk, save so that a file is whole or not there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto

from onnxq.errors import OnnxqError

ONE_FILE_LIMIT = 1_800_000_000  # bytes; protobuf stops at 2 GiB, graph and metadata included
_INLINE_LIMIT = 1024  # smaller tensors stay in the model file, where shape inference can see them
_ALIGNMENT = 4096  # of a tensor in the data file, so that a runtime can memory-map it


class ExternalValues(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """Values that stay in their external data file until somebody reads them."""

    def __init__(self, tensor: TensorProto, folder: Path) -> None:
        super().__init__(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        self.path = _inside(folder, where.get("location", ""), tensor.name)
        self.offset = int(where.get("offset", 0))
        self.length = int(where.get("length", 0)) or self.path.stat().st_size - self.offset
        for entry in tensor.external_data:  # the graph may be saved to another folder
            if entry.key == "location":
                entry.value = str(self.path.absolute())

    def load(self) -> NDArray[Any]:
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.length,))
        proto = TensorProto(dims=self.tensor.dims, data_type=self.tensor.data_type)
        if proto.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
            return np.asarray(raw.view(self.dtype).reshape(tuple(self.tensor.dims)))
        proto.raw_data = raw.tobytes()
        return onnx.numpy_helper.to_array(proto)


def _inside(folder: Path, location: str, tensor: str) -> Path:
    """The data file of a tensor; refuses one that is outside the model's folder.

    Caches keep models as links into a folder of blobs: a link beside the model may be followed,
    since whoever placed it there could have placed the file. A path that climbs out may not.
    """
    relative = Path(location)
    if not location or relative.is_absolute() or ".." in relative.parts:
        raise OnnxqError(
            f"tensor {tensor!r} wants external data at {location!r}, outside the model's folder; "
            "refused"
        )
    path = folder / relative
    if not path.is_file():
        raise OnnxqError(f"external data {str(path)!r} is missing; it belongs beside the model")
    return path


def load_proto(path: str | Path) -> onnx.ModelProto:
    """Read a model; external tensors stay in their files. Raises OnnxqError for what is none."""
    path = Path(path)
    if not path.is_file():
        raise OnnxqError(f"there is no file {str(path)!r}")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise OnnxqError(f"{str(path)!r} is not an ONNX model ({error})") from None
    if not model.graph.node and not model.graph.output:
        raise OnnxqError(f"{str(path)!r} is not an ONNX model, or has an empty graph")
    return model


def save_proto(model: onnx.ModelProto, path: str | Path) -> int:
    """Write a model whole or not at all, weights beside it in `<name>.data` when it is large.

    External tensors are copied file to file. Returns the bytes written. An older data file at the
    same place is replaced, never appended to. The given model stays as it is.
    """
    path = Path(path)
    data_path = path.with_name(path.name + ".data")
    tensors = list(model.graph.initializer)
    payload = sum(_nbytes(t) for t in tensors)
    external = payload > ONE_FILE_LIMIT or any(_is_external(t) for t in tensors)
    if external:
        given, model = model, onnx.ModelProto()
        model.CopyFrom(given)
        tensors = list(model.graph.initializer)
    with tempfile.TemporaryDirectory(prefix=".onnxq-", dir=path.parent) as scratch:
        staged = Path(scratch) / path.name
        staged_data = Path(scratch) / data_path.name
        if external:
            with staged_data.open("wb") as data:
                for tensor in tensors:
                    if _is_external(tensor) or _nbytes(tensor) > _INLINE_LIMIT:
                        _move_out(tensor, data, data_path.name, path.parent)
        staged.write_bytes(model.SerializeToString(deterministic=True))
        written = staged.stat().st_size
        if external:
            written += staged_data.stat().st_size
            os.replace(staged_data, data_path)
        os.replace(staged, path)
    return written


def _move_out(tensor: TensorProto, data: BinaryIO, name: str, folder: Path) -> None:
    """Append a tensor's bytes to the data file and leave a reference in the model."""
    offset = data.tell() + (-data.tell() % _ALIGNMENT)
    data.seek(offset)
    length = 0
    for piece in _pieces(tensor, folder):
        data.write(piece)
        length += len(piece)
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", name), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _pieces(tensor: TensorProto, folder: Path, size: int = 1 << 24) -> Iterator[bytes]:
    if not _is_external(tensor):
        yield tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        return
    where = {entry.key: entry.value for entry in tensor.external_data}
    path = Path(where["location"])
    source = path if path.is_absolute() else _inside(folder, str(path), tensor.name)
    with source.open("rb") as file:
        file.seek(int(where.get("offset", 0)))
        left = int(where.get("length", 0)) or source.stat().st_size - int(where.get("offset", 0))
        while left > 0:
            piece = file.read(min(size, left))
            if not piece:
                raise OnnxqError(f"external data {str(source)!r} ends inside {tensor.name!r}")
            yield piece
            left -= len(piece)


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _nbytes(tensor: TensorProto) -> int:
    if _is_external(tensor):
        lengths = [int(e.value) for e in tensor.external_data if e.key == "length"]
        return lengths[0] if lengths else _INLINE_LIMIT + 1
    return len(tensor.raw_data) or tensor.ByteSize()


def model_size(path: str | Path) -> int:
    """Bytes on disk, external data included."""
    path = Path(path)
    files = {
        entry.value
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return path.stat().st_size + sum((path.parent / f).stat().st_size for f in files)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
