"""Every preset of weights alone on real models: bytes, likeness to float, seconds to quantize.

onnxruntime's MatMulNBitsQuantizer makes its own of the same models, in the same run.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import weights_page
from accuracy import CALIBRATION, Bench
from numpy.typing import NDArray
from onnxq.passes import Assign, Float16
from onnxruntime.quantization import matmul_nbits_quantizer as peer
from rich.console import Console
from streams import Feed
from weights_page import SENTENCES, Row

import onnxq
from onnxq.recipe import Recipe, load_recipe, preset_names
from onnxq.storage import model_size
from onnxq.target import Format

MODELS = ("stories260K", "all-MiniLM-L6-v2")
BLOCKS = (32, 128)
WITHOUT_BLOCKS = ("int2",)  # its lattice has none
SLOW = ("int4-mixed", "int4", "int2")  # minutes on an encoder: last, fastest first
console = Console()


class Line(NamedTuple):
    """A target and what is measured."""

    what: str
    target: str
    measured: str
    met: str


# ── what is scored ───────────────────────────────────────────────────────────────────────────────


def scored_feeds(bench: Bench, name: str) -> list[Feed]:
    """What models are scored on, none of which calibrates."""
    if name == "stories260K":
        return [{"input_ids": ids[None, :-1]} for ids in bench.texts]
    return [
        {"input_ids": x[None], "attention_mask": np.ones_like(x)[None],
         "token_type_ids": np.zeros_like(x)[None]} for x in sentences(bench)
    ]  # fmt: skip


def sentences(bench: Bench) -> list[NDArray[np.int64]]:
    z = np.load(bench.shared / "data" / "stsb.npz")
    return bench.score_module.sequences(z, "dev")[:SENTENCES]


class Judge:
    """Loss and perplexity of a model beside float, whose answers are computed once."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self.reference = list(self.answers(bench.float_model(name)))

    def answers(self, model: Path) -> Iterator[NDArray[Any]]:
        """Log-probabilities (tokens, vocabulary) of each text, or unit embeddings (n, 384)."""
        score = self.bench.score_module
        settings = SimpleNamespace(library=None, provider="CPUExecutionProvider")
        session = score.session(model, settings)
        if self.name == "stories260K":
            for feed in scored_feeds(self.bench, self.name):
                yield score.log_softmax(session.run(None, feed)[0][0])
        else:
            yield score.embed(session, sentences(self.bench)).astype(np.float64)

    def __call__(self, model: Path) -> tuple[float, float]:
        if self.name != "stories260K":
            unit = [
                e / np.linalg.norm(e, axis=1, keepdims=True)
                for e in (next(self.answers(model)), self.reference[0])
            ]
            return float(1 - (unit[0] * unit[1]).sum(1).mean()), math.nan
        divergence = surprise = 0.0
        pairs = zip(self.answers(model), self.reference, self.bench.texts, strict=True)
        for p, q, ids in pairs:
            divergence += float((np.exp(q) * (q - p)).sum())
            surprise -= float(p[np.arange(len(p)), ids[1:]].sum())
        tokens = sum(len(q) for q in self.reference)
        return divergence / tokens, float(np.exp(surprise / tokens))


# ── onnxruntime's ────────────────────────────────────────────────────────────────────────────────


def rtn(block: int, *, bits: int = 4, symmetric: bool = False, embeddings: bool = False) -> Any:
    return peer.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, accuracy_level=4, bits=bits,
        op_types_to_quantize=("MatMul", "Gather") if embeddings else ("MatMul",),
    )  # fmt: skip


PEERS: dict[str, Callable[[int], Any]] = {
    "4 bits, asymmetric": rtn,
    "4 bits, symmetric": lambda block: rtn(block, symmetric=True),
    "4 bits, embeddings too": lambda block: rtn(block, embeddings=True),
    "2 bits": lambda block: rtn(block, bits=2),
    "8 bits": lambda block: rtn(block, bits=8),
    "HQQ": lambda block: peer.HQQWeightOnlyQuantConfig(block_size=block),
    "k-quant": lambda block: peer.KQuantWeightOnlyQuantConfig(),
}


