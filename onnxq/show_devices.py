"""What devices do with models, as the terminal shows it."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.text import Text

from onnxq.deploy import Deployment
from onnxq.devices.verdicts import CheckReport, Verdict
from onnxq.tables import (
    Column,
    percent,
    print_folded,
    print_table,
    print_text,
    print_warnings,
    quantity,
)

_MEANS = {
    "integer": "in integers",
    "runs": "as they stand",
    "folded": "computed when the model is loaded",
    "not fused": "in float, between a DequantizeLinear and a QuantizeLinear",
    "falls back": "on the CPU",
    "will not run": "nowhere",
}
_WORTH_SAYING = ("not fused", "falls back", "will not run")


def show_check(found: CheckReport, console: Console) -> None:
    """How many nodes run how, and those that do not as they should, with reason and fix."""
    console.print(f"{found.model} on {found.target} ({found.provider})", soft_wrap=True)
    console.print()
    rows = [[kind, str(count), _MEANS[kind]] for kind, count in found.counts.items()]
    columns = [Column("verdict"), Column("nodes", "right"), Column("they run", fit="wrap")]
    print_table(console, columns, rows)
    print_warnings(console, found.warnings)
    worth = [v for v in found.verdicts if v.kind in _WORTH_SAYING]
    for (kind, reason, fix), nodes in _alike(worth):
        console.print()
        print_folded(console, reason, f"{kind}: ", "bold")
        print_folded(console, _named(nodes), "  nodes: ")
        if fix:
            print_folded(console, fix, "  fix: ")
    if found.ran_on:
        _show_run(found, console)


def _show_run(found: CheckReport, console: Console) -> None:
    console.print()
    if found.error:
        console.print(f"{found.ran_on} did not run it: {found.error}", soft_wrap=True, markup=False)
        return
    right, said = found.agreement
    share = percent(right / said) if said else "none"
    console.print(f"{found.ran_on}: {right} of {said} verdicts were right ({share})")
    counted = groupby(sorted((v.kind, v.happened) for v in found.verdicts))
    rows = [[kind, what, str(len([*group]))] for (kind, what), group in counted]
    print_table(
        console, [Column("verdict"), Column("what happened"), Column("nodes", "right")], rows
    )
    for verdict in found.verdicts:
        if verdict.agrees is False:
            console.print(
                f"{verdict.node} ({verdict.op}): {verdict.kind} was said, "
                f"{verdict.happened} is what happened",
                soft_wrap=True,
            )


def _alike(verdicts: list[Verdict]) -> list[tuple[tuple[str, str, str], list[Verdict]]]:
    """Verdicts with one reason together, those that stop the model first."""
    found: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in verdicts:
        fix = verdict.fix.replace(verdict.node, "NODE") if verdict.node else verdict.fix
        found.setdefault((verdict.kind, verdict.reason, fix), []).append(verdict)
    return sorted(found.items(), key=lambda item: -_WORTH_SAYING.index(item[0][0]))


def _named(nodes: list[Verdict]) -> str:
    """The first few, by name."""
    names = ", ".join(f"{verdict.node} ({verdict.op})" for verdict in nodes[:5])
    return names + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")


def show_deployment(made: Deployment, console: Console) -> None:
    console.print(Text(f"wrote {made.folder}", style="bold"), soft_wrap=True)
    console.print()
    columns = [Column("file", fit="cut"), Column("size", "right")]
    print_table(console, columns, [[name, quantity(n, "B")] for name, n in made.files.items()])
    console.print()
    if made.tested:
        print_text(console, "The smoke test, run here:", 2)
        for line in made.smoke.splitlines():
            print_text(console, line, 4, "dim")
    else:
        print_text(console, f"The smoke test was not run: {made.smoke}", 2, "yellow")
    for note in made.notes:
        print_text(console, note, 2)
