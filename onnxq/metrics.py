"""How far a model's answers are from the float model's, by the name of a measure.

Every metric is a distance: 0 for equal answers and more for worse ones, but for `sqnr`, which is
noise over signal in dB. One is fed each feed with the outputs of both models for it.

    kl      mean over all rows of Σ p ln(p/q), p and q the softmax of the class scores, in nats
    top1    top-1 accuracy lost, where p says how likely each class is the right answer: mean over
            all rows of p_a − p_b, for the classes a of the float model and b of the other one
    agreement    share of the rows whose largest class score is another than the float model's
    cosine  1 − cosine of all values of an output, of the output where it is largest
    sqnr    10 log₁₀(noise/signal) over all values of an output, of the output where it is largest
    perplexity    of the samples' tokens; the distance is what ln(perplexity) rises by, in nats
    module:function    a function of your own; the distance is what its value falls by
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, suggest
from onnxq.iterables import imported
from onnxq.perplexity import NextToken, Perplexity, log_softmax
from onnxq.verify import Comparison, is_no_score

Array = NDArray[Any]
Outputs = Mapping[str, Array]
Judge = Callable[[list[Outputs]], float]  # of the outputs of all samples in order; more is better
NAMES = ("kl", "top1", "agreement", "cosine", "sqnr", "perplexity")
_OF_SCORES = ("kl", "top1", "agreement")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_SCORES = re.compile(r"logit|prob|score|class|softmax", re.IGNORECASE)


class Distance(Protocol):
    """Of two models on all samples that it was updated with."""

    def update(self, feed: Outputs, reference: Outputs, other: Outputs) -> None: ...

    def value(self) -> float: ...

    def scored(self) -> tuple[float, float] | None:
        """What the float model and the other score; None where only their distance is told."""

    def drop(self) -> float | None:
        """The distance as a share of the float model's score; None where it has none."""


@dataclass(frozen=True)
class Metric:
    """A kind of distance: `start()` begins one. `unit` and `title` are for reading."""

    name: str
    title: str
    start: Callable[[], Distance]
    unit: str = ""

    @property
    def lasting(self) -> bool:
        """Whether it says the same tomorrow: a user's function may not."""
        return ":" not in self.name


def metric(name: str, feed: Outputs, outputs: Outputs) -> Metric:
    """A metric by its name, for a model that says such outputs of such a feed; `auto` is `kl` for
    class scores and `cosine` otherwise.

    Raises OnnxqError for a name that is none, and where the outputs are not what it is for.
    """
    scores = class_scores(outputs)
    if name == "auto":
        name = "kl" if scores else "cosine"
    if name in _OF_SCORES:
        if not scores:
            raise OnnxqError(
                f"the metric {name!r} is for class scores, which none of the outputs "
                f"{', '.join(outputs)} look like; take cosine or sqnr"
            )
        of = ", ".join(scores)
        if name == "kl":
            return Metric(name, f"KL divergence of {of}", lambda: _KL(scores), "nat")
        if name == "agreement":
            return Metric(name, f"top-1 disagreement on {of}", lambda: _Agreement(scores))
        title = f"top-1 accuracy on {of}, by the float model's own probabilities"
        return Metric(name, title, lambda: _Top1(scores))
    if name == "perplexity":
        where = NextToken.find(feed, outputs)
        if where is None:
            raise OnnxqError(
                "perplexity is for models that score the next token of a text, and none of the "
                f"outputs {', '.join(outputs)} has a row for each token of an input; take kl, "
                "cosine or sqnr"
            )
        title = f"rise of ln(perplexity) of {where.ids}"
        return Metric(name, title, lambda: Perplexity(where), "nat")
    if name == "cosine":
        return Metric(name, "1 − cosine of the outputs", lambda: _Cosine())
    if name == "sqnr":
        return Metric(name, "noise over signal at the outputs", lambda: _Sqnr(), "dB")
    if _FUNCTION.fullmatch(name):
        judge: Judge = imported(name, "be the metric", "returns a number")
        return Metric(name, f"what {name} falls by", lambda: _Judged(name, judge))
    raise OnnxqError(
        f"there is no metric {name!r}; give module:function, or one of {', '.join(NAMES)}"
        + suggest(name, NAMES)
    )


def class_scores(outputs: Outputs) -> list[str]:
    """Outputs (…, classes) whose largest entry is an answer, as far as shape and name tell: of two
    dimensions, or of more and named so.
    """
    return [
        name
        for name, values in outputs.items()
        if isinstance(values, np.ndarray)
        and _is_real(values)
        and values.ndim >= 2
        and values.shape[-1] > 1
        and not is_no_score(name)
        and (values.ndim == 2 or _SCORES.search(name))
    ]


def _is_real(values: Array) -> bool:
    return values.dtype.kind == "f" or values.dtype.name == "bfloat16"


def _rows(values: Array) -> NDArray[np.float64]:
    return values.reshape(-1, values.shape[-1]).astype(np.float64)


