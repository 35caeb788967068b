"""Run candidates at a place: do they run, are they right, what do they take beside float?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxq.devices.place import Answer, Job, Place, ask
from onnxq.devices.single import difference, plain
from onnxq.errors import OnnxqError
from onnxq.graph import Array
from onnxq.ops.evaluate import evaluate
from onnxq.probing.candidates import Candidate
from onnxq.probing.forms import Form
from onnxq.target import OpRule

Ask = Callable[..., list[Answer]]
SECONDS = 0.2  # of timing a candidate and its rivals, in turns
_RESTING = {"session.intra_op.allow_spinning": "0"}  # or idle sessions hold the cores of the others
_FUSED = re.compile("QLinear|QGemm|Integer|Quant|NBits")
_AROUND = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class Measured:
    """What a candidate did. Times are those of runs in turns, in milliseconds; None: not timed.

    `off` is how far its answers are from the reference's: in steps of codes, or in parts of their
    range. `kernels` are the fused integer operators, none where it runs in float between
    quantizers. `float_ms` is the operator in float, `border_ms` what quantizers around it take.
    """

    op: str
    rule: OpRule
    purpose: str
    label: str
    block: int | None
    error: str = ""
    off: float = 0.0
    kernels: tuple[str, ...] | None = None
    integer_ms: float | None = None
    float_ms: float | None = None
    border_ms: float = 0.0

    @property
    def speedup(self) -> float | None:
        """How many times as fast as float."""
        if self.integer_ms is None or self.float_ms is None:
            return None
        return (self.float_ms + self.border_ms) / self.integer_ms

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `off` is null where there was nothing to hold answers against."""
        return {
            "op": self.op, "form": self.rule.form, "weight": str(self.rule.weight or ""),
            "activation": str(self.rule.activation or ""), "pair_limit": self.rule.pair_limit,
            "purpose": self.purpose, "shape": self.label, "error": self.error,
            "off": self.off if math.isfinite(self.off) else None, "kernels": self.kernels,
            "integer_ms": self.integer_ms, "float_ms": self.float_ms, "border_ms": self.border_ms,
        }  # fmt: skip


def measure(
    place: Place,
    wanted: Sequence[Candidate],
    *,
    timed: bool = True,
    threads: int | None = None,
    run: Ask = ask,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured]:
    """One measurement for each candidate, in order. `run` asks a place, as `ask` does."""
    here = Place("CPUExecutionProvider")
    references = run(here, [_reference(c) for c in wanted if c.purpose != "bits"])
    expected = iter(references)
    jobs = [_job(candidate, place, timed, threads) for candidate in wanted]
    answers = run(place, jobs, patience=120.0, progress=progress)
    found = []
    for candidate, answer in zip(wanted, answers, strict=True):
        right = None if candidate.purpose == "bits" else next(expected)
        found.append(_measured(place, candidate, answer, right))
    return found


def _reference(candidate: Candidate) -> Job:
    """Sums are held against those of the float model, which are whole numbers and so exact; codes
    against the same model without the runtime's optimizations."""
    form = candidate.reference if candidate.purpose == "sums" else candidate.form
    return Job(form.model, (form.feed,), optimize=False, threads=1)


def _job(candidate: Candidate, place: Place, timed: bool, threads: int | None) -> Job:
    form = candidate.form
    if candidate.purpose != "speed":
        return Job(form.model, (form.feed,), threads=threads)
    rivals = [candidate.reference, *borders(form)] if timed else []
    return Job(
        form.model, (form.feed,), threads=threads, config=_RESTING,
        seconds=SECONDS * timed, rivals=[(r.model, r.feed) for r in rivals],
        optimized=place.provider == "CPUExecutionProvider",
    )  # fmt: skip


def borders(form: Form) -> list[Form]:
    """A model of the quantizers that stand around an operator left float; none where the form
    itself takes and makes floats, as dynamic ones do."""
    codes = {k: v for k, v in form.feed.items() if v.dtype.kind in "iu" and v.dtype.itemsize < 4}
    if not codes or not _is_bare(form.model):
        return []
    first = next(iter(codes.values()))
    floats = {name: np.zeros(array.shape, np.float32) for name, array in codes.items()}
    feed: dict[str, Array] = {**codes, "made": next(iter(floats.values()))}
    nodes = [
        helper.make_node("DequantizeLinear", [name, "scale", "zero"], [f"{name}_real"])
        for name in codes
    ] + [helper.make_node("QuantizeLinear", ["made", "scale", "zero"], ["codes"])]
    outputs = {f"{name}_real": array for name, array in floats.items()} | {"codes": first}
    constants = {"scale": np.array(0.1, np.float32), "zero": np.zeros((), first.dtype)}
    graph = helper.make_graph(
        nodes, "borders", _infos(feed), _infos(outputs),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    like = form.model
    model = helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)
    return [Form(model, feed)]


def _infos(arrays: Mapping[str, Array]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in arrays.items()
    ]


def _is_bare(model: onnx.ModelProto) -> bool:
    """Whether an operator without weights stands between the quantizers."""
    return {"scale", "zero"} <= {tensor.name for tensor in model.graph.initializer}


def _measured(place: Place, candidate: Candidate, answer: Answer, right: Answer | None) -> Measured:
    c = candidate
    basis: dict[str, Any] = {
        "op": c.op, "rule": c.rule, "purpose": c.purpose, "label": c.label, "block": c.block
    }  # fmt: skip
    elsewhere = sorted({p for p in answer.placement.values() if p != place.provider})
    if answer.error or elsewhere:
        why = plain(answer.error) if answer.error else f"runs on {', '.join(elsewhere)}"
        return Measured(**basis, error=why)
    off = _off(c, answer.outputs[0], right)
    times = [typical(t) for t in (answer.latencies_ms, *answer.rivals_ms) if t]
    integer, floats, border = (*times, *[None] * 3)[:3] if times else (None, None, None)
    return Measured(
        **basis, off=off, kernels=_kernels(answer),
        integer_ms=integer, float_ms=floats, border_ms=border or 0.0,
    )  # fmt: skip


def typical(times_ms: Sequence[float]) -> float:
    """Of runs in turns: what other work on the machine disturbed least."""
    return float(np.percentile(times_ms, 20))


def _off(candidate: Candidate, made: Mapping[str, Array], right: Answer | None) -> float:
    if candidate.purpose == "bits":
        try:
            exact = evaluate(candidate.form.model, candidate.form.feed)
        except OnnxqError:
            return float("nan")  # beyond what exact arithmetic knows
        same = all(np.array_equal(exact[name], made[name]) for name in made)
        return 0.0 if same else float("inf")
    if right is None or right.error:
        return float("nan")
    outputs = right.outputs[0]
    if all(a.dtype.kind in "iu" for a in outputs.values()):
        return max(
            float(np.abs(made[n].astype(np.int64) - a.astype(np.int64)).max(initial=0))
            for n, a in outputs.items()
        )
    return difference(outputs, dict(made))


def _kernels(answer: Answer) -> tuple[str, ...] | None:
    """The integer operators that the runtime made of it; None where it does not say."""
    if answer.optimized is None:
        return None
    ops = [node.op_type for node in answer.optimized.graph.node]
    fused = [op for op in ops if _FUSED.search(op) and op not in _AROUND]
    return tuple(dict.fromkeys(fused))
