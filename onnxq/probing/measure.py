"""Run candidates at a place: do they run, are they right, what do they take beside float?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq.devices.place import Answer, Job, Place, ask
from onnxq.devices.single import difference
from onnxq.errors import OnnxqError
from onnxq.graph import Array
from onnxq.ops.evaluate import evaluate
from onnxq.probing.candidates import Candidate
from onnxq.probing.forms import Form
from onnxq.target import OpRule

Ask = Callable[..., list[Answer]]
SECONDS = 0.12  # of timing a candidate and its rivals, in turns
_RESTING = {"session.intra_op.allow_spinning": "0"}  # or idle sessions hold the cores of the others
_AROUND = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Clip")


@dataclass(frozen=True)
class Measured:
    """What a candidate did. Times are medians in milliseconds of runs in turns; None: not timed.

    `off` is how far its answers are from the reference's: in steps of codes, or in parts of their
    range. `float_ms` is the operator in float, `border_ms` what quantizers around it take then.
    """

    op: str
    rule: OpRule
    purpose: str
    label: str
    block: int | None
    error: str = ""
    off: float = 0.0
    kernels: tuple[str, ...] = ()
    integer_ms: float | None = None
    float_ms: float | None = None
    border_ms: float = 0.0

    @property
    def speedup(self) -> float | None:
        """How many times as fast as float."""
        if self.integer_ms is None or self.float_ms is None:
            return None
        return (self.float_ms + self.border_ms) / self.integer_ms


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
    if not codes or len(form.model.graph.initializer) > 3 or not _is_bare(form.model):
        return []
    nodes, inputs, outputs, feed = [], [], [], dict[str, Array]()
    for name, array in codes.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        nodes += [
            helper.make_node("DequantizeLinear", [name, "scale", "zero"], [f"{name}_real"]),
            helper.make_node("QuantizeLinear", [f"{name}_in", "scale", "zero"], [f"{name}_codes"]),
        ][: 2 if not outputs else 1]
        inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
        outputs.append(
            helper.make_tensor_value_info(f"{name}_real", TensorProto.FLOAT, array.shape)
        )
        feed[name] = array
        zero = np.zeros((), array.dtype)
    first = next(iter(codes))
    inputs.append(
        helper.make_tensor_value_info(f"{first}_in", TensorProto.FLOAT, codes[first].shape)
    )
    kind = helper.np_dtype_to_tensor_dtype(codes[first].dtype)
    outputs.append(helper.make_tensor_value_info(f"{first}_codes", kind, codes[first].shape))
    feed[f"{first}_in"] = np.zeros(codes[first].shape, np.float32)
    constants = [
        numpy_helper.from_array(np.asarray(0.1, np.float32), "scale"),
        numpy_helper.from_array(zero, "zero"),
    ]
    graph = helper.make_graph(nodes, "borders", inputs, outputs, constants)
    original = form.model
    return [
        Form(
            helper.make_model(
                graph, opset_imports=original.opset_import, ir_version=original.ir_version
            ),
            feed,
        )
    ]


def _is_bare(model: onnx.ModelProto) -> bool:
    """Whether an operator without weights stands between the quantizers."""
    return {"scale", "zero"} <= {tensor.name for tensor in model.graph.initializer}


def _measured(
    place: Place, candidate: Candidate, answer: Answer, right: Answer | None
) -> Measured:
    c = candidate
    basis: dict[str, Any] = {
        "op": c.op, "rule": c.rule, "purpose": c.purpose, "label": c.label, "block": c.block
    }  # fmt: skip
    elsewhere = sorted({p for p in answer.placement.values() if p != place.provider})
    if answer.error or elsewhere:
        why = _plain(answer.error) if answer.error else f"runs on {', '.join(elsewhere)}"
        return Measured(**basis, error=why)
    off = _off(c, answer.outputs[0], right)
    times = [float(np.median(t)) for t in (answer.latencies_ms, *answer.rivals_ms) if t]
    integer, floats, border = (*times, *[None] * 3)[:3] if times else (None, None, None)
    return Measured(
        **basis, off=off, kernels=_kernels(answer),
        integer_ms=integer, float_ms=floats, border_ms=border or 0.0,
    )  # fmt: skip


def _plain(error: str) -> str:
    """What a runtime says, without its own codes before it."""
    return error.rsplit("] : ", 1)[-1][:160]


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


def _kernels(answer: Answer) -> tuple[str, ...]:
    if answer.optimized is None:
        return ()
    ops = [node.op_type for node in answer.optimized.graph.node]
    return tuple(dict.fromkeys(op for op in ops if op not in _AROUND))


def summary(rows: Sequence[Measured]) -> str:
    """As JSON, for other programs."""
    return json.dumps([
        {"op": r.op, "form": r.rule.form, "purpose": r.purpose, "shape": r.label,
         "activation": str(r.rule.activation or ""), "weight": str(r.rule.weight or ""),
         "pair_limit": r.rule.pair_limit, "error": r.error, "off": r.off,
         "kernels": list(r.kernels), "integer_ms": r.integer_ms, "float_ms": r.float_ms,
         "border_ms": r.border_ms}
        for r in rows
    ])  # fmt: skip
