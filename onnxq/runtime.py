"""ONNX Runtime sessions."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from onnxq.coded_io import CodedValue, from_metadata
from onnxq.errors import OnnxqError, one_line
from onnxq.graph import Graph, to_proto_without_weights
from onnxq.ops import METADATA
from onnxq.ops.library import find_library
from onnxq.scratch import scratch
from onnxq.storage import save_proto
from onnxq.tensors import initializers, is_external, read_in

Array = NDArray[Any]
CPU = "CPUExecutionProvider"
_SERIALIZE_LIMIT = 1_800_000_000  # bytes; above it a model goes through a file
_NO_KERNEL = re.compile(r"([\w.]+):(\w+)\(-?\d+\) is not a registered function/op")
_NO_SCHEMA = re.compile(r"No Op registered for (\w+) with domain_version of (\d+)")

_KINDS = {kind: name.lower() for name, kind in onnx.TensorProto.DataType.items()} | {
    onnx.TensorProto.FLOAT: "float"
}

_FLOAT8 = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2)
# onnxruntime 1.31 takes pairs of FP8 into integer kernels, and then does not load the model.
NO_PAIRS = "session.disable_quant_qdq"

_libraries: ContextVar[tuple[str, ...]] = ContextVar("libraries", default=())
_with_kernels: ContextVar[bool] = ContextVar("with_kernels", default=True)


@contextmanager
def custom_ops(libraries: Sequence[str | Path]) -> Iterator[None]:
    """Every session that this thread makes inside the `with` knows these custom operators.

    `libraries` are shared libraries that export `RegisterCustomOps`. Their code runs.
    Raises OnnxqError for a file that is missing or is no such library.
    """
    paths = tuple(str(_checked_library(Path(library))) for library in libraries)
    before = _libraries.set(_libraries.get() + paths)
    try:
        yield
    finally:
        _libraries.reset(before)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Sessions that this thread makes inside the `with` compute the operators of `ai.onnxq` by
    their functions, as on a device that lacks the library."""
    before = _with_kernels.set(False)
    try:
        yield
    finally:
        _with_kernels.reset(before)


def names_operators(model: str | Path | onnx.ModelProto) -> bool:
    """Whether a model says that it has operators of `ai.onnxq` with kernels."""
    if isinstance(model, onnx.ModelProto):
        return any(entry.key == METADATA for entry in model.metadata_props)
    try:
        with (
            Path(model).open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data,
        ):
            return data.find(METADATA.encode()) >= 0
    except (OSError, ValueError):  # what is no file, or empty, the runtime refuses in its own words
        return False


def _checked_library(path: Path) -> Path:
    if not path.is_file():
        raise OnnxqError(f"there is no custom-operator library {str(path)!r}")
    try:
        ort.SessionOptions().register_custom_ops_library(str(path.absolute()))
    except Exception as error:
        reason = one_line(error)
        raise OnnxqError(
            f"{str(path)!r} is no custom-operator library that onnxruntime {ort.__version__} can "
            f"load: {reason}"
        ) from None
    return path.absolute()


def session_options() -> ort.SessionOptions:
    """What every session of onnxq begins with: no log, and the custom operators at hand."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for library in _libraries.get():
        options.register_custom_ops_library(library)
    return options


def default_threads() -> int:
    return os.cpu_count() or 1


def load_error(error: Exception) -> OnnxqError:
    """What the runtime says of a model that it does not load, as one line that says what to do."""
    text = one_line(error)
    if found := _NO_KERNEL.search(text):
        domain, op = found.groups()
        return OnnxqError(
            f"onnxruntime has no operator {op} of the domain {domain!r}; give the library that has "
            "it with --custom-ops (in Python: custom_ops=[...])"
        )
    if found := _NO_SCHEMA.search(text):
        op, opset = found.groups()
        return OnnxqError(
            f"onnxruntime {ort.__version__} has no operator {op} in opset {opset}; export the "
            "model again, or take a newer onnxruntime"
        )
    return OnnxqError(f"onnxruntime does not load the model: {text}")


@dataclass(frozen=True)
class Ends:
    """How what users give and get differs from what a model takes and makes.

    `kinds` are the types of its inputs as the runtime writes them: `tensor(float16)`.
    """

    kinds: Mapping[str, str]
    coded: Mapping[str, CodedValue]

    @classmethod
    def of_model(cls, model: onnx.ModelProto) -> Ends:
        weights = {tensor.name for tensor in model.graph.initializer}
        kinds = {
            value.name: f"tensor({_KINDS.get(value.type.tensor_type.elem_type, '')})"
            for value in model.graph.input
            if value.name not in weights
        }
        return cls(kinds, from_metadata({p.key: p.value for p in model.metadata_props}))

    def codes(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of a feed as the model takes them: float16, codes of real numbers."""
        known = {name: feed[name] for name in feed if name in self.kinds}
        for name, array in known.items():
            if self.kinds[name] == "tensor(float16)" and array.dtype == np.float32:
                known[name] = array.astype(np.float16)
        for name in self.coded.keys() & known.keys():
            if known[name].dtype.kind == "f":
                kind = np.dtype(self.kinds[name].removeprefix("tensor(").removesuffix(")"))
                known[name] = self.coded[name].codes(known[name], kind)
        return known

    def real(self, made: dict[str, Array]) -> dict[str, Array]:
        """Outputs with real numbers for codes."""
        return made | {n: self.coded[n].real(made[n]) for n in self.coded.keys() & made.keys()}


