"""onnxq's own operators in the place of layers: every form, by functions and by kernels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import MODELS, Array, context, feeds_of, model, normal, samples_of, sqnr
from onnxq.passes import (
    Assign,
    Codebook,
    CodebookMatMul,
    Expand,
    Lattice,
    MatMulNBits,
    RoundToNearest,
)

import onnxq
from onnxq import graph as g
from onnxq import ops
from onnxq.codebook import CodebookTensor, ScaleCodes
from onnxq.errors import OnnxqError
from onnxq.ops.library import find_library
from onnxq.pipeline import Context, Pass
from onnxq.runtime import Session, names_operators, without_kernels
from onnxq.target import load_target

SHAPES = [(64, 33), (172, 7), (100, 5), (37, 64), (16, 1)]  # in, out: odd, and no whole blocks
FORMS: dict[str, tuple[str, str, Sequence[Pass]]] = {
    "nf4": ("MatMulCodebook", "w4", (Codebook(kind="nf"),)),
    "nf4-double": ("MatMulCodebook", "w4", (Codebook(kind="nf", double_quantization=True),)),
    "kmeans4": ("MatMulCodebook", "w4", (Codebook(kind="kmeans"),)),
    "kmeans3": ("MatMul3", "w3", (Codebook(kind="kmeans"),)),
    "uniform3": ("MatMul3", "w3", (RoundToNearest(),)),
    "uniform3-symmetric": ("MatMul3", "w3", (RoundToNearest(),)),
    "lattice": ("MatMulLattice", "w4", (Lattice(),)),
}
DEVICE = load_target("cpu").with_custom_operators()
EIGHT_BITS = 25.0  # dB, of activations rounded to 8 bits in blocks


def matmul(columns: int, rows: int, dtype: str = "float32") -> onnx.ModelProto:
    kind = "float16" if dtype == "float16" else "float"
    text = f"({kind}[n, {columns}] x) => ({kind}[n, {rows}] y) {{ y = MatMul(x, w) }}"
    return model(text, opset=18, w=normal(columns, rows, seed=columns).astype(dtype))


def lowered(made: onnx.ModelProto, form: str, block: int = 64) -> tuple[g.Graph, Array, Context]:
    """The lowered graph and the weight that it stands for, (out, in)."""
    _, bits, steps = FORMS[form]
    columns = made.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    samples = samples_of(made, feeds_of(x=(8, columns)))
    graph, ctx = g.load(made), context(DEVICE, samples)
    assign = Assign(form="weights", format=f"{bits}:{block}", symmetric="symmetric" in form)
    for step in (assign, *steps, CodebookMatMul()):
        step.apply(graph, ctx)
    (name,) = {*ctx.codebooks, *ctx.weights}
    return graph, (ctx.codebooks.get(name) or ctx.weights[name]).dequantize(), ctx


def set_level(graph: g.Graph, level: int) -> None:
    for node in g.walk(graph):
        if node.domain == ops.DOMAIN:
            node.attrs["accuracy_level"] = level


def by_functions(graph: g.Graph, feed: dict[str, Array]) -> list[Array]:
    with without_kernels():
        return [Session.of(graph, optimize=o, threads=1).run(feed)["y"] for o in (False, True)]


def by_kernels(graph: g.Graph, feed: dict[str, Array]) -> list[Array]:
    if find_library() is None:
        return []
    return [Session.of(graph, optimize=o, threads=1).run(feed)["y"] for o in (False, True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_product_with_what_its_codes_stand_for(
    form: str, shape: tuple[int, int]
) -> None:
    graph, weight, _ = lowered(matmul(*shape), form)
    assert [node.op for node in graph.nodes if node.domain == ops.DOMAIN] == [FORMS[form][0]]
    onnx.checker.check_model(g.to_proto(graph), full_check=True)
    x = normal(3, shape[0], seed=9)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    bound = 3e-6 * np.abs(expected).max()
    for level in (0, 4):
        set_level(graph, level)
        for y in by_functions(graph, {"x": x}):
            np.testing.assert_allclose(y, expected, atol=bound)
        for y in by_kernels(graph, {"x": x}):
            if level == 0:
                np.testing.assert_allclose(y, expected, atol=bound)
            assert sqnr(y, expected) >= EIGHT_BITS


@pytest.mark.parametrize("block", [16, 32, 128, 256])
@pytest.mark.parametrize("form", ["nf4", "kmeans3", "uniform3"])
def test_blocks_of_every_size(form: str, block: int) -> None:
    graph, weight, _ = lowered(matmul(172, 7), form, block)
    set_level(graph, 0)
    x = normal(3, 172, seed=9)
    for y in (*by_functions(graph, {"x": x}), *by_kernels(graph, {"x": x})):
        np.testing.assert_allclose(y, x @ weight.T, atol=1e-4)


def test_codes_take_their_bits_in_the_file(tmp_path: Path) -> None:
    for form, most in (("nf4", 4.6), ("kmeans3", 3.6), ("uniform3", 4.1), ("lattice", 2.3)):
        graph, _, _ = lowered(matmul(512, 256), form, 64)
        assert 8 * g.save(graph, tmp_path / f"{form}.onnx") <= most * 512 * 256 + 8 * 12_000


def test_scales_in_eight_bits_stay_eight_bits() -> None:
    graph, weight, ctx = lowered(matmul(172, 7), "nf4-double")
    (table,) = (ctx.codebooks[name] for name in ctx.codebooks)
    assert isinstance(table, CodebookTensor)
    assert isinstance(table.scale, ScaleCodes)
    stored = {t.name for t in g.constants(graph) if t.dtype == np.int8 and t.shape == (1, 256)}
    assert stored == {"w_scale_codes"}
    set_level(graph, 0)
    x = normal(3, 172, seed=9)
    for y in (*by_functions(graph, {"x": x}), *by_kernels(graph, {"x": x})):
        np.testing.assert_allclose(y, x @ weight.T, atol=1e-4)


def test_float16_stays_float16() -> None:
    graph, weight, _ = lowered(matmul(64, 33, "float16"), "nf4")
    set_level(graph, 0)
    x = normal(3, 64, seed=9).astype(np.float16)
    for y in (*by_functions(graph, {"x": x}), *by_kernels(graph, {"x": x})):
        assert y.dtype == np.float16
        np.testing.assert_allclose(y, x.astype(np.float32) @ weight.T, rtol=2e-3, atol=2e-2)


GEMMS = [
    "Gemm (x, w, b)",
    "Gemm <transB = 1> (x, v, b)",
    "Gemm <transA = 1, transB = 1> (t, v, b)",
    "Gemm <alpha = 0.5, beta = 2.0> (x, w, b)",
    "Gemm <beta = 0.0> (x, w, b)",
    "Gemm (x, w, row)",
    "Gemm (x, w)",
]


@pytest.mark.parametrize("form", ["nf4", "lattice"])
@pytest.mark.parametrize("gemm", GEMMS)
def test_gemm_keeps_its_bias_and_its_factors(gemm: str, form: str) -> None:
    w, b = normal(40, 12), normal(12, seed=1)
    data = {"w": w, "v": np.ascontiguousarray(w.T), "b": b, "row": normal(1, 12, seed=2)}
    text = f"(float[n, 40] x) => (float[m, 12] y) {{ t = Transpose (x)\n y = {gemm} }}"
    read = set(gemm.replace("(", "").replace(")", "").replace(",", "").split())
    made = model(text, opset=18, **{name: data[name] for name in sorted(read & data.keys())})
    graph, weight, _ = lowered(made, form)
    set_level(graph, 0)
    (name,) = {"w", "v"} & set(data) & {t.name for t in g.load(made).tensors().values()}
    stands_for = onnx.numpy_helper.from_array(weight if name == "v" else weight.T.copy(), name)
    for tensor in made.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(stands_for)
    x = normal(3, 40, seed=9)
    expected = Session(made, optimize=False).run({"x": x})["y"]
    for y in (*by_functions(graph, {"x": x}), *by_kernels(graph, {"x": x})):
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max() + 1e-5)


def test_without_the_targets_leave_nothing_changes() -> None:
    graph, ctx = g.load(matmul(64, 33)), context("cpu")
    for step in (Assign(form="weights", format="w4:64"), Codebook(kind="nf")):
        step.apply(graph, ctx)
    assert CodebookMatMul().apply(graph, ctx) == 0
    assert graph.opset == 18
    assert Expand().apply(graph, ctx) == 1


def test_uniform_four_bits_are_left_to_matmul_nbits() -> None:
    graph, ctx = g.load(matmul(64, 33)), context(DEVICE)
    for step in (Assign(form="weights", format="w4:64"), RoundToNearest()):
        step.apply(graph, ctx)
    assert CodebookMatMul().apply(graph, ctx) == 0
    assert MatMulNBits().apply(graph, ctx) == 1


# ── models and sessions ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ops") / "encoder.nf4.onnx"
    data = MODELS / "encoder_classifier.calib.npz"
    result = onnxq.quantize(
        MODELS / "encoder_classifier.onnx", "nf4", samples=data, ops=True, output=out
    )
    assert result.report.verified
    assert min(o.cosine for o in result.report.outputs) > 0.99
    assert any("no library" in w for w in result.report.warnings) == (find_library() is None)
    return out


def test_a_model_says_which_operators_it_has(quantized: Path) -> None:
    made = onnx.load(quantized)
    known = {entry.key: entry.value for entry in made.metadata_props}
    assert known[ops.METADATA] == "MatMulCodebook"
    assert names_operators(quantized)
    assert names_operators(made)
    assert not names_operators(MODELS / "encoder_classifier.onnx")
    loaded = g.load(quantized)
    assert "MatMulCodebook" in {node.op for node in loaded.nodes}
    assert g.to_proto(loaded).SerializeToString(deterministic=True) == made.SerializeToString(
        deterministic=True
    )
    inlined = g.load(quantized, operators=False)
    assert not names_operators(g.to_proto(inlined))
    assert ops.DOMAIN not in {node.domain for node in g.walk(inlined)}


@pytest.mark.skipif(find_library() is None, reason="needs the library of kernels")
def test_a_session_runs_the_kernels_by_itself(quantized: Path) -> None:
    sample = np.load(MODELS / "encoder_classifier.calib.npz")
    feed = {name: sample[name][:1] for name in sample.files}
    plain = Session(quantized).run(feed)["logits"]
    with without_kernels():
        functions = Session(quantized).run(feed)["logits"]
    assert (plain != functions).any()  # x is rounded to 8 bits by the kernel alone
    assert sqnr(plain, functions) >= EIGHT_BITS


@pytest.mark.parametrize("target", ["qnn-htp", "generic-qdq"])
def test_other_targets_refuse_ops(target: str) -> None:
    with pytest.raises(OnnxqError, match=rf"--ops is for targets of .* CPU provider, and {target}"):
        onnxq.quantize(MODELS / "digits_cnn.onnx", "nf4", target=target, ops=True, write=False)


def test_other_presets_refuse_ops() -> None:
    with pytest.raises(OnnxqError, match=r"--ops is for recipes of codebooks.*'int4' is not one"):
        onnxq.quantize(MODELS / "digits_cnn.onnx", "int4", ops=True, write=False)
