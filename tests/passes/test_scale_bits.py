"""Scales that are codes, from the weights to what the runtime multiplies with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import Array, Feeds, feeds_of, fused, model, normal, pipeline, relative, run, sqnr
from onnxq.passes import Assign
from onnxq.passes.solve import planner
from onnxq.passes.solve.autoround import autoround
from onnxq.passes.solve.blocks import round_blocks
from onnxq.passes.solve.coordinate_descent import coordinate_descent
from onnxq.passes.solve.gptq import gptq
from onnxq.passes.solve.hqq import hqq
from onnxq.passes.solve.mix_bits import Item
from onnxq.passes.solve.search_weight_scales import search_weight_scale
from rounding import errors, layer

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Result
from onnxq.qtype import QTensor, QType
from onnxq.super_blocks import on_steps, scale_codes

BLOCKS = {2: (32, 64, 128), 3: (16, 32, 64, 128, 256), 4: (16, 32, 64, 128, 256)}
EVERY = [(bits, block) for bits, blocks in BLOCKS.items() for block in blocks]
EIGHT_BITS = 0.02  # of the largest output: activations rounded to 8 bits by the kernel
MATMUL = "(float[n,k] x) => (float[n,m] y) { y = MatMul (x, w) }"


@pytest.fixture
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of scales also where they save nothing."""
    monkeypatch.setattr(planner, "EXPANSION", -(10**9))


