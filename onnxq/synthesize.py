"""Makes up samples for a model when the user has none: images, text, or numbers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort

from onnxq.errors import OnnxqError
from onnxq.feeds import Feed
from onnxq.synthetic_images import image_feeds, is_image, settled
from onnxq.synthetic_inputs import Input, declared, filled, impossible, open_session, run
from onnxq.synthetic_text import (
    affordable,
    is_text,
    longest_of,
    predicts_next,
    token_feeds,
    vocabulary_of,
    written_feeds,
)

Kind = Literal["images", "language model", "tokens", "random"]


def synthesize(
    model: onnx.ModelProto,
    *,
    n: int = 32,
    seed: int = 0,
    path: Path | None = None,
    leave: Collection[str] = (),
) -> tuple[list[Feed], Kind]:
    """`n` made-up samples that the model runs on, and what they are; the same for the same seed.

    "images"          n images, as many to a feed as the model takes at a time
    "language model"  sequences of 64 tokens that the model wrote; fewer of a large model
    "tokens"          n sequences of 8 to 64 random ids
    "random"          n feeds of normal floats; integers are 0, or what the graph compares them with

    `path` is the model's file; it is needed where weights are external data. Inputs named in
    `leave` are left out of the samples: states, which the model makes itself.
    Raises OnnxqError when no samples can be made up that the model runs on.
    """
    session = open_session(model, path)
    rng = np.random.default_rng(seed)
    inputs = [settled(declared(value, model, leave), path) for value in session.get_inputs()]
    vocabularies = {
        i.name: rows
        for i in inputs
        if i.dtype.kind in "iu"
        and not i.is_a("mask", "type", "segment", "position")
        and (rows := vocabulary_of(model, i.name))
    }
    kind: Kind = "random"
    if any(is_image(i) for i in inputs):
        kind = "images"
        feeds = image_feeds(model, inputs, n, rng, path)
    elif vocabularies and all(is_text(i) for i in inputs):
        kind = "tokens"
        longest = longest_of(session, inputs, vocabularies)
        feeds = token_feeds(inputs, vocabularies, n, longest, rng)
        if predicts_next(session, inputs, vocabularies):
            kind = "language model"
            n = affordable(model, n)
            feeds = written_feeds(session, inputs, vocabularies, n, longest, rng)
    else:
        feeds = _random_feeds(session, inputs, n, rng)
    if any(np.isnan(y).any() for y in run(session, feeds[0]) if _is_float(y)):
        raise impossible(ValueError("its output is not a number"))
    return [{k: v for k, v in feed.items() if k not in leave} for feed in feeds], kind


def _is_float(y: object) -> bool:
    return isinstance(y, np.ndarray) and y.dtype.kind == "f"


def _random_feeds(
    session: ort.InferenceSession, inputs: list[Input], n: int, rng: np.random.Generator
) -> list[Feed]:
    """Open dimensions get 16, or the first longer size that the model runs with."""

    def feed(size: int) -> Feed:
        return {i.name: filled(i, i.sized(1, size), rng) for i in inputs}

    for size in (16, 128, 512):
        try:
            run(session, feed(size))
        except OnnxqError:
            continue
        return [feed(size) for _ in range(n)]
    return [feed(16)]
