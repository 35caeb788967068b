"""Where samples come from: an .npz file, a folder of them, a function, Python objects.

Whatever the source, samples are streamed: one feed (an array per model input) is in memory at a
time. Every feed is checked against the model's inputs before anyone sees it.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import onnx
from numpy.lib import format as npy
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, suggest

Feed = dict[str, NDArray[Any]]

_CASTS = {("int32", "int64"), ("float64", "float32"), ("float16", "float32")}
_READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_ACCEPTED = "give an .npz file, a folder of .npz files, or module:function"


@dataclass(frozen=True)
class InputSpec:
    """What the model declares about an input. A dimension is a size, a symbol or None (unnamed);
    `shape` is None when the model declares no rank.

    >>> str(InputSpec("input", np.dtype("float32"), ("batch", 3, 224, 224)))
    "'input' float32 [batch,3,224,224]"
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        return f"{self.name!r} {_type_text(self.dtype, self.shape)}"


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """The inputs that a caller must feed: graph inputs that are not initializers.

    Raises OnnxqError for an input that is no tensor.
    """
    given = {tensor.name for tensor in model.graph.initializer}
    given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [_input_spec(value) for value in model.graph.input if value.name not in given]


def _input_spec(value: onnx.ValueInfoProto) -> InputSpec:
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "value without a type"
        raise OnnxqError(
            f"the model's input {value.name!r} is a {kind.removesuffix('_type')}; "
            "only tensors can be fed, so export the model with tensor inputs"
        )
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if not tensor.HasField("shape"):
        return InputSpec(value.name, dtype, None)
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        for dim in tensor.shape.dim
    )
    return InputSpec(value.name, dtype, dims)


