"""A run in words and rows: what the page's sections say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from onnxq.headline import faster, smaller
from onnxq.page.runs import Run
from onnxq.report import LayerRecord, Report
from onnxq.show import form_text
from onnxq.show_providers import labels, lines
from onnxq.show_samples import span
from onnxq.tables import cosine, decibels, milliseconds, percent, quantity

HOLDS = 0.9  # cosine; below it a run warns, too
WORST = 5
MOST_RANGES = 24  # in the chart and its table; the worst first


@dataclass(frozen=True)
class Verdict:
    """`mark` is good, look, bad or unknown; `title` says it in a word or two."""

    mark: str
    title: str
    text: str


def verdict(run: Run) -> Verdict:
    """What a reader should know if they read one line."""
    report = run.report
    if report is None:
        return Verdict("good", "Measured", _measured(run.effects))
    said = _said(report)
    if not report.verified:
        text = "The model was written, but neither run nor compared with float."
        return Verdict("unknown", "Not verified", f"{text} {said}".strip())
    if any(output.cosine < HOLDS for output in report.outputs):
        worst = f" The layer that hurts most is {report.ranked[0].name}." if report.ranked else ""
        return Verdict("bad", "The answers changed", said + worst)
    count = len(run.warnings)
    if count:
        title = f"It holds; look at {count} warning{'s' * (count > 1)}"
        return Verdict("look", title, said)
    return Verdict("good", "It holds", said)


def _measured(effects: dict[str, Any]) -> str:
    """What the distances of `onnxq sensitivity` are."""
    count, whole = effects["measured_on"], f"{effects['all_quantized']:.3g} {effects['unit']}"
    return (
        f"What each of {len(effects['layers'])} layers does to the outputs of {effects['model']} "
        f"as {effects['preset']}: {effects['title']}, on {count} sample{'s' * (count != 1)}. With "
        f"all of them quantized it is {whole.rstrip()}."
    )


def _said(report: Report) -> str:
    """Size, speed and closeness in a sentence or two."""
    gains = [smaller(report.float_bytes, report.quantized_bytes)]
    before, after = report.float_latency, report.quantized_latency
    if before and after:
        gains.append(f"{faster(before, after)} on this machine")
    text = " and ".join(gain for gain in gains if gain)
    parts = [f"The quantized model is {text}."] if text else []
    if report.outputs:
        worst = min(report.outputs, key=lambda output: output.cosine)
        like = f"a cosine of {cosine(worst.cosine)} and {decibels(worst.sqnr_db)} SQNR"
        agreed = report.outputs[0].agreement
        top = f"; its top answer is float's for {percent(agreed)}" if agreed is not None else ""
        parts.append(f"Its outputs have {like} to float{top}.")
    return re.sub(r"(?<=\d) (?=dB|%)", "\N{NO-BREAK SPACE}", " ".join(parts))


def figures(report: Report) -> list[dict[str, str]]:
    """Rows of before and after."""
    rows = [
        row("Size", quantity(report.float_bytes, "B"), quantity(report.quantized_bytes, "B"),
            smaller(report.float_bytes, report.quantized_bytes))
    ]  # fmt: skip
    before, after = report.float_latency, report.quantized_latency
    if before and after:
        medians = milliseconds(before.median_ms), milliseconds(after.median_ms)
        rows.append(row("Latency, median", *medians, faster(before, after)))
    for record in report.metrics:
        distance = f"{record.distance:.4g} {record.unit}".rstrip()
        if record.float_score is None:
            rows.append(row(record.title, "", "", f"{distance} apart"))
        else:
            scores = f"{record.float_score:.4g}", f"{record.quantized_score or 0.0:.4g}"
            rows.append(row(record.name, *scores, f"{distance} apart"))
    return rows


def row(what: str, before: str, after: str, note: str) -> dict[str, str]:
    return {"what": what, "before": before, "after": after, "note": note}


def why(layer: LayerRecord, target: str) -> str:
    """Why a layer became what it is."""
    if layer.form == "float":
        return f"left float: {layer.reason or 'no reason given'}"
    if layer.reason:
        return layer.reason
    if not target or layer.form == "quantized":
        return "quantized"
    return f"target {target} runs {layer.op} as {form_text(layer.form)}"


def compared_on(report: Report) -> str:
    count = report.verification_samples
    if not report.preset or not count:
        return f"Compared on {report.samples}." if report.samples else ""
    seen = "did not see" if report.verification_unseen else "saw too"
    return f"Compared on {count} sample{'s' * (count != 1)} that calibration {seen}."


def worst_layers(report: Report) -> list[dict[str, str]]:
    return [
        {
            "name": layer.name,
            "op": layer.op,
            "form": form_text(layer.form),
            "sqnr": decibels(layer.sqnr_db),
            "share": percent(share),
        }
        for layer, share in report.error_shares[:WORST]
    ]


def left_float(report: Report) -> list[dict[str, Any]]:
    """Reasons for float, the one of most parameters first."""
    groups: dict[str, list[LayerRecord]] = {}
    for layer in report.layers:
        if layer.form == "float":
            groups.setdefault(layer.reason or "no reason given", []).append(layer)
    total = max(report.parameters, sum(layer.parameters for layer in report.layers))
    rows = [
        {
            "reason": reason,
            "nodes": len(group),
            "ops": ", ".join(dict.fromkeys(layer.op for layer in group)),
            "held": sum(layer.parameters for layer in group),
        }
        for reason, group in groups.items()
    ]
    rows.sort(key=lambda r: (-int(str(r["held"])), -int(str(r["nodes"]))))
    return [r | {"share": percent(int(str(r["held"])) / total if total else None)} for r in rows]


def ranges(report: Report) -> list[dict[str, str]]:
    return [
        {
            "tensor": r.tensor,
            "codes": span(r.low, r.high),
            "calibration": span(r.calibration_low, r.calibration_high),
            "validation": span(r.validation_low, r.validation_high),
            "clipped": percent(r.validation_clipped),
            "finding": r.finding + (f": sample {r.set_by}" if r.set_by is not None else ""),
        }
        for r in report.ranges[:MOST_RANGES]
    ]


def providers(report: Report) -> list[dict[str, Any]]:
    rows = []
    names = labels(report.providers)
    for name, record in zip(names, report.providers, strict=True):
        worst = min(record.outputs, key=lambda o: o.cosine, default=None)
        rows.append(
            {
                "name": name,
                "version": f"{record.provider} {record.version}".strip(),
                "nodes": str(record.nodes),
                "elsewhere": str(record.elsewhere),
                "cosine": cosine(worst.cosine) if worst else "–",
                "sqnr": decibels(worst.sqnr_db) if worst else "–",
                "agreement": percent(worst.agreement) if worst else "–",
                "cpu": "same bits" if record.same_bits else _farthest(record.against_cpu),
                "median": milliseconds(record.latency.median_ms) if record.latency else "–",
                "ratio": f"{record.ratio:.2f}" if record.ratio else "–",
                "lines": lines(record),
                "failed": bool(record.problem()),
            }
        )
    return rows


def _farthest(outputs: list[Any]) -> str:
    return decibels(min(o.sqnr_db for o in outputs)) if outputs else "–"
