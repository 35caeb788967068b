"""Figures of an NPU or another provider: whole models quantized for it, on it, beside float.

    scripts/benchmark npu FIGURE... --shared DIR [--target NAME] [--place NAME@PYTHON]

    top-1     MobileNet v1 0.75, the first 200 images of the dev split
    cosine    of the outputs to float: small networks, a detector, sentences of 128 tokens at most
    layers    what of each model runs on the CPU in between

or all. The provider runs in a Python of its own, by default the one in .providers/ (or the folder
that ONNXQ_PROVIDERS names) that goes with the target. --preset NAME (again for more) chooses.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accuracy import Bench, load_score
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.devices.place import PROVIDERS, Answer, Job, Place, ask
from onnxq.feeds import Feed
from onnxq.runtime import Session
from onnxq.target import CPU, Target, load_target

TASKS = {
    "cifar10_resnet20": "cifar",
    "kws_dscnn": "kws",
    "ultraface_rfb320": "faces",
    "all-MiniLM-L6-v2": "stsb",
}
CLASSIFIER, IMAGES, LOSS = "mobilenet_v1_0.75_224", 200, 0.015
CALIBRATION, SCORED, COSINE = 40, 20, 0.98
TOKENS = 128
PATIENCE = 7200.0  # seconds: a simulated NPU takes seconds for what takes it milliseconds
Row = tuple[str, str, str, str]
console = Console()


@dataclass
class Device:
    """Where models run, what they are quantized for, and with what."""

    bench: Bench
    target: Target
    place: Place
    presets: tuple[str, ...]

    def quantized(self, name: str, preset: str) -> Path:
        out = self.bench.scratch / f"{name}.{preset}.onnx"
        if not out.exists():
            samples = feeds(self.bench, name, "calib", CALIBRATION)
            onnxq.quantize(
                self.bench.float_model(name), preset, samples=samples + samples[:4],
                limit=CALIBRATION, target=self.target, output=out, check=False,
            )  # fmt: skip
        return out

    def run(self, model: Path, given: list[Feed]) -> Answer:
        answer = ask(self.place, [Job(model, given, profile=True)], patience=PATIENCE)[0]
        if answer.error:
            raise SystemExit(f"{model.name} does not run on {self.place.name}: {answer.error}")
        return answer


def feeds(bench: Bench, name: str, split: str, count: int) -> list[Feed]:
    """Samples of one shape; sentences are padded, and their mask says so."""
    if name == "all-MiniLM-L6-v2":
        z = np.load(bench.shared / "data" / "stsb.npz")
        sentences = bench.score_module.sequences(z, "dev")
        chosen = sentences[-count:] if split == "calib" else sentences[:count]
        return [padded(ids) for ids in chosen]
    task = TASKS.get(name, "imagenet")
    x, _ = images(bench, task, split, count)
    key = Session(bench.float_model(name)).inputs[0]
    return [{key: x[k : k + 1]} for k in range(len(x))]


def images(bench: Bench, task: str, split: str, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    arguments = SimpleNamespace(data=bench.shared / "data", n=count)
    x, y = bench.score_module.classification(arguments, task, split)
    return x[:count], y[:count]


def padded(ids: NDArray[np.int64]) -> Feed:
    row, shown = np.zeros((2, 1, TOKENS), np.int64)
    row[0, : len(ids)], shown[0, : len(ids)] = ids[:TOKENS], 1
    return {"input_ids": row, "attention_mask": shown, "token_type_ids": np.zeros_like(row)}


def top1(device: Device) -> Iterator[Row]:
    x, y = images(device.bench, "imagenet", "dev", IMAGES)
    session = Session(device.bench.float_model(CLASSIFIER))
    given = [{session.inputs[0]: image[None]} for image in x]
    right = np.mean([_first(session.run(f)).argmax() == n for f, n in zip(given, y, strict=True)])
    for preset in device.presets:
        answer = device.run(device.quantized(CLASSIFIER, preset), given)
        said = np.mean([_first(o).argmax() == n for o, n in zip(answer.outputs, y, strict=True)])
        what = f"{CLASSIFIER}, {preset}, {len(y)} images: top-1 (float {right:.4f})"
        yield what, f"≥ {right - LOSS:.4f}", f"{said:.4f}", _yes(said >= right - LOSS)


def cosine(device: Device) -> Iterator[Row]:
    for name in TASKS:
        given = feeds(device.bench, name, "dev", SCORED)
        session = Session(device.bench.float_model(name))
        expected = [session.run(feed) for feed in given]
        for preset in device.presets:
            answer = device.run(device.quantized(name, preset), given)
            for key in expected[0]:
                pairs = zip(answer.outputs, expected, strict=True)
                value = float(np.mean([_cosine(a[key], b[key]) for a, b in pairs]))
                what = f"{name}, {preset}, {key}: mean cosine to float"
                yield what, f"≥ {COSINE}", f"{value:.4f}", _yes(value >= COSINE)


def layers(device: Device) -> Iterator[Row]:
    for name in (CLASSIFIER, *TASKS):
        given = feeds(device.bench, name, "dev", 1)
        for preset in device.presets:
            answer = device.run(device.quantized(name, preset), given)
            placed = [node for node, who in answer.placement.items() if who == CPU]
            ran = [kernel for kernel in answer.kernels if kernel.provider == CPU]
            count = max(len(placed), len(ran))
            of = f"{count} of {len(answer.placement) or len(answer.kernels)}"
            yield f"{name}, {preset}: nodes on the CPU", "0", of, _yes(not count)


def _first(outputs: Feed) -> NDArray[Any]:
    return next(iter(outputs.values()))


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.vdot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def _yes(met: bool) -> str:
    return "yes" if met else "no"


FIGURES: dict[str, Callable[[Device], Iterator[Row]]] = {
    "top-1": top1,
    "cosine": cosine,
    "layers": layers,
}


def installed(target: Target) -> Place:
    """The Python in the folder of providers that has the target's."""
    short = next(name for name, long in PROVIDERS.items() if long in target.providers)
    if target.is_cpu:
        return Place.parse(short)
    root = Path(os.environ.get("ONNXQ_PROVIDERS", Path(__file__).parent.parent / ".providers"))
    return Place.parse(f"{short}@{root / short / 'python'}", target.provider_options)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark npu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("figures", nargs="+", choices=[*FIGURES, "all"], metavar="FIGURE")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--target", default="qnn-htp")
    parser.add_argument("--place")
    parser.add_argument("--preset", action="append", dest="presets")
    given = parser.parse_args(arguments)
    target = load_target(given.target)
    place = Place.parse(given.place, target.provider_options) if given.place else installed(target)
    presets = tuple(given.presets or ("int8-static", "int16x8"))
    table = Table("what", "target", "measured", "met", title=target.name, title_justify="left")
    with tempfile.TemporaryDirectory(prefix="onnxq-npu-") as scratch:
        bench = Bench(given.shared, Path(scratch), load_score(given.shared))
        device = Device(bench, target, place, presets)
        for name in FIGURES if "all" in given.figures else given.figures:
            for row in FIGURES[name](device):
                console.print(*row, sep=" | ", soft_wrap=True, highlight=False, markup=False)
                table.add_row(*row)
    console.print(table)
