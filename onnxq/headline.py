"""A report in a line: what people read first, wherever they read it."""

from __future__ import annotations

from onnxq.report import Latency, Report
from onnxq.tables import cosine, percent


def smaller(before: int, after: int) -> str:
    """
    >>> smaller(300, 100), smaller(100, 120), smaller(100, 100)
    ('3.00× smaller', '1.20× larger', 'as large')
    """
    return _factor(before, after, ("smaller", "larger", "as large"))


def faster(before: Latency, after: Latency) -> str:
    """Of the medians."""
    return _factor(before.median_ms, after.median_ms, ("faster", "slower", "as fast"))


def _factor(before: float, after: float, words: tuple[str, str, str]) -> str:
    if not before or not after:
        return ""
    ratio = f"{max(before, after) / min(before, after):.2f}"
    less, more, same = words
    return same if ratio == "1.00" else f"{ratio}× {less if after < before else more}"


def title(report: Report) -> str:
    if not report.preset:
        return f"{report.output} against {report.model}"
    return f"wrote {report.output}" if report.output else f"{report.model}, nothing written"


def headline(report: Report) -> str:
    """Smaller by so much, faster by so much, as good as that: the line people read."""
    parts = [smaller(report.float_bytes, report.quantized_bytes)]
    before, after = report.float_latency, report.quantized_latency
    if before and after:
        parts.append(faster(before, after))
    if report.outputs:
        parts.append(f"cosine {cosine(min(o.cosine for o in report.outputs))}")
        agreement = report.outputs[0].agreement
        if agreement is not None:
            parts.append(f"top-1 agrees {percent(agreement)}")
    if not report.verified:
        parts.append("not verified")
    return ", ".join(part for part in parts if part)
