"""More bits go where the outputs need them, within the bytes that there are."""

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import feeds_of, model, normal, pipeline, run

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Result

TEXT = """(float[n,64] x) => (float[n,8] y) {
    a = MatMul (x, loud)
    b = MatMul (x, faint)
    s = Add (a, b)
    y = MatMul (s, last)
}"""
WEIGHTS = {
    "loud": normal(64, 64, scale=1.0),
    "faint": normal(64, 64, seed=1, scale=1e-3),
    "last": normal(64, 8, seed=2),
}
SIXTEEN = 4 + (16 + 4) / 16  # bits of a weight in blocks of 16
EIGHT = 8 + (16 + 8) / 16


def mixed(source: onnx.ModelProto, feeds: Any, bits: float) -> Result:
    settings = ["assign.format=w4:16", f"mix-bits.bits={bits}"]
    return pipeline(source, feeds, "int4-mixed", settings=settings)


def bits_of(result: Result) -> dict[str, int]:
    return {name: q.qtype.bits for name, q in result.context.weights.items()}


def test_the_weights_that_the_outputs_hang_on_get_more_bits() -> None:
    source, feeds = model(TEXT, **WEIGHTS), feeds_of(16, x=(8, 64))
    one = (SIXTEEN * (4096 + 512) + EIGHT * 4096) / (2 * 4096 + 512)
    assert bits_of(mixed(source, feeds, one + 0.01)) == {"loud": 8, "faint": 4, "last": 4}


@pytest.mark.parametrize(("bits", "expected"), [(SIXTEEN, 4), (EIGHT, 8), (1.0, 4), (32, 8)])
def test_the_budget_is_kept_and_used(bits: float, expected: int) -> None:
    source, feeds = model(TEXT, **WEIGHTS), feeds_of(16, x=(8, 64))
    assert set(bits_of(mixed(source, feeds, bits)).values()) == {expected}


def test_no_other_choice_within_the_budget_is_better() -> None:
    """Against all choices, each built and run."""
    source, feeds = model(TEXT, **WEIGHTS), feeds_of(16, x=(8, 64))
    expected = np.concatenate([run(source, feed)["y"] for feed in feeds])

    def error(result: Result) -> float:
        said = np.concatenate([run(result.graph, feed, False)["y"] for feed in feeds])
        return float(np.square(said - expected).sum())

    names = list(WEIGHTS)
    sizes = np.array([WEIGHTS[name].size for name in names])
    budget = 6.5
    found = error(mixed(source, feeds, budget))
    nodes = {"loud": "a", "faint": "b", "last": "y"}
    for choice in range(8):
        wide = np.array([choice >> k & 1 for k in range(3)], bool)
        if (np.where(wide, EIGHT, SIXTEEN) * sizes).sum() > budget * sizes.sum():
            continue
        chosen = [nodes[name] for name, own in zip(names, wide, strict=True) if own]
        layers = ", ".join(f'"{name}=w8:16"' for name in chosen)
        settings = ["assign.format=w4:16", "mix-bits.bits=1", f"assign.layers=[{layers}]"]
        other = pipeline(source, feeds, "int4-mixed", settings=settings)
        assert found <= error(other) * 1.05


def test_what_is_tied_gets_the_same_bits() -> None:
    text = """(int64[n] ids) => (float[n,k] y) {
        h = Gather (w, ids)
        t = Transpose <perm = [1,0]> (w)
        y = MatMul (h, t)
    }"""
    source = model(text, w=normal(1100, 32))
    feeds = [{"ids": np.arange(9) + k} for k in range(8)]
    for bits, expected in ((EIGHT, 8), (SIXTEEN, 4)):
        result = mixed(source, feeds, bits)
        assert set(bits_of(result).values()) == {expected}
        stored = [i for i in g.to_proto(result.graph).graph.initializer if i.data_type == 2]
        assert len(stored) == 2  # codes and zero points, once


def test_a_budget_that_is_none_is_refused() -> None:
    with pytest.raises(OnnxqError, match="average number of bits"):
        mixed(model(TEXT, **WEIGHTS), feeds_of(4, x=(8, 64)), 0)
