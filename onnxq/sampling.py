"""The samples of one model, ready to feed: given or made up, their states filled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from onnxq.errors import OnnxqError
from onnxq.samples import Preprocessing, Samples, open_samples
from onnxq.states import States
from onnxq.synthesize import Kind, synthesize
from onnxq.synthetic_text import vocabulary_of
from onnxq.text import MAX_TOKENS, TextFile, is_text, load_tokenizer, longest

MADE_UP = {
    "images": "made-up images",
    "language model": "text that the model wrote itself",
    "tokens": "random tokens",
    "random": "random numbers",
}


class Sampling:
    """Opens samples for a model. Those it opens may leave states out; `carry` fills them in."""

    def __init__(
        self,
        path: Path,
        model: onnx.ModelProto,
        preprocess: Preprocessing,
        states: Mapping[str, str] | None,
        batch_size: int = 1,
        seed: int = 0,
        threads: int | None = None,
        tokenizer: str | Path | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """`tokenizer` and `max_tokens` are for text: by default the tokenizer beside the model.

        Raises OnnxqError for `states` {output: input} that are none.
        """
        self._path, self._model, self._preprocess = path, model, preprocess
        self._tokenizer, self._max_tokens = Path(tokenizer) if tokenizer else None, max_tokens
        self._batch_size, self._seed = batch_size, seed
        self._states = States(path, model, states, threads=threads)
        self.carry = self._states.carry

    def given(self, source: Any, limit: int | None) -> Samples:
        """Of a text file, or of anything that `open_samples` takes."""
        if is_text(source) and Path(source).is_file():
            return self._text(Path(source), limit)
        if self._tokenizer is not None:
            raise OnnxqError("a tokenizer is for samples in a text file (.txt)")
        return open_samples(
            source,
            self._states.specs,
            batch_size=self._batch_size,
            limit=limit,
            preprocess=self._preprocess,
        )

    def _text(self, file: Path, limit: int | None) -> Samples:
        if self._batch_size > 1 or self._preprocess is not None:
            raise OnnxqError(
                f"{file.name} is text, which is fed one sample at a time and prepared by the "
                "tokenizer alone; leave the batch size and the preprocessing out"
            )
        specs = self._states.specs
        known = (vocabulary_of(self._model, spec.name) for spec in specs)
        text = TextFile(
            file.name,
            file,
            load_tokenizer(self._tokenizer, self._path),
            specs,
            longest(self._path, self._max_tokens),
            next(filter(None, known), 0),
        )
        samples = Samples(text, specs, stop=limit)
        if next(iter(samples), None) is None:
            raise OnnxqError(f"{file.name} holds no sample long enough; give more text")
        return samples

    def made_up(self, n: int) -> tuple[Samples, Kind]:
        """`n` at most, and of what kind they are."""
        if self._preprocess is not None:
            raise OnnxqError("preprocessing is for a folder of images; give it with --data FOLDER")
        made, kind = synthesize(
            self._model, n=n, seed=self._seed, path=self._path, leave=self._states.sure
        )
        name = MADE_UP[kind]
        return open_samples(made, self._states.specs, synthesised=True, name=name), kind
