#!/usr/bin/env python3
"""How long a browser takes over the report page of a model with many layers.

    scripts/benchmark paint [--layers 2000] [--runs 5] [--keep FOLDER]

The run is made up: every layer has a weight with a histogram and 64 scales, and a tensor with a
histogram, so that the page is as large as a page becomes. Times are from navigation, in ms; search
is from a changed filter to the next frame. --keep keeps the page and screenshots of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from onnxq.distribution import Distribution, WeightRecord
from onnxq.page import Run, page
from onnxq.report import Latency, LayerRecord, OutputRecord, RangeRecord, Report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chrome import Page, chrome

OPERATORS = ("MatMul", "Conv", "Gemm")
SEARCH = """(async () => {
  const began = performance.now();
  controls.search.value = "17";
  await update();
  await new Promise(requestAnimationFrame);
  return performance.now() - began;
})()"""


def made_up(layers: int) -> Report:
    rng = np.random.default_rng(0)

    def spread() -> Distribution:
        return Distribution(-2, 2, rng.integers(0, 100_000, 64).tolist())

    records = []
    for n in range(layers):
        weight = WeightRecord(spread(), 768, rng.uniform(size=64).tolist(), -1, 1, 0.001)
        records.append(
            LayerRecord(
                f"/model/layers.{n}/mlp/down_proj/MatMul", OPERATORS[n % 3], "w s8:channel, a u8a",
                output=f"t{n}", parameters=1000 * n, macs=10_000 * n,
                sqnr_db=float(rng.normal(30, 8)), contribution=float(rng.exponential() ** 3),
                inputs=[f"t{n - 1}"], weight=weight,
            )
        )  # fmt: skip
    return Report(
        model="big.onnx", output="big.int8.onnx", target="cpu", preset="int8-static",
        verified=True, layers=records, outputs=[OutputRecord("y", 0.98, 15.0, 0.9)],
        ranges=[
            RangeRecord(f"t{n}", -1, 1, -1, 1, 0.0, -2, 2, 0.01, 3, None, "", spread())
            for n in range(layers)
        ],
        float_bytes=4 * 10**9, quantized_bytes=10**9,
        float_latency=Latency(20, 19, 21), quantized_latency=Latency(10, 9, 11),
    )  # fmt: skip


def measure(tab: Page, file: Path, width: int, runs: int) -> None:
    tab.size(width)
    rows = []
    for _ in range(runs):
        tab.call("Page.navigate", url="about:blank")
        tab.open(file)
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        ready = "Number(document.documentElement.dataset.readyAfter)"
        rows.append([tab.run(paint), tab.run(ready), tab.run(SEARCH)])
    median, most = np.median(rows, axis=0), np.max(rows, axis=0)
    for what, middle, worst in zip(("first paint", "charts", "search"), median, most, strict=True):
        print(f"{width:>5} px  {what:<12} {middle:6.0f} ms, at most {worst:6.0f} ms")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        chrome(Path(folder) / "profile") as tab,
    ):
        kept = options.keep or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        file = kept / "page.html"
        file.write_text(page([Run("big", made_up(options.layers))]), "utf-8")
        print(f"{options.layers} layers, {file.stat().st_size:,} bytes")
        for width in (1200, 360):
            measure(tab, file, width, options.runs)
            tab.screenshot(kept / f"page-{width}.png", whole=False)


if __name__ == "__main__":
    main()
