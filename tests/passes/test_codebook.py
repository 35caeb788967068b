import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import Array, context, model, normal, pipeline, samples_of
from onnxq.passes import Assign, Codebook, RoundToNearest
from onnxq.passes.solve.codebook import TABLES, floating_point, logarithmic, normal_float
from onnxq.passes.solve.round_to_nearest import round_to_nearest

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.codebook import CodebookTensor, ScaleCodes, nearest
from onnxq.layers import record_layers
from onnxq.pipeline import Context
from onnxq.qtype import QType

KINDS = list(TABLES)


def bnb4(quant_type: int) -> Array:
    """The 16 levels of MatMulBnb4, read from it with an identity: the high nibble first."""
    size = 16
    codes = np.arange(size, dtype=np.uint8) * np.ones((size, 1), np.uint8)
    packed = (codes.reshape(-1, 2) * np.array([16, 1], np.uint8)).sum(axis=1).astype(np.uint8)
    node = onnx.helper.make_node(
        "MatMulBnb4", ["x", "B", "absmax"], ["y"], domain="com.microsoft",
        K=size, N=size, block_size=size, quant_type=quant_type,
    )  # fmt: skip
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node], "g",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [size, size])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [size, size])],
            [onnx.numpy_helper.from_array(packed, "B"),
             onnx.numpy_helper.from_array(np.ones(size, np.float32), "absmax")],
        ),
        opset_imports=[onnx.helper.make_opsetid(*it) for it in (("", 17), ("com.microsoft", 1))],
        ir_version=8,
    )  # fmt: skip
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(size, dtype=np.float32)})[0][:, 0]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def test_normal_float_is_that_of_the_runtime() -> None:
    levels = bnb4(1)
    np.testing.assert_array_equal(normal_float(4), np.rint(127 * levels))
    assert np.abs(normal_float(4) / 127 - levels).max() <= 0.5 / 127


def test_floating_point_is_every_number_of_its_bits() -> None:
    """Sign, two bits of exponent, one of mantissa; the lowest exponent is of subnormal numbers."""
    magnitudes = [m / 2 for m in (0, 1)] + [2.0**e * (1 + m / 2) for e in range(3) for m in (0, 1)]
    both = sorted({sign * m for m in magnitudes for sign in (-1, 1)})
    assert (floating_point(4) / 2).tolist() == both
    assert floating_point(3).tolist() == [-4, -2, -1, 0, 1, 2, 4]


def test_logarithmic_is_zero_and_powers_of_two() -> None:
    assert logarithmic(3).tolist() == [-8, -4, -2, -1, 0, 1, 2, 4]
    assert logarithmic(4)[[0, -1]].tolist() == [-128, 64]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_ascend_hold_zero_and_fit_their_bits(kind: str, bits: int) -> None:
    levels = TABLES[kind](bits).astype(int)
    assert (np.diff(levels) > 0).all()
    assert 0 in levels
    assert len(levels) <= 1 << bits


# ── solving ──────────────────────────────────────────────────────────────────────────────────────


