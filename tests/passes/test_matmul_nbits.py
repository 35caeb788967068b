"""Every form of weights in blocks, run by ONNX Runtime, against the weights that it stands for."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import Array, Feeds, feeds_of, model, normal, pipeline, relative, run
from onnxq.passes.lower.matmul_nbits import packed
from places import place

from onnxq import graph as g
from onnxq.devices import Job, Place, ask
from onnxq.errors import OnnxqError
from onnxq.pipeline import Result

BLOCKS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}
EVERY = [(bits, block) for bits, blocks in BLOCKS.items() for block in blocks]
COLUMNS = 300  # no multiple of a block, nor of what a byte holds
EIGHT_BITS = 0.02  # of the largest output: activations rounded to 8 bits by the kernel


def quantized(
    source: onnx.ModelProto,
    feeds: Feeds,
    format: str,
    symmetric: bool = False,
    preset: str = "int4-rtn",
) -> Result:
    settings = [f"assign.format={format}", f"assign.symmetric={str(symmetric).lower()}"]
    return pipeline(source, feeds, preset, settings=settings)


def check(result: Result, feeds: Feeds, expected: list[Array], output: str = "y") -> None:
    """Exact without the runtime's optimizations, but for 8-bit activations with them."""
    proto = g.to_proto(result.graph)
    onnx.checker.check_model(proto)
    for feed, want in zip(feeds, expected, strict=True):
        plain, optimized = (run(proto, feed, optimize)[output] for optimize in (False, True))
        assert plain.shape == optimized.shape == want.shape
        assert relative(plain, want) < 2e-6
        assert relative(optimized, want) < EIGHT_BITS


def operators(result: Result) -> Counter[str]:
    return Counter(node.op for node in g.walk(result.graph))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block"), EVERY)
def test_products_are_those_of_the_dequantized_weights(
    bits: int, block: int, symmetric: bool
) -> None:
    w = normal(COLUMNS, 7) * np.logspace(-1, 1, COLUMNS, dtype="f4")[:, None]
    source = model("(float[n,k] x) => (float[n,m] y) { y = MatMul (x, w) }", w=w)
    feeds = feeds_of(2, x=(3, COLUMNS))
    result = quantized(source, feeds, f"w{bits}:{block}", symmetric)
    q = result.context.weights["w"]
    assert q.qtype.bits == bits
    assert q.qtype.symmetric == symmetric
    check(result, feeds, [feed["x"] @ q.dequantize().T for feed in feeds])
    node = next(n for n in result.graph.nodes if n.op == "MatMulNBits")
    assert node.attrs["accuracy_level"] == 4
    assert len(node.inputs) == 3 + (not symmetric)


def test_a_symmetric_scale_may_be_negative() -> None:
    w = -np.abs(normal(32, 4))
    w[0] = 9  # the farthest weight takes the lowest code
    source = model("(float[n,32] x) => (float[n,4] y) { y = MatMul (x, w) }", w=w)
    feeds = feeds_of(2, x=(3, 32))
    result = quantized(source, feeds, "w4:32", symmetric=True)
    q = result.context.weights["w"]
    assert (q.scale < 0).any()
    check(result, feeds, [feed["x"] @ q.dequantize().T for feed in feeds])


GEMMS = {
    "plain": ("", "", (40, 6), None),
    "bias": ("", ", c", (40, 6), (6,)),
    "transB": ("<transB = 1>", ", c", (6, 40), (6,)),
    "alpha": ("<alpha = 0.5>", "", (40, 6), None),
    "alpha, beta": ("<alpha = 0.5, beta = 2.0>", ", c", (40, 6), (6,)),
    "beta of nothing": ("<beta = 0.0>", ", c", (40, 6), (6,)),
    "bias of one row": ("", ", c", (40, 6), (1, 6)),
    "bias by row": ("", ", c", (40, 6), (3, 1)),
    "bias of one number": ("", ", c", (40, 6), (1,)),
}


