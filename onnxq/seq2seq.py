"""Samples for the decoder of an encoder-decoder model whose halves are files of their own.

The encoder is run on its samples; on what it says the float decoder writes a text, token by token,
at temperature 1 (Liu et al., "LLM-QAT", 2023). With t₁ … t_n that text, a decoder is fed as
generation feeds it: at the start with t₁ … t_k and no past, afterwards with t_{k+1} alone and the
past that t₁ … t_k made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.exported import settings
from onnxq.feeds import Feed, InputSpec, input_specs
from onnxq.perplexity import NextToken
from onnxq.runtime import Session
from onnxq.storage import load_proto
from onnxq.synthetic_text import drawn

LENGTH = 16  # tokens of a written text
CUTS = (4, 8, 12, 15)  # tokens before a step


def encoder_of(decoder: Path, specs: list[InputSpec]) -> Path | None:
    """The encoder that a decoder listens to: it lies beside it."""
    listens = any("encoder" in spec.name for spec in specs)
    found = decoder.with_name("encoder_model.onnx")
    return found if listens and found.is_file() and found != decoder else None


def decoder_feeds(
    decoder: Path, encoder: Path, heard: Iterable[Feed], seed: int, threads: int | None
) -> Iterator[Feed]:
    """Whole feeds for `decoder`, of the feeds `heard` by `encoder`.

    Raises OnnxqError where no decoder beside them starts a text.
    """
    rng = np.random.default_rng(seed)
    listener = Session(encoder, threads=threads)
    writer = _Decoder(_starting(decoder), threads)
    fed = writer if writer.path == decoder else _Decoder(decoder, threads)
    start = _start_token(decoder)
    for feed in heard:
        said = next(iter(listener.run(feed).values()))
        masks = [array for name, array in feed.items() if "mask" in name]
        mask = masks[0] if masks else np.ones(said.shape[:2], np.int64)
        ids = writer.write(said, mask, start, rng)
        if fed.starts:
            yield fed.feed(ids, said, mask, {})
        if fed.goes_on:
            for cut in CUTS:
                past = writer.pasts(ids[:, :cut], said, mask)
                yield fed.feed(ids[:, cut : cut + 1], said, mask, past)


def _starting(decoder: Path) -> Path:
    """The decoder that takes no past, or the one that may."""
    for name in ("decoder_model.onnx", "decoder_model_merged.onnx"):
        if (found := decoder.with_name(name)).is_file():
            return found
    raise OnnxqError(
        f"{decoder.name} goes on with a text that another decoder starts, and neither "
        "decoder_model.onnx nor decoder_model_merged.onnx lies beside it"
    )


def _start_token(decoder: Path) -> int:
    for name in ("generation_config.json", "config.json"):
        known = settings(decoder, name)
        for key in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(known.get(key), int):
                return int(known[key])
    return 0


class _Decoder:
    """A decoder file. `starts` without a past, `goes_on` with one: a merged one does both."""

    def __init__(self, path: Path, threads: int | None) -> None:
        self.path, self._session = path, Session(path, threads=threads)
        self._specs = input_specs(load_proto(path))
        self.goes_on = any(_is_past(spec) for spec in self._specs)
        self.starts = not self.goes_on or any("use_cache" in spec.name for spec in self._specs)

    def feed(
        self, ids: NDArray[Any], said: NDArray[Any], mask: NDArray[Any], past: dict[str, Any]
    ) -> Feed:
        """`past` is empty or what `pasts` made; `said` (batch, length, width) is the encoder's."""
        batch, length = ids.shape
        before = next((a.shape[2] for name, a in past.items() if "encoder" not in name), 0)
        made: Feed = {}
        for spec in self._specs:
            name = spec.name
            if _is_past(spec):
                shape = [n if isinstance(n, int) else 0 for n in spec.shape or ()]
                value = past.get(name, np.zeros([batch, *shape[1:]], spec.dtype))
            elif "use_cache" in name:
                value = np.array([bool(past)])
            elif "encoder" in name:
                value = mask if "mask" in name else said
            elif "mask" in name:
                value = np.ones((batch, before + length))
            elif "position" in name:
                row = np.arange(before, before + length)
                value = row if spec.shape and len(spec.shape) == 1 else np.tile(row, (batch, 1))
            else:
                value = ids
            made[name] = value.astype(spec.dtype)
        return made

    def write(
        self, said: NDArray[Any], mask: NDArray[Any], start: int, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """A text (batch, LENGTH) that begins with the token `start`."""
        text = np.full((len(said), 1), start, np.int64)
        while text.shape[1] < LENGTH:
            feed = self.feed(text, said, mask, {})
            outputs = self._session.run(feed)
            found = NextToken.find(feed, outputs)
            if found is None:
                raise OnnxqError(f"{self.path.name} scores no next token; it is no decoder")
            following = drawn(outputs[found.logits][:, -1], rng)
            text = np.concatenate([text, following[:, None]], axis=1)
        return text

    def pasts(
        self, ids: NDArray[Any], said: NDArray[Any], mask: NDArray[Any]
    ) -> dict[str, NDArray[Any]]:
        """What the tokens leave behind, by the names of the inputs that take it up."""
        outputs = self._session.run(self.feed(ids, said, mask, {}))
        return {
            name.replace("present", "past_key_values", 1): array
            for name, array in outputs.items()
            if name.startswith("present")
        }


def _is_past(spec: InputSpec) -> bool:
    return spec.name.startswith("past")
