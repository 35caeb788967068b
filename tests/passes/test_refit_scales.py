from dataclasses import replace

import numpy as np
import pytest
from onnxq.passes.solve.hessian import by_group
from onnxq.passes.solve.refit_scales import refit_scales
from rounding import errors, layer

from onnxq.qtype import QTensor
from onnxq.solver import Layer


def refitted(made: Layer, q: QTensor) -> QTensor:
    now, size = by_group(q, len(made.hessian)), made.qtype.group or 0
    weight = made.weight.reshape(now.codes.shape)
    return replace(q, scale=refit_scales(weight, now, made.hessian, q.scale, size))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("spec", ["u4a:8", "u4:8", "u4a:16", "s4:32", "s2:8", "s4:channel", "s4"])
def test_repeated_it_gives_the_least_squares_of_all_scales_together(spec: str, groups: int) -> None:
    """Against LAPACK: the minimum over scales of ‖(w − Σ s_b c_b) L‖², H = L Lᵀ."""
    made = layer(12, 36, spec, groups)
    q = made.start
    assert q is not None
    scales = q.scale.astype(np.float32) * np.float32(1 + 1e-6)  # which float16 does not hold
    q = replace(q, scale=scales)
    for _ in range(400):
        q = refitted(made, q)
    centred = q.codes.astype(float) - by_group(q, 1).zero[0]
    size = q.qtype.group if q.qtype.blocked else 36
    part = np.arange(36)[:, None] // size == np.arange(-(-36 // size))
    least = []
    for row, codes in enumerate(centred):
        h = made.hessian[row // (12 // groups)].astype(float) + 1e-12 * np.eye(36)
        factor = np.linalg.cholesky(h)
        a, b = factor.T @ (codes[:, None] * part), factor.T @ made.weight[row]
        least.append((a, b))
    if spec == "s4":
        least = [(np.concatenate([a for a, _ in least]), np.concatenate([b for _, b in least]))]
    best = sum(np.sum((b - a @ np.linalg.lstsq(a, b)[0]) ** 2) for a, b in least)
    assert errors(made, q).sum() == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("spec", ["u4a:8", "u4:16"])
def test_float16_scales_remain_float16_and_no_row_gets_worse(spec: str) -> None:
    made = layer(40, 36, spec)
    assert made.start is not None
    found = refitted(made, made.start)
    np.testing.assert_array_equal(found.scale, found.scale.astype(np.float16))
    before, after = errors(made, made.start), errors(made, found)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.97 * before.sum()


def test_blocks_of_nothing_but_zeros_and_dead_inputs_keep_their_scales() -> None:
    made = layer(6, 24, "u4a:8")
    made.weight[:, 8:16] = 0
    made.hessian[:, 16:] = made.hessian[:, :, 16:] = 0
    assert made.start is not None
    zero = replace(made.start, codes=made.start.codes.copy())
    zero.codes[:, 8:16] = zero.zero[:, 1:2]
    found = refitted(made, zero)
    np.testing.assert_array_equal(found.scale[:, 1:], zero.scale[:, 1:])
    assert (found.scale[:, 0] != zero.scale[:, 0]).any()