def by_onnxruntime(path: Path, config: Any, block: int = 128) -> onnx.ModelProto:
    """`block` is for configurations that do not say."""
    quantizer = peer.MatMulNBitsQuantizer(
        onnx.load(path), block_size=block, accuracy_level=4, algo_config=config
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it draws bars
        quantizer.process()
    return quantizer.model.model


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def of_weights_alone(recipe: Recipe) -> bool:
    plans = [step for step in recipe.passes if isinstance(step, Assign)]
    alone = all(
        plan.form != "dynamic" and Format.parse(plan.format).activation_bits is None
        for plan in plans
    )
    return alone and bool(plans or any(isinstance(step, Float16) for step in recipe.passes))


def block_sizes(recipe: Recipe) -> list[int | None]:
    """Its own and BLOCKS; of a recipe without blocks one that says nothing of them."""
    if recipe.name in WITHOUT_BLOCKS:
        return [None]
    own = {
        Format.parse(step.format).block
        for step in recipe.passes
        if isinstance(step, Assign) and step.form == "weights"
    }
    return sorted({*own, *BLOCKS} - {None}, key=lambda n: n or 0) if own else [None]


def planned() -> Iterator[tuple[str, str, int | None]]:
    """Tool, recipe and block size of every row of one model."""
    for label in PEERS:
        yield from (("onnxruntime", label, block) for block in BLOCKS)
    for name in sorted(preset_names(), key=lambda n: SLOW.index(n) if n in SLOW else -1):
        recipe = load_recipe(name)
        if of_weights_alone(recipe):
            yield from (("onnxq", name, block) for block in block_sizes(recipe))


def measure(judge: Judge, tool: str, recipe: str, block: int | None) -> Row:
    bench, name = judge.bench, judge.name
    made = bench.scratch / f"{name}.{tool}.{recipe}.{block}.onnx"
    row = Row(name, tool, recipe, block)
    started = time.perf_counter()
    try:
        if tool == "onnxq":
            onnxq.quantize(
                bench.float_model(name), recipe, samples=bench.feeds(name), limit=CALIBRATION,
                block_size=block, output=made, check=False,
            )  # fmt: skip
        else:
            assert block
            onnx.save(by_onnxruntime(bench.float_model(name), PEERS[recipe](block), block), made)
        seconds = time.perf_counter() - started
        said = judge(made)
        return Row(*row.key, model_size(made), *said, seconds)
    except Exception as error:  # of any tool: what stops is a row that says why
        text = " ".join(str(error).rpartition("failed:")[2].split())[:160]
        return Row(*row.key, reason=f"{type(error).__name__}: {text}")


def rows(bench: Bench, results: Path | None, presets: Sequence[str]) -> Iterator[Row]:
    """All rows of all models; those in `results` as they are there, the others added to it.

    `presets` are those to measure where `results` has nothing of them: none means all.
    """
    kept = results.read_text("utf-8").splitlines() if results and results.exists() else []
    known = {row.key: row for row in (Row(**json.loads(line)) for line in kept)}
    for name in MODELS:
        yield known.get((name, "float32", "float32", None)) or Row(
            name, "float32", "float32", None, model_size(bench.float_model(name)), 0.0
        )
        wanted = list(planned())
        judge: Judge | None = None
        for number, key in enumerate(wanted):
            row = known.get((name, *key))
            if row is None:
                if presets and key[0] == "onnxq" and key[1] not in presets:
                    continue
                judge = judge or Judge(bench, name)
                row = measure(judge, *key)
                if results:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(row)) + "\n")
            said = row.reason or f"{row.bytes / 1e6:.3f} MB, {row.loss:.5f}, {row.seconds:.1f} s"
            place = f"{name} {number + 1}/{len(wanted)}: {row.tool} {row.label}: {said}"
            console.print(place, soft_wrap=True, highlight=False, markup=False)
            yield row


def figure(
    bench: Bench, results: Path | None, page: Path | None, presets: Sequence[str] = ()
) -> Iterator[Line]:
    made: list[Row] = []
    try:
        made.extend(rows(bench, results, presets))
    finally:  # a run that is stopped has what it measured
        if page and made:
            weights_page.write(page, made)
    yield from targets(made)


def targets(made: list[Row]) -> Iterator[Line]:
    found = {row.key: row for row in made}
    ours = "int4"
    for block, least in zip(BLOCKS, (0.986, 0.978), strict=True):
        keys = [
            ("stories260K", "onnxq", ours, block),
            ("stories260K", "onnxruntime", "4 bits, asymmetric", block),
            ("all-MiniLM-L6-v2", "onnxq", ours, block),
        ]
        if not found.keys() >= set(keys):
            continue
        mine, theirs, mini = (found[key] for key in keys)
        ratio, size = mine.loss / theirs.loss, mine.bytes / max(1, theirs.bytes)
        yield Line(
            f"KL, stories260K, {ours}, block {block} ÷ onnxruntime's asymmetric rounding",
            "≤ 0.55, file ≤ 1", f"{ratio:.3f} ({mine.loss:.4f} ÷ {theirs.loss:.4f}), "
            f"file {size:.2f}", "yes" if ratio <= 0.55 and size <= 1 else "no",
        )  # fmt: skip
        good = 1 - mini.loss >= least and mini.bytes <= 16e6
        yield Line(
            f"cosine, all-MiniLM-L6-v2, {ours}, block {block}", f"≥ {least}, ≤ 16 MB",
            f"{1 - mini.loss:.4f}, {mini.bytes / 1e6:.1f} MB", "yes" if good else "no",
        )  # fmt: skip
