"""Perplexity of a model that predicts the next token, on the samples' own tokens.

With t₁ … t_n the tokens of a sample and p the softmax of the logits at each place,

    perplexity = exp( − mean ln p(t_{k+1} | t₁ … t_k) )

the mean over all places k ≥ 1 of all samples that a token follows. Logits are (batch, tokens,
vocabulary), tokens (batch, tokens). A sample may come in several feeds, each with the past that the
one before it made: the last place of a feed is then scored by the first token of the next. Places
that the attention mask hides, and what follows them, do not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.verify import Runs, is_no_score

Array = NDArray[Any]
_NO_TOKENS = ("mask", "position", "type", "segment")
_PASTS = ("past", "cache", "state")


@dataclass(frozen=True)
class NextToken:
    """Which input are the tokens, and which output scores those that follow."""

    ids: str
    logits: str

    @classmethod
    def find(cls, feed: Mapping[str, Array], outputs: Mapping[str, Array]) -> NextToken | None:
        """As far as shapes and names tell: an output with a row for each token and a column for
        each that there is.
        """
        tokens = [
            name
            for name, array in feed.items()
            if array.ndim == 2 and array.dtype.kind in "iu" and not _named(name, *_NO_TOKENS)
        ]
        for ids in sorted(tokens, key=lambda name: not _named(name, "decoder")):
            for logits, scores in outputs.items():
                row_each = scores.ndim == 3 and scores.shape[:2] == feed[ids].shape
                column_each = row_each and scores.shape[2] > max(1, feed[ids].max(initial=0))
                real = scores.dtype.kind == "f" or scores.dtype.name == "bfloat16"
                if column_each and real and not is_no_score(logits):
                    return cls(ids, logits)
        return None

    def holds(self, session: Runs, feed: Mapping[str, Array]) -> bool:
        """Whether what is said early on does not hang on what comes later, as in a decoder; False
        where a feed of one token does not tell.
        """
        ids = feed[self.ids]
        if ids.shape[1] < 2:
            return False
        changed = ids.copy()
        changed[:, -1] = np.where(ids[:, -1] > 0, ids[:, -1] - 1, ids[:, -1] + 1)
        first, second = (
            session.run({**feed, self.ids: tokens}, [self.logits])[self.logits]
            for tokens in (ids, changed)
        )
        return bool(np.allclose(first[:, :-1], second[:, :-1], rtol=1e-3, atol=1e-3))


def _named(name: str, *words: str) -> bool:
    return any(word in name.lower() for word in words)


def log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln p (…, classes); NaN for scores of which the largest is infinite."""
    with np.errstate(invalid="ignore"):
        shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _likelihood(scores: Array, following: Array) -> NDArray[np.float64]:
    """ln p (rows,) of the tokens that follow, by scores (rows, vocabulary)."""
    return log_softmax(scores.astype(np.float64))[np.arange(len(following)), following]


@dataclass
class _Open:
    """Where a sample stands after a feed: what was said at its last place, (batch, vocabulary), the
    rows in which that counts, and the number of tokens so far.
    """

    said: tuple[Array, Array]
    counts: NDArray[np.bool_]
    tokens: int


@dataclass
class Perplexity:
    """The distance of two models is how much further ln(perplexity) is from 0, in nats per token;
    the drop the relative rise of perplexity.
    """

    where: NextToken
    losses: tuple[float, float] = (0.0, 0.0)  # −Σ ln p of the float model and of the other
    places: int = 0
    _open: _Open | None = None

    def update(
        self, feed: Mapping[str, Array], reference: Mapping[str, Array], other: Mapping[str, Array]
    ) -> None:
        ids = feed[self.where.ids]
        length = ids.shape[1]
        if not ids.size:
            return
        said = (reference[self.where.logits], other[self.where.logits])
        shown = _shown(self.where.ids, feed)
        before = self._open if self._open and _goes_on(feed, self._open) else None
        if before is not None:
            self._score(before.said, ids[:, 0], before.counts & shown[:, 0])
        for place in range(length - 1):
            scores = (said[0][:, place], said[1][:, place])
            self._score(scores, ids[:, place + 1], shown[:, place] & shown[:, place + 1])
        past = before.tokens if before is not None else 0
        self._open = _Open((said[0][:, -1], said[1][:, -1]), shown[:, -1], past + length)

    def _score(
        self, said: tuple[Array, Array], following: Array, counts: NDArray[np.bool_]
    ) -> None:
        rows = np.flatnonzero(counts)
        first, second = (
            -float(_likelihood(scores[rows], following[rows]).sum()) for scores in said
        )
        self.losses = (self.losses[0] + first, self.losses[1] + second)
        self.places += len(rows)

    def scored(self) -> tuple[float, float]:
        """Perplexity of the float model and of the other."""
        if not self.places:
            raise OnnxqError(
                "perplexity needs tokens that follow others, and each sample has a single one; "
                "give longer samples"
            )
        first, second = (_exp(loss / self.places) for loss in self.losses)
        return first, second

    def value(self) -> float:
        self.scored()
        return (self.losses[1] - self.losses[0]) / self.places

    def drop(self) -> float:
        return _exp(self.value()) - 1


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _goes_on(feed: Mapping[str, Array], before: _Open) -> bool:
    """Whether the past of a feed is what the feed before it made."""
    pasts = [array for name, array in feed.items() if _named(name, *_PASTS) and array.ndim > 2]
    return any(array.size and before.tokens in array.shape[1:] for array in pasts)


def _shown(ids: str, feed: Mapping[str, Array]) -> NDArray[np.bool_]:
    """(batch, tokens): where the mask, which may cover the past too, lets tokens be seen."""
    batch, length = feed[ids].shape
    for name, array in feed.items():
        own = _named(name, "decoder") == _named(ids, "decoder") and not _named(name, "encoder_att")
        if _named(name, "mask") and own and array.ndim == 2 and array.shape[1] >= length:
            return np.asarray(array[:, -length:] != 0)
    return np.ones((batch, length), bool)