def _loaded(
    source: str | bytes, options: ort.SessionOptions, providers: Sequence[str]
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(source, options, providers=list(providers))
    except Exception as error:
        raise load_error(error) from None


def _has_float8(model: str | Path | onnx.ModelProto) -> bool:
    if not isinstance(model, onnx.ModelProto):
        path, model = Path(model), onnx.ModelProto()
        with suppress(DecodeError, OSError):  # what is no model has none
            model.ParseFromString(path.read_bytes())
    return any(tensor.data_type in _FLOAT8 for tensor in initializers(model))


class Session:
    """A model ready to run: `run(feed, names)` gives arrays by name."""

    def __init__(
        self,
        model: str | Path | onnx.ModelProto,
        *,
        providers: Sequence[str] = (CPU,),
        optimize: bool = True,
        threads: int | None = None,
        config: Mapping[str, str] | None = None,
        initializers: Mapping[str, Array] | None = None,
    ) -> None:
        """`initializers` are weights that the model itself leaves out. On the CPU, a model with
        operators of `ai.onnxq` gets their kernels, where a library of them was built.

        Raises OnnxqError when the runtime refuses the model or lacks the provider.
        """
        missing = [p for p in providers if p not in ort.get_available_providers()]
        if missing:
            have = ", ".join(ort.get_available_providers())
            raise OnnxqError(
                f"this onnxruntime has no {missing[0]}; it has {have}: install the package of "
                "onnxruntime that has it, or choose another target"
            )
        options = session_options()
        kernels = find_library() if _with_kernels.get() and providers[0] == CPU else None
        if kernels and str(kernels) not in _libraries.get() and names_operators(model):
            options.register_custom_ops_library(str(kernels))
        options.intra_op_num_threads = threads or default_threads()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        )
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)
        self._weights = {  # the session reads them where they are, so they must outlive it
            name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in (initializers or {}).items()
        }
        if self._weights:
            options.add_external_initializers(list(self._weights), list(self._weights.values()))
        with ExitStack() as files:  # the session has read what it needs once it is made
            source = self._source(model, files)
            try:
                self.ort = _loaded(source, options, providers)
            except OnnxqError:
                if not _has_float8(model):
                    raise
                options.add_session_config_entry(NO_PAIRS, "1")
                self.ort = _loaded(source, options, providers)
        self.inputs = [value.name for value in self.ort.get_inputs()]
        self.outputs = [value.name for value in self.ort.get_outputs()]
        ends = [*self.ort.get_inputs(), *self.ort.get_outputs()]
        self._has_bfloat16 = any(value.type == "tensor(bfloat16)" for value in ends)
        given = [*self.ort.get_inputs(), *self.ort.get_overridable_initializers()]
        kinds = {value.name: value.type for value in given}
        self._ends = Ends(kinds, from_metadata(self.ort.get_modelmeta().custom_metadata_map))

    @classmethod
    def of(cls, graph: Graph, **options: Any) -> Session:
        """A session of a graph, whose weights it takes from memory; `options` as above."""
        model, weights = to_proto_without_weights(graph)
        return cls(model, initializers=weights, **options)

    def _source(self, model: str | Path | onnx.ModelProto, files: ExitStack) -> str | bytes:
        if not isinstance(model, onnx.ModelProto):
            return str(model)
        external = any(map(is_external, initializers(model)))
        if external and self._weights:
            return bytes(self._with_other_weights(model).SerializeToString())
        if not external and sum(len(t.raw_data) for t in initializers(model)) < _SERIALIZE_LIMIT:
            return bytes(model.SerializeToString())
        path = files.enter_context(scratch()) / "model.onnx"
        save_proto(model, path)
        return str(path)

    def _with_other_weights(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model with what `initializers` do not give, such as weights in bodies, read in."""
        others = [
            t.name for t in initializers(model) if is_external(t) and t.name not in self._weights
        ]
        if not others:
            return model
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        for tensor in initializers(whole):
            if tensor.name in others:
                read_in(tensor, Path())
        return whole

    def run(
        self, feed: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Outputs by name. Inputs of float16 take float32 as well, for a model that was converted;
        where inputs and outputs are codes, real numbers go in and come out.

        Raises OnnxqError when the model does not run on this feed.
        """
        names = list(names or self.outputs)
        known = self._ends.codes(feed)
        try:
            run = self._run_bfloat16 if self._has_bfloat16 else self.ort.run
            said = dict(zip(names, run(names, known), strict=True))
        except Exception as error:
            text = one_line(error)
            raise OnnxqError(f"the model does not run on this sample: {text}") from None
        return self._ends.real(said)

    def _run_bfloat16(self, names: list[str], feed: Mapping[str, Array]) -> list[Array]:
        """As `InferenceSession.run`, which knows of no bfloat16 in NumPy."""
        made = self.ort.run_with_ort_values(names, {k: _ort_value(a) for k, a in feed.items()})
        return [_array(value) for value in made]


def _ort_value(array: Array) -> ort.OrtValue:
    if array.dtype != ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view(np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)


def _array(value: ort.OrtValue) -> Array:
    if not value.is_tensor() or value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    size = int(np.prod(value.shape()))
    raw = ctypes.string_at(value.data_ptr(), 2 * size) if size else b""
    return np.frombuffer(raw, np.uint16).view(ml_dtypes.bfloat16).reshape(value.shape())
