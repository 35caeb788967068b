"""A report as notebooks show it: a few lines of HTML, without style or script."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from onnxq.headline import faster, headline, smaller, title
from onnxq.report import Report
from onnxq.tables import cosine, decibels, milliseconds, percent, quantity

WORST = 3  # layers
OUTPUTS = 5


def summary_html(report: Report) -> str:
    """Title, headline and warnings, then before and after, outputs and the worst layers."""
    parts = [f"<strong>{escape(title(report))}</strong><br>{escape(headline(report))}"]
    parts += [f"<br>⚠ {escape(warning)}" for warning in report.warnings]
    parts.append(_table(("", "float", "quantized", ""), _before_and_after(report)))
    if report.outputs:
        rows = [(o.name, cosine(o.cosine), decibels(o.sqnr_db)) for o in report.outputs[:OUTPUTS]]
        parts.append(_table(("output", "cosine", "SQNR"), rows))
    if report.ranked:
        shares = report.error_shares[:WORST]
        rows = [(layer.name, decibels(layer.sqnr_db), percent(share)) for layer, share in shares]
        parts.append(_table(("worst layers", "SQNR", "error"), rows))
    return f"<div>{''.join(parts)}</div>"


def _before_and_after(report: Report) -> list[tuple[str, str, str, str]]:
    before, after = report.float_bytes, report.quantized_bytes
    rows = [("size", quantity(before, "B"), quantity(after, "B"), smaller(before, after))]
    slow, fast = report.float_latency, report.quantized_latency
    if slow and fast:
        medians = milliseconds(slow.median_ms), milliseconds(fast.median_ms)
        rows.append(("latency, median", *medians, faster(slow, fast)))
    return rows


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in titles)
    lines = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
