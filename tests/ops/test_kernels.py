"""The kernels of the library against the references, on every shape, by every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from drawn import REAL, Array, largest_weight, of_any, proto, size_of_terms
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import OnnxqError
from onnxq.ops import OPERATORS, library_path
from onnxq.ops.library import build, find_library
from onnxq.runtime import Session, custom_ops

pytestmark = pytest.mark.skipif(find_library() is None, reason="needs the library of kernels")

PRODUCTS = ("MatMulCodebook", "MatMul3", "MatMulLattice")
ISAS = build().built if find_library() else ()
SIZES = [1, 2, 4, 64, 256, 12, 96, 20, 160, 28, 224]
FLOATS = {"float32": 1e-5, "float16": 1e-3}
A_STEP = 1 / 127  # of the largest of a block: a tie may round the other way


def kernel_says(model: onnx.ModelProto, x: Array, threads: int) -> Array:
    """By the kernel alone: the model has no function to fall back on."""
    del model.functions[:]
    with custom_ops([library_path()]):
        return Session(model, threads=threads).run({"x": x})["y"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set that the library has kernels for, and this CPU runs."""
    monkeypatch.setenv("ONNXQ_OPS_ISA", request.param)
    constants = {
        "codes": np.zeros((1, 1, 8), np.uint8), "scales": np.ones((1, 1), np.float32),
        "codebook": np.zeros((1, 1, 16), np.int8),
    }  # fmt: skip
    x = np.zeros((1, 16), np.float32)
    try:
        kernel_says(proto("MatMulCodebook", x, constants), x, threads=1)
    except OnnxqError as error:
        assert "this CPU can use" in str(error)  # noqa: PT017 - of any other reason it fails
        pytest.skip(f"this CPU lacks {request.param}")
    return str(request.param)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_what_the_reference_says(name: str, level: int) -> None:
    @given(st.data())
    @settings(max_examples=20, deadline=None)
    def check(data: Any) -> None:
        x, constants = data.draw(of_any(name))
        expected = OPERATORS[name].reference(x, **constants, accuracy_level=level)
        threads = data.draw(st.sampled_from([1, 2]))
        said = kernel_says(proto(name, x, constants, accuracy_level=level), x, threads)
        assert (said.dtype, said.shape) == (expected.dtype, expected.shape)
        bound = FLOATS[str(x.dtype)] * size_of_terms(name, x, constants)
        if level == 4:
            bound += A_STEP * np.abs(x).max(initial=0) * largest_weight(name, x, constants)
        np.testing.assert_allclose(said, expected, rtol=0, atol=bound)

    check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize(
    ("length", "block"), [(size, 0) for size in SIZES] + [(96, 24), (80, 16), (56, 28), (6, 1)]
)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 33)], ids=str)
def test_a_transform_is_what_the_reference_says(
    batch: tuple[int, ...], length: int, block: int, kind: str
) -> None:
    x = np.random.default_rng(length).standard_normal((*batch, length)).astype(kind)
    expected = OPERATORS["HadamardTransform"].reference(x, block_size=block)
    said = kernel_says(proto("HadamardTransform", x, {}, block_size=block), x, threads=2)
    assert (said.dtype, said.shape) == (expected.dtype, expected.shape)
    bound = {"rtol": 1e-3, "atol": 1e-3} if kind == "float16" else {"rtol": 0, "atol": 3e-6}
    np.testing.assert_allclose(said, expected, **bound)


@pytest.mark.parametrize("name", PRODUCTS)
@given(st.data())
@settings(max_examples=10, deadline=None)
def test_what_is_no_constant_is_read_anew_in_each_run(name: str, data: Any) -> None:
    x, constants = data.draw(of_any(name))
    made = proto(name, x, constants)
    scales = next(t for t in made.graph.initializer if t.name == "scales")
    made.graph.input.append(
        onnx.helper.make_tensor_value_info("scales", scales.data_type, list(scales.dims))
    )
    made.graph.initializer.remove(scales)
    del made.functions[:]
    with custom_ops([library_path()]):
        session = Session(made)
    for factor in (1, 2):
        given = constants | {"scales": constants["scales"] * constants["scales"].dtype.type(factor)}
        said = session.run({"x": x, "scales": given["scales"]})["y"]
        bound = 2 * FLOATS[str(x.dtype)] * size_of_terms(name, x, given)
        np.testing.assert_allclose(said, OPERATORS[name].reference(x, **given), rtol=0, atol=bound)
