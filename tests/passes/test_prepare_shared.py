"""Passes that prepare leave full-size models the function that they had: `pytest --shared PATH`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Array, Feeds, context, run, samples_of
from onnxq.passes import Equalize, FoldBatchNorm, Normalize, SmoothQuant, SplitOutliers, Widen

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.feeds import InputSpec, input_specs
from onnxq.pipeline import Pass

STEPS: list[Pass] = [
    Equalize(), SmoothQuant(), SplitOutliers(), SplitOutliers(of="activations"),
]  # fmt: skip
# model: (what score.py calls its samples, which steps rewrite something)
TASKS = {
    "mobilenet_v1_0.75_224": ("imagenet", "equalize split-outliers"),
    "mobilenet_v1_0.25_224": ("imagenet", "equalize split-outliers"),
    "cifar10_resnet20": ("cifar", "equalize split-outliers"),
    "kws_dscnn": ("kws", "equalize split-outliers"),
    "mnist_cntk": ("mnist", "equalize split-outliers"),
    "ultraface_rfb320": ("faces", "equalize split-outliers"),
    "all-MiniLM-L6-v2": ("stsb", "equalize smoothquant split-outliers"),
    "stories260K": ("lm", "equalize smoothquant split-outliers"),
    "stories260K_kv": ("", "equalize smoothquant split-outliers"),
    "silero_vad_16k": ("", ""),
    "gtcrn_stream": ("", ""),
}


def noise(spec: InputSpec, rng: np.random.Generator) -> Array:
    """Quiet noise; what silero takes is 576 samples of 16 kHz."""
    shape = [n if isinstance(n, int) else 1 for n in spec.shape or ()]
    if np.dtype(spec.dtype).kind != "f":
        return np.full(shape, 3 if shape else 16000, spec.dtype)
    if shape == [1, 1]:
        shape = [1, 576]
    return rng.normal(0, 0.1, shape).astype(spec.dtype)


def feeds_for(model: onnx.ModelProto, task: str, shared: Path, folder: Path) -> Feeds:
    """Eight of score.py's samples; noise for models that it has none for."""
    specs = input_specs(model)
    if not task:
        rng = np.random.default_rng(0)
        return [{spec.name: noise(spec, rng) for spec in specs} for _ in range(8)]
    out = folder / "samples"
    script = [sys.executable, str(shared / "score" / "score.py"), "samples", task, str(out)]
    subprocess.run([*script, "--n", "8"], check=True, capture_output=True)
    if out.is_dir():
        feeds = [dict(np.load(file)) for file in sorted(out.iterdir())]
        for feed in feeds if task == "stsb" else ():
            feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
        return feeds
    ((name, array),) = np.load(out.with_suffix(".npz")).items()
    return [{name: array[k : k + 1]} for k in range(len(array))]


def title(step: Pass) -> str:
    return " ".join([step.name, *map(str, step.settings().values())])


@pytest.mark.parametrize("step", STEPS, ids=title)
@pytest.mark.parametrize("name", TASKS)
def test_the_function_stays(name: str, step: Pass, shared: Path, tmp_path: Path) -> None:
    task, rewritten = TASKS[name]
    source = onnx.load(shared / "models" / f"{name}.onnx")
    feeds = feeds_for(source, task, shared, tmp_path)
    graph = g.load(source)
    ctx = context(samples=samples_of(source, feeds))
    for first in (Widen(), Normalize(), FoldBatchNorm()):
        first.apply(graph, ctx)
    assert ctx.samples is not None
    if wanted := step.observe(graph, ctx):
        ctx.stats |= observe(graph, wanted, ctx.samples, threads=1)
    changes = step.apply(graph, ctx)
    assert changes or step.name not in rewritten.split()
    assert step.apply(graph, ctx) == 0
    for feed in feeds[:3]:
        expected = run(source, feed)
        for key, values in run(graph, feed).items():
            if expected[key].size:  # a probability near 0 is as exact as the sum behind it
                apart = np.abs(values - expected[key]).max()
                assert apart < 1e-5 * np.abs(expected[key]).max() + 1e-7