def error(weight: Array, q: CodebookTensor, square: Array | None = None) -> float:
    factor = np.ones(weight.shape[1]) if square is None else square
    return float((factor * (weight.astype(np.float64) - q.dequantize()) ** 2).sum())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("spec", ["u4a:16", "u3a:32", "u2a:64"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_and_no_block_is_worse_than_its_range_s_scale(
    kind: str, spec: str, double: bool
) -> None:
    weight, qtype = normal(6, 100), QType.parse(spec)
    group = qtype.group or 0
    q = Codebook(kind, double_quantization=double).solve(weight, qtype)  # type: ignore[arg-type]
    assert q.codes.max() < 1 << qtype.bits
    assert q.scales.shape == (6, -(-100 // group))
    assert q.format == f"{kind}{qtype.bits}:{group}"
    assert isinstance(q.scale, ScaleCodes) == double
    unit = np.repeat(q.scales, group, axis=1)[:, :100]
    np.testing.assert_array_equal(q.codes, nearest(weight / unit, q.levels))
    plain = Codebook(kind, search=False, double_quantization=double)  # type: ignore[arg-type]
    assert error(weight, q) < error(weight, plain.solve(weight, qtype))


def test_k_means_beats_normal_float_and_even_levels_at_equal_size() -> None:
    weight = normal(64, 512) * np.exp(normal(64, 512, seed=1) / 2)  # longer tails than normal
    for bits in (2, 3, 4):
        qtype = QType.parse(f"u{bits}:64")
        found, normal_levels = (
            error(weight, Codebook(kind).solve(weight, qtype))  # type: ignore[arg-type]
            for kind in ("kmeans", "nf")
        )
        even = weight.astype(np.float64) - round_to_nearest(weight, qtype).dequantize()
        assert found < 0.98 * normal_levels < (even**2).sum()


def test_inputs_that_are_large_are_served_first() -> None:
    weight, qtype = normal(16, 128), QType.parse("u3a:32")
    square = np.where(np.arange(128) % 32 < 4, 50.0, 0.1)
    for kind in ("nf", "kmeans"):
        seen = Codebook(kind).solve(weight, qtype, square)  # type: ignore[arg-type]
        blind = Codebook(kind).solve(weight, qtype)  # type: ignore[arg-type]
        assert error(weight, seen, square) < 0.9 * error(weight, blind, square)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_nothing_stay_nothing(kind: str) -> None:
    weight = normal(4, 64)
    weight[:, 16:32], weight[2] = 0, 0
    q = Codebook(kind).solve(weight, QType.parse("u4a:16"))  # type: ignore[arg-type]
    real = q.dequantize()
    assert not real[:, 16:32].any()
    assert not real[2].any()


def test_levels_of_four_bits_fit_four_bits() -> None:
    q = Codebook("kmeans", level_bits=4).solve(normal(8, 64), QType.parse("u3a:32"))
    assert q.levels.min() >= -8
    assert q.levels.max() <= 7


# ── the pass ─────────────────────────────────────────────────────────────────────────────────────

LAYERS = """(float[n, 64] x) => (float[n, 4] y) {
    h = MatMul(x, w)
    r = Relu(h)
    y = Gemm <transB = 1> (r, v, b)
}"""


def planned(**fields: object) -> tuple[g.Graph, Context]:
    made = model(LAYERS, w=normal(64, 48), v=normal(4, 48), b=normal(4))
    samples = samples_of(made, [{"x": normal(16, 64) * np.linspace(0, 3, 64, dtype="f4")}])
    graph, ctx = g.load(made), context(samples=samples)
    Assign(form="weights", format="w4:16").apply(graph, ctx)
    return graph, ctx


def test_samples_say_which_inputs_matter() -> None:
    graph, ctx = planned()
    step = Codebook()
    ctx.stats |= observe(graph, step.observe(graph, ctx), ctx.samples, threads=1)
    assert step.apply(graph, ctx) == 2
    assert ctx.samples is not None
    x = next(iter(ctx.samples))["x"]
    weight = normal(64, 48).T
    expected = step.solve(weight, QType.parse("u4a:16"), (x.astype(np.float64) ** 2).mean(axis=0))
    np.testing.assert_array_equal(ctx.codebooks["w"].codes, expected.codes)
    assert not np.array_equal(expected.codes, step.solve(weight, QType.parse("u4a:16")).codes)


def test_a_weight_has_one_form_whatever_the_order_of_passes() -> None:
    for steps in ((Codebook(), RoundToNearest()), (RoundToNearest(), Codebook())):
        graph, ctx = planned()
        ctx.samples = None
        for step in steps:
            step.apply(graph, ctx)
        assert set(ctx.codebooks) == {"w", "v"}
        assert not ctx.weights


def test_weights_of_eight_bits_get_no_table() -> None:
    made = model(LAYERS, w=normal(64, 48), v=normal(4, 48), b=normal(4))
    graph, ctx = g.load(made), context()
    Assign(form="weights", format="w8:16").apply(graph, ctx)
    assert Codebook().apply(graph, ctx) == 0


def test_the_report_names_the_table() -> None:
    made = model(LAYERS, w=normal(64, 48), v=normal(4, 48), b=normal(4))
    result = pipeline(made, None, "nf4")
    report = result.report
    record_layers(result, report)
    assert {record.form for record in report.layers} == {"w nf4:64", "w nf4:16"}
