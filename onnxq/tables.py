"""Numbers and tables as the terminal shows them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from rich.console import Console
from rich.text import Text

TOP = 10  # rows of a ranking; the JSON has them all
EXACT_DB = 200.0  # what a report says of equal outputs
INDENT = 2


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def quantity(value: float, unit: str = "") -> str:
    """Three digits and a prefix.

    >>> quantity(505_347, "B"), quantity(1_823_744), quantity(0)
    ('505 kB', '1.82 M', '0')
    """
    prefixes = ["", "k", "M", "G", "T"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    whole = prefixes[0] == "" or value >= 99.95
    number = f"{value:.0f}" if whole else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    return f"{number} {prefixes[0]}{unit}".strip()


def percent(share: float | None) -> str:
    """A share in percent; never 0 or 100 unless it is.

    >>> percent(0.0), percent(0.0002), percent(0.123), percent(0.9999), percent(1.0), percent(None)
    ('0 %', '<0.1 %', '12.3 %', '>99.9 %', '100 %', '–')
    """
    if share is None:
        return "–"
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    rounded = f"{100 * share:.1f}"
    if rounded in ("0.0", "100.0"):
        return "<0.1 %" if rounded == "0.0" else ">99.9 %"
    return f"{rounded} %"


def cosine(value: float) -> str:
    """Four decimals, more where four would say that outputs are equal which are not.

    >>> cosine(0.98765), cosine(0.999987), cosine(1.0)
    ('0.9877', '0.99999', '1.0000')
    """
    digits = next((d for d in (4, 5, 6, 7) if round(value, d) != 1), 4)
    return f"{value:.{digits}f}"


def decibels(value: float | None) -> str:
    if value is None:
        return "–"
    return "exact" if value >= EXACT_DB else f"{value:.1f} dB"


def milliseconds(value: float) -> str:
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2 if value >= 0.995 else 3
    return f"{value:.{digits}f} ms"


def bar(share: float, width: int) -> str:
    """A bar of blocks, an eighth of a column fine; only nothing is drawn as nothing.

    >>> bar(1.0, 4), bar(0.3, 4), bar(1e-9, 4), bar(0.0, 4)
    ('████', '█▎', '▏', '')
    """
    eighths = math.ceil(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def draws_bars(console: Console) -> bool:
    """Whether there is room, and blocks are among what the stream can say."""
    return console.width >= 80 and console.encoding.lower().startswith("utf")


def shorten(text: str, width: int) -> str:
    """Cut from the middle: the ends of a name tell more than its inside.

    >>> shorten("/encoder/layer.3/attention/MatMul", 20)
    '/encoder/…ion/MatMul'
    """
    if len(text) <= width:
        return text
    tail = (width - 1 + 1) // 2
    head = width - 1 - tail
    return text[:head] + "…" + text[len(text) - tail :]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Column:
    """`cut` columns shorten their cells to fit, `wrap` columns break them over lines; where that is
    not enough, `drop` columns are left out, the last first.
    """

    title: str
    justify: Literal["left", "right"] = "left"
    fit: Literal["keep", "cut", "wrap", "drop"] = "keep"


def print_table(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], indent: int = INDENT
) -> None:
    """Rows without lines around them, as wide as they need to be and no wider than the console."""
    room = console.width - indent
    widths = _widths(columns, rows, room)
    dropped = [i for i, column in enumerate(columns) if column.fit == "drop"]
    while dropped and sum(widths) + 2 * len(columns) - 2 > room:
        last = dropped.pop()
        columns = [*columns[:last], *columns[last + 1 :]]
        rows = [[*row[:last], *row[last + 1 :]] for row in rows]
        widths = _widths(columns, rows, room)
    titles = [column.title for column in columns]
    lines = [_line(columns, widths, titles)] if any(titles) else []
    for row in rows:
        lines += _folded(columns, widths, row)
    for number, line in enumerate(lines):
        style = "dim" if number == 0 and any(titles) else ""
        console.print(Text(" " * indent + line, style=style), soft_wrap=True)


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """What each column needs; flexible ones share what is left."""
    widths = [
        max([len(column.title), *(len(row[i]) for row in rows)]) for i, column in enumerate(columns)
    ]
    flexible = [i for i, column in enumerate(columns) if column.fit in ("cut", "wrap")]
    left = room - sum(w for i, w in enumerate(widths) if i not in flexible) - 2 * len(columns) + 2
    for i in flexible:
        widths[i] = min(widths[i], max(12, left // len(flexible)))
    return widths


def _folded(columns: Sequence[Column], widths: Sequence[int], row: Sequence[str]) -> list[str]:
    """A row as one line, or as several where a cell is folded."""
    cells = [
        textwrap.wrap(cell, width) or [""] if column.fit == "wrap" else [shorten(cell, width)]
        for column, width, cell in zip(columns, widths, row, strict=True)
    ]
    return [_line(columns, widths, line) for line in zip_longest(*cells, fillvalue="")]


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Iterable[str]) -> str:
    padded = [
        cell.rjust(width) if column.justify == "right" else cell.ljust(width)
        for column, width, cell in zip(columns, widths, cells, strict=True)
    ]
    return "  ".join(padded).rstrip()


def print_text(console: Console, text: str, indent: int = 0, style: str = "") -> None:
    """Words folded over lines."""
    for line in textwrap.wrap(text, max(20, console.width - indent)):
        console.print(Text(" " * indent + line, style=style), soft_wrap=True)


def heading(console: Console, title: str, note: str = "") -> None:
    console.print()
    beside = note and len(title) + 2 + len(note) <= console.width
    line = Text.assemble((title, "bold"), (f"  {note}" if beside else "", "dim"))
    console.print(line, soft_wrap=True)
    if note and not beside:
        print_text(console, note, INDENT, "dim")


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    for warning in warnings:
        print_folded(console, warning, "warning: ", "bold yellow")


def print_folded(console: Console, text: str, label: str, style: str = "") -> None:
    """One line where it is piped, so that it can be searched for; folded on a terminal."""
    fits = console.width - len(label) if console.is_terminal else len(text)
    first, *rest = textwrap.wrap(text, max(20, fits)) or [""]
    console.print(Text.assemble((label, style), first), soft_wrap=True)
    for line in rest:
        console.print(Text(" " * len(label) + line), soft_wrap=True)


def print_more(console: Console, count: int, what: str, note: str) -> None:
    if count > 0:
        console.print(Text(f"  and {count} more {what}{'s' * (count > 1)}; {note}", style="dim"))