def mixture(out: int, columns: int, seed: int = 0) -> Array:
    """Normal weights of which each block of 32 has a width of its own."""
    rng = np.random.default_rng(seed)
    width = np.repeat(np.exp(rng.normal(0, 0.3, (out, columns // 32))), 32, axis=1)
    return (rng.normal(size=(out, columns)) * width * 0.05).astype(np.float32)


def square_error(weight: Array, q: QTensor) -> float:
    return float(np.square(weight.astype(np.float64) - q.dequantize()).sum())


def check_grid(q: QTensor) -> None:
    assert q.step is not None
    codes = scale_codes(q.scale, q.step)
    assert codes.min() >= 1
    assert codes.max() <= 15
    np.testing.assert_array_equal(codes * q.step[:, None], q.scale)


# ── rounding ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_blocks_half_as_wide_with_scales_of_four_bits_err_less_at_no_more_bytes(bits: int) -> None:
    weight = mixture(128, 384)
    narrow, wide = QType.parse(f"u{bits}a:32/4"), QType.parse(f"u{bits}a:64")
    found, plain = round_blocks(weight, narrow), round_blocks(weight, wide)
    check_grid(found)
    stored = [Item(q, q, [], [], *weight.shape).bytes(q) for q in (narrow, wide)]
    assert stored[0] < stored[1]
    assert square_error(weight, found) < 0.9 * square_error(weight, plain)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_little_is_lost_to_scales_of_16_bits(bits: int) -> None:
    weight = mixture(128, 384)
    coarse, exact = (
        square_error(weight, round_blocks(weight, QType.parse(f"u{bits}a:32{codes}")))
        for codes in ("/4", "")
    )
    assert coarse < 1.06 * exact


@pytest.mark.parametrize("square", [False, True])
def test_searching_pays(square: bool) -> None:
    weight, qtype = mixture(64, 256), QType.parse("u4a:32/4")
    spread = 1.0 if square else 0.0
    seen = np.exp(np.random.default_rng(2).normal(0, spread, (1, 256)))
    searched, plain = (
        np.sum(seen * (weight - round_blocks(weight, qtype, square=seen, clip=c).dequantize()) ** 2)
        for c in (True, False)
    )
    assert searched < 0.92 * plain


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_same_bytes_on_any_number_of_threads(order: str) -> None:
    weight = np.asarray(normal(1100, 300), order=order)  # type: ignore[call-overload]
    one, *others = (
        round_blocks(weight, QType.parse("u4a:32/4"), threads=threads) for threads in (1, 2, 5)
    )
    for other in others:
        for part in ("codes", "scale", "zero", "step"):
            assert getattr(one, part).tobytes() == getattr(other, part).tobytes()


@pytest.mark.parametrize("clip", [False, True])
def test_zeros_stay_zeros_and_one_block_is_as_good_as_exact(clip: bool) -> None:
    weight = np.zeros((4, 40), np.float32)
    weight[1, 5], weight[2, 33:36] = 0.01, (-1, 0.5, 0.2)
    q = round_blocks(weight, QType.parse("u4a:32/4"), clip=clip)
    check_grid(q)
    assert q.step is not None
    np.testing.assert_array_equal(q.dequantize() == 0, weight == 0)
    np.testing.assert_allclose(q.dequantize(), weight, atol=0.06)
    alone = normal(8, 32)
    one = round_blocks(alone, QType.parse("u4a:32/4"), clip=clip)
    assert one.scale.shape == (8, 1)
    plain = round_blocks(alone, QType.parse("u4a:32"), clip=clip)
    assert square_error(alone, one) < 1.05 * square_error(alone, plain)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-5, 1e3, 1e6, 1e30, 3e38])
def test_tiny_and_huge_weights_are_as_exact_as_others(size: float) -> None:
    weight = normal(6, 100)
    weight *= np.float32(size / np.abs(weight).max())
    q = round_blocks(weight, QType.parse("u4a:32/4"))
    check_grid(q)
    assert np.abs(q.dequantize() / size - weight / size).max() < 0.11


SOLVERS = {
    "gptq": gptq,
    "coordinate-descent": coordinate_descent,
    "autoround": lambda made: autoround(made, 40),
    "search-scales": search_weight_scale,
    "hqq": lambda made: hqq(made.weight, made.qtype, start=made.start),
    "hqq alone": lambda made: hqq(made.weight, made.qtype),
}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_leave_scales_that_have_codes(name: str, groups: int) -> None:
    made = layer(12, 70, "u4a:16/4", groups)
    solved = SOLVERS[name](made)  # type: ignore[operator]
    check_grid(solved)
    assert solved.qtype == made.qtype
    if not name.startswith("hqq"):
        assert made.start is not None
        assert errors(made, solved).sum() < errors(made, made.start).sum()


def test_refitting_moves_scales_by_whole_codes_and_no_row_gets_worse() -> None:
    made = layer(40, 64, "u4a:16/4")
    assert made.start is not None
    solved = coordinate_descent(made, sweeps=1)
    codes = [scale_codes(q.scale, q.step) for q in (made.start, solved) if q.step is not None]
    assert (codes[0] != codes[1]).any()
    before, after = errors(made, made.start), errors(made, solved)
    assert (after <= before * (1 + 1e-5)).all()


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────


def planned(columns: int, rows: int, format: str = "w4:32") -> str:
    source = model(MATMUL, w=normal(columns, rows))
    settings = [f"assign.format={format}", "assign.scale_bits=4"]
    result = pipeline(source, feeds_of(2, x=(1, columns)), "int4-rtn", settings=settings)
    return str(result.context.weights["w"].qtype)


def test_scales_are_codes_where_that_saves_bytes() -> None:
    assert planned(256, 256) == "u4a:32/4"
    assert planned(256, 8) == "u4a:32"  # the operators would take more
    assert planned(64, 2000, "w4:64") == "u4a:64"  # one step for one scale
    assert planned(172, 2000, "w4:128") == "u4a:16/4"  # of a width that is no multiple
    assert planned(256, 256, "w8:32") == "u8a:32"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale_bits": 8}, "4 or 16, not 8"),
        ({"scale_bits": 4, "symmetric": True}, "asymmetric blocks"),
        ({"scale_bits": 4, "form": "static"}, "asymmetric blocks"),
    ],
)
def test_scales_of_four_bits_are_for_asymmetric_blocks(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(OnnxqError, match=message):
        Assign(**{"form": "weights", "format": "w4:32", **fields})  # type: ignore[arg-type]


# ── the runtime ──────────────────────────────────────────────────────────────────────────────────


def quantized(
    source: onnx.ModelProto, feeds: Feeds, format: str, preset: str = "int4-rtn"
) -> Result:
    settings = [f"assign.format={format}", "assign.scale_bits=4"]
    result = pipeline(source, feeds, preset, settings=settings)
    for q in result.context.weights.values():
        if q.qtype.bits < 8:
            check_grid(q)
    return result


def check(result: Result, feeds: Feeds, expected: list[Array], path: Path) -> None:
    """Exact without the runtime's optimizations; with them nothing of the expansion is left."""
    proto = g.to_proto(result.graph)
    onnx.checker.check_model(proto, full_check=True)
    for feed, want in zip(feeds, expected, strict=True):
        plain, optimized = (run(proto, feed, optimize)["y"] for optimize in (False, True))
        assert relative(plain, want) < 2e-6
        assert relative(optimized, want) < EIGHT_BITS
    left = fused(proto, path / "optimized.onnx").graph.node
    assert {n.op_type for n in left} <= {"MatMulNBits", "GatherBlockQuantized", "Concat", "Split"}


@pytest.mark.usefixtures("however_small")
@pytest.mark.parametrize("rows", [7, 8])
@pytest.mark.parametrize(("bits", "block"), EVERY)
def test_products_are_those_of_the_dequantized_weights(
    bits: int, block: int, rows: int, tmp_path: Path
) -> None:
    w = normal(300, rows) * np.logspace(-1, 1, 300, dtype="f4")[:, None]
    source = model(MATMUL, opset=18 if bits == 3 else 13, w=w)
    feeds = feeds_of(2, x=(3, 300))
    result = quantized(source, feeds, f"w{bits}:{block}")
    q = result.context.weights["w"]
    assert (q.qtype.bits, q.qtype.scale_bits) == (bits, 4)
    assert result.graph.opset == (18 if bits == 3 else 13)
    check(result, feeds, [feed["x"] @ q.dequantize().T for feed in feeds], tmp_path)


@pytest.mark.usefixtures("however_small")
@pytest.mark.parametrize("columns", [8, 40])
def test_one_block_a_row_and_one_row(columns: int, tmp_path: Path) -> None:
    source = model(MATMUL, w=normal(columns, 1))
    feeds = feeds_of(2, x=(3, columns))
    result = quantized(source, feeds, "w4:256")
    w = result.context.weights["w"].dequantize()
    check(result, feeds, [feed["x"] @ w.T for feed in feeds], tmp_path)


@pytest.mark.usefixtures("however_small")
def test_several_matrices_have_steps_of_their_own_rows(tmp_path: Path) -> None:
    source = model("(float[3,2,80] x) => (float y) { y = MatMul (x, w) }", w=normal(3, 80, 6))
    feeds = feeds_of(2, x=(3, 2, 80))
    result = quantized(source, feeds, "w4:32")
    w = np.swapaxes(result.context.weights["w"].dequantize().reshape(3, 6, 80), 1, 2)
    check(result, feeds, [feed["x"] @ w for feed in feeds], tmp_path)


def test_a_table_and_the_output_layer_tied_to_it_are_stored_once(tmp_path: Path) -> None:
    text = """(int64[n] ids) => (float[n,k] y) {
        h = Gather (w, ids)
        y = Gemm <transB = 1> (h, w)
    }"""
    w = normal(1200, 256) * np.logspace(-1, 1, 256, dtype="f4")
    feeds = [{"ids": np.arange(40, dtype=np.int64)}]
    result = quantized(model(text, w=w), feeds, "w4:32")
    stored = g.to_proto(result.graph).graph.initializer
    assert sum(t.data_type == onnx.TensorProto.UINT8 for t in stored) == 3  # codes, zeros, scales
    real = next(iter(result.context.weights.values())).dequantize()
    check(result, feeds, [real[feeds[0]["ids"]] @ real.T], tmp_path)


@pytest.mark.usefixtures("however_small")
def test_float16_activations_get_float16_scales() -> None:
    text = "(float16[n,256] x) => (float16[n,8] y) { y = MatMul (x, w) }"
    source = model(text, w=normal(256, 8).astype(np.float16))
    feeds = [{"x": normal(3, 256).astype(np.float16)}]
    result = quantized(source, feeds, "w4:32")
    w = result.context.weights["w"].dequantize()
    for optimize in (False, True):
        y = run(result.graph, feeds[0], optimize)["y"]
        assert y.dtype == np.float16
        assert relative(y, feeds[0]["x"].astype("f4") @ w.T) < EIGHT_BITS


@pytest.mark.usefixtures("however_small")
def test_the_portable_form_has_the_scales_as_floats() -> None:
    source, feeds = model(MATMUL, w=normal(256, 8)), feeds_of(2, x=(3, 256))
    result = quantized(source, feeds, "w4:32", "int4-qdq")
    w = result.context.weights["w"].dequantize()
    for optimize in (False, True):
        y = run(result.graph, feeds[0], optimize)["y"]
        assert relative(y, feeds[0]["x"] @ w.T) < EIGHT_BITS


def test_the_file_holds_four_bits_a_scale() -> None:
    source = model(MATMUL, w=normal(1024, 512))
    feeds = feeds_of(2, x=(1, 1024))
    result = quantized(source, feeds, "w4:32")
    q = result.context.weights["w"]
    stored = sum(t.values.nbytes for t in g.constants(result.graph))
    counted = Item(q.qtype, q.qtype, [], [], 512, 1024).bytes(q.qtype)
    assert counted == 512 * (1024 * 4 + 32 * (4 + 4) + 16) / 8
    assert counted <= stored < counted + 2500  # a table of bytes, shapes


@pytest.mark.usefixtures("however_small")
@pytest.mark.parametrize("name", ZOO)
def test_awkward_graphs_run_alike_with_and_without_optimizations(name: str) -> None:
    case = ZOO[name]()
    if "int4-rtn" in case.refused:
        pytest.skip("refused with float16 scales too")
    result = quantized(case.model, case.feeds, "w4:16")
    for feed in case.feeds:
        plain, optimized = (run(result.graph, feed, optimize) for optimize in (False, True))
        for key, values in plain.items():
            if values.dtype.kind == "f" and values.any():
                assert sqnr(optimized[key], values) > 24


def test_a_scale_off_its_steps_is_seen() -> None:
    q = round_blocks(normal(4, 64), QType.parse("u4a:32/4"))
    assert q.step is not None
    check_grid(q)
    off = replace(q, scale=q.scale * np.float32(1.1))
    with pytest.raises(AssertionError):
        check_grid(off)
    check_grid(replace(off, scale=on_steps(off.scale, q.step[:, None])))
