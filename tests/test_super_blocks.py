import numpy as np
import pytest
from graphs import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq import cache
from onnxq.qtype import QTensor, QType
from onnxq.spool import LARGE, Weights
from onnxq.super_blocks import covering, on_steps, row_steps, scale_codes

CODES = np.arange(1, 16, dtype=np.float32)
U4 = QType.parse("u4a:32/4")
scales = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(0, 2**14, width=32),
)


@given(scales)
def test_every_scale_that_has_a_code_is_a_float16(scale: Array) -> None:
    step = row_steps(scale, U4)
    products = step[:, None] * CODES
    assert step.shape == (len(scale),)
    assert (step > 0).all()
    if 2 * scale.max() > 2**-11:
        np.testing.assert_array_equal(products, products.astype(np.float16))


@given(scales)
def test_the_largest_of_a_row_is_the_last_code(scale: Array) -> None:
    step, largest = row_steps(scale, U4), scale.max(axis=1)
    assert (step[largest == 0] == 1).all()
    some = largest > max(2.0**-10 * largest.max(), 1e-30)  # float16 has all digits for it
    np.testing.assert_allclose(15 * step[some], largest[some], rtol=2**-7)


@pytest.mark.parametrize("size", [1e-35, 1e-12, 1e-6, 1.0, 6e4, 1e30])
def test_tensors_of_any_size_have_steps(size: float) -> None:
    scale = np.array([[0.3, 1], [0.9, 0.2]], np.float32) * np.float32(size)
    np.testing.assert_allclose(15 * row_steps(scale, U4), scale.max(axis=1), rtol=2**-7)


def test_rounding_is_to_the_nearest_and_covering_to_the_next() -> None:
    step = np.array([0.25, 2.0], np.float32)
    scale = np.random.default_rng(0).uniform(0, 40, (2, 500)).astype(np.float32)
    grid = step[:, None, None] * CODES
    distance = np.abs(grid - scale[:, :, None])
    found = on_steps(scale, step[:, None])
    np.testing.assert_array_equal(np.abs(found - scale), distance.min(axis=2))
    above = covering(scale, step[:, None])
    inside = scale <= grid[:, :, -1]
    assert (above >= scale)[inside].all()
    assert (above - step[:, None] < scale)[inside].all()
    codes = scale_codes(found, step)
    assert codes.min() == 1
    assert codes.max() == 15
    np.testing.assert_array_equal(codes * step[:, None], found)


def test_the_step_is_kept_wherever_a_weight_is(tmp_path: object) -> None:
    rows = LARGE // 64
    step, scale = np.full(rows, 0.5, np.float32), np.ones((rows, 2), np.float32)
    codes = np.zeros((rows, 64), U4.dtype)
    q = QTensor(codes, scale, codes[:, :2], U4, step)
    kept: Weights[QTensor] = Weights()
    kept["w"] = q
    path = tmp_path / "q.npz"  # type: ignore[operator]
    cache.write(path, q)
    for again in (kept["w"], kept.copy()["w"], cache.read(path)):
        assert again.qtype == U4
        np.testing.assert_array_equal(again.step, step)
        np.testing.assert_array_equal(again.codes, codes)
