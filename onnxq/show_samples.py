"""What the samples themselves say of a quantized model: by groups, and range by range."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from onnxq.report import CLIPPED, NARROWER, WIDER, RangeRecord, Report
from onnxq.tables import (
    INDENT,
    TOP,
    Column,
    decibels,
    heading,
    percent,
    print_more,
    print_table,
    print_text,
)

_FINDINGS = {
    "clipped": ("clips", f"more than {percent(CLIPPED)} of the values in validation"),
    "wider": ("far beyond", f"more than {WIDER} times as wide a range in validation"),
    "one sample": ("sample N", "this one of calibration alone sets the range"),
    "narrower": ("far inside", f"less than {NARROWER} of the range is used in validation"),
}


def show_groups(report: Report, console: Console) -> None:
    """Loss by group of samples, the group that loses most first."""
    if not report.groups:
        return
    count = len({record.group for record in report.groups})
    heading(console, "Groups of samples, worst first", f"{count} group{'s' * (count != 1)}")
    ranked = sorted(report.groups, key=lambda r: (-r.stands_out, -r.drop, r.cosine, r.group))
    named = len({record.output for record in ranked}) > 1
    columns = [Column("group", fit="cut")]
    columns += [Column("output", fit="cut")] if named else []
    titles = ("samples", "loses", "±", "SQNR")
    columns += [*(Column(title, "right") for title in titles), Column("")]
    rows = [
        [
            record.group,
            *([record.output] if named else []),
            str(record.samples),
            percent(record.drop),
            percent(record.error),
            decibels(record.sqnr_db),
            "stands out" if record.stands_out else "",
        ]
        for record in ranked[:TOP]
    ]
    print_table(console, columns, rows)
    print_more(console, len(ranked) - len(rows), "row", "--report FILE.json has them all")
    by_agreement = {record.agreement is not None for record in ranked}
    notes = {True: "1 − top-1 agreement with float", False: "1 − cosine to float"}
    note = " or ".join(notes[kind] for kind in sorted(by_agreement, reverse=True))
    text = f"loses: {note}, mean of the group's samples and its standard error"
    console.print(Text(f"  {text}", style="dim"))


def show_ranges(report: Report, console: Console) -> None:
    """The tensors whose ranges do not suit what validation showed."""
    named = [record for record in report.ranges if record.finding]
    if not named:
        return
    heading(console, "Ranges to look at", f"{len(named)} of {len(report.ranges)} tensors")
    calibrated = any(record.calibration_low is not None for record in named)
    titles = ("calibration" if calibrated else "codes", "validation", "clipped")
    columns = [Column("tensor", fit="cut"), *(Column(t, "right") for t in titles), Column("")]
    rows = [
        (
            record.tensor,
            span(record.calibration_low, record.calibration_high)
            if calibrated
            else span(record.low, record.high),
            span(record.validation_low, record.validation_high),
            percent(record.validation_clipped),
            _finding(record),
        )
        for record in named[:TOP]
    ]
    print_table(console, columns, rows)
    print_more(console, len(named) - len(rows), "tensor", "--report FILE.json has them all")
    kinds = dict.fromkeys(record.finding for record in named)
    notes = [f"{_FINDINGS[kind][0]}: {_FINDINGS[kind][1]}" for kind in kinds]
    print_text(console, "; ".join(notes), INDENT, "dim")


def _finding(record: RangeRecord) -> str:
    alone = record.finding == "one sample"
    return f"sample {record.set_by}" if alone else _FINDINGS[record.finding][0]


def span(low: float | None, high: float | None) -> str:
    """
    >>> span(-1, 2.3456), span(None, None)
    ('-1 … 2.35', '–')
    """
    return "–" if low is None or high is None else f"{low:.3g} … {high:.3g}"
