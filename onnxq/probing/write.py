"""A target as TOML that `load_target` reads: one [[rule]] or [[supports]] per line of evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from onnxq import toml
from onnxq.devices.single import Verdict
from onnxq.qtype import QType
from onnxq.target import OpRule, Support, Target

_TABLES = {"rule": "ops", "supports": "supports"}  # key → field
_DICTS = ("left_float", "lacks", "session", "provider_options", "float32", "slow")


def target_toml(target: Target, notes: Sequence[str] = ()) -> str:
    """The whole of a target, in need of no base; `notes` go above it as comments."""
    blocks = ["\n".join(f"# {note}" for note in notes)] if notes else []
    rows = [
        f"{f.name} = {_value(value)}"
        for f in fields(Target)
        if f.name not in ("name", *_TABLES.values(), *_DICTS)
        and (value := getattr(target, f.name)) not in ((), None, False)
    ]
    blocks.append("\n".join(rows))
    for key, held in _TABLES.items():
        blocks += [_table(key, ops, row) for row, ops in _grouped(getattr(target, held))]
    for key in _DICTS:
        entries: Mapping[str, str] = getattr(target, key)
        if entries:
            lines = [f"{toml.dump(k)} = {toml.dump(v)}" for k, v in entries.items()]
            blocks.append("\n".join([f"[{key}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _grouped(ops: Mapping[str, Iterable[Any]]) -> list[tuple[Any, list[str]]]:
    """(row, operators), the rows of each operator in the order that they had."""
    found: list[tuple[Any, list[str]]] = []
    for op, rows in ops.items():
        after = 0
        for row in rows:
            same = [n for n in range(after, len(found)) if found[n][0] == row]
            if same:
                found[same[0]][1].append(op)
                after = same[0] + 1
            else:
                found.append((row, [op]))
                after = len(found)
    return found


def _table(name: str, ops: Sequence[str], row: OpRule | Support) -> str:
    lines = [f"[[{name}]]", f"ops = {toml.dump(tuple(ops))}"]
    for f in fields(row):
        value = getattr(row, f.name)
        if value not in (None, (), {}) and value != f.default:
            lines.append(f"{f.name} = {_value(value)}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, QType):
        return toml.dump(str(value))
    if isinstance(value, dict):
        inner = (f"{toml.dump(k)} = {toml.dump(tuple(v))}" for k, v in value.items())
        return "{ " + ", ".join(inner) + " }"
    return toml.dump(value)


def supports(found: Sequence[Verdict], source: str) -> dict[str, tuple[Support, ...]]:
    """What a provider runs as it stands, by operator: the types of which a call ran, the ranks,
    and, where a call of an attribute's value did not run, the values that did."""
    made: dict[str, tuple[Support, ...]] = {}
    for op in dict.fromkeys(verdict.single.op for verdict in found):
        rows = [verdict for verdict in found if verdict.single.op == op]
        good = [verdict for verdict in rows if verdict.runs]
        if not good:
            continue
        types = tuple(dict.fromkeys(v.single.type for v in good))
        refused = {v.single.rank for v in rows} - {v.single.rank for v in good}
        ranks = [v.single.rank for v in good]
        bounds = (min(ranks), max(ranks)) if refused else ()
        made[op] = (Support(source, types=types, ranks=bounds, attributes=_attributes(rows)),)
    return made


def _attributes(rows: Sequence[Verdict]) -> dict[str, list[Any]]:
    """Attributes of text, some value of which never ran, with those that did."""
    values: dict[str, list[Any]] = {}
    for key in sorted({key for v in rows for key in v.single.call.attributes}):
        said = [(v.runs, v.single.call.attributes.get(key)) for v in rows]
        tried = {value for _, value in said if isinstance(value, str)}
        ran = {value for runs, value in said if runs and isinstance(value, str)}
        if ran and tried - ran:
            values[key] = sorted(ran)
    return values