@pytest.mark.parametrize("kind", GEMMS)
def test_gemm_with_all_that_it_can_be_asked_for(kind: str) -> None:
    attributes, third, shape, bias = GEMMS[kind]
    source = model(
        f"(float[3,40] x) => (float[3,6] y) {{ y = Gemm {attributes} (x, w{third}) }}",
        w=normal(*shape),
        **({"c": normal(*bias, seed=1)} if bias else {}),
    )
    feeds = feeds_of(2, x=(3, 40))
    result = quantized(source, feeds, "w4:32")
    q = result.context.weights["w"]
    w = q.dequantize()
    rounded = model(
        f"(float[3,40] x) => (float[3,6] y) {{ y = Gemm {attributes} (x, w{third}) }}",
        w=w if "transB" in kind else w.T,
        **({"c": normal(*bias, seed=1)} if bias else {}),
    )
    check(result, feeds, [run(rounded, feed)["y"] for feed in feeds])
    assert operators(result)["MatMulNBits"] == 1


def test_gemm_with_its_input_transposed() -> None:
    source = model(
        "(float[40,3] x) => (float[3,6] y) { y = Gemm <transA=1> (x, w) }", w=normal(40, 6)
    )
    feeds = feeds_of(2, x=(40, 3))
    result = quantized(source, feeds, "w4:16")
    w = result.context.weights["w"].dequantize()
    check(result, feeds, [feed["x"].T @ w.T for feed in feeds])


STACKS = {
    "slices": ((3, 2, 40), (3, 40, 6)),
    "one input for all": ((2, 40), (3, 40, 6)),
    "an input with a batch of one": ((1, 2, 40), (3, 40, 6)),
    "one matrix": ((5, 2, 40), (1, 40, 6)),
    "one matrix of a higher rank": ((2, 40), (1, 1, 40, 6)),
}


@pytest.mark.parametrize("kind", STACKS)
def test_several_matrices_are_a_product_each(kind: str) -> None:
    x, w = STACKS[kind]
    given = ",".join(map(str, x))
    source = model(f"(float[{given}] x) => (float y) {{ y = MatMul (x, w) }}", w=normal(*w))
    feeds = feeds_of(2, x=x)
    result = quantized(source, feeds, "w4:32")
    rows = result.context.weights["w"].dequantize()
    matrices = np.swapaxes(rows.reshape(*w[:-2], w[-1], w[-2]), -1, -2)
    check(result, feeds, [feed["x"] @ matrices for feed in feeds])
    assert operators(result)["MatMulNBits"] == np.prod(w[:-2])


def test_matrices_that_cannot_be_told_apart_keep_eight_bits() -> None:
    source = model("(float[e,2,40] x) => (float y) { y = MatMul (x, w) }", w=normal(3, 40, 6))
    result = quantized(source, feeds_of(2, x=(3, 2, 40)), "w4:32")
    assert result.context.weights["w"].qtype.bits == 8
    assert operators(result)["MatMulNBits"] == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [96, 64, 44, 43])
def test_rows_of_a_table_are_those_of_the_solver(bits: int, columns: int) -> None:
    source = model(
        "(int64[n,s] ids) => (float[n,s,k] y) { y = Gather (w, ids) }", w=normal(1100, columns)
    )
    feeds = [{"ids": np.random.default_rng(0).integers(0, 1100, (2, 5))}]
    result = quantized(source, feeds, f"w{bits}:32")
    w = result.context.weights["w"].dequantize()
    for optimize in (False, True):
        y = run(result.graph, feeds[0], optimize)["y"]
        np.testing.assert_allclose(y, w[feeds[0]["ids"]], rtol=1e-6)
    assert operators(result) == {"GatherBlockQuantized": 1, "Cast": 1}


