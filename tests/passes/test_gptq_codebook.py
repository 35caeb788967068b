import numpy as np
import pytest
from graphs import Array, normal
from onnxq.passes.solve.codebook import Codebook
from onnxq.passes.solve.gptq_codebook import GPTQCodebook, gptq_codebook, row_error
from rounding import correlated

from onnxq.codebook import CodebookTensor
from onnxq.errors import OnnxqError
from onnxq.qtype import QType
from onnxq.solver import Layer


def layer(rows: int, columns: int, spec: str, kind: str = "nf", double: bool = False) -> Layer:
    weight, qtype = normal(rows, columns), QType.parse(spec)
    step = Codebook(kind, double_quantization=double)  # type: ignore[arg-type]
    return Layer(weight, qtype, correlated(columns), None, step.solve(weight, qtype))


def total(made: Layer, q: CodebookTensor) -> float:
    return float(row_error(made.weight, q, made.hessian[0]).sum())


def obq(weight: Array, q: CodebookTensor, hessian: Array, damping: float) -> Array:
    """Frantar & Alistarh 2022, "Optimal Brain Compression", eq. 7: the columns left are moved by
    the inverse of their own part of H, computed anew for each, in order of falling H_kk.
    """
    h = hessian.astype(np.float64) + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    left = list(np.argsort(-np.diag(hessian), kind="stable"))
    w, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape, np.uint8)
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        k = left[0]
        scale = q.scales[:, k // q.group].astype(np.float64)
        distance = np.abs(w[:, k, None] - scale[:, None] * q.levels)
        codes[:, k] = distance.argmin(axis=1)
        lost = w[:, k] - scale * q.levels[codes[:, k]]
        w[:, left] -= np.outer(lost, inverse[0] / inverse[0, 0])
        left = left[1:]
    return codes


def test_the_same_codes_as_the_naive_loop() -> None:
    made = layer(9, 40, "u3a:16")
    assert isinstance(made.start, CodebookTensor)
    solved = gptq_codebook(made, damping=0.01, rounds=1)
    naive = obq(made.weight, made.start, made.hessian[0], 0.01)
    same = (solved.codes == naive).all(axis=1)
    kept = (solved.codes == made.start.codes).all(axis=1)
    assert (same | kept).all()
    assert same.sum() >= 7


@pytest.mark.parametrize("spec", ["u4a:16", "u3a:32", "u2a:64"])
@pytest.mark.parametrize("kind", ["nf", "kmeans", "log"])
def test_far_better_than_rounding_and_no_row_worse(kind: str, spec: str) -> None:
    made = layer(32, 100, spec, kind)
    assert isinstance(made.start, CodebookTensor)
    solved = gptq_codebook(made)
    before, after = (row_error(made.weight, q, made.hessian[0]) for q in (made.start, solved))
    assert (after <= before).all()
    assert after.sum() < 0.8 * before.sum()
    np.testing.assert_array_equal(solved.levels, made.start.levels)
    np.testing.assert_array_equal(solved.scales, solved.scales.astype(np.float16))


def test_refitted_scales_help() -> None:
    made = layer(32, 96, "u3a:32", "kmeans")
    assert total(made, gptq_codebook(made, rounds=3)) < total(made, gptq_codebook(made, rounds=1))


def test_scales_in_eight_bits_stay() -> None:
    made = layer(16, 96, "u4a:32", double=True)
    assert isinstance(made.start, CodebookTensor)
    solved = gptq_codebook(made)
    assert solved.scale is made.start.scale
    assert total(made, solved) < total(made, made.start)


def test_inputs_that_vary_by_themselves_leave_the_nearest_codes() -> None:
    made = layer(8, 64, "u4a:16")._replace(hessian=np.eye(64, dtype=np.float32)[None])
    assert isinstance(made.start, CodebookTensor)
    np.testing.assert_array_equal(gptq_codebook(made, rounds=1).codes, made.start.codes)


def test_blocks_of_nothing_stay_nothing() -> None:
    made = layer(4, 64, "u4a:16")
    weight = made.weight.copy()
    weight[:, 16:32] = 0
    start = Codebook().solve(weight, made.qtype)
    solved = gptq_codebook(made._replace(weight=weight, start=start))
    assert not solved.dequantize()[:, 16:32].any()


def test_without_a_table_it_says_which_pass_comes_first() -> None:
    with pytest.raises(OnnxqError, match="put the pass 'codebook' before"):
        GPTQCodebook().solve(layer(4, 16, "u4a:16")._replace(start=None))
