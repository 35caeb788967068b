"""Figures of models made of integers alone; `scripts/benchmark integer` runs them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from accuracy import CALIBRATION, TASKS, Bench
from numpy.typing import NDArray
from weights_models import Line

import onnxq
from onnxq.feeds import Feed, input_specs
from onnxq.graph import save
from onnxq.ops import EXP_BITS, EXP_FRACTION, UNIT_BITS
from onnxq.ops.dyadic import dyadic
from onnxq.ops.evaluate import evaluate
from onnxq.ops.reference import REFERENCES
from onnxq.runtime import Session
from onnxq.samples import open_samples

OWN = Path(__file__).resolve().parents[1] / "models"  # small models of the project itself
MODELS = (
    "digits_cnn", "mobilenet_v1_0.75_224", "cifar10_resnet20", "encoder_classifier",
    "all-MiniLM-L6-v2",
)  # fmt: skip
CLASSIFIERS = ("mobilenet_v1_0.75_224", "cifar10_resnet20")
EXACT_SAMPLES = 4


def floats(bench: Bench) -> Iterator[Line]:
    """Float operators between inputs and outputs."""
    for name in MODELS:
        result = integers(bench, name)
        left = result.report.float_operators
        assert left is not None
        yield Line(f"{name}: float operators", "0", str(len(left)), yes(not left))


def bits(bench: Bench) -> Iterator[Line]:
    """Values that the runtime gives other bits for than integers of any size have."""
    for name in MODELS:
        integers(bench, name)
        path = place(bench, name)
        model, feeds = onnx.load(path), samples(bench, name)[:EXACT_SAMPLES]
        exact = [evaluate(model, feed) for feed in feeds]
        for optimize in (False, True):
            for threads in (1, 2):
                session = Session(path, optimize=optimize, threads=threads)
                differing = sum(
                    int(np.sum(values != wanted[key]))
                    for feed, wanted in zip(feeds, exact, strict=True)
                    for key, values in session.run(feed).items()
                )
                how = f"optimizations {'on' if optimize else 'off'}, {threads} threads"
                yield Line(
                    f"{name}, {how}: values that are not exact, {len(feeds)} samples", "0",
                    str(differing), yes(not differing),
                )  # fmt: skip


def agreement(bench: Bench) -> Iterator[Line]:
    """Top-1 of the integers against the same plan with floats between quantizers."""
    for name in CLASSIFIERS:
        result = integers(bench, name)
        assert result.context.qdq_form is not None
        qdq = bench.scratch / f"{name}.qdq.onnx"
        save(result.context.qdq_form, qdq)
        arguments = SimpleNamespace(data=bench.shared / "data", n=None)
        x, y = bench.score_module.classification(arguments, TASKS[name], "dev")
        paths = (bench.float_model(name), qdq, place(bench, name))
        alone, quantized, whole = (answers(path, x) for path in paths)
        same = float((whole == quantized).mean())
        yield Line(
            f"{name}: top-1 agreement with its QDQ form, {len(y)} images", "≥ 0.97",
            f"{same:.4f}", yes(same >= 0.97),
        )  # fmt: skip
        tops = ", ".join(f"{float((p == y).mean()):.4f}" for p in (alone, quantized, whole))
        yield Line(f"{name}: top-1 of float, QDQ form and integers", "", tops, "")
        close = float((whole == alone).mean())
        yield Line(f"{name}: top-1 agreement with float", "", f"{close:.4f}", "")


def embeddings(bench: Bench) -> Iterator[Line]:
    name = "all-MiniLM-L6-v2"
    integers(bench, name)
    score = bench.score(name, place(bench, name))
    yield Line(
        f"{name}: {score.text}", "≥ 0.97", f"{score.likeness:.4f}",
        yes(score.likeness >= 0.97),
    )  # fmt: skip


def bounds(bench: Bench) -> Iterator[Line]:
    """The largest errors of the functions themselves, on fine grids, against float64."""
    step = 2.0**-14
    x = np.arange(-8 * 2**14, 8 * 2**14 + 1, 7)
    scaling = (
        *dyadic(step / math.sqrt(2) * 2**UNIT_BITS), *dyadic(step / 2 / step / 2**UNIT_BITS)
    )  # fmt: skip
    made = REFERENCES["IntegerGelu"](x, 0, *scaling, np.int64(0), -(2**40), 2**40)
    real = x * step
    phi = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in real])
    worst = float(np.abs(np.asarray(made, np.float64) * step - real * phi).max())
    yield Line("i-GELU: largest error", "≤ 0.0182", f"{worst:.5f}", yes(worst <= 0.0182))
    x = -np.arange(0, 20 * 2**14, 11)
    made = REFERENCES["IntegerExp"](x, *dyadic(step / math.log(2) * 2**EXP_FRACTION))
    worst = float(np.abs(np.asarray(made, np.float64) / 2**EXP_BITS - np.exp(x * step)).max())
    yield Line("i-exp: largest error", "≤ 0.0021", f"{worst:.5f}", yes(worst <= 0.0021))
    rng = np.random.default_rng(0)
    roots = np.concatenate([np.arange(1, 4096), rng.integers(1, 2**31 - 1, 100_000), [2**31 - 1]])
    squares = roots.astype(object) ** 2
    x = np.concatenate([squares - 1, squares, squares + 1])
    said = runs_sqrt(np.array([int(v) for v in x], np.int64))
    wrong = sum(int(s) != math.isqrt(int(v)) for s, v in zip(said, x, strict=True))
    yield Line("i-sqrt: roots of n² − 1, n² and n² + 1 not exact", "0", str(wrong), yes(not wrong))


def yes(met: bool) -> str:
    return "yes" if met else "no"


def runs_sqrt(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """IntegerSqrt as the runtime computes it."""
    from onnxq.ops import DOMAIN, OPSET, VERSION, closure

    kind = onnx.TensorProto.INT64
    ends = [onnx.helper.make_tensor_value_info(name, kind, [None]) for name in "xy"]
    node = onnx.helper.make_node("IntegerSqrt", ["x"], ["y"], domain=DOMAIN)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "root", ends[:1], ends[1:]),
        functions=closure(["IntegerSqrt"]), ir_version=10,
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)
        ],
    )  # fmt: skip
    return Session(model).run({"x": x})["y"]


# ── models ───────────────────────────────────────────────────────────────────────────────────────


def integers(bench: Bench, name: str) -> onnxq.Result:
    """A model with the preset `integer-only`, not verified: the figures are what is looked at."""
    own = OWN / f"{name}.onnx"

    def made() -> onnxq.Result:
        return onnxq.quantize(
            own if own.exists() else bench.float_model(name), "integer-only",
            samples=samples(bench, name), limit=CALIBRATION, output=place(bench, name), check=False,
        )  # fmt: skip

    result: onnxq.Result = bench.once((name, "integers"), made)
    return result


def place(bench: Bench, name: str) -> Path:
    return bench.scratch / f"{name}.integers.onnx"


def samples(bench: Bench, name: str) -> list[Feed]:
    own = OWN / f"{name}.onnx"
    if own.exists():
        return list(open_samples(OWN / f"{name}.calib.npz", input_specs(onnx.load(own))))
    return bench.feeds(name)


def answers(path: Path, x: NDArray[np.float32]) -> NDArray[np.int64]:
    """The class of each image."""
    session = Session(path)
    key = session.inputs[0]
    said = [session.run({key: x[k : k + 1]})[session.outputs[0]] for k in range(len(x))]
    return np.array([int(np.argmax(row)) for row in said])


FIGURES = {
    "floats": floats, "bits": bits, "agreement": agreement, "embeddings": embeddings,
    "bounds": bounds,
}  # fmt: skip
