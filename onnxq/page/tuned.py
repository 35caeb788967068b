"""What `onnxq tune` measured, as the page shows it."""

from __future__ import annotations

from typing import Any

from onnxq.page.runs import Run
from onnxq.show import form_text
from onnxq.tables import cosine, percent, quantity

MOST = 30  # layers in the table; the chart has all


def candidates(tuning: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the models that were measured, the fastest first."""
    order = sorted(
        tuning.get("candidates", ()),
        key=lambda c: (c["ratio"] is None, c["ratio"] or 0.0, c["drop"]),
    )
    return [
        {
            "name": c["name"],
            "note": "chosen" if c["name"] == tuning["chosen"] else "front" * c["on_front"],
            "drop": percent(c["drop"]),
            "cosine": cosine(c["cosine"]),
            "ratio": f"{c['ratio']:.2f}" if c["ratio"] else "–",
            "size": quantity(c["bytes"], "B"),
            "holds": "yes" if c["holds"] else "no",
        }
        for c in order
    ]


def front(tuning: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of the candidates that were timed, and of the float model."""
    if not tuning:
        return []
    rows = [
        {
            "name": row["name"],
            "ratio": row["ratio"],
            "drop": 100 * row["drop"],
            "size": row["bytes"],
            "group": "chosen"
            if row["name"] == tuning["chosen"]
            else "on the front"
            if row["on_front"]
            else "others",
        }
        for row in tuning["candidates"]
        if row["ratio"] is not None
    ]
    whole = {"name": "float", "ratio": 1.0, "drop": 0.0, "size": tuning["float_bytes"]}
    return [*rows, whole | {"group": "float"}]


def losses(tuning: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of each layer in each format: what it loses when it alone is quantized."""
    return [
        {"group": title, "at": place, "value": seen["losses"][layer]}
        for title, seen in _formats(tuning).items()
        for place, layer in enumerate(_layers(tuning), 1)
        if layer in seen["losses"]
    ]


def sensitivity(run: Run) -> dict[str, Any]:
    """What is lost, in which unit, in which formats, and a row for each of the MOST layers that
    lose most in any.
    """
    formats = _formats(run.tuning)
    if not formats:
        return {}
    layers = _layers(run.tuning)
    most = {
        layer: max(seen["losses"].get(layer, 0.0) for seen in formats.values()) for layer in layers
    }
    became = {record.name: record.form for record in run.report.layers} if run.report else {}
    first = next(iter(formats.values()))
    return {
        "title": first["title"],
        "unit": first["unit"],
        "formats": list(formats),
        "layers": len(layers),
        "rows": [
            {
                "name": layer,
                "place": layers.index(layer) + 1,
                "form": form_text(became[layer], brief=True) if layer in became else "–",
                "cells": [_cell(seen, layer) for seen in formats.values()],
            }
            for layer in sorted(layers, key=lambda layer: -most[layer])[:MOST]
        ],
    }


def _formats(tuning: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured, by preset and format; nothing of those that no mix was tried of."""
    return {
        f"{seen['preset']}, {seen['format']}": seen
        for seen in tuning.get("sensitivities", ())
        if seen["losses"]
    }


def _layers(tuning: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(n for seen in _formats(tuning).values() for n in seen["losses"]))


def _cell(seen: dict[str, Any], layer: str) -> dict[str, str]:
    """Its loss, and the ms that quantizing it adds."""
    loss, times = seen["losses"].get(layer), seen["times"].get(layer)
    return {
        "loss": "–" if loss is None else f"{loss:.3g}",
        "time": f"{times[1] - times[0]:+.3f} ms".replace("-", "−") if times else "",
    }
