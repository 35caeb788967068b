"""Folders that `onnxq deploy` writes: whether their own smoke test passes from a clean environment.

    scripts/benchmark deploy --shared DIR [--kind KIND]...

DIR holds models/, data/ and score/score.py. Models are given the fixed shape of a sample. Python's
environment has onnxruntime and NumPy and nothing else; pages run in headless Chromium, NPU models
on Qualcomm's simulator, as scripts/providers has made them. A kind that a model cannot have is
refused with the reason, and so is no folder.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from accuracy import CALIBRATION, Bench, load_score
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq import cache
from onnxq.deploy import KINDS, deploy
from onnxq.devices import Place
from onnxq.errors import OnnxqError
from onnxq.feeds import Feed

ROOT = Path(__file__).resolve().parents[1]
MODELS = (
    ("mobilenet_v1_0.25_224", "int8-static"),
    ("cifar10_resnet20", "int8-static"),
    ("cifar10_resnet20", "integer-only"),
    ("kws_dscnn", "int8-static"),
    ("kws_dscnn", "int8-accurate"),
    ("all-MiniLM-L6-v2", "int8-dynamic"),
    ("stories260K", "int4-rtn"),
    ("stories260K", "int8-weights"),
)
SAID = re.compile("^PASS$|: the largest difference is ")  # providers print things of their own
console = Console()


@dataclass(frozen=True)
class Clean:
    """Where smoke tests run."""

    python: Path
    qnn: Path
    dist: Path

    @classmethod
    def made_in(cls, folder: Path) -> Clean:
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        packages = ["onnxruntime", "numpy"]
        subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True)
        providers = Path(os.environ.get("ONNXQ_PROVIDERS", ROOT / ".providers"))
        dist = providers / "web" / "node_modules" / "onnxruntime-web" / "dist"
        return cls(python, providers / "qnn" / "python", dist)

    def options(self, kind: str) -> dict[str, Any]:
        """Raises OnnxqError where a place is missing."""
        needed = {"qnn": self.qnn, "web": self.dist}.get(kind)
        if needed is not None and not needed.exists():
            raise OnnxqError(f"skipped: {needed} is missing; make it with scripts/providers {kind}")
        if kind == "qnn":
            return {"place": Place.parse(f"qnn@{self.qnn}")}
        return {"runtime": self.dist} if kind == "web" else {}

    def smoke_test(self, folder: Path, kind: str) -> tuple[bool, str]:
        python = self.qnn if kind == "qnn" else self.python
        kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
        done = subprocess.run(
            [str(python), "smoke_test.py"], cwd=folder, env=kept, capture_output=True, text=True
        )
        good = done.returncode == 0
        lines = [line for line in done.stdout.splitlines() if SAID.search(line)]
        return good, "; ".join(lines) if good else (done.stdout + done.stderr)[-300:]


def fixed(model: Path, feed: Feed, place: Path) -> Path:
    """The model with the shapes of a sample."""
    proto = onnx.load(model)
    for value in proto.graph.input:
        if value.name in feed:
            for dim, size in zip(value.type.tensor_type.shape.dim, feed[value.name].shape):  # noqa: B905
                dim.dim_value = size
    onnx.save(proto, place)
    return place


def quantized(bench: Bench, name: str, preset: str) -> tuple[Path, Feed]:
    path = bench.scratch / f"{name}.{preset}.onnx"
    feeds = bench.feeds(name)
    alike = [f for f in feeds if all(f[k].shape == feeds[-1][k].shape for k in f)]
    model = fixed(bench.float_model(name), feeds[-1], bench.scratch / "float.onnx")
    onnxq.quantize(
        model, preset, samples=alike, limit=CALIBRATION, output=path, latency_check=False
    )
    return path, feeds[-1]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark deploy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--kind", action="append", choices=KINDS, default=[])
    given = parser.parse_args(arguments)
    table = Table("model", "preset", "for", "bytes", "smoke test", "seconds", title="deploy")
    folders = passed = 0
    with tempfile.TemporaryDirectory(prefix="onnxq-deploy-") as scratch, cache.disabled():
        bench = Bench(given.shared, Path(scratch), load_score(given.shared))
        clean = Clean.made_in(Path(scratch) / "clean")
        for name, preset in MODELS:
            model, sample = quantized(bench, name, preset)
            for kind in given.kind or KINDS:
                began, size = time.perf_counter(), 0
                try:
                    folder = Path(scratch) / f"{model.stem}-{kind}"
                    made = deploy(model, kind, folder, samples=[sample], **clean.options(kind))
                    size = sum(made.files.values())
                    good, said = clean.smoke_test(folder, kind)
                    folders, passed = folders + 1, passed + good
                except OnnxqError as error:
                    said = f"no folder: {error}"
                took = time.perf_counter() - began
                row = [name, preset, kind, f"{size:,}", said, f"{took:.1f}"]
                console.print(*row, sep=" | ", soft_wrap=True, highlight=False, markup=False)
                table.add_row(*row)
    console.print(table)
    console.print(f"{passed} of {folders} folders pass their own smoke test")
    sys.exit(passed < folders)