class Samples:
    """Feeds for the model, one per inference; iterating again starts again.

    `len` is the number of feeds. It reads a function's samples through once where it must count.
    """

    def __init__(
        self,
        source: _Source,
        specs: Sequence[InputSpec],
        *,
        synthesised: bool = False,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.synthesised = synthesised
        self._source, self._specs = source, list(specs)
        self._start, self._stop = start, stop
        self._length: int | None = None
        self._digest: str | None = None

    @property
    def description(self) -> str:
        """For a report: `calib.npz, 40 samples`."""
        count = self._source.samples(self._start, self._start + len(self))
        return f"{self._source.name}, {count} sample{'' if count == 1 else 's'}"

    def __len__(self) -> int:
        if self._length is None:
            self._length = max(0, self._source.count(self._stop) - self._start)
        return self._length

    def __iter__(self) -> Iterator[Feed]:
        for number, feed in enumerate(self._source.feeds(self._start, self._stop), self._start):
            yield _checked(feed, self._specs, self._source, number)

    def slice(self, start: int, stop: int | None) -> Samples:
        """The feeds `start` to `stop` (exclusive; None: to the end) of these, still streaming.

        Raises ValueError for a negative bound.
        """
        if start < 0 or (stop is not None and stop < 0):
            raise ValueError("a slice of samples has bounds from 0 up")
        ends = [self._stop, None if stop is None else self._start + stop]
        end = min((e for e in ends if e is not None), default=None)
        return Samples(
            self._source,
            self._specs,
            synthesised=self.synthesised,
            start=self._start + start,
            stop=end,
        )

    def digest(self) -> str:
        """SHA-256 (hex) over the names, dtypes, shapes and bytes of all feeds, in order."""
        if self._digest is None:
            sha = hashlib.sha256()
            for feed in self:
                for name, array in sorted(feed.items()):
                    sha.update(repr((name, str(array.dtype), array.shape)).encode())
                    strings = array.dtype.kind == "O"  # whose bytes are addresses
                    sha.update(repr(array.tolist()).encode() if strings else array.tobytes())
            self._digest = sha.hexdigest()
        return self._digest


def open_samples(
    source: object,
    specs: Sequence[InputSpec],
    *,
    batch_size: int = 1,
    limit: int | None = None,
    name: str | None = None,
    synthesised: bool = False,
) -> Samples:
    """Open `source` as samples for a model with the inputs `specs`.

    source      one feed is
    .npz path   `batch_size` rows of every array. Arrays that are no input are ignored. An array
                with one dimension more than its input holds a whole feed in each row, an array of
                no dimensions is fed every time. A fixed first dimension of the model overrides
                `batch_size`; rows left over are then not fed.
    folder      one .npz file of it, as it is, in the order of the names
    'mod:func'  what the function yields; it is called anew for each iteration
    dict        as an .npz
    sequence, zero-argument callable, iterable: the dicts {input name: array} that it holds or
                yields. A one-shot iterator is first written to a temporary file.

    `limit` is the largest number of samples: rows of an .npz or dict, feeds elsewhere.
    `name` names the source in descriptions and messages.

    Raises OnnxqError when the source cannot be read, is empty, or its first feed does not fit.
    """
    if batch_size < 1:
        raise OnnxqError(f"the batch size is {batch_size}; give 1 or more")
    if limit is not None and limit < 1:
        raise OnnxqError(f"the limit of samples is {limit}; give 1 or more")
    if isinstance(source, Samples):
        return source.slice(0, limit)
    opened = _open(source, list(specs), batch_size, limit, name)
    stop = None if isinstance(opened, _Rows) else limit
    samples = Samples(opened, specs, synthesised=synthesised, stop=stop)
    if next(iter(samples), None) is None:
        raise OnnxqError(f"{opened.name} holds no samples; give at least one")
    return samples


class _Source(Protocol):
    """Feeds by number, as they come, before they are checked."""

    name: str

    def count(self, stop: int | None) -> int:
        """The number of feeds before `stop`."""

    def feeds(self, start: int, stop: int | None) -> Iterator[Mapping[str, Any]]: ...

    def samples(self, start: int, stop: int) -> int:
        """How many samples the feeds `start` to `stop` hold."""

    def where(self, feed: int, row: int = 0) -> str:
        """Names the sample at `row` of a feed, for a message."""


@dataclass
class _OneByOne:
    """A source whose feeds are single samples."""

    name: str

    def samples(self, start: int, stop: int) -> int:
        return max(0, stop - start)

    def where(self, feed: int, row: int = 0) -> str:
        return f"{self.name}, sample {feed} (counted from 0)"


@dataclass
class _Rows:
    """Arrays cut along axis 0."""

    name: str
    arrays: dict[str, _Array]
    stacked: frozenset[str]  # inputs whose every row is a whole feed
    batch: int
    rows: int  # of the arrays that are cut, or of the stacked ones where none is

    def count(self, stop: int | None) -> int:
        total = -(-self.rows // self.batch)
        return total if stop is None else min(stop, total)

    def samples(self, start: int, stop: int) -> int:
        return max(0, min(self.rows, stop * self.batch) - start * self.batch)

    def where(self, feed: int, row: int = 0) -> str:
        number = feed * self.batch + (row if self.batch > 1 else 0)
        return f"{self.name}, sample {number} (counted from 0)"

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
class _Folder(_OneByOne):
    paths: list[Path]
    inputs: list[str]

    def count(self, stop: int | None) -> int:
        return len(self.paths[:stop])

    def where(self, feed: int, row: int = 0) -> str:
        return str(self.paths[feed])

    def feeds(self, start: int, stop: int | None) -> Iterator[Feed]:
        for path in self.paths[start:stop]:
            arrays = _npz_arrays(path)
            # With an input missing, the other names go along for the message.
            names = self.inputs if set(self.inputs) <= set(arrays) else list(arrays)
            yield {name: arrays[name].whole() for name in names}


@dataclass
class _List(_OneByOne):
    items: Sequence[Mapping[str, Any]]

    def count(self, stop: int | None) -> int:
        return len(self.items) if stop is None else min(stop, len(self.items))

    def feeds(self, start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
        for number in range(start, self.count(stop)):
            yield self.items[number]


@dataclass
class _Spool(_OneByOne):
    """The feeds of a one-shot iterator in a temporary file, one .npy after the other."""

    inputs: list[str]
    file: IO[bytes]
    offsets: list[int]

    def count(self, stop: int | None) -> int:
        return len(self.offsets[:stop])

    def feeds(self, start: int, stop: int | None) -> Iterator[Feed]:
        for offset in self.offsets[start:stop]:
            self.file.seek(offset)
            yield {name: npy.read_array(self.file) for name in self.inputs}


@dataclass
class _Call(_OneByOne):
    """What a function yields, called anew for each iteration."""

    make: Callable[[], Iterable[Any]]
    total: int | None = field(default=None)

    def count(self, stop: int | None) -> int:
        if self.total is None:
            return sum(1 for _ in self.feeds(0, stop))
        return self.total if stop is None else min(stop, self.total)

    def feeds(self, start: int, stop: int | None) -> Iterator[Mapping[str, Any]]:
        number = 0
        iterator = self.begin()
        while stop is None or number < stop:
            with self._named():
                feed = next(iterator, None)
            if feed is None:
                break
            if number >= start:
                yield feed
            number += 1
        else:
            return
        if self.total is not None and number < self.total:
            raise OnnxqError(
                f"{self.name} gave {self.total} samples at first and {number} when read again; "
                "make it start anew on each call"
            )
        self.total = number

    def begin(self) -> Iterator[Any]:
        with self._named():
            return iter(self.make())

    def _named(self) -> _Named:
        return _Named(self.name)


@dataclass
class _Named:
    """Turns an exception of the user's function into one line that names the function."""

    name: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, OnnxqError):
            raise OnnxqError(
                f"{self.name} failed with {type(error).__name__}: {error}; it must return or "
                "yield dicts {input name: array}"
            ) from error


def _open(
    source: object, specs: list[InputSpec], batch_size: int, limit: int | None, name: str | None
) -> _Source:
    inputs = [spec.name for spec in specs]
    if isinstance(source, str | Path):
        path = Path(source)
        if isinstance(source, str) and not path.exists() and _FUNCTION.fullmatch(source):
            return _probed(_Call(name or str(source), _imported(str(source))))
        if path.is_dir():
            paths = sorted(path.glob("*.npz"))
            if not paths:
                raise OnnxqError(f"folder {str(path)!r} holds no .npz file; {_ACCEPTED}")
            return _Folder(name or path.name, paths, inputs)
        if not path.exists():
            raise OnnxqError(f"samples {str(path)!r} do not exist; {_ACCEPTED}")
        if path.suffix.lower() != ".npz":
            raise OnnxqError(f"{str(path)!r} is no .npz file; {_ACCEPTED}")
        return _cut(name or path.name, _npz_arrays(path), specs, batch_size, limit)
    if isinstance(source, Mapping):
        arrays = {key: _InMemory(np.asarray(value)) for key, value in source.items()}
        return _cut(name or "arrays", arrays, specs, batch_size, limit)
    if isinstance(source, Sequence):
        return _List(name or "list", source)
    if callable(source):
        return _probed(_Call(name or str(getattr(source, "__name__", "function")), source))
    if isinstance(source, Iterator):
        return _spooled(source, specs, limit, name or "iterator")
    if isinstance(source, Iterable):
        return _probed(_Call(name or type(source).__name__, lambda: source))
    raise OnnxqError(f"samples cannot come from a {type(source).__name__}; {_ACCEPTED}")


def _imported(text: str) -> Callable[[], Iterable[Any]]:
    module, _, attribute = text.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: Any = importlib.import_module(module)
    except Exception as error:
        raise OnnxqError(
            f"importing {module!r} for samples failed with {type(error).__name__}: {error}; "
            "run where the module lies, or install it"
        ) from error
    for part in attribute.split("."):
        if not hasattr(function, part):
            near = suggest(part, (name for name in vars(function) if name[0] != "_"))
            raise OnnxqError(f"{module!r} has no {attribute!r} to give samples{near}")
        function = getattr(function, part)
    if not callable(function):
        raise OnnxqError(f"{text!r} is no function; name one that yields dicts")
    return function


def _probed(call: _Call) -> _Call:
    """Finds out early that a function hands out the same iterator each time."""
    first = call.begin()
    with call._named():
        empty = next(first, None) is None
    if empty:
        raise OnnxqError(f"{call.name} gives no samples; make it yield at least one")
    second = call.begin()
    with call._named():
        exhausted = second is first or next(second, None) is None
    if exhausted:
        raise OnnxqError(
            f"{call.name} cannot be read twice; make it start anew on each call, "
            "for example as a generator function"
        )
    return call


def _spooled(feeds: Iterator[Any], specs: list[InputSpec], limit: int | None, name: str) -> _Source:
    file = tempfile.TemporaryFile(prefix="onnxq-samples-")  # noqa: SIM115 (it lives with the source)
    spool = _Spool(name, [spec.name for spec in specs], file, [])
    for number, feed in enumerate(islice(feeds, limit)):
        spool.offsets.append(file.tell())
        checked = _checked(feed, specs, spool, number)
        for spec in specs:
            array = checked[spec.name]
            npy.write_array(file, array.astype(str) if array.dtype.kind == "O" else array)
    return spool


def _cut(
    name: str,
    arrays: Mapping[str, _Array],
    specs: list[InputSpec],
    batch_size: int,
    limit: int | None,
) -> _Rows:
    """Decide how the arrays become feeds."""
    for spec in specs:
        if spec.name not in arrays:
            raise OnnxqError(_missing(name, spec, arrays))
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
            raise OnnxqError(_unfit(name, spec, used[spec.name]))
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
        raise OnnxqError(f"{name}: the arrays differ in their number of samples: {lengths}")
    total = total if limit is None else min(total, limit)
    if total and (fixed or stacked):
        total -= total % batch
        if not total:
            raise OnnxqError(
                f"{name} holds fewer samples than the {batch} that the model takes at a time; "
                "give more"
            )
    return _Rows(name, used, frozenset(stacked), batch, total)


class _Array(Protocol):
    """An array that can be read some rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def rows(self, start: int, stop: int, step: int) -> Iterator[NDArray[Any]]:
        """Rows `start` to `stop`, `step` at a time; an array of no dimensions, again and again."""

    def whole(self) -> NDArray[Any]: ...


@dataclass
class _InMemory:
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
            yield from _InMemory(self.whole()).rows(start, stop, step)
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


def _npz_arrays(path: Path) -> dict[str, _Array]:
    """The arrays of an .npz file by name; only their headers are read.

    Raises OnnxqError when the file is no .npz or holds Python objects.
    """
    arrays: dict[str, _Array] = {}
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
    reason = " ".join(str(error).split()).rstrip(".")
    return OnnxqError(f"cannot read {str(path)!r}: {reason}; save it anew with numpy.savez")


def _checked(feed: Any, specs: list[InputSpec], source: _Source, number: int) -> Feed:
    """The feed with every input in the model's dtype; raises OnnxqError where it does not fit."""
    where = source.where(number)
    if not isinstance(feed, Mapping):
        raise OnnxqError(
            f"{where} is a {type(feed).__name__}; give a dict {{input name: array}} with "
            + ", ".join(map(str, specs))
        )
    arrays = {str(name): np.asarray(value) for name, value in feed.items()}
    for spec in specs:
        if spec.name not in arrays:
            raise OnnxqError(_missing(where, spec, arrays))
    names = [spec.name for spec in specs]
    for name in arrays:
        if name not in names:
            raise OnnxqError(
                f"{where} has {name!r}, which is no input of the model; "
                f"it expects {', '.join(map(str, specs))}{suggest(name, names)}"
            )
    return {spec.name: _fitted(arrays[spec.name], spec, source, number) for spec in specs}


def _fitted(array: NDArray[Any], spec: InputSpec, source: _Source, number: int) -> NDArray[Any]:
    native = array.dtype.newbyteorder("=")
    strings = spec.dtype.kind == "O" and native.kind in "OUS"
    if native != spec.dtype and not strings and (native.name, spec.dtype.name) not in _CASTS:
        raise OnnxqError(_unfit(source.where(number), spec, array))
    dims = spec.shape if spec.shape is not None else array.shape
    if array.ndim != len(dims) or any(
        isinstance(want, int) and want != got for want, got in zip(dims, array.shape, strict=True)
    ):
        raise OnnxqError(_unfit(source.where(number), spec, array))
    with np.errstate(over="ignore"):  # an overflow is infinite, and told below
        array = np.ascontiguousarray(array, spec.dtype).reshape(array.shape)
    if spec.dtype.kind == "f" or spec.dtype.name == "bfloat16":
        finite = np.isfinite(array)
        if not finite.all():
            bad = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(~finite)))
            value = np.atleast_1d(array)[bad]
            raise OnnxqError(
                f"{source.where(number, bad[0])}: tensor {spec.name!r} holds {float(value)}; "
                "samples must be finite, so mend or remove it"
            )
    return array


def _missing(where: str, spec: InputSpec, arrays: Mapping[str, Any]) -> str:
    came = ", ".join(
        f"{name!r} {_type_text(a.dtype, a.shape)}" for name, a in islice(arrays.items(), 6)
    )
    return (
        f"{where}: the model's input {spec} is missing; what came is {came or 'nothing'}"
        f"{suggest(spec.name, arrays) if arrays else ''}"
    )


def _unfit(where: str, spec: InputSpec, array: _Array | NDArray[Any]) -> str:
    return (
        f"{where}: the model expects {spec}, what came is {_type_text(array.dtype, array.shape)}; "
        "change the samples to fit"
    )


def _type_text(dtype: np.dtype[Any], shape: Sequence[int | str | None] | None) -> str:
    kind = "string" if dtype.kind == "O" else dtype.name
    if shape is None:
        return f"{kind} of any shape"
    return f"{kind} [{','.join('?' if dim is None else str(dim) for dim in shape)}]"
