"""The expansion at load, run by the runtime for every form it can take."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Array, context, fused, model, normal, run
from onnxq.passes import Assign, Codebook, Expand, MatMulNBits, RoundToNearest
from onnxq.passes.lower.expand import byte_table, kernel_bits
from onnxq.passes.solve.codebook import TABLES

from onnxq import graph as g
from onnxq.codebook import ScaleCodes
from onnxq.errors import OnnxqError
from onnxq.pipeline import Pipeline
from onnxq.recipe import load_recipe
from onnxq.target import load_target

EXPANSION = {"Cast", "Gather", "BitwiseOr", "Reshape", "Pad", "Mul", "Add", "Slice"}
SHAPES = [(64, 33), (172, 7), (100, 5), (37, 64), (16, 1)]  # in, out: odd, and no whole blocks
BLOCKS = (16, 32, 64, 128, 256)


def matmul(columns: int, rows: int) -> onnx.ModelProto:
    text = f"(float[n, {columns}] x) => (float[n, {rows}] y) {{ y = MatMul(x, w) }}"
    return model(text, opset=18, w=normal(columns, rows, seed=columns))


def lowered(made: onnx.ModelProto, *steps: object, format: str) -> tuple[g.Graph, Array]:
    """The lowered graph and the weight that it stands for, (out, in)."""
    graph, ctx = g.load(made), context()
    for step in (Assign(form="weights", format=format), *steps, Expand()):
        step.apply(graph, ctx)  # type: ignore[attr-defined]
    (name,) = {*ctx.codebooks, *ctx.weights}
    return graph, (ctx.codebooks.get(name) or ctx.weights[name]).dequantize()


def with_accuracy(graph: g.Graph, level: int) -> g.Graph:
    for node in g.walk(graph):
        if node.op == "MatMulNBits":
            node.attrs["accuracy_level"] = level
    return graph


def check_exact(graph: g.Graph, weight: Array, path: Path) -> None:
    """In float32, expanded at load and in each run; nothing of the expansion is left to run."""
    x = normal(3, weight.shape[1], seed=9)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    with_accuracy(graph, 1)
    for optimize in (False, True):
        y = run(graph, {"x": x}, optimize)["y"]
        np.testing.assert_allclose(y, expected, atol=3e-6 * np.abs(expected).max())
    left = fused(g.to_proto(graph), path / "optimized.onnx").graph
    assert [node.op_type for node in left.node] == ["MatMulNBits"]
    known = {tensor.name for tensor in left.initializer} | {"x", ""}
    assert set(left.node[0].input) <= known


def check_within_eight_bit_activations(graph: g.Graph, weight: Array) -> None:
    """Level 4 rounds each row of x to 8 bits in blocks; no product may be off by more than that."""
    (node,) = (n for n in g.walk(graph) if n.op == "MatMulNBits")
    group = node.attrs["block_size"]
    x = normal(3, weight.shape[1], seed=9)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    with_accuracy(graph, 4)
    y = run(graph, {"x": x})["y"]
    bound = np.zeros_like(expected)
    for first in range(0, x.shape[1], group):
        part = slice(first, first + group)
        step = np.abs(x[:, part]).max(axis=1, keepdims=True) / 127
        bound += 0.51 * step * np.abs(weight[:, part]).sum(axis=1)
    assert (np.abs(y - expected) <= bound + 1e-5).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_three_bits(shape: tuple[int, int], symmetric: bool, block: int, tmp_path: Path) -> None:
    made = matmul(*shape)
    graph, ctx = g.load(made), context()
    Assign(form="weights", format=f"w3:{block}", symmetric=symmetric).apply(graph, ctx)
    RoundToNearest().apply(graph, ctx)
    q = ctx.weights["w"]
    assert (q.qtype.bits, q.qtype.symmetric) == (3, symmetric)
    assert Expand().apply(graph, ctx) == 1
    node = next(n for n in g.walk(graph) if n.op == "MatMulNBits")
    assert node.attrs["bits"] == 4
    assert len(node.inputs) == 3 + (not symmetric)
    check_exact(graph, q.dequantize(), tmp_path)
    check_within_eight_bit_activations(graph, q.dequantize())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_in_every_shape(
    shape: tuple[int, int], bits: int, block: int, tmp_path: Path
) -> None:
    if bits == 2 and block not in (32, 64, 128):
        pytest.skip("no rule of the target")
    graph, weight = lowered(matmul(*shape), Codebook("nf"), format=f"w{bits}:{block}")
    check_exact(graph, weight, tmp_path)
    check_within_eight_bit_activations(graph, weight)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_codebook(kind: str, bits: int, double: bool, tmp_path: Path) -> None:
    step = Codebook(kind, double_quantization=double)  # type: ignore[arg-type]
    graph, weight = lowered(matmul(172, 35), step, format=f"w{bits}:32")
    check_exact(graph, weight, tmp_path)
    check_within_eight_bit_activations(graph, weight)


@pytest.mark.parametrize("bits", [2, 3])
def test_levels_of_four_bits_run_on_the_kernel_for_four(bits: int, tmp_path: Path) -> None:
    graph, weight = lowered(matmul(100, 9), Codebook("kmeans", level_bits=4), format=f"w{bits}:32")
    (node,) = (n for n in g.walk(graph) if n.op == "MatMulNBits")
    assert node.attrs["bits"] == 4
    check_exact(graph, weight, tmp_path)


@pytest.mark.parametrize(("columns", "rows"), [(512, 256), (128, 6)])  # whole super-blocks, and not
def test_scales_in_eight_bits_are_expanded_too(columns: int, rows: int, tmp_path: Path) -> None:
    made = matmul(columns, rows)
    graph, ctx = g.load(made), context()
    for step in (Assign(form="weights", format="w4:32"), Codebook(double_quantization=True)):
        step.apply(graph, ctx)
    q = ctx.codebooks["w"]
    assert isinstance(q.scale, ScaleCodes)
    Expand().apply(graph, ctx)
    check_exact(graph, q.dequantize(), tmp_path)
    scales = rows * columns // 32
    stored = sum(t.values.nbytes for t in g.constants(graph) if t.values.dtype == np.int8)
    assert scales <= stored < scales + 256


@pytest.mark.parametrize(
    ("format", "step", "bits"),
    [("w3:128", RoundToNearest(), 3), ("w3:128", Codebook(), 3), ("w4:128", Codebook(), 4),
     ("w2:128", Codebook(), 2)],
    ids=str,
)  # fmt: skip
def test_the_file_holds_no_more_than_the_codes(format: str, step: object, bits: int) -> None:
    graph, _ = lowered(matmul(1000, 256), step, format=format)
    stored = sum(t.values.nbytes for t in g.constants(graph))
    scales = 256 * 8 * 2
    assert 256 * 1000 * bits / 8 <= stored <= 256 * 1000 * bits / 8 + 2 * scales + 3000


GEMMS = {
    "bias": ("y = Gemm <transB = 1> (x, w, b)", (24, 40), (24,)),
    "plain": ("y = Gemm (x, w, b)", (40, 24), (1, 24)),
    "factors": ("y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", (40, 24), (24,)),
}


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("format", ["w3:16", "w4:16"])
def test_gemm(name: str, format: str) -> None:
    node, shape, bias = GEMMS[name]
    made = model(
        f"(float[n, 40] x) => (float[n, 24] y) {{ {node} }}",
        opset=18, w=normal(*shape), b=normal(*bias, seed=1),
    )  # fmt: skip
    graph, weight = lowered(made, Codebook("kmeans"), format=format)
    with_accuracy(graph, 1)
    x = normal(5, 40, seed=2)
    stored = weight if shape[0] == 24 else weight.T
    again = model(
        f"(float[n, 40] x) => (float[n, 24] y) {{ {node} }}",
        opset=18, w=stored, b=normal(*bias, seed=1),
    )  # fmt: skip
    for optimize in (False, True):
        y = run(graph, {"x": x}, optimize)["y"]
        np.testing.assert_allclose(y, run(again, {"x": x})["y"], rtol=1e-4, atol=1e-5)


def test_a_weight_of_two_layers_is_stored_once() -> None:
    made = model(
        """(float[n, 64] x) => (float[n, 64] y) {
            h = MatMul(x, w)
            r = Relu(h)
            y = MatMul(r, w)
        }""",
        opset=18, w=normal(64, 64),
    )  # fmt: skip
    graph, _ = lowered(made, Codebook(), format="w4:32")
    assert sum(n.op == "MatMulNBits" for n in g.walk(graph)) == 2
    codes = [t for t in g.constants(graph) if t.values.shape == (64, 32)]
    assert len({t.name for t in codes}) == 1


def test_what_has_no_such_codes_is_left_to_other_passes() -> None:
    made = matmul(64, 32)
    graph, ctx = g.load(made), context()
    for step in (Assign(form="weights", format="w4:32"), RoundToNearest()):
        step.apply(graph, ctx)
    assert Expand().apply(graph, ctx) == 0
    assert MatMulNBits().apply(graph, ctx) == 1


def test_without_expansion_three_bits_are_refused() -> None:
    graph, ctx = g.load(matmul(64, 32)), context()
    for step in (Assign(form="weights", format="w3:32"), RoundToNearest()):
        step.apply(graph, ctx)
    with pytest.raises(OnnxqError, match="put the pass 'expand' before"):
        MatMulNBits().apply(graph, ctx)


def test_three_bits_of_any_preset_of_weights_alone() -> None:
    recipe = load_recipe("int4-rtn").in_blocks(3, 32)
    result = Pipeline(recipe.passes).run(g.load(matmul(64, 32)), None, load_target("cpu"))
    x = normal(3, 64, seed=9)
    weight = result.context.weights["w"].dequantize()
    y = run(with_accuracy(result.graph, 1), {"x": x})["y"]
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_second_apply_changes_nothing() -> None:
    graph, ctx = g.load(matmul(64, 32)), context()
    for step in (Assign(form="weights", format="w3:32"), Codebook(), Expand()):
        assert step.apply(graph, ctx) == 1
    once = g.to_proto(graph).SerializeToString(deterministic=True)
    assert Codebook().apply(graph, ctx) == Expand().apply(graph, ctx) == 0
    assert g.to_proto(graph).SerializeToString(deterministic=True) == once


@pytest.mark.parametrize(("bits", "wide"), [(1, 4), (2, 4), (2, 8), (4, 4), (4, 8)])
def test_a_byte_becomes_the_values_of_its_codes(bits: int, wide: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << wide, 1 << bits).astype(np.uint8)
    table = byte_table(values, bits, wide)
    for byte in (0, 1, 97, 255):
        number = int.from_bytes(table[byte].tobytes(), "little")
        for place in range(8 // bits):
            code = byte >> (bits * place) & ((1 << bits) - 1)
            assert number >> (wide * place) & ((1 << wide) - 1) == values[code]


def test_which_kernel_levels_need() -> None:
    assert kernel_bits(np.array([-8, 7], np.int8)) == 4
    assert kernel_bits(np.array([-9, 7], np.int8)) == kernel_bits(np.array([-8, 8], np.int8)) == 8
