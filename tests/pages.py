"""Runs to make pages of, with something in every part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from chrome import Page

from onnxq.distribution import Distribution, WeightRecord
from onnxq.page import page
from onnxq.page.runs import Run
from onnxq.report import (
    DisagreementRecord,
    GroupRecord,
    Latency,
    LayerRecord,
    OutputRecord,
    PassRecord,
    ProviderRecord,
    RangeRecord,
    Report,
)


def layer(number: int, **more: Any) -> LayerRecord:
    op = ("Conv", "MatMul", "Gemm")[number % 3]
    weight = WeightRecord(
        "w", Distribution(-1, 2, [1, 50, 9]), 4, [0.1, 0.2, 0.3, 0.4], -1, 1, 0.01
    )
    quantized = LayerRecord(
        f"/block.{number}/{op}", op, "w s8:channel, a u8a", output=f"t{number}",
        parameters=100 * number, macs=1000, sqnr_db=20.0 + number, contribution=1 / (number + 1),
        inputs=[f"t{number - 1}"], before=[f"/block.{number - 1}/x"], weights=[weight],
    )  # fmt: skip
    return replace(quantized, **more)


def output(cosine: float = 0.99) -> OutputRecord:
    return OutputRecord("y", cosine, 20.0, 0.97)


def spread(number: int) -> RangeRecord:
    finding = "clipped" if number == 2 else ""
    return RangeRecord(f"t{number}", 0, 4, 0, 4, 0.0, 0, 6, 0.01, 5, None, finding,
                       Distribution(0, 6, [90, 5, 5]))  # fmt: skip


def report(layers: int = 12, **more: Any) -> Report:
    latency = Latency(0.5, 0.4, 0.6)
    wrong = DisagreementRecord("conv1", ["Conv"], "step", 0.03, 1, "rounds down", 1.0)
    full = Report(
        model="m.onnx", output="q.onnx", target="cpu", preset="int8-static", recipe="[[pass]]\n",
        samples="9 samples", verified=True, passes=[PassRecord("assign", {}, 3, 0.2, 90.0)],
        layers=[
            *map(layer, range(layers)),
            LayerRecord("/head/Softmax", "Softmax", "float", "rounding costs accuracy"),
        ],
        outputs=[output()],
        ranges=[spread(n) for n in range(layers)],
        groups=[GroupRecord("class 1", "y", 9, 0.1, 0.01, 0.9, 0.99, 20.0, True)],
        providers=[
            ProviderRecord("cpu", "CPUExecutionProvider", "1", 5, 0, outputs=[output()],
                           same_bits=True, latency=latency, ratio=0.5),
            ProviderRecord("npu", "NPUExecutionProvider", "2", 4, 1, "x", outputs=[output()],
                           against_cpu=[output()], disagreement=wrong, latency=latency, ratio=0.7),
        ],
        verification_samples=4, float_bytes=4000, quantized_bytes=1000,
        float_latency=Latency(1.0, 0.9, 1.1), quantized_latency=latency,
        environment={"onnxq": "0", "model_sha256": "f" * 64}, warnings=["look here"],
    )  # fmt: skip
    return replace(full, **more)


def tuning() -> dict[str, Any]:
    rows = [("int8-static", 0.5, 0.012), ("int8-static, 2 float", 0.55, 0.004), ("w4", None, 0.2)]
    return {
        "model": "m.onnx", "drop_title": "top-1", "held_out": 64, "chosen": rows[1][0],
        "float_bytes": 4000, "replay": "onnxq quantize m.onnx", "refused": {"int4": "too small"},
        "warnings": [],
        "candidates": [
            {"name": name, "ratio": ratio, "drop": drop, "cosine": 0.99, "bytes": 1000,
             "holds": drop < 0.01, "on_front": ratio is not None}
            for name, ratio, drop in rows
        ],
        "sensitivities": [
            {"preset": preset, "format": "w8a8", "title": "KL divergence", "unit": "nat",
             "losses": {f"/block.{n}/x": step * n for n in range(4)},
             "times": {"/block.1/x": [0.2, 0.1]}}
            for preset, step in (("int8-static", 0.01), ("int8-accurate", 0.002))
        ],
        "report": json.loads(report().to_json()),
    }  # fmt: skip


def effects() -> dict[str, Any]:
    layers = [
        {"name": f"l{n}", "op": "Conv", "alone": 0.1 * n if n else None, "spared": 0.2,
         "reason": "" if n else "no kernel"}
        for n in range(5)
    ]  # fmt: skip
    return {"model": "m.onnx", "all_quantized": 0.3, "unit": "nat", "title": "KL divergence",
            "preset": "int8-static", "measured_on": 9, "layers": layers,
            "warnings": [], "environment": {}}  # fmt: skip


def shown(tab: Page, folder: Path, *runs: Run) -> None:
    """Open the page of these runs."""
    file = folder / "page.html"
    file.write_text(page(list(runs)), "utf-8")
    assert file.stat().st_size < 2_000_000
    tab.open(file)
