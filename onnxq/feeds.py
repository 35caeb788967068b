"""What a feed is: the inputs that a model declares, and whether given arrays fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, one_line, suggest

Feed = dict[str, NDArray[Any]]
Shape = tuple[int | str | None, ...]

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_CASTS = {("int32", "int64")} | {(a, b) for a in _FLOATS for b in _FLOATS}


@dataclass(frozen=True)
class InputSpec:
    """What the model declares about an input. A dimension is a size, a symbol or None (unnamed);
    `shape` is None when the model declares no rank.

    >>> str(InputSpec("input", np.dtype("float32"), ("batch", 3, 224, 224)))
    "'input' float32 [batch,3,224,224]"
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None
    optional: bool = False  # a sample may leave it out
    outputs: tuple[str, ...] = ()  # of the same type and a shape that fits: it may be their state

    def __str__(self) -> str:
        return f"{self.name!r} {type_text(self.dtype, self.shape)}"


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """The inputs that a caller must feed: graph inputs that are not initializers.

    Raises OnnxqError for an input that is no tensor.
    """
    given = {tensor.name for tensor in model.graph.initializer}
    given |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    specs = [_spec(value) for value in model.graph.input if value.name not in given]
    outputs = output_specs(model)
    return [
        replace(spec, outputs=tuple(o.name for o in outputs if may_carry(o, spec)))
        for spec in specs
    ]


def output_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """The outputs that are tensors, as the model declares them."""
    tensors = [v for v in model.graph.output if v.type.tensor_type.elem_type]
    return [_spec(value) for value in tensors]


def may_carry(output: InputSpec, state: InputSpec) -> bool:
    """Whether an output could be what an input is given next: dtype, rank and known sizes agree."""
    if output.dtype != state.dtype:
        return False
    if output.shape is None or state.shape is None:
        return True
    return len(output.shape) == len(state.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(output.shape, state.shape, strict=True)
    )


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
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


class Source(Protocol):
    """Feeds by number, as they come, before they are checked."""

    name: str

    @property
    def note(self) -> str:
        """What else a report says of the feeds."""

    def count(self, stop: int | None) -> int:
        """The number of feeds before `stop`."""

    def feeds(self, start: int, stop: int | None) -> Iterator[Mapping[str, Any]]: ...

    def samples(self, start: int, stop: int) -> int:
        """How many samples the feeds `start` to `stop` hold."""

    def where(self, feed: int, row: int = 0) -> str:
        """Names the sample at `row` of a feed, for a message."""

    def origin(self, start: int, stop: int | None) -> str:
        """What the feeds `start` to `stop` are made from, where that is quicker to tell than they
        are to make; "" where it is not.
        """


@dataclass
class OneByOne:
    """A source whose feeds are single samples."""

    name: str
    note: ClassVar[str] = ""

    def origin(self, start: int, stop: int | None) -> str:
        return ""

    def samples(self, start: int, stop: int) -> int:
        return max(0, stop - start)

    def where(self, feed: int, row: int = 0) -> str:
        return f"{self.name}, sample {feed} (counted from 0)"