@pytest.mark.parametrize(("columns", "block"), [(128, 32), (96, 16), (32, 16), (60, 32)])
def test_zero_points_of_a_row_fill_bytes_for_older_runtimes(columns: int, block: int) -> None:
    """onnxruntime 1.24, which OpenVINO's wheel has, reads others wrongly."""
    source = model(
        "(int64[n] ids) => (float[n,k] y) { y = Gather (w, ids) }", w=normal(1100, columns)
    )
    feed = {"ids": np.arange(7, 1100, 90)}
    result = quantized(source, [feed], "w4:32")
    (node,) = [node for node in result.graph.nodes if node.op == "GatherBlockQuantized"]
    assert node.attrs["block_size"] == block
    older = Place("CPUExecutionProvider", place("openvino").command)
    (answer,) = ask(older, [Job(g.to_proto(result.graph), (feed,))])
    expected = result.context.weights["w"].dequantize()[feed["ids"]]
    np.testing.assert_allclose(answer.outputs[0]["y"], expected, rtol=1e-6)


@pytest.mark.parametrize("head", ["Gemm <transB = 1> (f, w)", "MatMul (h, t)"])
def test_a_table_and_the_output_layer_tied_to_it_are_stored_once(head: str) -> None:
    turned = "t = Transpose <perm = [1,0]> (w)" if "MatMul" in head else "f = Flatten (h)"
    source = model(
        f"(int64[n] ids) => (float[n,k] y) {{ h = Gather (w, ids) {turned} y = {head} }}",
        w=normal(1200, 64) * np.logspace(-1, 1, 64, dtype="f4"),
    )
    feeds = [{"ids": np.arange(40, dtype=np.int64)}]
    settings = ["assign.format=w4:32"]
    result = pipeline(source, feeds, "int4-rtn", settings=settings)
    proto = g.to_proto(result.graph)
    stored = [i.name for i in proto.graph.initializer if i.data_type == onnx.TensorProto.UINT8]
    assert operators(result)["GatherBlockQuantized"] == operators(result)["MatMulNBits"] == 1
    assert len(stored) == 2  # codes and zero points
    w = next(iter(result.context.weights.values())).dequantize()
    check(result, feeds, [w[feeds[0]["ids"]] @ w.T])


@pytest.mark.parametrize("preset", ["int4-rtn", "int4-qdq"])
def test_a_table_of_matrices_and_a_lone_id(preset: str) -> None:
    text = """(int64[n] ids, int64 one) => (float y, float z) {
        y = Gather (w, ids)
        z = Gather (v, one)
    }"""
    source = model(text, w=normal(1100, 4, 32), v=normal(1100, 64))
    feed = {"ids": np.array([3, 0, -1]), "one": np.array(7)}
    result = quantized(source, [feed], "w4:32", preset=preset)
    w, v = (result.context.weights[key].dequantize() for key in "wv")
    for optimize in (False, True):
        said = run(result.graph, feed, optimize)
        np.testing.assert_allclose(said["y"], w.reshape(1100, 4, 32)[feed["ids"]], rtol=1e-6)
        np.testing.assert_allclose(said["z"], v[7], rtol=1e-6)


def test_small_tables_get_eight_bits() -> None:
    source = model("(int64[n] ids) => (float[n,k] y) { y = Gather (w, ids) }", w=normal(2, 64))
    result = quantized(source, [{"ids": np.array([0, 1])}], "w4:32")
    assert result.context.weights["w"].qtype.bits == 8


def test_half_precision_scales_take_half_the_bytes_and_say_the_same() -> None:
    source = model("(float[n,64] x) => (float[n,8] y) { y = MatMul (x, w) }", w=normal(64, 8))
    result = quantized(source, feeds_of(2, x=(1, 64)), "w4:32")
    stored = {i.name: i for i in g.to_proto(result.graph).graph.initializer}
    assert stored["w_scale"].data_type == onnx.TensorProto.FLOAT16
    tiny = model("(float[n,64] x) => (float[n,8] y) { y = MatMul (x, w) }", w=1e-6 * normal(64, 8))
    feeds = feeds_of(2, x=(1, 64))
    result = quantized(tiny, feeds, "w4:32")
    stored = {i.name: i for i in g.to_proto(result.graph).graph.initializer}
    assert stored["w_scale"].data_type == onnx.TensorProto.FLOAT
    q = result.context.weights["w"]
    check(result, feeds, [feed["x"] @ q.dequantize().T for feed in feeds])


