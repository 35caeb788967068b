"""Kernels of 2 and 3 bits and of the Hadamard transform: figures of kernels.py.

lattice   E8P, one row of x and many: against MatMulNBits of 4 bits, and float32 MatMul
three     3 bits, likewise
hadamard  4096 numbers: against two products with matrices of 64 x 64, H_64 ⊗ H_64
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime as ort
from integer import RESTING
from kernels import (
    BLOCK,
    PREFILL_ROWS,
    SIZE,
    Array,
    Layer,
    Line,
    Run,
    compared,
    float_matmul,
    nbits,
    session,
)
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxq.ops import DOMAIN, library_path

ROOT = 64  # of SIZE
TIMES = 15  # an odd number: an even one of transforms gives x again


def beside_peers(
    threads: int, name: str, op: str, weights: list[Array], most: float
) -> Iterator[Line]:
    """One row of x in integers and in floats, and many; `most` is the bound of the first."""
    one, many = Layer.random(1), Layer.random(PREFILL_ROWS)
    for level, kind, bound in ((4, "integers", {"most": most}), (0, "floats", {})):
        ours = session(threads, op, one.x, weights, DOMAIN, accuracy_level=level)
        what = f"{name}, M = 1, {SIZE} x {SIZE}, {kind} ÷ MatMulNBits, level {level}"
        yield compared(what, threads, ours, nbits(threads, one, level), **bound)
    for level, kind, bound in ((4, "integers", {"most": 1.0}), (0, "floats", {})):
        ours = session(threads, op, many.x, weights, DOMAIN, accuracy_level=level)
        what = f"{name}, M = {PREFILL_ROWS}, {SIZE} x {SIZE}, {kind} ÷ float32 MatMul"
        yield compared(what, threads, ours, float_matmul(threads, many), **bound)


def lattice(threads: int) -> Iterator[Line]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << 16, (SIZE, SIZE // 8), np.uint16)
    scales = rng.uniform(0.001, 0.01, SIZE).astype(np.float32)
    return beside_peers(threads, "E8P", "MatMulLattice", [codes, scales], 0.8)


def three(threads: int) -> Iterator[Line]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (SIZE, SIZE // BLOCK, 3 * BLOCK // 8), np.uint8)
    levels = np.array([-127, -80, -48, -20, 20, 48, 80, 127], np.int8).reshape(1, 1, 8)
    return beside_peers(threads, "3 bits", "MatMul3", [codes, Layer.random(1).scales, levels], 1.1)


def chain(threads: int, x: Array, nodes: list[NodeProto], constants: dict[str, Array]) -> Run:
    """A model of `nodes` from x to y, TIMES one after another: what a node takes within a model,
    without what a session takes for each run."""
    repeated = []
    for k in range(TIMES):
        names = {"x": f"x{k}" if k else "x", "y": f"x{k + 1}" if k + 1 < TIMES else "y"}
        for node in nodes:
            copy = NodeProto.FromString(node.SerializeToString())
            for values in (copy.input, copy.output):
                values[:] = [names.get(v, v if v in constants else f"{v}_{k}") for v in values]
            repeated.append(copy)
    graph = helper.make_graph(
        repeated, "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in RESTING.items():
        options.add_session_config_entry(key, value)
    options.register_custom_ops_library(library_path())
    made = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: made.run(None, {"x": x})[0]


def two_products(threads: int, x: Array) -> Run:
    """(H_64 ⊗ H_64) x / 64 as H_64 X H_64 / 64, X the rows of 64 numbers of x."""
    h = np.ones((1, 1), np.float32)
    while len(h) < ROOT:
        h = np.kron(np.array([[1, 1], [1, -1]], np.float32), h)
    h /= np.float32(ROOT**0.5)
    nodes = [
        helper.make_node("Reshape", ["x", "square"], ["rows"]),
        helper.make_node("MatMul", ["rows", "right"], ["half"]),
        helper.make_node("MatMul", ["left", "half"], ["both"]),
        helper.make_node("Reshape", ["both", "line"], ["y"]),
    ]
    constants = {"left": h, "right": h, "square": np.array([ROOT, ROOT]), "line": np.array(x.shape)}
    return chain(threads, x, nodes, constants)


def hadamard(threads: int) -> Iterator[Line]:
    x = Layer.random(1).x
    ours = chain(
        threads, x, [helper.make_node("HadamardTransform", ["x"], ["y"], domain=DOMAIN)], {}
    )
    other = two_products(threads, x)
    apart = float(np.abs(ours() - other()).max())
    yield Line(
        f"{TIMES} x HadamardTransform of {SIZE}: apart from products", threads, apart, most=1e-5
    )
    what = f"{TIMES} x HadamardTransform of {SIZE} ÷ two products of {ROOT} x {ROOT}"
    yield compared(what, threads, ours, other, most=0.3)


FIGURES: dict[str, Callable[[int], Iterator[Line]]] = {
    "lattice": lattice,
    "three": three,
    "hadamard": hadamard,
}
