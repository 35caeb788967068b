"""Samples in arrays, in memory or in .npz files: cut along axis 0, or a feed per file.

Of a file only the rows that are asked for are in memory.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, one_line
from onnxq.feeds import Batches, Feed, InputSpec, OneByOne, require, unfit

_READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)


class Array(Protocol):
    """An array that can be read some rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def rows(self, start: int, stop: int, step: int) -> Iterator[NDArray[Any]]:
        """Rows `start` to `stop`, `step` at a time; an array of no dimensions, again and again."""

    def whole(self) -> NDArray[Any]: ...


@dataclass
class InMemory:
    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def rows(self, start: int, stop: int, step: int) -> Iterator[NDArray[Any]]:
        for row in range(start, stop, step):
            yield self.array[row : min(row + step, stop)] if self.shape else self.array

    def whole(self) -> NDArray[Any]:
        return self.array


@dataclass
class _InNpz:
    """A member of an .npz file, which is a zip of .npy files."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_column: bool  # Fortran order: a row is not contiguous
    header: int  # bytes before the data

    def rows(self, start: int, stop: int, step: int) -> Iterator[NDArray[Any]]:
        if self.by_column or not self.shape:
            yield from InMemory(self.whole()).rows(start, stop, step)
            return
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        with ExitStack() as stack:
            try:
                file = stack.enter_context(zipfile.ZipFile(self.path))
                data = stack.enter_context(file.open(self.member))
                data.seek(self.header + start * row_bytes)
                for row in range(start, stop, step):
                    count = min(step, stop - row)
                    raw = data.read(count * row_bytes)
                    yield np.frombuffer(raw, self.dtype).reshape(count, *self.shape[1:])
            except _READ_ERRORS as error:
                raise _unreadable(self.path, error) from error

    def whole(self) -> NDArray[Any]:
        try:
            with zipfile.ZipFile(self.path) as file, file.open(self.member) as data:
                return npy.read_array(data)
        except _READ_ERRORS as error:
            raise _unreadable(self.path, error) from error


def npz_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name; only their headers are read.

    Raises OnnxqError when the file is no .npz or holds Python objects.
    """
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as file:
            for member in file.namelist():
                if not member.endswith(".npy"):
                    continue
                with file.open(member) as data:
                    version = npy.read_magic(data)
                    read = (
                        npy.read_array_header_1_0 if version[0] == 1 else npy.read_array_header_2_0
                    )
                    shape, by_column, dtype = read(data)
                    name = member.removesuffix(".npy")
                    arrays[name] = _InNpz(path, member, shape, dtype, by_column, data.tell())
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error
    return arrays


def _unreadable(path: Path, error: Exception) -> OnnxqError:
    reason = one_line(error).rstrip(".")
    return OnnxqError(f"cannot read {str(path)!r}: {reason}; save it anew with numpy.savez")


@dataclass
class Rows(Batches):
    """Arrays cut along axis 0; `rows` are those of the stacked ones where no array is cut."""

    arrays: dict[str, Array]
    stacked: frozenset[str]  # inputs whose every row is a whole feed

    def feeds(self, start: int, stop: int | None) -> Iterator[Feed]:
        end = self.count(stop)
        streams: dict[str, Iterator[NDArray[Any]]] = {}
        for name, array in self.arrays.items():
            step = 1 if name in self.stacked or not array.shape else self.batch
            total = end if step < self.batch else self.rows
            streams[name] = array.rows(start * step, min(end * step, total), step)
        for _ in range(start, end):
            feed = {name: next(stream) for name, stream in streams.items()}
            yield {name: a[0] if name in self.stacked else a for name, a in feed.items()}


@dataclass
class Folder(OneByOne):
    paths: list[Path]
    specs: list[InputSpec]

    def count(self, stop: int | None) -> int:
        return len(self.paths[:stop])

    def where(self, feed: int, row: int = 0) -> str:
        return str(self.paths[feed])

    def feeds(self, start: int, stop: int | None) -> Iterator[Feed]:
        for path in self.paths[start:stop]:
            arrays = npz_arrays(path)
            require(str(path), self.specs, arrays)
            names = [spec.name for spec in self.specs if spec.name in arrays]
            yield {name: arrays[name].whole() for name in names}


def cut(
    name: str,
    arrays: Mapping[str, Array],
    specs: list[InputSpec],
    batch_size: int,
    limit: int | None,
) -> Rows:
    """Decide how the arrays become feeds."""
    require(name, specs, arrays)
    specs = [spec for spec in specs if spec.name in arrays]
    used = {spec.name: arrays[spec.name] for spec in specs}
    stacked = set[str]()
    fixed: dict[int, str] = {}
    for spec in specs:
        rank, dims = len(used[spec.name].shape), spec.shape
        if dims is None or (rank == 0 and not dims):
            continue
        if rank == len(dims) + 1:
            stacked.add(spec.name)
        elif rank != len(dims):
            raise OnnxqError(unfit(name, spec, used[spec.name].dtype, used[spec.name].shape))
        elif isinstance(dims[0], int):
            fixed.setdefault(dims[0], spec.name)
    if len(fixed) > 1:
        (a, first), (b, second) = list(fixed.items())[:2]
        raise OnnxqError(
            f"the model takes {a} rows of {first!r} and {b} of {second!r} at a time; give one "
            f"with a leading axis that counts samples, or a folder of .npz files"
        )
    batch = next(iter(fixed), 1 if stacked else batch_size)
    if batch < 1:
        raise OnnxqError(f"the model declares 0 rows of {fixed[batch]!r}; nothing can be cut")
    rows = {}
    for key, array in used.items():
        if array.shape:
            rows[key] = array.shape[0] * (batch if key in stacked else 1)
    total = min(rows.values(), default=1)
    if len(set(rows.values())) > 1:
        lengths = ", ".join(f"{key!r} {used[key].shape[0]}" for key in rows)
        raise OnnxqError(
            f"{name}: the arrays differ in their number of samples: {lengths}; give each as many"
        )
    total = total if limit is None else min(total, limit)
    if total and (fixed or stacked):
        total -= total % batch
        if not total:
            raise OnnxqError(
                f"{name} holds fewer samples than the {batch} that the model takes at a time; "
                "give more"
            )
    return Rows(name, batch, total, used, frozenset(stacked))