def test_a_width_that_is_no_multiple_gets_blocks_that_cost_no_more() -> None:
    text = "(float[n,k] x) => (float[n,m] y) { y = MatMul (x, w) }"
    blocks = {}
    for columns in (256, 172, 64, 128):
        source = model(text, w=normal(columns, 8))
        result = quantized(source, feeds_of(2, x=(1, columns)), "w4:128")
        blocks[columns] = result.context.weights["w"].qtype.group
    assert blocks[256] == blocks[128] == 128  # filled as they are
    assert blocks[64] == blocks[172] == 16


def test_a_block_that_the_kernel_runs_in_floats_is_refused() -> None:
    source = model("(float[n,64] x) => (float[n,8] y) { y = MatMul (x, w) }", w=normal(64, 8))
    with pytest.raises(OnnxqError, match="w2 in blocks of 32, 64, 128, not in blocks of 16"):
        quantized(source, feeds_of(2, x=(1, 64)), "w2:16")


def test_float16_activations_get_float16_scales(tmp_path: Path) -> None:
    source = model(
        "(float16[n,64] x) => (float16[n,8] y) { y = MatMul (x, w) }",
        w=normal(64, 8).astype(np.float16),
    )
    feeds = [{"x": normal(3, 64).astype(np.float16)}]
    result = quantized(source, feeds, "w4:32")
    w = result.context.weights["w"].dequantize()
    for optimize in (False, True):
        y = run(result.graph, feeds[0], optimize)["y"]
        assert y.dtype == np.float16
        assert relative(y, feeds[0]["x"].astype("f4") @ w.T) < EIGHT_BITS


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 5, 8])
def test_codes_are_packed_low_bits_first(bits: int, columns: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, columns)).astype(np.uint8)
    each, rows = 8 // bits, packed(codes, bits)
    assert rows.shape == (3, -(-columns // each))
    for k in range(columns):
        found = rows[:, k // each] >> (bits * (k % each)) & ((1 << bits) - 1)
        assert (found == codes[:, k]).all()


# ── standard operators ───────────────────────────────────────────────────────────────────────────

PORTABLE: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "MatMul": ("y = MatMul (x, w)", (COLUMNS, 7), (3, COLUMNS)),
    "Gemm transB": ("y = Gemm <transB = 1> (x, w)", (7, COLUMNS), (3, COLUMNS)),
    "batched": ("y = MatMul (x, w)", (2, COLUMNS, 7), (2, 3, COLUMNS)),
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block"), EVERY)
@pytest.mark.parametrize("kind", PORTABLE)
def test_the_portable_form_says_the_same(kind: str, bits: int, block: int, symmetric: bool) -> None:
    text, shape, x = PORTABLE[kind]
    given = ",".join(map(str, x))
    source = model(f"(float[{given}] x) => (float y) {{ {text} }}", w=normal(*shape))
    feeds = feeds_of(2, x=x)
    result = quantized(source, feeds, f"w{bits}:{block}", symmetric, "int4-qdq")
    w = np.swapaxes(
        result.context.weights["w"].dequantize().reshape(*shape[:-2], 7, COLUMNS), -1, -2
    )
    check(result, feeds, [feed["x"] @ w for feed in feeds])
    assert operators(result)["MatMulNBits"] == 0
    assert result.graph.opset == {2: 25, 4: 21, 8: 21}[bits]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [64, 43])
def test_the_portable_form_looks_rows_up_before_it_scales_them(bits: int, columns: int) -> None:
    source = model(
        "(int64[n,s] ids) => (float[n,s,k] y) { y = Gather (w, ids) }", w=normal(1100, columns)
    )
    feeds = [{"ids": np.random.default_rng(0).integers(0, 1100, (2, 5))}]
    result = quantized(source, feeds, f"w{bits}:32", preset="int4-qdq")
    w = result.context.weights["w"].dequantize()
    for optimize in (False, True):
        y = run(result.graph, feeds[0], optimize)["y"]
        np.testing.assert_allclose(y, w[feeds[0]["ids"]], rtol=1e-6)
