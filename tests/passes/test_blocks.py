import itertools
from typing import Any

import numpy as np
import pytest
from graphs import Array, normal
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxq.passes.solve import blocks
from onnxq.passes.solve.blocks import round_blocks

from onnxq.qtype import QTensor, QType, quantize_weight, weight_scale

FORMATS = ["u4a:4", "u4:4", "s4:4", "s4a:8", "u2a:3", "u8a:5"]
matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=11),
    elements=st.floats(-4, 4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3),
)


def block_errors(weight: Array, solved: QTensor, square: Array | float = 1.0) -> Array:
    """Σ q d² of every block, (out, blocks)."""
    group = solved.qtype.group
    assert group is not None
    error = square * (weight.astype(np.float64) - solved.dequantize()) ** 2
    starts = np.arange(0, weight.shape[1], group)
    return np.add.reduceat(error, starts, axis=1)


def heavy(out: int, columns: int) -> Array:
    draws = np.random.default_rng(5).standard_t(3, (out, columns))
    return draws.astype(np.float32) * np.float32(0.02)


@pytest.mark.parametrize("spec", FORMATS)
@given(matrices)
def test_without_clipping_it_is_rounding_by_the_blocks_ranges(spec: str, weight: Array) -> None:
    qtype = QType.parse(spec)
    scale, zero = weight_scale(weight, qtype)
    plain = quantize_weight(weight, scale, zero, qtype)
    solved = round_blocks(weight, qtype, clip=False)
    assert solved.codes.dtype == solved.zero.dtype == qtype.dtype
    assert solved.codes.tobytes() == plain.codes.tobytes()
    assert solved.zero.tobytes() == zero.tobytes()
    np.testing.assert_array_equal(solved.scale, scale)


