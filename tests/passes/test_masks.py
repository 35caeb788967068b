"""Ranges of scores that a mask writes to."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import model
from onnxq.passes.solve.masks import ENOUGH, MARGIN, Addend, Unmasked, masked

from onnxq import graph as g


@pytest.mark.parametrize("hidden", [-np.inf, -1e4, float(np.finfo(np.float32).min)])
def test_a_range_ends_where_nothing_more_would_be_seen(hidden: float) -> None:
    scores = Unmasked()
    scores.update(np.float32([-3, 5, hidden]))
    scores.update(np.float32([-4, hidden, 1]))
    assert (scores.result().low, scores.result().high) == (-4 - MARGIN, 5)
    x = np.array([-3.0, 5.0, hidden])
    held = np.maximum(x, scores.result().low)
    exact, kept = (np.exp(v - v.max()) / np.exp(v - v.max()).sum() for v in (x, held))
    assert np.abs(exact - kept).max() < np.exp(-MARGIN)


def test_a_mask_is_kept_as_far_as_it_is_needed() -> None:
    mask = Addend()
    mask.update(np.float32([0, -1e30]))
    assert (mask.result().low, mask.result().high) == (ENOUGH, 0)


def test_the_way_of_a_mask_to_a_softmax_is_followed() -> None:
    text = """(float[n,8] x, float[n,8] keep, float[n,8] other) => (float[n,8] y, float[n,8] z) {
        inverse = Sub (one, keep) mask = Mul (inverse, low)
        s = Add (x, mask) r = Reshape (s, shape) y = Softmax (r) z = Neg (other)
    }"""
    graph = g.load(model(
        text, 21, one=np.float32(1), low=np.float32(-1e4), shape=np.array([0, 8]),
    ))  # fmt: skip
    g.infer_types(graph)
    found = masked(graph)
    assert found["r"] is found["s"] is Unmasked
    assert {name for name, kind in found.items() if kind is Addend} >= {"x", "mask", "inverse"}
    assert "other" not in found
    assert "z" not in found