@dataclass
class Batches:
    """A source of single samples, of which `batch` make a feed; the last may hold fewer."""

    name: str
    note: ClassVar[str] = ""
    batch: int
    rows: int  # samples

    def origin(self, start: int, stop: int | None) -> str:
        return ""

    def count(self, stop: int | None) -> int:
        total = -(-self.rows // self.batch)
        return total if stop is None else min(stop, total)

    def samples(self, start: int, stop: int) -> int:
        return max(0, min(self.rows, stop * self.batch) - start * self.batch)

    def where(self, feed: int, row: int = 0) -> str:
        number = feed * self.batch + (row if self.batch > 1 else 0)
        return f"{self.name}, sample {number} (counted from 0)"


def checked(feed: Any, specs: list[InputSpec], source: Source, number: int) -> Feed:
    """The feed with every input in the model's dtype; raises OnnxqError where it does not fit."""
    where = source.where(number)
    if not isinstance(feed, Mapping):
        raise OnnxqError(
            f"{where} is a {type(feed).__name__}; give a dict {{input name: array}} with "
            + ", ".join(map(str, specs))
        )
    arrays = {str(name): as_array(value, name, where) for name, value in feed.items()}
    require(where, specs, arrays)
    names = [spec.name for spec in specs]
    for name in arrays:
        if name not in names:
            raise OnnxqError(
                f"{where} has {name!r}, which is no input of the model; "
                f"it expects {', '.join(map(str, specs))}{suggest(name, names)}"
            )
    fitted = {
        spec.name: _fitted(arrays[spec.name], spec, source, number)
        for spec in specs
        if spec.name in arrays
    }
    if fitted and all(a.shape and not a.size for a in fitted.values()):
        raise OnnxqError(f"{where} holds no values: every tensor is empty; remove the sample")
    return fitted


def _fitted(array: NDArray[Any], spec: InputSpec, source: Source, number: int) -> NDArray[Any]:
    native = array.dtype.newbyteorder("=")
    strings = spec.dtype.kind == "O" and native.kind in "OUS"
    if native != spec.dtype and not strings and (native.name, spec.dtype.name) not in _CASTS:
        raise OnnxqError(unfit(source.where(number), spec, array.dtype, array.shape))
    dims = spec.shape if spec.shape is not None else array.shape
    if array.ndim != len(dims) or any(
        isinstance(want, int) and want != got for want, got in zip(dims, array.shape, strict=True)
    ):
        raise OnnxqError(unfit(source.where(number), spec, array.dtype, array.shape))
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


def as_array(value: Any, name: object, where: str) -> NDArray[Any]:
    """Raises OnnxqError for lists whose rows differ in length."""
    try:
        return np.asarray(value)
    except ValueError as error:
        reason = one_line(error)
        raise OnnxqError(
            f"{where}: {str(name)!r} makes no array ({reason}); give an array of one shape, and "
            "samples of differing shapes one by one"
        ) from None


def require(where: str, specs: Sequence[InputSpec], arrays: Mapping[str, Any]) -> None:
    """Raises OnnxqError when an input that a sample must give is not among the arrays."""
    for spec in specs:
        if spec.name not in arrays and not spec.optional:
            raise OnnxqError(_missing(where, spec, arrays))


def _missing(where: str, spec: InputSpec, arrays: Mapping[str, Any]) -> str:
    came = ", ".join(
        f"{name!r} {type_text(a.dtype, a.shape, came=True)}"
        for name, a in islice(arrays.items(), 6)
    )
    state = ""
    if near := get_close_matches(spec.name, spec.outputs, n=1, cutoff=0):
        state = (
            f"; if it is a state that an output carries on, say so: --state {near[0]}={spec.name}"
        )
    return (
        f"{where}: the model's input {spec} is missing; what came is {came or 'nothing'}"
        f"{suggest(spec.name, arrays) if arrays else ''}{state}"
    )


def unfit(where: str, spec: InputSpec, dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    advice = "change the samples to fit"
    if dtype.kind == "O" and spec.dtype.kind != "O":
        advice = "samples of differing shapes go into a folder of .npz files, one each"
    return (
        f"{where}: the model expects {spec}, what came is {type_text(dtype, shape, came=True)}; "
        f"{advice}"
    )


def type_text(dtype: np.dtype[Any], shape: Shape | None, *, came: bool = False) -> str:
    """`float32 [batch,3]`. Objects are strings to a model; those that came may be anything."""
    kind = {"O": "object" if came else "string", "U": "string", "S": "string"}.get(
        dtype.kind, dtype.name
    )
    if shape is None:
        return f"{kind} of any shape"
    return f"{kind} [{','.join('?' if dim is None else str(dim) for dim in shape)}]"