@pytest.mark.parametrize("spec", FORMATS)
@given(matrices, st.data())
def test_no_block_is_worse_off_clipped(spec: str, weight: Array, data: Any) -> None:
    qtype = QType.parse(spec)
    squares = hnp.arrays(
        np.float32, (1, weight.shape[1]), elements=st.floats(0.0625, 100, width=32)
    )
    square = data.draw(squares)
    plain = block_errors(weight, round_blocks(weight, qtype, clip=False), square)
    found = block_errors(weight, round_blocks(weight, qtype, square=square), square)
    assert (found <= plain * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("spec", FORMATS)
def test_every_weight_takes_the_nearest_code_of_its_block(spec: str) -> None:
    weight, qtype = normal(6, 10), QType.parse(spec)
    solved = round_blocks(weight, qtype)
    assert qtype.group is not None
    levels = np.arange(qtype.qmin, qtype.qmax + 1)
    for row, column in np.ndindex(*weight.shape):
        block = column // qtype.group
        reals = solved.scale[row, block] * (levels - int(solved.zero[row, block]))
        error = np.abs(reals - weight[row, column])
        assert error[levels == int(solved.codes[row, column])] <= error.min() * (1 + 1e-5)


@pytest.mark.parametrize("spec", ["u2a:16", "u2:16", "u4a:16", "u4:16"])
def test_the_scale_is_close_to_the_best_there_is(spec: str) -> None:
    """Against all scales, both signs, and all zero points, finely tried one by one."""
    qtype, weight = QType.parse(spec), heavy(20, 16)
    square = np.random.default_rng(1).uniform(0.1, 2, (1, 16)).astype(np.float32)
    best = np.full(20, np.inf)
    zeros = [qtype.middle] if qtype.symmetric else range(qtype.qmin, qtype.qmax + 1)
    step = 2 * np.abs(weight).max(axis=1) / (qtype.qmax - qtype.qmin)
    for part, sign, zero in itertools.product(np.linspace(0.2, 1.2, 400), (1, -1), zeros):
        scale = (sign * part * step)[:, None]
        codes = np.clip(np.rint(weight / scale) + zero, qtype.qmin, qtype.qmax)
        best = np.minimum(best, (square * (scale * (codes - zero) - weight) ** 2).sum(axis=1))
    found = block_errors(weight, round_blocks(weight, qtype, square=square), square)[:, 0]
    plain = block_errors(weight, round_blocks(weight, qtype, clip=False), square)[:, 0]
    assert (found >= best * 0.97).all()
    saved, possible = np.log(plain / found).mean(), np.log(plain / best).mean()
    assert saved > 0.4 * possible


@pytest.mark.parametrize(
    ("spec", "share"), [("u4a:32", 0.95), ("u4:32", 0.95), ("u4a:128", 0.9), ("u2a:32", 0.75)]
)
def test_clipping_pays(spec: str, share: float) -> None:
    weight, qtype = normal(64, 256), QType.parse(spec)
    plain = block_errors(weight, round_blocks(weight, qtype, clip=False)).sum()
    assert block_errors(weight, round_blocks(weight, qtype)).sum() < share * plain


def test_columns_whose_inputs_are_loud_are_kept_best() -> None:
    weight, qtype = heavy(64, 256), QType.parse("u4a:32")
    square = np.exp(np.random.default_rng(2).normal(0, 2, (1, 256))).astype(np.float32)
    blind = block_errors(weight, round_blocks(weight, qtype), square).sum()
    assert (
        block_errors(weight, round_blocks(weight, qtype, square=square), square).sum() < 0.8 * blind
    )


@pytest.mark.parametrize("spec", ["u4:16", "s4:16"])
def test_the_farthest_weight_takes_the_lowest_code(spec: str) -> None:
    weight, qtype = normal(8, 32), QType.parse(spec)
    solved = round_blocks(weight, qtype, clip=False)
    for block in range(2):
        part = slice(16 * block, 16 * block + 16)
        farthest = np.abs(weight[:, part]).argmax(axis=1)
        lowest = solved.codes[:, part].astype(int)[np.arange(8), farthest]
        assert set(lowest) == {qtype.qmin}
    assert (solved.scale < 0).any()
    assert (solved.scale > 0).any()


@pytest.mark.parametrize("spec", ["u4a:32", "u4:128"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_same_bytes_on_any_number_of_threads(spec: str, order: Any) -> None:
    weight = np.asarray(heavy(1100, 300), order=order)  # several tiles, a last block cut short
    square = np.random.default_rng(3).uniform(0, 2, (1, 300))
    one, *others = (
        round_blocks(weight, QType.parse(spec), square=square, threads=n) for n in (1, 2, 5)
    )
    for other in others:
        for part in ("codes", "scale", "zero"):
            assert getattr(one, part).tobytes() == getattr(other, part).tobytes()


def test_tiles_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, square = heavy(37, 45), np.random.default_rng(4).uniform(0, 2, (37, 45))
    qtype = QType.parse("u4a:8")
    whole = round_blocks(weight, qtype, square=square)
    monkeypatch.setattr(blocks, "ROWS", 5)
    monkeypatch.setattr(blocks, "TILE", 80)
    monkeypatch.setattr(blocks, "STRIP", 3)
    small = round_blocks(weight, qtype, square=square)
    assert whole.codes.tobytes() == small.codes.tobytes()
    np.testing.assert_array_equal(whole.scale, small.scale)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spec", ["u4a:4", "u4:4", "s4:4"])
def test_zeros_stay_zeros(spec: str, clip: bool) -> None:
    weight = np.zeros((3, 10), np.float32)
    weight[1, 5] = 1e-4  # its block alone is none of zeros
    solved = round_blocks(weight, QType.parse(spec), clip=clip).dequantize()
    assert np.array_equal(solved == 0, weight == 0)
    assert solved[1, 5] == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spec", ["u4a:4", "u4:4"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-5, 1e3, 1e6, 1e30, 3e38])
def test_tiny_and_huge_weights_are_as_exact_as_others(spec: str, clip: bool, size: float) -> None:
    weight = normal(6, 10)
    weight *= np.float32(size / np.abs(weight).max())
    solved = round_blocks(weight, QType.parse(spec), clip=clip)
    assert np.isfinite(solved.scale).all()
    error = np.abs(solved.dequantize() / size - weight / size)
    assert error.max() < 0.16
