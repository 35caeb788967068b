"""Made-up token ids: random ones, or text that a language model writes itself (Liu et al.,
"LLM-QAT", 2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.feeds import Feed
from onnxq.synthetic_inputs import SAME_VALUE, Input, filled, run

_LENGTH = 64  # tokens, of sequences whose length the model leaves open
_TOP = 40  # likeliest tokens to choose the next one from
_TEXT_BUDGET = 4e12  # multiply-adds for writing text: large models write fewer sequences


def is_text(i: Input) -> bool:
    return i.dtype.kind in "iub" or i.is_state or i.is_a("mask")


def vocabulary_of(model: onnx.ModelProto, ids: str) -> int:
    """Rows of the table that an input of ids looks up; 0 when there is none."""
    tables = {t.name: t.dims[0] for t in model.graph.initializer if len(t.dims) == 2}
    for node in model.graph.node:  # a table kept in another type, or as a Constant
        if node.op_type == "Constant" and len(node.attribute[0].t.dims) == 2:
            tables[node.output[0]] = node.attribute[0].t.dims[0]
        if node.op_type in ("Cast", "Identity", "DequantizeLinear") and node.input[0] in tables:
            tables[node.output[0]] = tables[node.input[0]]
    same = {ids}
    for node in model.graph.node:
        if node.op_type in SAME_VALUE and node.input[0] in same:
            same.add(node.output[0])
        looks_up = node.op_type in ("Gather", "GatherBlockQuantized") and node.input[1] in same
        if looks_up and node.input[0] in tables:
            return int(tables[node.input[0]])
    return 0


def _text_feed(inputs: list[Input], ids: dict[str, NDArray[Any]]) -> Feed:
    """The ids with masks of ones, positions, token types of zero, and an empty past."""
    batch, length = next(iter(ids.values())).shape
    rng = np.random.default_rng(0)
    return {
        i.name: ids[i.name].astype(i.dtype)
        if i.name in ids
        else filled(i, i.sized(batch, 0 if i.is_state else length), rng)
        for i in inputs
    }


def _random_ids(
    inputs: list[Input],
    vocabularies: dict[str, int],
    batch: int,
    length: int,
    rng: np.random.Generator,
) -> dict[str, NDArray[Any]]:
    return {
        i.name: rng.integers(0, vocabularies[i.name], i.sized(batch, length))
        for i in inputs
        if i.name in vocabularies
    }


def longest_of(
    session: ort.InferenceSession, inputs: list[Input], vocabularies: dict[str, int]
) -> int:
    """The longest sequence, of those we would write, that the model has positions for."""
    for length in (_LENGTH, 48, 32, 16):
        ids = _random_ids(inputs, vocabularies, 1, length, np.random.default_rng(0))
        try:
            run(session, _text_feed(inputs, ids))
        except OnnxqError:
            continue
        return length
    return 8


def token_feeds(
    inputs: list[Input],
    vocabularies: dict[str, int],
    n: int,
    longest: int,
    rng: np.random.Generator,
) -> list[Feed]:
    lengths = rng.integers(8, longest + 1, n)
    return [
        _text_feed(inputs, _random_ids(inputs, vocabularies, 1, int(length), rng))
        for length in lengths
    ]


def _logits(session: ort.InferenceSession, feed: Feed, vocabulary: int) -> NDArray[Any] | None:
    """The first output (batch, length, vocabulary)."""
    for y in run(session, feed):
        if isinstance(y, np.ndarray) and y.ndim == 3 and y.shape[2] == vocabulary:
            return y
    return None


def predicts_next(
    session: ort.InferenceSession, inputs: list[Input], vocabularies: dict[str, int]
) -> bool:
    """Whether an output scores the next token: it has a column per token, and what it says early
    on does not hang on what comes later."""
    if len(vocabularies) != 1:
        return False
    ((name, vocabulary),) = vocabularies.items()
    ids = _random_ids(inputs, vocabularies, 1, 8, np.random.default_rng(0))
    if ids[name].ndim != 2:
        return False
    first = _logits(session, _text_feed(inputs, ids), vocabulary)
    if first is None:
        return False
    ids[name][:, -1] = (ids[name][:, -1] + 1) % vocabulary
    second = _logits(session, _text_feed(inputs, ids), vocabulary)
    return second is not None and np.allclose(first[:, :-1], second[:, :-1], rtol=1e-3, atol=1e-3)


def affordable(model: onnx.ModelProto, n: int) -> int:
    """How many of n sequences to write."""
    weights = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    return max(1, min(n, int(_TEXT_BUDGET / (weights * _LENGTH**2 / 2 + 1))))


def written_feeds(
    session: ort.InferenceSession,
    inputs: list[Input],
    vocabularies: dict[str, int],
    n: int,
    longest: int,
    rng: np.random.Generator,
) -> list[Feed]:
    """Sequences that the model writes, each after a random first token, at temperature 1."""
    ((name, vocabulary),) = vocabularies.items()
    ids = next(i for i in inputs if i.name == name)
    batch, length = ids.sized(n, longest)
    fixed = isinstance(ids.shape[1], int)
    rounds = -(-n // batch)
    written = []
    for _ in range(rounds):
        text = np.zeros((batch, length), np.int64)
        text[:, 0] = rng.integers(0, vocabulary, batch)
        for end in range(1, length):
            seen = text if fixed else text[:, :end]
            scores = _logits(session, _text_feed(inputs, {name: seen}), vocabulary)
            assert scores is not None  # predicts_next saw them
            text[:, end] = drawn(scores[:, end - 1 if scores.shape[1] > end else -1], rng)
        written.append(text)
    step = batch if isinstance(ids.shape[0], int) else 1
    text = np.concatenate(written)
    return [_text_feed(inputs, {name: text[k : k + step]}) for k in range(0, len(text), step)]


def drawn(scores: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """One of the 40 likeliest tokens for each row of scores (batch, vocabulary)."""
    scores = scores.astype(np.float64)
    top = min(_TOP, scores.shape[1])
    least = np.partition(scores, -top, axis=1)[:, -top, None]
    noisy = np.where(scores >= least, scores + rng.gumbel(size=scores.shape), -np.inf)
    return np.asarray(noisy.argmax(axis=1))
