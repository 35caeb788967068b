"""Models of one operator each, and which of them a place runs: what `[[supports]]` is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from onnxq.devices import calls, layer_calls, movement_calls
from onnxq.devices.calls import Call, Fed, Weight, is_data
from onnxq.devices.place import Answer, Job, Place, ask

Array = NDArray[Any]

OPSET = 21  # that every runtime of these years loads; newer for operators that are newer
TYPES = (
    "float32", "float16", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32",
    "int64", "uint64", "bool",
)  # fmt: skip
_IN_SCHEMAS = {"float32": "float", "float64": "double"}
_TOLERANCE = {"float16": 2e-2, "float32": 1e-3, "float64": 1e-3}  # of the output's range


@dataclass(frozen=True)
class Single:
    """A model of one operator on data of one element type, and what to feed it.

    `rank` is of that data; 0 also where the operator takes none, as Range.
    """

    op: str
    type: str
    rank: int
    call: Call
    model: onnx.ModelProto
    feed: dict[str, Array]

    def __str__(self) -> str:
        said = [f"{key}={value}" for key, value in self.call.attributes.items()]
        return " ".join([self.op, self.type, f"rank {self.rank}", *said])


@dataclass(frozen=True)
class Verdict:
    """Whether a place ran a model itself. `reason` says why not; `error` is the largest difference
    to the CPU here, relative to the output's range (None: nothing to compare)."""

    single: Single
    runs: bool
    reason: str = ""
    error: float | None = None


def table() -> dict[str, tuple[Call, ...]]:
    """Calls by operator."""
    parts = (calls.elementwise, calls.pairs, calls.reductions, movement_calls.movement,
             layer_calls.layers, layer_calls.pools, layer_calls.quantizers,
             layer_calls.control_flow, layer_calls.microsoft)  # fmt: skip
    return {op: found for part in parts for op, found in part().items()}


def singles(
    ops: Iterable[str] | None = None, types: Sequence[str] = TYPES, opset: int = OPSET
) -> list[Single]:
    """The models of these operators (None: of all) on data of each of these types they take.

    Every call in the first of the types, one in each of the others.
    """
    known = table()
    return [
        made
        for op in (known if ops is None else ops)
        for kind in types
        for number, call in enumerate(_typical(known[op], first=kind == types[0]))
        if (made := make_single(op, call, kind, opset, number)) is not None
    ]


def _typical(found: tuple[Call, ...], first: bool) -> tuple[Call, ...]:
    """All calls, or those that are like most: of rank 4, or else the highest below."""
    if first or any(call.types for call in found):
        return found
    ranks = {call.rank for call in found}
    rank = max((r for r in ranks if r <= 4), default=max(ranks))
    return next((call,) for call in found if call.rank == rank)


def make_single(
    op: str, call: Call, kind: str = "float32", opset: int = OPSET, number: int = 0
) -> Single | None:
    """The model of one call; None where the operator takes no such data. `number` seeds it."""
    opset = max(opset, _first_opset(op, call.domain))
    if kind not in (call.types or _types(op, call, opset)):
        return None
    rng = np.random.default_rng([number, TYPES.index(kind)])
    names: list[str] = []
    feed: dict[str, Array] = {}
    constants: list[onnx.TensorProto] = []
    for place, value in enumerate(call.inputs):
        name = "" if value is None else f"x{place}"
        names.append(name)
        if isinstance(value, Fed):
            feed[name] = value.array
        elif isinstance(value, Weight):
            array = np.full(value.shape, value.value) if value.value is not None else None
            array = _draw(rng, value.shape, kind, call) if array is None else array.astype(kind)
            constants.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        elif isinstance(value, tuple):
            feed[name] = _draw(rng, value, kind, call)
        elif value is not None:
            constants.append(onnx.numpy_helper.from_array(value, name))
    outputs = [f"y{n}" for n in range(call.outputs)]
    node = helper.make_node(op, names, outputs, name=op, domain=call.domain, **call.attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in feed.items()
    ]
    graph = helper.make_graph(
        [node], "single", inputs, [onnx.ValueInfoProto(name=n) for n in outputs], constants
    )
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(call.domain, 1)] if call.domain else []
    ir = helper.find_min_ir_version_for(opsets[:1])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir)
    return Single(op, kind, call.rank, call, onnx.shape_inference.infer_shapes(model), feed)


def _draw(rng: np.random.Generator, shape: tuple[int, ...], kind: str, call: Call) -> Array:
    if kind == "bool":
        return np.asarray(rng.random(shape) < 0.5)
    if kind.startswith("float"):
        return np.asarray(rng.uniform(call.low, call.high, shape).astype(kind))
    low = 1 if call.low >= 0 or kind.startswith("u") else -5
    return np.asarray(rng.integers(low, 6, shape).astype(kind))


@cache
def _first_opset(op: str, domain: str) -> int:
    if domain:
        return 1
    every = onnx.defs.get_all_schemas_with_history()
    return min(s.since_version for s in every if s.name == op and s.domain == "")


def _types(op: str, call: Call, opset: int) -> set[str]:
    """What all inputs that are data may be; float32 says that nothing of the call is."""
    schema = onnx.defs.get_schema(op, opset)
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    places = [n for n, value in enumerate(call.inputs) if is_data(value)]
    if not places:
        return {"float32"}
    formals = [schema.inputs[min(n, len(schema.inputs) - 1)].type_str for n in places]
    known = [allowed.get(formal, {formal}) for formal in formals]
    return {
        kind
        for kind in TYPES
        if all(f"tensor({_IN_SCHEMAS.get(kind, kind)})" in types for types in known)
    }


def verdicts(
    place: Place,
    models: Sequence[Single],
    *,
    patience: float = 60.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Verdict]:
    """Which of these models a place runs itself: all nodes its own, the answers the CPU's.

    Raises OnnxqError where the place itself does not work.
    """
    jobs = [Job(single.model, (single.feed,), threads=1) for single in models]
    here = ask(Place("CPUExecutionProvider"), jobs)
    there = ask(place, jobs, patience=patience, progress=progress)
    return [
        _verdict(place, single, ours, theirs)
        for single, ours, theirs in zip(models, here, there, strict=True)
    ]


def _verdict(place: Place, single: Single, here: Answer, there: Answer) -> Verdict:
    if there.error:
        return Verdict(single, False, plain(there.error))
    elsewhere = sorted({p for p in there.placement.values() if p != place.provider})
    if elsewhere:
        return Verdict(single, False, f"runs on {', '.join(elsewhere)}")
    if here.error:
        return Verdict(single, True)
    error = difference(here.outputs[0], there.outputs[0])
    bound = max(_TOLERANCE.get(str(a.dtype), 0.0) for a in here.outputs[0].values())
    bound = max(bound, _TOLERANCE.get(single.type, 0.0))
    if error > bound:
        return Verdict(single, False, f"answers differ by {error:.2g} of their range", error)
    return Verdict(single, True, error=error)


_NOISE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:")


def plain(error: str) -> str:
    """What a runtime says, without its codes and the paths of the day."""
    return _NOISE.sub("", error)[:160]


def difference(one: dict[str, Array], other: dict[str, Array]) -> float:
    """The largest, of all outputs, relative to the range of each; infinite for other shapes."""
    worst = 0.0
    for name, a in one.items():
        b = other[name]
        if a.shape != b.shape:
            return float("inf")
        if a.size == 0 or a.dtype.kind not in "fiub":
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        if not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return float("inf")
        finite = np.isfinite(x)
        span = float(np.abs(x[finite]).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(x - y)[finite].max(initial=0.0)) / span)
    return worst
