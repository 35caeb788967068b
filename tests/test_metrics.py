"""Distances against their definitions, on arrays."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal

from onnxq.errors import OnnxqError
from onnxq.metrics import NAMES, class_scores, metric

A = [{"logits": 3 * normal(4, 6, seed=k), "hidden": normal(4, 5, 8, seed=k)} for k in range(3)]
B = [{n: v + normal(*v.shape, seed=50 + k) for n, v in a.items()} for k, a in enumerate(A)]
P, Q = (
    np.concatenate([np.exp(o["logits"]) / np.exp(o["logits"]).sum(-1, keepdims=True) for o in s])
    for s in (A, B)
)


def distance(name: str, left=A, right=B):  # type: ignore[no-untyped-def]
    made = metric(name, {}, A[0]).start()
    for a, b in zip(left, right, strict=True):
        made.update({}, a, b)
    return made


def test_kl_is_that_of_the_softmax() -> None:
    assert distance("kl").value() == pytest.approx((P * np.log(P / Q)).sum(-1).mean(), rel=1e-5)


def test_probabilities_are_taken_as_they_are() -> None:
    rows = [[{"logits": p[None]} for p in side] for side in (P, Q)]
    expected = (P * np.log(P / Q)).sum(-1).mean()
    assert distance("kl", *rows).value() == pytest.approx(expected, rel=1e-5)


def test_agreement_counts_rows_and_top1_weighs_them_by_what_they_cost() -> None:
    turned = P.argmax(-1) != Q.argmax(-1)
    assert 0 < turned.mean() < 1
    assert distance("agreement").drop() == distance("agreement").value() == turned.mean()
    rows = np.arange(len(P))
    lost = P.max(-1) - P[rows, Q.argmax(-1)]
    assert distance("top1").value() == pytest.approx(lost.mean(), rel=1e-5)
    assert distance("top1").drop() >= lost.sum() / P.max(-1).sum() - 1e-6


def test_a_drop_of_few_rows_is_what_noise_as_strong_costs_on_average() -> None:
    """Against drawing the noise: the measured loss of one row is all or nothing."""
    rng = np.random.default_rng(0)
    scores = np.array([[3.0, 2.6, 0.0, -1.0]])
    p = np.exp(scores) / np.exp(scores).sum()
    noise = np.array([[0.3, -0.1, 0.2, -0.4]])
    drawn = scores + rng.normal(0, noise.std(), (200_000, 4))
    expected = (p[0, 0] - p[0, drawn.argmax(-1)]).mean() / p[0, 0]
    outputs = {"logits": scores}
    made = metric("top1", {}, outputs).start()
    made.update({}, outputs, {"logits": scores + noise})
    assert made.drop() == pytest.approx(expected, rel=0.05)


def test_cosine_and_sqnr_are_those_of_the_worst_output() -> None:
    def pooled(name: str) -> tuple[float, float]:
        a, b = (np.concatenate([o[name].ravel() for o in s]).astype(float) for s in (A, B))
        cosine = a @ b / np.sqrt(a @ a * (b @ b))
        return 1 - cosine, 10 * np.log10(((a - b) ** 2).sum() / (a @ a))

    worst = max(pooled("logits"), pooled("hidden"))
    assert distance("cosine").value() == pytest.approx(worst[0])
    assert distance("sqnr").value() == pytest.approx(worst[1])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "perplexity"])
def test_equal_outputs_have_no_distance(name: str) -> None:
    value = distance(name, A, A).value()
    assert value == pytest.approx(0 if name != "sqnr" else -200, abs=1e-9)
    assert distance(name, A, B).value() > value


def test_class_scores_are_told_by_shape_and_name() -> None:
    outputs = {
        "scores": normal(2, 5),
        "token_logits": normal(2, 7, 5),
        "last_hidden_state": normal(2, 7, 5),
        "image": normal(2, 3, 8, 8),
        "one": normal(2, 1),
        "embedding": normal(2, 16),
        "ids": np.zeros((2, 4), np.int64),
    }
    assert class_scores(outputs) == ["scores", "token_logits"]
    assert metric("auto", {}, outputs).name == "kl"
    assert metric("auto", {}, {"image": outputs["image"]}).name == "cosine"
    with pytest.raises(OnnxqError, match="for class scores, which none of the outputs image look"):
        metric("top1", {}, {"image": outputs["image"]})
