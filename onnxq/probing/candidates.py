"""What to run: every shipped rule on every operator that it names, as models with an answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnxq.devices.calls import Call
from onnxq.devices.single import OPSET, Single, make_single, table
from onnxq.errors import OnnxqError
from onnxq.float_operators import float_operators
from onnxq.probing.cases import LAYERS, of_codes, saturating
from onnxq.probing.forms import Form, between, coded_form, integer_form, whole_form
from onnxq.target import OpRule, Target, load_target, target_names

PAIR_LIMIT = 128  # 255 · 128 < 2¹⁵: sums of such pairs fit 16 bits


@dataclass(frozen=True)
class Candidate:
    """A form to run at a place, and what its answers are held against.

    `purpose` is `speed` (beside float, answers as without the runtime's optimizations), `sums`
    (the largest products, against the exact sums) or `bits` (against integers of any size). The
    rule is as shipped but for `pair_limit`, which is the one that the form keeps.
    """

    op: str
    rule: OpRule
    purpose: str
    label: str
    form: Form
    reference: Form
    block: int | None = None


def shipped_rules(first: str) -> list[tuple[str, OpRule]]:
    """(operator, rule) of the shipped targets, those of `first` before others', each once."""
    names = [first, *(name for name in target_names() if name != first)]
    found: dict[tuple[str, OpRule], OpRule] = {}
    for name in names:
        for op, rules in load_target(name).ops.items():
            for rule in rules:
                key = (op, replace(rule, source="", pair_limit=None))
                found.setdefault(key, replace(rule, pair_limit=None))
    return [(op, rule) for (op, _), rule in found.items()]


def candidates(op: str, rule: OpRule, base: Target) -> Iterator[Candidate]:
    """Those that onnxq can make of a rule; of integers alone, of all that `base` has."""
    if rule.form == "integer":
        yield from _bits(op, rule, base)
    elif op in LAYERS:
        yield from _speeds(op, rule)
        yield from _sums(op, rule)
    else:
        yield from _elementwise(op, rule)


def _speeds(op: str, rule: OpRule) -> Iterator[Candidate]:
    """Every shape; every size of blocks on the first."""
    fitting = {label: call for label, call in LAYERS[op].items() if _is_of(rule, op, call)}
    for number, (label, call) in enumerate(fitting.items()):
        single = make_single(op, call, "float32", OPSET)
        if single is None:
            continue
        blocks = rule.blocks or (None,)
        for block in blocks if number == 0 else blocks[len(blocks) // 2 :][:1]:
            try:
                form = coded_form(single, rule, block)
            except OnnxqError:
                continue
            what = f"{label}, blocks of {block}" if block else label
            whole = Form(single.model, single.feed)
            yield Candidate(op, rule, "speed", what, form, whole, block)


def _is_of(rule: OpRule, op: str, call: Call) -> bool:
    """Whether a call is of the kind that a rule is for. A general rule leaves depthwise aside."""
    weight = call.inputs[1]
    if op == "Conv":
        return bool(rule.depthwise) == (call.attributes.get("group", 1) != 1)
    if op == "MatMul":
        constant = not isinstance(weight, tuple)
        batched = constant and len(getattr(weight, "shape", ())) > 2
        wanted = rule.constant_weight is not False
        return wanted == constant and bool(rule.batched) == batched
    return True


def _sums(op: str, rule: OpRule) -> Iterator[Candidate]:
    """The largest sums, with neighbouring weights unbound and, where that may help, bound."""
    takes = op in ("Conv", "Gemm", "MatMul") and rule.weight is not None
    if not takes or rule.constant_weight is False:
        return
    assert rule.weight is not None
    pairs = rule.activation is not None and rule.weight.bits == 8 and rule.weight.signed
    single = largest(op, rule)
    for limit in (None, PAIR_LIMIT) if pairs and not rule.depthwise else (None,):
        for block in rule.blocks or (None,):
            bound = replace(rule, pair_limit=limit)
            try:
                form = whole_form(single, bound, block)
            except OnnxqError:
                continue
            label = f"largest sums{f', blocks of {block}' if block else ''}"
            whole = Form(single.model, single.feed)
            yield Candidate(op, bound, "sums", label, form, whole, block)


def largest(op: str, rule: OpRule) -> Single:
    """Activations 1, -1, and 1 and -1 by turns; weights 1 in half of the outputs, else -1."""
    call = saturating(op, bool(rule.depthwise), bool(rule.batched))
    single = make_single(op, call, "float32", OPSET)
    assert single is not None
    weights = single.model.graph.initializer[0]
    shape = tuple(weights.dims)
    axis = 0 if op == "Conv" else -1
    halves = np.where(np.arange(shape[axis]) % 2, -1.0, 1.0).astype(np.float32)
    along = [1] * len(shape)
    along[axis] = -1
    weights.raw_data = np.ascontiguousarray(np.broadcast_to(halves.reshape(along), shape)).tobytes()
    x = np.ones_like(single.feed["x0"])
    if op == "Conv":  # windows of three columns
        x[..., 3:6], x[..., ::2, 6:] = -1, -1
    else:
        x[..., 1, :], x[..., 2, ::2] = -1, -1
    return replace(single, feed={"x0": x})


def _elementwise(op: str, rule: OpRule) -> Iterator[Candidate]:
    if rule.form != "static" or rule.activation is None or rule.activation.bits < 8:
        return
    for label, call in of_codes(op).items():
        single = make_single(op, call, "float32", OPSET)
        if single is not None:
            whole = Form(single.model, single.feed)
            form = between(single, rule.activation)
            yield Candidate(op, rule, "speed", label, form, whole)


def _bits(op: str, rule: OpRule, base: Target) -> Iterator[Candidate]:
    """The first call that becomes integer as a whole: a power of a variable has no such form."""
    for call in table().get(op, ()):
        single = make_single(op, call, "float32", OPSET)
        if single is None or (op == "MatMul" and not _is_of(rule, op, call)):
            continue
        try:
            form = integer_form(single, base)
        except OnnxqError:
            continue
        if float_operators(form.model):
            continue
        yield Candidate(op, rule, "bits", "bits", form, form)
        return
