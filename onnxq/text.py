"""Samples from a text file, through the model's own tokenizer (`tokenizer.json`).

Paragraphs, where blank lines part them, else lines, are one sample each; longer ones are cut into
windows of as many tokens as a sample may have. Ids go to the input of tokens, ones to the masks, 0,
1, 2, … to positions; a past is left out, which the model makes itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, one_line
from onnxq.exported import beside, settings
from onnxq.feeds import Feed, InputSpec, OneByOne

MAX_TOKENS = 256
_NO_IDS = ("mask", "position", "type", "segment")
_LIMITS = ("max_position_embeddings", "n_positions", "max_target_positions")


def is_text(source: object) -> bool:
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".txt"


def takes_tokens(specs: Sequence[InputSpec]) -> bool:
    return any(_is_ids(spec) for spec in specs)


def load_tokenizer(path: Path | None, model: Path) -> Any:
    """A `tokenizers.Tokenizer`, of `path` or of the tokenizer.json beside the model.

    Raises OnnxqError where there is none, or the package that reads it is missing.
    """
    file = path or beside(model, "tokenizer.json")
    if file is None:
        raise OnnxqError(
            f"text needs the model's tokenizer, and no tokenizer.json lies beside {str(model)!r}; "
            "name it with --tokenizer FILE"
        )
    if not file.is_file():
        raise OnnxqError(f"there is no tokenizer {str(file)!r}")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise OnnxqError("text needs the package tokenizers: pip install 'onnxq[text]'") from None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise OnnxqError(f"{str(file)!r} is no tokenizer.json: {one_line(error)}") from None


def longest(model: Path, max_tokens: int) -> int:
    """`max_tokens`, or as many as the config.json beside the model has positions for."""
    known = settings(model)
    limits = [known[key] for key in _LIMITS if key in known]
    return min([max_tokens, *(n for n in limits if isinstance(n, int) and n > 0)])


@dataclass
class TextFile(OneByOne):
    """`vocabulary` is how many tokens the model knows; 0 where that cannot be told."""

    path: Path
    tokenizer: Any
    specs: Sequence[InputSpec]
    max_tokens: int
    vocabulary: int = 0

    def __post_init__(self) -> None:
        self._given = [spec for spec in self.specs if not spec.optional]
        ids = [spec for spec in self._given if _is_ids(spec)]
        if not ids:
            raise OnnxqError(
                f"{self.name} is text, and the model takes no tokens but "
                f"{', '.join(map(str, self._given))}; give an .npz file or a folder of them"
            )
        for spec in self._given:
            if spec not in ids and np.dtype(spec.dtype).kind not in "iub" and not _is_mask(spec):
                raise OnnxqError(
                    f"{self.name} is text, which does not tell the model's input {spec}; give an "
                    ".npz file or a folder of them"
                )
        batch, length = ids[0].shape or (None, None)
        if isinstance(batch, int) and batch != 1:
            raise OnnxqError(
                f"the model takes {batch} sequences at a time and text is fed one by one; give an "
                ".npz file"
            )
        self.fixed = length if isinstance(length, int) else None
        self._padded = any(_is_mask(spec) for spec in self._given)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.fixed or self.max_tokens)

    def count(self, stop: int | None) -> int:
        total = 0
        for _ in self._windows():
            if total == stop:
                break
            total += 1
        return total

    def feeds(self, start: int, stop: int | None) -> Iterator[Feed]:
        for number, (ids, shown, types) in enumerate(self._windows()):
            if number == stop:
                return
            if number >= start:
                yield {spec.name: _filled(spec, ids, shown, types) for spec in self._given}

    def _windows(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """Ids, mask and token types (tokens,) of each sample."""
        for text in _texts(self.path):
            whole = self.tokenizer.encode(text)
            for part in (whole, *whole.overflowing):
                ids = np.array(part.ids, np.int64)
                if self.vocabulary and ids.max(initial=0) >= self.vocabulary:
                    raise OnnxqError(
                        f"the tokenizer gives the id {ids.max()} and the model knows "
                        f"{self.vocabulary} tokens; it is not the model's own tokenizer"
                    )
                missing = (self.fixed or len(ids)) - len(ids)
                if not len(ids) or (missing and not self._padded):
                    continue
                shown = np.ones_like(ids)
                types = np.array(part.type_ids, np.int64)
                yield tuple(np.pad(row, (0, missing)) for row in (ids, shown, types))  # type: ignore[misc]


def _is_ids(spec: InputSpec) -> bool:
    wide = spec.shape is None or len(spec.shape) == 2
    named = any(word in spec.name.lower() for word in _NO_IDS)
    return wide and np.dtype(spec.dtype).kind in "iu" and not named


def _is_mask(spec: InputSpec) -> bool:
    return "mask" in spec.name.lower()


def _filled(
    spec: InputSpec, ids: NDArray[Any], shown: NDArray[Any], types: NDArray[Any]
) -> NDArray[Any]:
    name = spec.name.lower()
    if "position" in name:
        row = np.arange(len(ids))
    elif _is_mask(spec):
        row = shown
    elif "type" in name or "segment" in name:
        row = types
    elif _is_ids(spec):
        row = ids
    else:  # a switch, such as use_cache_branch
        return np.zeros([n if isinstance(n, int) else 1 for n in spec.shape or ()], spec.dtype)
    lead = [n if isinstance(n, int) else 1 for n in (spec.shape or (1, 1))[:-1]]
    return np.broadcast_to(row, (*lead, len(ids))).astype(spec.dtype)


def _texts(path: Path) -> Iterator[str]:
    """The paragraphs of a file, or its lines where no blank line parts any."""
    with_paragraphs = False
    for index, line in enumerate(_lines(path)):
        with_paragraphs = with_paragraphs or (not line and index > 0)
    kept: list[str] = []
    for line in _lines(path):
        if line:
            kept.append(line)
        if kept and not (line and with_paragraphs):
            yield "\n".join(kept)
            kept = []
    if kept:
        yield "\n".join(kept)


def _lines(path: Path) -> Iterator[str]:
    """Without the blank lines at the end."""
    blank = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                text = line.strip()
                if not text:
                    blank += 1
                    continue
                yield from [""] * blank
                blank = 0
                yield text
    except UnicodeDecodeError:
        raise OnnxqError(f"{str(path)!r} is no text in UTF-8") from None
