"""Several runs beside each other."""

from __future__ import annotations

from typing import Any

from onnxq.page.runs import Run
from onnxq.page.words import verdict
from onnxq.report import LayerRecord, Report
from onnxq.show import form_text
from onnxq.tables import cosine, decibels, milliseconds, percent, quantity

APART_DB = 0.05  # of two layers' SQNR; below it a difference is none to look at
MOST = 30  # layers that differ


def beside(runs: list[Run]) -> list[dict[str, str]]:
    """A row of figures for each run that has a report."""
    return [_row(run, run.report) for run in runs if run.report]


def _row(run: Run, report: Report) -> dict[str, str]:
    worst = min(report.outputs, key=lambda output: output.cosine, default=None)
    latency = report.quantized_latency
    return {
        "name": run.name,
        "verdict": verdict(run).title,
        "preset": report.preset or "–",
        "size": quantity(report.quantized_bytes, "B"),
        "latency": milliseconds(latency.median_ms) if latency else "–",
        "cosine": cosine(worst.cosine) if worst else "–",
        "sqnr": decibels(worst.sqnr_db) if worst else "–",
        "agreement": percent(worst.agreement) if worst else "–",
        "quantized": percent(report.share("parameters")),
        "warnings": str(len(run.warnings)),
    }


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """Layers whose format or error is not the same in all runs that have them, the farthest first.

    A layer is the same where its output or its name is.
    """
    tables = [_by_output(run.report) for run in runs if run.report]
    found: list[tuple[float, dict[str, Any]]] = []
    for key in dict.fromkeys(key for table in tables for key in table):
        layers = [table.get(key) for table in tables]
        measured = [layer.sqnr_db for layer in layers if layer and layer.sqnr_db is not None]
        apart = max(measured) - min(measured) if measured else 0.0
        forms = {layer.form for layer in layers if layer}
        if len(forms) == 1 and apart < APART_DB:
            continue
        if sum(layer is not None for layer in layers) < 2 or not measured:
            continue
        cells = [
            (decibels(layer.sqnr_db), form_text(layer.form, brief=True)) if layer else ("–", "")
            for layer in layers
        ]
        named = next(layer for layer in layers if layer)
        shown = f"{apart:.1f} dB" if len(measured) > 1 else "format"
        found.append((apart, {"name": named.name, "op": named.op, "cells": cells, "apart": shown}))
    found.sort(key=lambda pair: (-pair[0], pair[1]["name"]))
    return [row for _, row in found]


def _by_output(report: Report) -> dict[str, LayerRecord]:
    return {layer.output or layer.name: layer for layer in report.layers}


def lines_of(runs: list[Run]) -> list[dict[str, Any]]:
    """The SQNR of each layer in each run, at one place per layer."""
    tables = [(run.name, _by_output(run.report)) for run in runs if run.report]
    measured = {
        key: None
        for _, table in tables
        for key, layer in table.items()
        if layer.sqnr_db is not None
    }
    places = {key: number for number, key in enumerate(measured, 1)}
    return [
        {"group": name, "at": place, "value": round(min(layer.sqnr_db, 100.0), 2)}
        for name, table in tables
        for key, place in places.items()
        if (layer := table.get(key)) is not None and layer.sqnr_db is not None
    ]
