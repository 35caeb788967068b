"""What one model has and another has not: operators, stretches of the graph, parameters, types.

Tensors of one name are the same in both: a pass keeps the name of whatever it does not change the
meaning of. Between tensors that both models have lie stretches of nodes; where those of one model
differ from those of the other something was replaced, fused or put in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import graph as g
from onnxq.storage import load_proto, model_size

Tensors = Mapping[str, Any]


@dataclass
class Count:
    """How many of something each model has."""

    name: str
    before: int
    after: int


@dataclass
class Stretch:
    """Operators that became others, in order, at `count` places; `example` is a tensor they make.

    Where `before` and `after` are the same, only `attributes` changed.
    """

    before: list[str]
    after: list[str]
    count: int
    example: str
    attributes: list[str] = field(default_factory=list)


@dataclass
class Parameter:
    """A parameter of one name in both models that is not the same: type and shape, or values."""

    name: str
    before: str
    after: str


@dataclass
class Difference:
    """`interface` are changes of inputs, outputs and opsets, each in words; `types` counts the
    numbers in parameters and constants by element type. `shared_tensors` of the `tensors` that
    nodes of the first model make have a namesake in the second.
    """

    before: str
    after: str
    before_bytes: int
    after_bytes: int
    tensors: int
    shared_tensors: int
    interface: list[str]
    operators: list[Count]
    stretches: list[Stretch]
    types: list[Count]
    parameters: list[Parameter]

    @property
    def same(self) -> bool:
        """In structure and parameters."""
        changed = [o for o in (*self.operators, *self.types) if o.before != o.after]
        return not (changed or self.interface or self.stretches or self.parameters)

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"same": self.same}, indent=2)


def diff(before: str | Path, after: str | Path) -> Difference:
    """How the second model differs from the first. Raises OnnxqError for what is no model."""
    protos = load_proto(before), load_proto(after)
    graphs = tuple(g.load(p, Path(f).parent) for p, f in zip(protos, (before, after), strict=True))
    nodes = [[n for n in g.walk(graph) if n.op != "Constant"] for graph in graphs]
    made = [{t.name: node for node in some for t in node.outputs if t.name} for some in nodes]
    inputs = {t.name for graph in graphs for t in graph.inputs}
    shared = (made[0].keys() & made[1].keys()) | inputs
    weights = [{t.name: t for t in g.constants(graph)} for graph in graphs]
    return Difference(
        before=str(before),
        after=str(after),
        before_bytes=model_size(before),
        after_bytes=model_size(after),
        tensors=len(made[0]),
        shared_tensors=len(made[0].keys() & made[1].keys()),
        interface=[
            *_opsets(*protos),
            *_values("input", graphs[0].inputs, graphs[1].inputs),
            *_values("output", graphs[0].outputs, graphs[1].outputs),
        ],
        operators=counts(*(Counter(map(label, some)) for some in nodes)),
        stretches=stretches(made[0], made[1], shared),
        types=counts(*map(_types, graphs)),
        parameters=_parameters(*weights),
    )


def label(node: g.Node) -> str:
    """An operator by its type, with its domain where it is none of ONNX's own."""
    return node.op if g.is_standard(node) else f"{node.domain}.{node.op}"


def counts(before: Counter[str], after: Counter[str]) -> list[Count]:
    """Those that differ most first.

    >>> [(c.name, c.before, c.after) for c in counts(Counter("aab"), Counter("bccc"))]
    [('c', 0, 3), ('a', 2, 0), ('b', 1, 1)]
    """
    rows = [Count(name, before[name], after[name]) for name in {*before, *after}]
    return sorted(rows, key=lambda row: (-abs(row.after - row.before), row.name))


def stretches(
    before: Mapping[str, g.Node], after: Mapping[str, g.Node], shared: set[str]
) -> list[Stretch]:
    """What makes the shared tensors in one model and otherwise in the other, the most frequent
    first. `before` and `after` are the nodes by the tensors that they make.
    """
    found: dict[tuple[tuple[str, ...], ...], Stretch] = {}
    for tensor in before:
        if tensor not in after:
            continue
        left, right = (_stretch(made, tensor, shared) for made in (before, after))
        ops = tuple(map(label, left)), tuple(map(label, right))
        attributes = tuple(_attributes(left, right)) if ops[0] == ops[1] else ()
        if ops[0] == ops[1] and not attributes:
            continue
        known = found.setdefault(
            (*ops, attributes), Stretch([*ops[0]], [*ops[1]], 0, tensor, [*attributes])
        )
        known.count += 1
    return sorted(found.values(), key=lambda s: (-s.count, s.before, s.after))


