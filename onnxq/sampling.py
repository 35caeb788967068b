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
    ) -> None:
        """Raises OnnxqError for `states` {output: input} that are none."""
        self._path, self._model, self._preprocess = path, model, preprocess
        self._batch_size, self._seed = batch_size, seed
        self._states = States(path, model, states, threads=threads)
        self.carry = self._states.carry

    def given(self, source: Any, limit: int | None) -> Samples:
        """Of anything that `open_samples` takes."""
        return open_samples(
            source,
            self._states.specs,
            batch_size=self._batch_size,
            limit=limit,
            preprocess=self._preprocess,
        )

    def made_up(self, n: int) -> tuple[Samples, Kind]:
        """`n` at most, and of what kind they are."""
        if self._preprocess is not None:
            raise OnnxqError("preprocessing is for a folder of images; give it with --data FOLDER")
        made, kind = synthesize(
            self._model, n=n, seed=self._seed, path=self._path, leave=self._states.sure
        )
        name = MADE_UP[kind]
        return open_samples(made, self._states.specs, synthesised=True, name=name), kind
