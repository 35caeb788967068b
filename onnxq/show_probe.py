"""What was measured of a device, as the terminal shows it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from onnxq.probing import Probed
from onnxq.tables import Column, print_table
from onnxq.target import OpRule


def show_probe(found: Probed, path: Path, console: Console) -> None:
    """The rules that hold, each by its best and its worst shape; those that do not, and why."""
    cached = ", measured before" if found.cached else ""
    console.print(f"{found.provider}, onnxruntime {found.version}{cached}", markup=False)
    if not found.timed:
        console.print("the CPU is emulated: support and exactness alone, no times")
    console.print()
    columns = [
        Column("operator"), Column("form"), Column("weights"), Column("activations"),
        Column("× float", "right"), Column("exact"), Column("kernel", fit="wrap"),
    ]  # fmt: skip
    print_table(console, columns, [_row(found, *key) for key in found.timed_rules])
    integers = {row.op for row in found.measured if row.purpose == "bits" and row.off == 0}
    if integers:
        console.print()
        console.print(f"in integers alone, bit for bit: {len(integers)} operators")
    if found.dropped:
        console.print()
        console.print("not in the target:")
        rows = [[op, form, format, why] for op, form, format, why in found.dropped]
        print_table(console, [Column(""), Column(""), Column(""), Column("", fit="wrap")], rows)
    console.print()
    console.print(
        f"wrote {path}; use it with quantize --target {_as_argument(path)}", soft_wrap=True
    )


def _row(found: Probed, op: str, rule: OpRule) -> list[str]:
    rows = [row for row in found.rows_of(op, rule) if not row.error]
    speeds = [row.speedup for row in rows if row.speedup is not None]
    times = f"{min(speeds):.1f} – {max(speeds):.1f}" if speeds else "–"
    sums = {row.rule.pair_limit for row in rows if row.purpose == "sums" and row.off <= 0.01}
    exact = "–" if not sums else "yes" if None in sums else f"pairs ≤ {max(filter(None, sums))}"
    kernels = dict.fromkeys(k for row in rows for k in row.kernels or ())
    weight, activation = str(rule.weight or ""), str(rule.activation or "")
    return [op, rule.form, weight, activation, times, exact, " ".join(kernels)]


def _as_argument(path: Path) -> str:
    return str(path) if path.is_absolute() else f"./{path}"
