import numpy as np
import pytest
from graphs import normal

from onnxq import cache
from onnxq.codebook import SUPER_BLOCK, CodebookTensor, ScaleCodes, nearest
from onnxq.spool import LARGE, Weights

LEVELS = np.array([-90, -10, 0, 127], np.int8)


def tensor(out: int, columns: int, group: int, double: bool = False) -> CodebookTensor:
    rng = np.random.default_rng(0)
    scale = np.abs(normal(out, -(-columns // group)))
    codes = rng.integers(0, 4, (out, columns)).astype(np.uint8)
    kept = ScaleCodes.of(scale) if double else scale
    return CodebookTensor(codes, LEVELS, kept, bits=2, group=group, name="mine")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(8, 4), (9, 4), (3, 16)])
def test_dequantize_follows_the_definition(columns: int, group: int, double: bool) -> None:
    q = tensor(3, columns, group, double)
    real = q.dequantize()
    assert real.dtype == np.float32
    for row in range(3):
        for column in range(columns):
            level = float(LEVELS[q.codes[row, column]])
            expected = np.float32(level) * q.scales[row, column // group]
            assert real[row, column] == expected
    assert q.format == f"mine2:{group}"


def test_nearest_is_the_level_of_least_distance() -> None:
    x = 60 * normal(5, 40)
    distance = np.abs(x[..., None] - LEVELS.astype(np.float32))
    np.testing.assert_array_equal(nearest(x, LEVELS), distance.argmin(axis=-1))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, SUPER_BLOCK), (7, 100)])
def test_scales_in_eight_bits_are_within_half_a_step(shape: tuple[int, int]) -> None:
    scale = np.abs(normal(*shape)) + np.float32(0.5)
    codes = ScaleCodes.of(scale)
    assert codes.codes.dtype == np.int8
    assert codes.codes.shape == shape
    assert codes.step.shape == (-(-scale.size // SUPER_BLOCK),)
    step = np.repeat(codes.step, SUPER_BLOCK)[: scale.size].reshape(shape)
    assert (np.abs(codes.dequantize() - scale) <= step * 0.5001).all()


def test_super_blocks_have_steps_of_their_own() -> None:
    scale = np.ones((2, SUPER_BLOCK), np.float32)
    scale[1] += np.linspace(0, 1, SUPER_BLOCK, dtype=np.float32)
    first, second = ScaleCodes.of(scale).step
    assert first < second


def test_scales_that_are_all_alike_are_exact() -> None:
    scale = np.full((2, 3), 0.37, np.float32)
    np.testing.assert_array_equal(ScaleCodes.of(scale).dequantize(), scale)


@pytest.mark.parametrize("double", [False, True])
def test_large_ones_wait_on_disk_and_come_back_the_same(double: bool) -> None:
    weights: Weights[CodebookTensor] = Weights()
    columns = LARGE // 4
    weights["w"] = q = tensor(4, columns, 128, double)
    assert weights._small["w"].codes.size == 0
    again = weights.copy()["w"]
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())


@pytest.mark.parametrize("double", [False, True])
def test_the_cache_gives_back_what_was_put(
    double: bool, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path))
    q = tensor(3, 9, 4, double)
    cache.put("k", q)
    again = cache.get("k")
    assert type(again) is CodebookTensor
    assert again.format == q.format
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())
