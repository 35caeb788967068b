"""What the page's script shows, packed: layers with their details, tensors, charts' rows."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import asdict
from typing import Any

from onnxq.distribution import Distribution, WeightRecord
from onnxq.page import tuned
from onnxq.page.compare import lines_of
from onnxq.page.runs import Run
from onnxq.page.words import MOST_RANGES, why
from onnxq.report import LayerRecord, RangeRecord, Report
from onnxq.show import form_text
from onnxq.show_providers import labels

DIGITS = 4


def packed(runs: list[Run], charts: dict[str, Any], room: int) -> str:
    """The data in at most `room` bytes of base64 of gzip.

    Of runs too large for that, the layers that do least go without histograms and scales; how many
    have them is in `detailed`.
    """
    most = max((len(run.report.layers) for run in runs if run.report), default=0)
    while True:
        whole = {
            "runs": [_run(run, most) for run in runs],
            "lines": lines_of(runs) if len(runs) > 1 else [],
            "charts": charts,
        }
        text = json.dumps(whole, separators=(",", ":"))
        found = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
        if len(found) <= room or not most:
            return found
        most //= 2


def _run(run: Run, most: int) -> dict[str, Any]:
    report = run.report or Report()
    detailed = {layer.name for layer in report.ranked[:most]}
    kept = {name for layer in report.layers if layer.name in detailed for name in _tensors(layer)}
    shares = {layer.name: share for layer, share in report.error_shares}
    return {
        "name": run.name,
        "detailed": min(most, len(report.ranked)),
        "layers": _effects(run.effects)
        if run.effects
        else [
            _layer(r, report.target, shares.get(r.name), r.name in detailed) for r in report.layers
        ],
        "unit": run.effects.get("unit", ""),
        "tensors": {r.tensor: _tensor(r, r.tensor in kept) for r in report.ranges},
        "ranges": [row for r in report.ranges[:MOST_RANGES] for row in _spans(r)],
        "front": _points(tuned.front(run.tuning)),
        "losses": _points(tuned.losses(run.tuning)),
        "providers": [
            {"name": name, "value": short(record.latency.median_ms)}
            for name, record in zip(labels(report.providers), report.providers, strict=True)
            if record.latency
        ],
    }


def _tensors(layer: LayerRecord) -> list[str]:
    return [*layer.inputs, layer.output]


def _layer(layer: LayerRecord, target: str, share: float | None, detailed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": layer.name,
        "op": layer.op,
        "form": form_text(layer.form, brief=True),
        "full": form_text(layer.form),
        "why": why(layer, target),
        "parameters": layer.parameters,
        "macs": layer.macs,
        "sqnr": short(layer.sqnr_db),
        "share": short(share),
        "inputs": layer.inputs,
        "output": layer.output,
        "before": layer.before,
        "after": layer.after,
    }
    if detailed:
        found["weights"] = [_weight(weight) for weight in layer.weights]
    return found


def _weight(record: WeightRecord) -> dict[str, Any]:
    weight = asdict(record) | {"values": _values(record.values)}
    return {key: short(value) for key, value in weight.items()}


def _effects(effects: dict[str, Any]) -> list[dict[str, Any]]:
    """Layers of `onnxq sensitivity`."""
    return [
        {
            "name": layer["name"],
            "op": layer["op"],
            "form": "float" if layer["alone"] is None else "quantized",
            "why": layer["reason"],
            "alone": short(layer["alone"]),
            "spared": short(layer["spared"]),
        }
        for layer in effects["layers"]
    ]


def _tensor(record: RangeRecord, detailed: bool) -> dict[str, Any]:
    found = {
        "low": record.low,
        "high": record.high,
        "calibration": [record.calibration_low, record.calibration_high],
        "validation": [record.validation_low, record.validation_high],
        "clipped": record.validation_clipped,
        "finding": record.finding,
    }
    found = {key: short(value) for key, value in found.items()}
    if detailed and record.values is not None and record.values.counts:
        found["values"] = _values(record.values)
    return found


def _values(found: Distribution) -> dict[str, Any]:
    return {key: short(value) for key, value in asdict(found).items()}


def _spans(record: RangeRecord) -> list[dict[str, Any]]:
    """Rows of the ranges' chart, in units of the code that is farthest from zero."""
    reach = max(abs(record.low), abs(record.high)) or 1.0
    ends = {
        "codes": (record.low, record.high),
        "calibration": (record.calibration_low, record.calibration_high),
        "validation": (record.validation_low, record.validation_high),
    }
    return [
        {"tensor": record.tensor, "group": what, "low": short(low / reach),
         "high": short(high / reach)}
        for what, (low, high) in ends.items() if low is not None and high is not None
    ]  # fmt: skip


def _points(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: short(value) for key, value in row.items()} for row in rows]


def short(value: Any) -> Any:
    """Numbers, alone or in a list, to a few digits.

    >>> short([0.123456, 123456, None])
    [0.1235, 123500, None]
    """
    if isinstance(value, list):
        return [short(part) for part in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    kept = float(f"{value:.{DIGITS}g}")
    return int(kept) if isinstance(value, int) else kept
