from typing import Any

import numpy as np
import pytest
from graphs import Array, model, pipeline
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxq.passes.solve.blocks import round_blocks
from onnxq.passes.solve.hqq import HQQ, hqq

from onnxq import graph as g
from onnxq.pipeline import Pipeline
from onnxq.qtype import QTensor, QType, in_blocks
from onnxq.recipe import load_recipe
from onnxq.target import load_target

FORMATS = ["u4a:4", "u4:4", "s4:4", "u2a:3", "u8a:5"]
P = 0.7
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=11),
    elements=st.floats(-4, 4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3),
)


def heavy(out: int, columns: int) -> Array:
    draws = np.random.default_rng(5).standard_t(4, (out, columns))
    return draws.astype(np.float32) * np.float32(0.02)


def lp_errors(weight: Array, solved: QTensor) -> Array:
    """Σ |W − Ŵ|ᵖ of every block, (out, blocks)."""
    assert solved.qtype.group is not None
    error = np.abs(weight.astype(np.float64) - solved.dequantize())
    return (in_blocks(error, solved.qtype.group) ** P).sum(axis=2)


def paper(weight: Array, scale: float, zero: float, qtype: QType, iterations: int) -> float:
    """The scale of one block, (group,), in the paper's steps one by one."""
    beta, best, least = 10.0, scale, np.inf
    for _ in range(iterations + 1):
        codes = np.clip(np.rint(weight / scale) + zero, qtype.qmin, qtype.qmax)
        x = weight - scale * (codes - zero)
        if (error := float((np.abs(x) ** P).sum())) < least:
            best, least = scale, error
        unit = x / scale
        w_e = scale * np.array(
            [np.sign(v) * max(abs(v) - abs(v) ** (P - 1) / beta, 0) if v else 0 for v in unit]
        )
        scale = float((weight - w_e) @ (codes - zero) / ((codes - zero) @ (codes - zero)))
        scale = float(np.float16(scale))
        beta *= 1.01
    return best


@pytest.mark.parametrize("spec", ["u4a:32", "u4:32", "s4:32"])
def test_it_is_the_papers_loop(spec: str) -> None:
    weight, qtype = heavy(5, 70), QType.parse(spec)
    start, solved = round_blocks(weight, qtype, clip=False), hqq(weight, qtype)
    assert qtype.group is not None
    np.testing.assert_array_equal(solved.zero, start.zero)
    assert (solved.scale != start.scale).mean() > 0.5
    same = 0
    for row, block in np.ndindex(*start.scale.shape):
        part = weight[row, block * qtype.group : (block + 1) * qtype.group].astype(np.float64)
        expected = paper(
            part, float(start.scale[row, block]), int(start.zero[row, block]), qtype, 20
        )
        same += float(solved.scale[row, block]) == expected
        assert float(solved.scale[row, block]) == pytest.approx(expected, rel=0.05)
    assert same >= 0.8 * start.scale.size  # in float32 a tie may fall the other way


@pytest.mark.parametrize("spec", FORMATS)
@given(matrices, st.booleans())
def test_no_block_is_worse_than_its_start(spec: str, weight: Array, clip: bool) -> None:
    qtype = QType.parse(spec)
    start = round_blocks(weight, qtype, clip=clip)
    before, after = lp_errors(weight, start), lp_errors(weight, hqq(weight, qtype, start=start))
    assert (after <= before * (1 + 1e-4) + 1e-3 * np.abs(weight).max() ** P).all()


@pytest.mark.parametrize("spec", ["u4a:32", "u4:32", "u4a:128", "u2a:32"])
def test_weights_with_heavy_tails_are_better_than_rounded_by_range(spec: str) -> None:
    weight, qtype = heavy(64, 256), QType.parse(spec)
    plain = lp_errors(weight, round_blocks(weight, qtype, clip=False)).sum()
    assert lp_errors(weight, hqq(weight, qtype)).sum() < 0.98 * plain


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_same_bytes_on_any_number_of_threads(order: Any) -> None:
    weight, qtype = np.asarray(heavy(600, 300), order=order), QType.parse("u4a:64")
    one, *others = (hqq(weight, qtype, threads=n) for n in (1, 2, 5))
    for other in others:
        for part in ("codes", "scale", "zero"):
            assert getattr(one, part).tobytes() == getattr(other, part).tobytes()


@pytest.mark.parametrize("size", [1e-30, 1e-5, 1e6, 1e30])
def test_tiny_and_huge_weights_and_zeros(size: float) -> None:
    weight = heavy(6, 10)
    weight[2, :8] = 0
    weight *= np.float32(size / np.abs(weight).max())
    solved = hqq(weight, QType.parse("u4a:4"))
    assert np.isfinite(solved.scale).all()
    assert (solved.dequantize()[2, :8] == 0).all()
    assert np.abs(solved.dequantize() / size - weight / size).max() < 0.16


def test_the_pass_goes_on_from_the_codes_there_are_once() -> None:
    source = model(
        "(float[n, 96] x) => (float[n, 64] y, float[n, 8] z) "
        "{ y = MatMul(x, a)  z = MatMul(y, b) }",
        opset=21, a=heavy(96, 64), b=heavy(64, 8),
    )  # fmt: skip
    steps = load_recipe("int4-rtn").passes
    plain = pipeline(source, None, "int4-rtn")
    after = next(k for k, step in enumerate(steps) if step.name == "round-to-nearest") + 1
    twice = [*steps[:after], HQQ(), HQQ(), *steps[after:]]
    found = Pipeline(twice).run(g.load(source), None, load_target("cpu"), threads=1)
    for name, values in (("a", heavy(96, 64)), ("b", heavy(64, 8))):
        start = plain.context.weights[name]
        expected = hqq(values.T, start.qtype, start=start)
        assert expected.codes.tobytes() == found.context.weights[name].codes.tobytes()
        assert expected.scale.tobytes() == found.context.weights[name].scale.tobytes()
        assert (expected.scale != start.scale).any()
