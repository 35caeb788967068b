"""MatMulCodebook on every instruction set that this CPU has, and what its kernel refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxq.ops import DOMAIN, library_path
from onnxq.ops.library import build, find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="no library of kernels was built")

Array = NDArray[Any]
ISAS = build().built if find_library() else ()
NAMES = ("codes", "scales", "codebook", "zero_points", "bias")
TYPE = helper.np_dtype_to_tensor_dtype


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ONNXQ_OPS_ISA", request.param)
    try:
        answer(operands(np.random.default_rng(0), 1, 16, 1, 16))
    except Exception as error:
        pytest.skip(f"{request.param}: {error}")
    return str(request.param)


def operands(
    rng: np.random.Generator, rows: int, columns: int, channels: int, block: int, tables: str = "",
    floats: bool = False, zero_points: bool = True, dtype: Any = np.float32,
) -> dict[str, Array]:  # fmt: skip
    """Random; `tables` has n for a codebook per channel, b for one per block."""
    blocks = -(-columns // block)
    shape = (channels if "n" in tables else 1, blocks if "b" in tables else 1, 16)
    given: dict[str, Array] = {
        "x": rng.standard_normal((rows, columns)).astype(dtype),
        "codes": rng.integers(0, 256, (channels, blocks, block // 2), np.uint8),
        "scales": rng.uniform(0.001, 0.02, (channels, blocks)).astype(dtype),
        "codebook": rng.standard_normal(shape, np.float32) if floats
        else rng.integers(-128, 128, shape).astype(np.int8),
        "bias": rng.standard_normal(channels).astype(dtype),
    }  # fmt: skip
    if zero_points:
        given["zero_points"] = rng.integers(-128, 128, (channels, blocks)).astype(np.int8)
    return given


def answer(
    given: dict[str, Array], accuracy_level: int = 0, constant: bool = True, threads: int = 2
) -> Array:
    """y of a model with the operands as initializers, or all as inputs."""
    inputs = given if not constant else {"x": given["x"]}
    node = helper.make_node(
        "MatMulCodebook", ["x", *(name if name in given else "" for name in NAMES)], ["y"],
        domain=DOMAIN, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(k, TYPE(v.dtype), v.shape) for k, v in inputs.items()],
        [helper.make_tensor_value_info("y", TYPE(given["x"].dtype), None)],
        [numpy_helper.from_array(v, k) for k, v in given.items() if k not in inputs],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    options.register_custom_ops_library(library_path())
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    result: Array = session.run(None, inputs)[0]
    return result


def product(given: dict[str, Array], x: Array | None = None) -> Array:
    """x Wᵀ + bias in float64, W by its definition."""
    codes = given["codes"].astype(int)
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(*given["scales"].shape, -1)
    tables = np.broadcast_to(given["codebook"].astype(np.float64), (*codes.shape[:2], 16))
    weight = np.take_along_axis(tables, codes, 2)
    weight -= given.get("zero_points", np.zeros((1, 1)))[..., None]
    weight *= given["scales"].astype(np.float64)[..., None]
    x = given["x"].astype(np.float64) if x is None else x
    result: Array = x @ weight.reshape(len(weight), -1)[:, : x.shape[1]].T + given["bias"]
    return result


def rounded(x: Array, block: int) -> Array:
    """x as its codes of 8 bits mean, in blocks."""
    blocks = -(-x.shape[1] // block)
    padded = np.pad(x, [(0, 0), (0, blocks * block - x.shape[1])]).reshape(-1, blocks, block)
    scale = np.abs(padded).max(2, keepdims=True) / np.float32(127)
    codes = np.rint(padded / np.where(scale > 0, scale, 1))
    values: Array = (codes * scale.astype(np.float64)).reshape(-1, blocks * block)[:, : x.shape[1]]
    return values


def off(y: Array, expected: Array) -> float:
    assert y.shape == expected.shape
    return float(np.abs(y - expected).max() / np.abs(expected).max()) if y.size else 0.0


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 9, 130, 300])
@pytest.mark.parametrize("block", [16, 48, 64, 256])
def test_floats_are_exact(isa: str, rows: int, block: int) -> None:
    rng = np.random.default_rng(rows * block)
    for tables in ("", "n", "b", "nb"):
        for floats in (False, True):
            columns, channels = (int(n) for n in rng.integers(1, 200, 2))
            given = operands(rng, rows, columns, channels, block, tables, floats, rows % 2 == 0)
            assert off(answer(given), product(given)) < 1e-5


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 9, 130, 300])
@pytest.mark.parametrize("block", [16, 48, 64, 256])
def test_integers_are_exact_for_x_in_8_bits(isa: str, rows: int, block: int) -> None:
    rng = np.random.default_rng(rows * block)
    for tables in ("", "n", "b", "nb"):
        columns, channels = (int(n) for n in rng.integers(1, 200, 2))
        given = operands(rng, rows, columns, channels, block, tables, False, rows % 2 == 0)
        expected = product(given, rounded(given["x"], block))
        assert off(answer(given, accuracy_level=4), expected) < 1e-5


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_columns_beyond_what_is_unpacked_at_once(isa: str, accuracy_level: int) -> None:
    given = operands(np.random.default_rng(1), 12, 4500, 20, 48)
    x = rounded(given["x"], 48) if accuracy_level else None
    assert off(answer(given, accuracy_level), product(given, x)) < 1e-5


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_weights_that_are_computed_are_those_that_are_constant(accuracy_level: int) -> None:
    given = operands(np.random.default_rng(2), 3, 100, 40, 32, "n")
    constant = answer(given, accuracy_level)
    np.testing.assert_array_equal(answer(given, accuracy_level, constant=False), constant)


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_float16(accuracy_level: int, rows: int) -> None:
    given = operands(np.random.default_rng(3), rows, 100, 40, 32, dtype=np.float16)
    x = rounded(given["x"].astype(np.float32), 32) if accuracy_level else None
    y = answer(given, accuracy_level)
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, answer(given, accuracy_level, threads=1))
    expected = product(given, x)
    spacing = np.spacing(np.abs(expected).astype(np.float16)).astype(np.float64)
    assert (np.abs(y - expected) < 0.52 * spacing + 1e-5 * np.abs(expected).max()).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_undefined_numbers_stay_in_their_rows(isa: str, value: float) -> None:
    given = operands(np.random.default_rng(4), 3, 64, 5, 32)
    given["x"][1, 40] = value
    for accuracy_level in (0, 4):
        y = answer(given, accuracy_level)
        assert not np.isfinite(y[1]).any()
        assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codes": np.zeros((4, 2), np.uint8)}, r"codes has shape \[4, 2\]"),
        ({"codes": np.zeros((4, 2, 4), np.uint8)}, "multiples of 16 from 16 to 256"),
        ({"codes": np.zeros((4, 2, 136), np.uint8)}, "multiples of 16 from 16 to 256"),
        ({"codes": np.zeros((4, 2, 16), np.int8)}, "codes is int8; it must be uint8"),
        ({"codes": np.zeros((4, 3, 16), np.uint8)}, r"scales has shape \[4, 2\]"),
        ({"scales": np.zeros(8, np.float32)}, r"scales has shape \[8\]"),
        ({"scales": np.zeros((4, 2), np.float64)}, "scales is another type"),
        ({"codebook": np.zeros(16, np.int8)}, r"codebook has shape \[16\]"),
        ({"codebook": np.zeros((3, 1, 16), np.int8)}, r"codebook has shape \[3, 1, 16\]"),
        ({"codebook": np.zeros((1, 1, 8), np.int8)}, r"codebook has shape \[1, 1, 8\]"),
        ({"codebook": np.zeros((1, 1, 16), np.uint8)}, "codebook is uint8"),
        ({"zero_points": np.zeros((4, 1), np.int8)}, r"zero_points has shape \[4, 1\]"),
        ({"zero_points": np.zeros((4, 2), np.float16)}, "zero_points is float16"),
        ({"bias": np.zeros(3, np.float32)}, r"bias has shape \[3\]"),
        ({"bias": np.zeros(4, np.float16)}, "bias is float16, but x is float32"),
        ({"x": np.zeros((2, 65), np.float32)}, r"x has shape \[2, 65\]"),
        ({"x": np.zeros((2, 32), np.float32)}, r"x has shape \[2, 32\]"),
        ({"x": np.zeros((2, 0), np.float32)}, r"x has shape \[2, 0\]"),
        ({"x": np.zeros((), np.float32)}, "x is a scalar"),
        ({"x": np.zeros((2, 64), np.int8)}, "x is int8"),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_what_is_wrong_is_said(changed: dict[str, Array], message: str, constant: bool) -> None:
    given = operands(np.random.default_rng(5), 2, 64, 4, 32) | changed
    with pytest.raises(Exception, match=message):
        answer(given, constant=constant)


def test_an_unknown_level_and_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands(np.random.default_rng(6), 1, 16, 1, 16)
    with pytest.raises(Exception, match="accuracy_level is 3; it must be 0 or 4"):
        answer(given, accuracy_level=3)
    monkeypatch.setenv("ONNXQ_OPS_ISA", "mmx")
    with pytest.raises(Exception, match=r"ONNXQ_OPS_ISA is mmx; .* portable"):
        answer(given)
