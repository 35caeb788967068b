"""The operators that have kernels: what they mean, and the functions that compute them without."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from drawn import Array, of_any, of_codebook, of_lattice, proto, size_of_terms
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import OnnxqError
from onnxq.lattice import points
from onnxq.ops import OPERATORS, closure
from onnxq.ops.accelerated.hadamard import PALEY, hadamard, paley
from onnxq.ops.accelerated.weights import rounded
from onnxq.runtime import Session

PRODUCTS = ("MatMulCodebook", "MatMul3", "MatMulLattice")
SIZES = [1, 2, 4, 8, 32, 128, 12, 24, 96, 20, 40, 28, 112]
ROUNDING = {"float32": 2e-6, "float16": 1e-3}  # of sums this long, and of the result


def functions_say(model: onnx.ModelProto, x: Array) -> list[Array]:
    """With the runtime's optimizations off and on."""
    onnx.checker.check_model(model, full_check=True)
    return [Session(model, optimize=optimize, threads=1).run({"x": x})["y"] for optimize in (0, 1)]


# ── products with codes ──────────────────────────────────────────────────────────────────────────


def naive_weight(name: str, constants: dict[str, Array], columns: int) -> Array:
    """W, number by number, as the layout says."""
    codes, scales = constants["codes"], constants["scales"].astype(np.float64)
    weight = np.zeros((len(codes), columns))
    for n, k in product(range(len(codes)), range(columns)):
        if name == "MatMulLattice":
            weight[n, k] = scales[n] * points()[codes[n, k // 8], k % 8]
            continue
        size = codes.shape[2]
        block = size * 2 if name == "MatMulCodebook" else size * 8 // 3
        b, i = divmod(k, block)
        data = codes[n, b].tolist()
        if name == "MatMulCodebook":
            code = data[i // 2] >> 4 * (i % 2) & 15
        else:
            high = data[block // 4 + i // 8] >> i % 8 & 1
            code = (data[i // 4] >> 2 * (i % 4) & 3) + 4 * high
        tables, zeros = constants["codebook"].astype(np.float64), constants["zero_points"]
        level = tables[n % tables.shape[0], b % tables.shape[1], code]
        zero = float(zeros[n % zeros.shape[0], b % zeros.shape[1]])
        weight[n, k] = scales[n, b] * (level - zero)
    return weight


@pytest.mark.parametrize("name", PRODUCTS)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_product_is_that_with_the_weight_its_codes_stand_for(name: str, data: Any) -> None:
    x, constants = data.draw(of_any(name))
    x = x.astype(np.float64)
    expected = x @ naive_weight(name, constants, x.shape[-1]).T + constants["bias"]
    given = OPERATORS[name].reference(x, **constants)
    np.testing.assert_allclose(
        given, expected, atol=1e-12 * max(1, np.abs(expected).max(initial=0))
    )


@pytest.mark.parametrize("name", PRODUCTS)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_functions_say_what_the_reference_says(name: str, data: Any) -> None:
    x, constants = data.draw(of_any(name))
    level = data.draw(st.sampled_from([0, 4]))
    expected = OPERATORS[name].reference(x, **constants)
    bound = ROUNDING[str(x.dtype)] * size_of_terms(name, x, constants)
    for said in functions_say(proto(name, x, constants, accuracy_level=level), x):
        assert (said.dtype, said.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(said, expected, rtol=0, atol=bound)


@given(of_codebook("MatMulCodebook"))
@settings(max_examples=5, deadline=None)
def test_optional_inputs_are_zero_where_they_are_missing(case: Any) -> None:
    x, constants = case
    constants |= {"zero_points": np.zeros((1, 1), np.int8), "bias": np.zeros(1, x.dtype)}
    needed = {key: constants[key] for key in ("codes", "scales", "codebook")}
    reference = OPERATORS["MatMulCodebook"].reference
    np.testing.assert_array_equal(reference(x, **needed), reference(x, **constants))


def test_eight_bits_round_each_block_of_a_row_to_127_steps() -> None:
    x = np.array([[1.0, -0.5, 0.2, 100.0, 50.0]], np.float32)
    steps = np.array([[1 / 127] * 3 + [100 / 127] * 2])
    said = rounded(x, 3)
    np.testing.assert_allclose(said / steps, [[127, -64, 25, 127, 64]], rtol=1e-6)  # even: 63.5
    assert not rounded(np.zeros((2, 4), np.float32), 4).any()


@given(of_lattice())
@settings(max_examples=10, deadline=None)
def test_at_level_4_a_product_is_off_by_the_rounding_of_x_alone(case: Any) -> None:
    x, constants = case
    x = x.astype(np.float32)
    reference = OPERATORS["MatMulLattice"].reference
    exact, near = (reference(x, **constants, accuracy_level=level) for level in (0, 4))
    terms = size_of_terms("MatMulLattice", np.ones_like(x), constants)
    assert np.abs(near - exact).max(initial=0) <= terms * np.abs(x).max(initial=0) / 127
    assert x.size < 100 or (near != exact).any()


# ── Hadamard ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", SIZES)
def test_a_hadamard_matrix_is_orthogonal_and_of_ones(size: int) -> None:
    matrix = hadamard(size)
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size, dtype=np.int64))


def test_a_power_of_two_has_sylvesters_order() -> None:
    expected = [[(-1) ** (i & j).bit_count() for j in range(64)] for i in range(64)]
    np.testing.assert_array_equal(hadamard(64), expected)


@pytest.mark.parametrize("n", PALEY)
def test_paleys_matrix_is_skew_but_for_its_diagonal(n: int) -> None:
    skew = paley(n) - np.eye(n, dtype=np.int64)
    np.testing.assert_array_equal(skew.T, -skew)


@pytest.mark.parametrize("size", [0, 3, 6, 36, 44, 100])
def test_a_size_that_has_no_matrix_here_is_refused(size: int) -> None:
    with pytest.raises(OnnxqError, match=f"of size {size} is known here: take 2"):
        hadamard(size)


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize(
    ("length", "block"), [(size, 0) for size in SIZES] + [(96, 24), (80, 16), (56, 28), (6, 1)]
)
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3)], ids=str)
def test_the_transform_is_a_product_with_the_matrix(
    length: int, block: int, batch: tuple[int, ...], kind: str
) -> None:
    x = np.random.default_rng(length).standard_normal((*batch, length)).astype(kind)
    whole = np.kron(np.eye(length // (block or length)), hadamard(block or length))
    expected = x.astype(np.float64) @ whole.T / np.sqrt(block or length)
    bound = {"rtol": 1e-3, "atol": 1e-3} if kind == "float16" else {"rtol": 0, "atol": 2e-6}
    given = OPERATORS["HadamardTransform"].reference(x, block_size=block)
    said = functions_say(proto("HadamardTransform", x, {}, block_size=block), x)
    for result in (given, *said):
        assert (result.dtype, result.shape) == (x.dtype, x.shape)
        np.testing.assert_allclose(result, expected, **bound)


# ── what ONNX knows of them ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", OPERATORS)
@given(st.data())
@settings(max_examples=3, deadline=None)
def test_onnx_has_the_schema_and_infers_the_shape(name: str, data: Any) -> None:
    known = onnx.defs.get_schema(name, domain="ai.onnxq")
    assert known.doc == OPERATORS[name].function.doc_string
    assert [i.name for i in known.inputs] == list(OPERATORS[name].function.input)
    x, constants = data.draw(of_any(name)) if name in PRODUCTS else (np.zeros((2, 32), "f4"), {})
    made = onnx.shape_inference.infer_shapes(proto(name, x, constants))
    kind = made.graph.output[0].type.tensor_type
    last = len(constants["codes"]) if constants else 32
    dims = [d.dim_value or d.dim_param for d in kind.shape.dim]
    assert dims == [*(f"d{k}" for k in range(x.ndim - 1)), last]
    assert kind.elem_type == onnx.helper.np_dtype_to_tensor_dtype(x.dtype)


def test_functions_are_of_standard_operators_of_the_models_opset() -> None:
    for opset in (21, onnx.defs.onnx_opset_version()):
        for each in closure(OPERATORS, opset):
            assert {o.domain: o.version for o in each.opset_import}[""] == opset
            for node in each.node:
                if node.domain == "":
                    onnx.defs.get_schema(node.op_type, opset)
