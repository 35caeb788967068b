"""Every model × preset: quantized on real samples, verified, and scored beside float.

A model's task says how it is scored. `score.py` of the shared folder scores images, sentences and
text without a past; the streams and the decoder with a past are run here, call after call.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from streams import Feed, enhanced, read_wav, si_sdr, speech

import onnxq
from onnxq.errors import OnnxqError
from onnxq.proof import VERIFICATION_SAMPLES
from onnxq.report import Report
from onnxq.runtime import Session

CALIBRATION = 40
TEXTS = 120  # of the dev split, as many as score.py takes
PRESETS = ("int8-static", "int8-dynamic", "int8-weights", "int16x8", "int8-static-qoperator")
SOME_MODELS = {  # presets that take long or are for certain models
    "int8-smooth": ("all-MiniLM-L6-v2", "stories260K", "stories260K_kv"),
    "int8-accurate": ("mobilenet_v1_0.75_224", "all-MiniLM-L6-v2"),
    "int8-per-tensor": ("mobilenet_v1_0.75_224",),
    "int8-symmetric": ("mobilenet_v1_0.75_224",),
    "int8-power-of-two": ("mobilenet_v1_0.75_224",),
    "w4a8": ("mobilenet_v1_0.75_224", "mobilenet_v1_0.25_224", "cifar10_resnet20"),
}  # fmt: skip
TASKS = {
    "mobilenet_v1_0.75_224": "imagenet",
    "mobilenet_v1_0.25_224": "imagenet",
    "cifar10_resnet20": "cifar",
    "kws_dscnn": "kws",
    "mnist_cntk": "mnist",
    "ultraface_rfb320": "faces",
    "all-MiniLM-L6-v2": "stsb",
    "stories260K": "lm",
    "stories260K_kv": "lm-past",
    "silero_vad_16k": "speech",
    "gtcrn_stream": "enhancement",
}
AUDIO = {"speech": "silero_test_16k.wav", "enhancement": "gtcrn_mix_16k.wav"}


@dataclass(frozen=True)
class Score:
    """What a quantized model scores: `reference` (float's) and `quantized` are in `measure`;
    `likeness` says how like float its answers are, right or wrong, and `text` puts it in words.
    """

    likeness: float
    text: str
    measure: str = ""
    reference: float = math.nan
    quantized: float = math.nan


@dataclass(frozen=True)
class Row:
    """One model × preset; without a report it was refused, for `reason`."""

    model: str
    preset: str
    report: Report | None = None
    score: Score | None = None
    reason: str = ""

    @property
    def latency_ratio(self) -> float:
        assert self.report
        before, after = self.report.float_latency, self.report.quantized_latency
        assert before
        assert after
        return after.median_ms / before.median_ms


def load_score(shared: Path) -> ModuleType:
    """The module `score/score.py` of a folder with models and data."""
    spec = importlib.util.spec_from_file_location("score", shared / "score" / "score.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Bench:
    """The folder with models, data and `score.py`, and a folder to write models to."""

    shared: Path
    scratch: Path
    score_module: ModuleType
    _answers: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def float_model(self, name: str) -> Path:
        return self.shared / "models" / f"{name}.onnx"

    @cached_property
    def texts(self) -> list[NDArray[np.int64]]:
        z = np.load(self.shared / "data" / "tinystories_tok512.npz")
        return self.score_module.sequences(z, "dev")[:TEXTS]

    def once(self, key: tuple[str, ...], compute: Callable[[], Any]) -> Any:
        """What is the same for every preset, computed once."""
        if key not in self._answers:
            self._answers[key] = compute()
        return self._answers[key]

    # ── samples ──────────────────────────────────────────────────────────────────────────────

    def feeds(self, name: str) -> list[Feed]:
        """CALIBRATION samples, then those that verify."""
        task, total = TASKS[name], CALIBRATION + VERIFICATION_SAMPLES
        if task in AUDIO:
            stream = self.float_stream(name)[1]
            return spread(stream, CALIBRATION) + spread(stream, VERIFICATION_SAMPLES)
        if task == "stsb":
            z = np.load(self.shared / "data" / "stsb.npz")
            sentences = self.score_module.sequences(z, "dev")[-total:][::-1]
            return [
                {"input_ids": x[None], "attention_mask": np.ones_like(x)[None],
                 "token_type_ids": np.zeros_like(x)[None]} for x in sentences
            ]  # fmt: skip
        if task in ("lm", "lm-past"):
            z = np.load(self.shared / "data" / "tinystories_tok512.npz")
            return [{"input_ids": x[None]} for x in self.score_module.sequences(z, "calib")[:total]]
        arguments = SimpleNamespace(data=self.shared / "data", n=total)
        x, _ = self.score_module.classification(arguments, task, "calib")
        key = Session(self.float_model(name)).inputs[0]
        return [{key: x[k : k + 1]} for k in range(total)]

    def float_stream(self, name: str) -> tuple[NDArray[Any], list[Feed]]:
        return self.once((name, "stream"), lambda: self.stream(name, self.float_model(name)))

    def stream(self, name: str, model: Path) -> tuple[NDArray[Any], list[Feed]]:
        audio = read_wav(self.shared / "data" / "audio" / AUDIO[TASKS[name]])
        return speech(model, audio) if TASKS[name] == "speech" else enhanced(model, audio)

    # ── scores ───────────────────────────────────────────────────────────────────────────────

    def score(self, name: str, model: Path) -> Score:
        match TASKS[name]:
            case "speech":
                decided = self.stream(name, model)[0] > 0.5
                equal = float((decided == (self.float_stream(name)[0] > 0.5)).mean())
                return Score(equal, f"decisions equal {equal:.4f}")
            case "enhancement":
                decibels = si_sdr(self.float_stream(name)[0], self.stream(name, model)[0])
                return Score(decibels, f"SI-SDR {decibels:.1f} dB")
            case "faces":
                said = self.scored(name, model)
                text = "face or none agrees {agreement:.4f}, scores differ by {mean_abs:.4f}"
                return Score(said["agreement"], text.format(**said))
            case "stsb":
                said = self.scored(name, model)
                both = said["float_spearman"], said["spearman"]
                return Score(said["cosine"], f"cosine {said['cosine']:.4f}", "Spearman", *both)
            case "lm":
                float_model = self.float_model(name)
                alone = self.once((name, "score"), lambda: self.scored(name, float_model))
                said = self.scored(name, model)
                both = alone["perplexity"], said["perplexity"]
                return Score(said["kl"], f"KL {said['kl']:.4f}", "perplexity", *both)
            case "lm-past":
                return self.decoder_with_past(name, model)
            case _:
                said = self.scored(name, model)
                both = said["float_top1"], said["top1"]
                text = f"top-1 agrees {said['agreement']:.4f}"
                return Score(said["agreement"], text, "top-1", *both)

    def scored(self, name: str, model: Path) -> dict[str, Any]:
        """What score.py says of a model beside float, on the dev split."""
        script, reference = self.shared / "score" / "score.py", self.float_model(name)
        command = [sys.executable, script, TASKS[name], model, "--float", reference]
        command += ["--n", str(TEXTS)] if TASKS[name] == "lm" else []
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OnnxqError(f"score.py: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout.splitlines()[-1])

    def decoder_with_past(self, name: str, model: Path) -> Score:
        """Perplexity and KL as score.py has them, each text fed in two steps."""
        float_model = Session(self.float_model(name))
        reference = self.once((name, "logs"), lambda: list(self.log_probabilities(float_model)))
        ours = list(self.log_probabilities(Session(model)))
        tokens = sum(len(p) for p in ours)

        def perplexity(logs: list[NDArray[np.float64]]) -> float:
            pairs = zip(logs, self.texts, strict=True)
            said = sum(p[np.arange(len(p)), ids[1:]].sum() for p, ids in pairs)
            return float(np.exp(-said / tokens))

        pairs = zip(ours, reference, strict=True)
        kl = float(sum((np.exp(q) * (q - p)).sum() for p, q in pairs) / tokens)
        return Score(kl, f"KL {kl:.4f}", "perplexity", perplexity(reference), perplexity(ours))

    def log_probabilities(self, session: Session) -> Iterator[NDArray[np.float64]]:
        """Per text, (tokens - 1, vocabulary): the second half is said with the first as past."""
        pasts = [value for value in session.ort.get_inputs() if value.name != "input_ids"]
        for ids in self.texts:
            past = {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in pasts}
            logits = []
            for half in np.array_split(ids[:-1], 2):
                said = session.run({"input_ids": half[None], **past})
                past = {n: said[n.replace("past_key_values", "present")] for n in past}
                logits.append(said["logits"][0])
            yield self.score_module.log_softmax(np.concatenate(logits))


def spread(feeds: list[Feed], count: int) -> list[Feed]:
    """`count` of them at even distances, half a distance from either end."""
    return [feeds[int((k + 0.5) * len(feeds) / count)] for k in range(count)]


def measure(bench: Bench, name: str, preset: str) -> Row:
    """Quantize, verify and score; what stops is a row that says why."""
    made = bench.scratch / f"{name}.{preset}.onnx"
    if name not in TASKS:
        return Row(name, preset, reason="no task is known for this model")
    try:
        report = onnxq.quantize(
            bench.float_model(name), preset, samples=bench.feeds(name), limit=CALIBRATION,
            output=made,
        ).report  # fmt: skip
        return Row(name, preset, report, bench.score(name, made))
    except OnnxqError as error:
        return Row(name, preset, reason=f"refused: {' '.join(str(error).split())}")
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return Row(name, preset, reason=f"crashed: {type(error).__name__}: {text}")


# ── the page ─────────────────────────────────────────────────────────────────────────────────────

COLUMNS = ["model", "preset", "size, kB", "parameters quantized", "measure", "float", "quantized",
           "like float", "÷ float latency"]  # fmt: skip
FLOAT_COLUMNS = ["model", "preset", "parameters quantized", "what stays float, largest first"]
TARGET_COLUMNS = ["model", "preset", "target", "measured", "met"]


def cells(row: Row) -> list[str]:
    if not row.report or not row.score:
        return [row.model, row.preset, "", "", "", "", row.reason, "", ""]
    report, score = row.report, row.score
    both = [f"{v:.4f}" if score.measure else "" for v in (score.reference, score.quantized)]
    return [
        row.model, row.preset,
        f"{report.float_bytes / 1e3:,.0f} → {report.quantized_bytes / 1e3:,.0f}",
        percent(report.share("parameters") or 0), score.measure, *both,
        score.text, f"{row.latency_ratio:.2f}",
    ]  # fmt: skip


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def left_float(rows: list[Row]) -> list[list[str]]:
    """Of each row that leaves more than a twentieth of its parameters float: the reasons."""
    lines = []
    for row in rows:
        share = row.report.share("parameters") if row.report else None
        if not row.report or share is None or share >= 0.95:
            continue
        held: dict[str, int] = {}
        for layer in row.report.layers:
            if layer.form == "float":
                text = f"{layer.op}: {layer.reason}"
                held[text] = held.get(text, 0) + layer.parameters
        of_layers = sum(layer.parameters for layer in row.report.layers)
        held["constants of no layer"] = row.report.parameters - of_layers
        total = max(1, row.report.parameters, of_layers)
        largest = sorted(held.items(), key=lambda item: -item[1])[:3]
        said = [f"{text} ({percent(n / total)})" for text, n in largest if n / total >= 0.01]
        lines.append([row.model, row.preset, percent(share), "; ".join(said)])
    return lines


@dataclass(frozen=True)
class Target:
    model: str
    preset: str
    text: str
    least: float
    value: Callable[[Row], float]
    form: str = "{:.4f}"


def likeness(row: Row) -> float:
    return row.score.likeness if row.score else math.nan


def parameters(row: Row) -> float:
    return (row.report.share("parameters") or 0.0) if row.report else math.nan


def gain(row: Row) -> float:
    return row.score.quantized - row.score.reference if row.score else math.nan


def speed(row: Row) -> float:
    """Less is better: negative."""
    return -row.latency_ratio if row.report else math.nan


TARGETS = (
    Target("silero_vad_16k", "int8-static", "decisions equal ≥ 0.99", 0.99, likeness),
    Target("silero_vad_16k", "int8-static", "parameters quantized ≥ 0.95", 0.95, parameters),
    Target("gtcrn_stream", "int8-static", "SI-SDR ≥ 25 dB", 25, likeness, "{:.1f}"),
    Target("all-MiniLM-L6-v2", "int8-dynamic", "cosine ≥ 0.994", 0.994, likeness),
    Target("all-MiniLM-L6-v2", "int8-static", "cosine ≥ 0.95", 0.95, likeness),
    Target("mobilenet_v1_0.75_224", "int8-static", "top-1 less float's ≥ -0.015", -0.015, gain,
           "{:+.4f}"),
    Target("mobilenet_v1_0.75_224", "int8-accurate", "agrees ≥ 0.965", 0.965, likeness),
    Target("mobilenet_v1_0.75_224", "int8-accurate", "latency ÷ float ≤ 0.75", -0.75, speed),
    Target("mobilenet_v1_0.75_224", "int8-per-tensor", "top-1 less float's ≥ -0.02", -0.02, gain,
           "{:+.4f}"),
    Target("mobilenet_v1_0.75_224", "int8-per-tensor", "agrees ≥ 0.90", 0.90, likeness),
    Target("mobilenet_v1_0.75_224", "w4a8", "top-1 less float's ≥ -0.06", -0.06, gain, "{:+.4f}"),
    Target("mobilenet_v1_0.25_224", "int8-static", "agrees ≥ 0.90", 0.90, likeness),
    Target("all-MiniLM-L6-v2", "int8-smooth", "cosine ≥ 0.996", 0.996, likeness),
    Target("all-MiniLM-L6-v2", "int8-smooth", "latency ÷ float ≤ 0.75", -0.75, speed),
)  # fmt: skip


def targets(rows: list[Row]) -> list[list[str]]:
    found = {(row.model, row.preset): row for row in rows}
    lines = []
    for target in TARGETS:
        if row := found.get((target.model, target.preset)):
            value = target.value(row)
            shown = abs(value) if target.value is speed else value
            said = row.reason if math.isnan(value) else target.form.format(shown)
            met = "yes" if value >= target.least else "no"
            lines.append([target.model, target.preset, target.text, said, met])
    return lines


PAGE = """# Accuracy of every preset on real models

Every model is quantized with every preset, those that take long or are for certain hardware on some
models, on {calibration} calibration samples, verified as
`onnxq quantize` does, and scored beside float on a dev split. It is one run, with settings as they
come and seed 0, on {cpu} ({cores} cores) with onnxruntime {onnxruntime} and onnxq {onnxq}:

    scripts/benchmark accuracy --shared DIR --markdown docs/accuracy.md

DIR is a folder with models and data; `scripts/benchmark --help` says what it holds.

- Images, keywords and digits: top-1 on the dev split; "agrees" is the share of inputs with float's
  answer. The images of ImageNet are probably training images, so only the difference to float
  counts. For faces, the share of images in which both models find one, or both none (score over
  0.7), and the mean difference of the scores.
- Sentences: Spearman of STS-B dev, and the mean cosine of the embeddings to float's. STS-B has no
  calibration split: {calibration} of the 3,000 sentences that are scored calibrate.
- Text: perplexity on {texts} texts, and the mean KL divergence from float per token.
  `stories260K_kv` gets each text in two steps, the second with the keys and values of the first.
- Audio: speech decisions (probability over 0.5) equal to float's in one minute of calls, and SI-SDR
  of the enhanced signal to that of the float model. Each model carries its own state. Calibration
  samples are calls of the float model at even distances in the same recording.

"÷ float latency" is the median of the verification's timing on one sample, both models in turns:
below 1 is faster than float. Other work on the machine disturbs it, in the smallest models most.

{table}

## Targets

{targets}

## What stays float

Rows with less than 95 % of parameters quantized; shares are of all parameters.

{left_float}
"""
NOTES = "## What stands out"


def markdown_table(columns: list[str], lines: list[list[str]]) -> str:
    ruled = [columns, ["---"] * len(columns), *lines]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in ruled]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def tables(rows: list[Row]) -> dict[str, str]:
    """The three tables of the page."""
    return {
        "table": markdown_table(COLUMNS, [cells(row) for row in rows]),
        "targets": markdown_table(TARGET_COLUMNS, targets(rows)),
        "left_float": markdown_table(FLOAT_COLUMNS, left_float(rows)),
    }


def write_page(path: Path, rows: list[Row]) -> None:
    """The page anew from the rows; what stands under NOTES in it is kept."""
    environment = next((r.report.environment for r in rows if r.report), None)
    assert environment, "nothing was quantized"
    told = {key: environment[key] for key in ("cpu", "cores", "onnxruntime", "onnxq")}
    text = PAGE.format(calibration=CALIBRATION, texts=TEXTS, **told, **tables(rows))
    old = path.read_text("utf-8") if path.exists() else ""
    _, heading, notes = old.partition(NOTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + (f"\n{heading}{notes}" if heading else ""), "utf-8")


def accuracy(bench: Bench, console: Console, chosen: list[str], page: Path | None) -> None:
    """All rows, each said as it is done, then the tables; `chosen` models or all there are."""
    there = {path.stem for path in (bench.shared / "models").glob("*.onnx")}
    ordered = [*(name for name in TASKS if name in there), *sorted(there - TASKS.keys())]
    rows = []
    for name in ordered:
        some = [preset for preset, models in SOME_MODELS.items() if name in models]
        for preset in (*PRESETS, *some) if not chosen or name in chosen else ():
            rows.append(measure(bench, name, preset))
            console.print(*cells(rows[-1]), soft_wrap=True, highlight=False, markup=False)
    for table in tables(rows).values():
        console.print(table, soft_wrap=True, highlight=False, markup=False)
    if page:
        write_page(page, rows)
