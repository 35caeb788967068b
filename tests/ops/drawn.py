"""Arguments of the operators that have kernels, of every shape, and what the runtime says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxq.ops import DOMAIN, OPERATORS, VERSION, closure

Array = NDArray[Any]
Draw = st.DrawFn
BATCHES = [(), (1,), (3,), (0,), (2, 3), (1, 2, 2)]
REAL = ("float32", "float16")


def proto(name: str, x: Array, constants: dict[str, Array], **attributes: int) -> onnx.ModelProto:
    """A model of one operator: x is its input, `constants` are initializers."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    dims = [*(f"d{k}" for k in range(x.ndim - 1)), x.shape[-1]]
    graph = helper.make_graph(
        [helper.make_node(name, ["x", *constants], ["y"], domain=DOMAIN, **attributes)],
        "g",
        [helper.make_tensor_value_info("x", kind, dims)],
        [helper.make_tensor_value_info("y", kind, [None] * x.ndim)],
        [numpy_helper.from_array(values, n) for n, values in constants.items()],
    )
    return helper.make_model(
        graph,
        functions=closure([name]),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )


@st.composite
def of_codebook(draw: Draw, name: str) -> tuple[Array, dict[str, Array]]:
    """x and constants of MatMulCodebook or MatMul3."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns, rows = draw(st.integers(1, 80)), draw(st.integers(1, 9))
    block = 16 * draw(st.integers(1, 16))
    blocks = -(-columns // block)
    count, size = (16, block // 2) if name == "MatMulCodebook" else (8, 3 * block // 8)
    kind, scale_kind = draw(st.sampled_from(REAL)), draw(st.sampled_from(REAL))
    tables = (draw(st.sampled_from([1, rows])), draw(st.sampled_from([1, blocks])), count)
    if draw(st.booleans()):
        codebook = rng.integers(-128, 128, tables).astype(np.int8)
    else:
        codebook = rng.standard_normal(tables).astype(np.float32)
    zeros = draw(st.sampled_from([(1, 1), (rows, blocks)]))
    zero_kind = draw(st.sampled_from(["int8", scale_kind]))
    constants = {
        "codes": rng.integers(0, 256, (rows, blocks, size), np.uint8),
        "scales": (rng.standard_normal((rows, blocks)) / 64).astype(scale_kind),
        "codebook": codebook,
        "zero_points": rng.integers(-8, 8, zeros).astype(zero_kind),
        "bias": rng.standard_normal(draw(st.sampled_from([(1,), (rows,)]))).astype(kind),
    }
    return _x(draw, rng, columns, kind), constants


@st.composite
def of_lattice(draw: Draw) -> tuple[Array, dict[str, Array]]:
    """x and constants of MatMulLattice."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns, rows = draw(st.integers(1, 80)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(REAL))
    constants = {
        "codes": rng.integers(0, 1 << 16, (rows, -(-columns // 8)), np.uint16),
        "scales": rng.standard_normal(rows).astype(draw(st.sampled_from(REAL))),
        "bias": rng.standard_normal(draw(st.sampled_from([(1,), (rows,)]))).astype(kind),
    }
    return _x(draw, rng, columns, kind), constants


def _x(draw: Draw, rng: np.random.Generator, columns: int, kind: str) -> Array:
    x = rng.standard_normal((*draw(st.sampled_from(BATCHES)), columns))
    return x.astype(kind)


def of_any(name: str) -> st.SearchStrategy[tuple[Array, dict[str, Array]]]:
    """x and constants of a product with codes."""
    return of_lattice() if name == "MatMulLattice" else of_codebook(name)


def size_of_terms(name: str, x: Array, constants: dict[str, Array]) -> float:
    """The largest sum of absolute values of the terms of an element: what roundings are part of."""
    weight = np.abs(_weight(name, x, constants))
    terms = np.abs(x.astype(np.float64)) @ weight + np.abs(constants["bias"]).max()
    return float(terms.max(initial=0))


def largest_weight(name: str, x: Array, constants: dict[str, Array]) -> float:
    return float(np.abs(_weight(name, x, constants)).max())


def _weight(name: str, x: Array, constants: dict[str, Array]) -> Array:
    """W^T, (K, N)."""
    alone = {key: value for key, value in constants.items() if key != "bias"}
    return OPERATORS[name].reference(np.eye(x.shape[-1], dtype=np.float32), **alone)
