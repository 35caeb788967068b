"""Weights that an interrupted run had solved, kept until it is done.

One file per solver and weight, in a folder of the run's own: that of a run with the same model,
recipe, samples and target. A weight is solved once or taken from there, never both, and what it is
solved from does not depend on which: the bytes of the result are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq import cache
from onnxq.errors import OnnxqError

FOLDER = "unfinished"


@dataclass(frozen=True)
class Checkpoint:
    """What a run has solved so far; without a folder it keeps nothing."""

    folder: Path | None = None

    @classmethod
    def of(cls, *run: object, resume: bool) -> Checkpoint:
        """That of a run, told by what its result depends on; emptied unless it is to resume.

        Raises OnnxqError where a run is to resume and there is no place to keep anything.
        """
        place = cache.folder()
        if place is None:
            if resume:
                raise OnnxqError(
                    "nothing to resume from: the cache is off; set ONNXQ_CACHE to a folder"
                )
            return cls()
        made = cls(place / FOLDER / cache.key("run", *run)[:32])
        if not resume:
            made.clear()
        return made

    def get(self, solver: str, weight: str) -> Any:
        """What the solver made of a weight, or None."""
        return None if self.folder is None else cache.read(self._path(solver, weight))

    def put(self, solver: str, weight: str, solved: Any) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                cache.write(self._path(solver, weight), solved)

    def clear(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, solver: str, weight: str) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(f"{solver} {weight}".encode()).hexdigest()
        return self.folder / f"{name[:32]}.npz"


NOTHING_KEPT = Checkpoint()
