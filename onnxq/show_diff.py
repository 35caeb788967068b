"""The difference of two models in the terminal: in words, then as tables."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from onnxq.diff import Difference, Stretch
from onnxq.headline import smaller
from onnxq.tables import TOP, Column, heading, print_more, print_table, print_text, quantity

KEPT = 0.5  # of the tensors; with fewer shared names the stretches say little


def show_diff(found: Difference, console: Console) -> None:
    """The words first: the tables are for who wants to know exactly."""
    console.print(Text(f"{found.before} → {found.after}", style="bold"), soft_wrap=True)
    for sentence in sentences(found):
        print_text(console, sentence, 2)
    changed = [o for o in found.operators if o.before != o.after]
    if changed:
        heading(console, "Operators")
        rows = [[o.name, str(o.before), str(o.after), f"{o.after - o.before:+d}"] for o in changed]
        columns = [Column("", fit="cut"), *(Column(t, "right") for t in ("before", "after", ""))]
        print_table(console, columns, rows)
    if found.stretches:
        heading(console, "What became of what", f"{sum(s.count for s in found.stretches)} places")
        columns = [Column("places", "right"), Column("before", fit="wrap"),
                   Column("after", fit="wrap")]  # fmt: skip
        rows = [[str(s.count), *_sides(s)] for s in found.stretches[:TOP]]
        print_table(console, columns, rows)
        print_more(console, len(found.stretches) - TOP, "kind", "--json has them all")
    types = [t for t in found.types if t.before != t.after]
    if types:
        heading(console, "Numbers in parameters and constants, by type")
        rows = [[t.name, quantity(t.before), quantity(t.after)] for t in types]
        print_table(
            console, [Column(""), Column("before", "right"), Column("after", "right")], rows
        )
    if found.parameters:
        heading(console, "Parameters of one name", str(len(found.parameters)))
        columns = [Column("", fit="cut"), Column("before", fit="wrap"), Column("after", fit="wrap")]
        rows = [[p.name, p.before, p.after] for p in found.parameters[:TOP]]
        print_table(console, columns, rows)
        print_more(console, len(found.parameters) - TOP, "parameter", "--json has them all")


def sentences(found: Difference) -> list[str]:
    """What changed, the plainest first."""
    if found.same:
        return ["The models have the same structure and the same parameters."]
    nodes = [sum(getattr(o, side) for o in found.operators) for side in ("before", "after")]
    sizes = quantity(found.before_bytes, "B"), quantity(found.after_bytes, "B")
    said = [
        f"{sizes[0]} became {sizes[1]} ({smaller(found.before_bytes, found.after_bytes)}), "
        f"{nodes[0]} nodes became {nodes[1]}."
    ]
    new = [o.name for o in found.operators if not o.before]
    gone = [o.name for o in found.operators if not o.after]
    if new:
        said.append(f"New operators: {', '.join(new)}.")
    if gone:
        said.append(f"Operators that are gone: {', '.join(gone)}.")
    said += [f"{text[0].upper()}{text[1:]}." for text in found.interface]
    said += [_fused(s) for s in found.stretches if _work(s.after) < _work(s.before)][:3]
    if found.shared_tensors < KEPT * found.tensors:
        said.append(
            f"Only {found.shared_tensors} of {found.tensors} tensors have the same name in both: "
            "what became of what is told by names, and may be coarse."
        )
    return said


def _work(ops: list[str]) -> int:
    """Operators that compute, not those that only change the type."""
    return sum(op not in ("QuantizeLinear", "DequantizeLinear", "Cast") for op in ops)


def _fused(stretch: Stretch) -> str:
    places = f"{stretch.count} place{'s' * (stretch.count > 1)}"
    before, after = _sides(stretch)
    return f"Fused in {places}: {before} became {after}, for example {stretch.example}."


def _sides(stretch: Stretch) -> tuple[str, str]:
    if stretch.before == stretch.after:
        return _chain(stretch.before), "; ".join(stretch.attributes)
    return _chain(stretch.before), _chain(stretch.after)


def _chain(ops: list[str]) -> str:
    """
    >>> _chain(["Conv", "Relu", "Relu"])
    'Conv, 2 Relu'
    """
    grouped: list[tuple[str, int]] = []
    for op in ops:
        if grouped and grouped[-1][0] == op:
            grouped[-1] = op, grouped[-1][1] + 1
        else:
            grouped.append((op, 1))
    return ", ".join(f"{count} {op}" if count > 1 else op for op, count in grouped)