def _stretch(made: Mapping[str, g.Node], tensor: str, shared: set[str]) -> list[g.Node]:
    """The nodes that make a tensor from shared ones, in the order of the data."""
    order: dict[int, g.Node] = {}
    pending: list[tuple[g.Node, bool]] = [(made[tensor], False)]
    while pending:
        node, inputs_done = pending.pop()
        if inputs_done:
            order.setdefault(id(node), node)
            continue
        if id(node) in order:
            continue
        pending.append((node, True))
        names = [t.name for t in reversed(node.inputs)]
        pending += [(made[n], False) for n in names if n in made and n not in shared]
    return list(order.values())


def _attributes(left: list[g.Node], right: list[g.Node]) -> list[str]:
    """Attributes of nodes of the same types that differ, as `Conv.pads: [0, 0] → [1, 1]`."""
    changed = []
    for a, b in zip(left, right, strict=True):
        for name in sorted({*a.attrs, *b.attrs}):
            values = [node.attrs.get(name, "none") for node in (a, b)]
            if not any(isinstance(v, g.Graph) for v in values) and not _equal(*values):
                changed.append(f"{label(a)}.{name}: {_text(values[0])} → {_text(values[1])}")
    return changed


def _equal(a: Any, b: Any) -> bool:
    tensors = [hasattr(value, "values") for value in (a, b)]
    if all(tensors):
        return bool(np.array_equal(a.values, b.values))
    return not any(tensors) and bool(np.array_equal(a, b))


def _text(value: Any) -> str:
    return "a tensor" if hasattr(value, "values") else str(value)


def _opsets(before: Any, after: Any) -> list[str]:
    sets = [{o.domain or "ai.onnx": o.version for o in p.opset_import} for p in (before, after)]
    return [
        f"opset of {name}: {sets[0].get(name, 'none')} → {sets[1].get(name, 'none')}"
        for name in sorted({*sets[0], *sets[1]})
        if sets[0].get(name) != sets[1].get(name)
    ]


def _values(what: str, before: list[Any], after: list[Any]) -> list[str]:
    """Inputs or outputs that came, went or changed."""
    left, right = ({t.name: signature(t) for t in tensors} for tensors in (before, after))
    return [
        f"{what} {name}: {left.get(name, 'none')} → {right.get(name, 'none')}"
        for name in dict.fromkeys((*left, *right))
        if left.get(name) != right.get(name)
    ]


def signature(tensor: Any) -> str:
    """Element type and shape, as `float32[n, 3]`."""
    shape = "?" if tensor.shape is None else ", ".join("?" if d is None else str(d) for d in
                                                      tensor.shape)  # fmt: skip
    return f"{g.dtype(tensor) or 'unknown'}[{shape}]"


def _types(graph: g.Graph) -> Counter[str]:
    """Numbers in constants, those of Constant nodes too, by element type."""
    found: Counter[str] = Counter()
    made = [node.attrs["value"] for node in g.walk(graph) if "value" in node.attrs]
    constants = {id(t): t for t in (*g.constants(graph), *made) if g.is_constant(t)}
    for tensor in constants.values():
        found[str(g.dtype(tensor))] += int(np.prod(tensor.shape, dtype=np.int64))
    return found


def _parameters(before: Tensors, after: Tensors) -> list[Parameter]:
    """Read one pair at a time."""
    found = []
    for name in before.keys() & after.keys():
        left, right = signature(before[name]), signature(after[name])
        if left != right:
            found.append(Parameter(name, left, right))
        elif not np.array_equal(_bytes(before[name]), _bytes(after[name])):
            found.append(Parameter(name, left, f"{right}, other values"))
    return sorted(found, key=lambda p: p.name)


def _bytes(tensor: Any) -> Any:
    return np.ascontiguousarray(g.values(tensor)).reshape(-1).view(np.uint8)