def _log_of(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln p (rows, classes); of what is probabilities already, their logarithm."""
    if scores.size and scores.min() >= 0 and np.allclose(scores.sum(-1), 1, atol=1e-3):
        return np.log(np.maximum(scores, 1e-12))
    return log_softmax(scores)


class _Measured:
    def drop(self) -> float | None:
        return None

    def scored(self) -> tuple[float, float] | None:
        return None


@dataclass
class _KL(_Measured):
    scores: Sequence[str]
    total: float = 0.0
    rows: int = 0

    def update(self, feed: Outputs, reference: Outputs, other: Outputs) -> None:
        for name in self.scores:
            p, q = (_log_of(_rows(outputs[name])) for outputs in (reference, other))
            self.total += float((np.exp(p) * (p - q)).sum())
            self.rows += len(p)

    def value(self) -> float:
        return max(self.total / max(self.rows, 1), 0.0)


@dataclass
class _Agreement(_Measured):
    scores: Sequence[str]
    wrong: int = 0
    rows: int = 0

    def update(self, feed: Outputs, reference: Outputs, other: Outputs) -> None:
        for name in self.scores:
            a, b = _rows(reference[name]).argmax(-1), _rows(other[name]).argmax(-1)
            self.wrong += int((a != b).sum())
            self.rows += len(a)

    def value(self) -> float:
        return self.wrong / max(self.rows, 1)

    def drop(self) -> float:
        return self.value()


@dataclass
class _Top1(_Measured):
    """Few rows show no small loss, so the drop is no less than what noise as strong as each row's
    would cost on average: with e the error of a row's scores, of standard deviation σ over the
    classes, and s its scores, a class j overtakes the first with probability
    Φ(−(s_a − s_j) / (√2 σ)), and then costs p_a − p_j.
    """

    scores: Sequence[str]
    kept: float = 0.0
    lost: float = 0.0
    expected: float = 0.0
    rows: int = 0

    def update(self, feed: Outputs, reference: Outputs, other: Outputs) -> None:
        for name in self.scores:
            a, b = _rows(reference[name]), _rows(other[name])
            p, every = np.exp(_log_of(a)), np.arange(len(a))
            best = p[every, a.argmax(-1)]
            self.kept += float(best.sum())
            self.lost += float((best - p[every, b.argmax(-1)]).sum())
            self.expected += float(_expected_loss(a, p, (b - a).std(-1, keepdims=True)).sum())
            self.rows += len(a)

    def value(self) -> float:
        return self.lost / max(self.rows, 1)

    def drop(self) -> float:
        return max(self.lost, self.expected) / (self.kept or 1.0)


def _expected_loss(
    scores: NDArray[np.float64], p: NDArray[np.float64], sigma: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(rows,) of scores and p (rows, classes) and sigma (rows, 1); of the eight nearest classes."""
    order = np.argsort(-scores, axis=-1)[:, :9]
    ranked, likely = np.take_along_axis(scores, order, -1), np.take_along_axis(p, order, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(sigma > 0, (ranked[:, :1] - ranked[:, 1:]) / (2 * sigma), np.inf)
    overtakes = 0.5 * np.vectorize(math.erfc, otypes=[float])(z)
    return np.minimum((overtakes * (likely[:, :1] - likely[:, 1:])).sum(-1), likely[:, 0])


@dataclass
class _Pooled(_Measured):
    """Sums over all values of each output."""

    seen: dict[str, Comparison] = field(default_factory=dict)

    def update(self, feed: Outputs, reference: Outputs, other: Outputs) -> None:
        for name, values in reference.items():
            if name in other and isinstance(values, np.ndarray) and _is_real(values):
                known = self.seen.setdefault(name, Comparison(scores=False))
                known.update(values, other[name])


class _Cosine(_Pooled):
    def value(self) -> float:
        return max((max(1 - c.cosine, 0.0) for c in self.seen.values()), default=0.0)

    def drop(self) -> float:
        return self.value()


class _Sqnr(_Pooled):
    def value(self) -> float:
        return max((-c.sqnr_db for c in self.seen.values()), default=0.0)


@dataclass
class _Judged:
    """By a function of the user, which wants all outputs at once: they are kept until then."""

    name: str
    judge: Judge
    float_outputs: list[Outputs] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)

    def update(self, feed: Outputs, reference: Outputs, other: Outputs) -> None:
        self.float_outputs.append(reference)
        self.outputs.append(other)

    def scored(self) -> tuple[float, float]:
        return self._score(self.float_outputs), self._score(self.outputs)

    def value(self) -> float:
        reference, other = self.scored()
        return reference - other

    def drop(self) -> float:
        reference, other = self.scored()
        return (reference - other) / (abs(reference) or 1.0)

    def _score(self, outputs: list[Outputs]) -> float:
        try:
            score = float(self.judge(outputs))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise OnnxqError(
                f"the metric {self.name} failed with {reason}; it takes a list of {{output name: "
                "array}, one for each sample, and returns a number"
            ) from error
        if not math.isfinite(score):
            raise OnnxqError(
                f"the metric {self.name} returned {score}; it must return a finite number"
            )
        return score
