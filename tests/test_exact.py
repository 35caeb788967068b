"""Exact numbers are those of the runtime, where the runtime is exact."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import Array, model, pipeline, run

from onnxq import graph as g
from onnxq.devices.exact import evaluate
from onnxq.devices.hypotheses import Exact, half_to_even, half_up, shifted, to_bits, wrapped
from onnxq.devices.pieces import Pieces
from onnxq.devices.products import adding_in, columns, products, saturating_pairs


@pytest.mark.parametrize("name", ["conv_bn_relu6", "depthwise", "residual", "gemm", "matmul"])
def test_every_code_is_the_runtimes(name: str) -> None:
    case = ZOO[name]()
    graph = pipeline(case.model, case.feeds).graph
    pieces = Pieces(graph)
    proto = g.to_proto(graph)
    shown = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in pieces.names if n not in shown)
    for feed in case.feeds[:3]:
        said, exact = run(proto, feed, optimize=False), evaluate(proto, feed)
        for end in pieces.names:
            off = np.abs(said[end].astype(np.float64) - exact[end])
            if said[end].dtype.kind == "f":
                assert off.max() < 1e-4 * np.abs(said[end]).max() or (off > 0).mean() < 0.01
            else:
                assert off.max() <= 1
                assert (off > 0).mean() < 0.01


def test_pieces_are_the_layers_in_order_and_each_runs_alone() -> None:
    case = ZOO["residual"]()
    graph = pipeline(case.model, case.feeds).graph
    pieces = Pieces(graph)
    assert [pieces.operators(n) for n in pieces.names][1:4] == [["Conv"], ["Conv"], ["Add"]]
    proto = g.to_proto(graph)
    shown = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in pieces.names if n not in shown)
    said = {**case.feeds[0], **run(proto, case.feeds[0])}
    for name in pieces.names:
        for deeper in (False, True):
            feeds = {n: said[n] for n in pieces.feeds(name, deeper)}
            made = run(pieces.model(name, said, deeper), feeds)
            assert list(made) == [name]
            np.testing.assert_allclose(made[name], said[name], atol=1e-4)


def test_blocks_and_channels_have_scales_of_their_own() -> None:
    text = """(float[2] x) => (float[4,6] blocks, float[4,6] channels) {
        blocks = DequantizeLinear <axis = 1, block_size = 2> (w, s, z)
        channels = DequantizeLinear <axis = 0> (w, t)
    }"""
    rng = np.random.default_rng(0)
    made = model(
        text, 21, w=rng.integers(-9, 9, (4, 6)).astype(np.int8),
        s=rng.uniform(1, 2, (4, 3)).astype(np.float32),
        z=rng.integers(-3, 3, (4, 3)).astype(np.int8),
        t=rng.uniform(1, 2, 4).astype(np.float32),
    )  # fmt: skip
    feed = {"x": np.zeros(2, np.float32)}
    exact, said = evaluate(made, feed), run(made, feed)
    for name in ("blocks", "channels"):
        np.testing.assert_allclose(said[name], exact[name], rtol=1e-6)


# ── sums of products ─────────────────────────────────────────────────────────────────────────────


def naive_conv(x: Array, w: Array, strides: int, dilations: int, groups: int, pad: int) -> Array:
    """Σ over input channel and place, written out."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    per, out = w.shape[1], w.shape[0] // groups
    size = [(n - dilations * (w.shape[2] - 1) - 1) // strides + 1 for n in x.shape[2:]]
    y = np.zeros((len(x), len(w), *size), np.int64)
    for n, o, i, j in product(*map(range, y.shape)):
        for c, a, b in product(range(per), range(w.shape[2]), range(w.shape[3])):
            place = strides * i + dilations * a, strides * j + dilations * b
            y[n, o, i, j] += x[n, (o // out) * per + c, *place] * w[o, c, a, b]
    return y


@pytest.mark.parametrize(
    ("strides", "dilations", "groups", "pad"),
    [(1, 1, 1, 0), (2, 1, 1, 1), (1, 2, 2, 2), (2, 1, 4, 1)],
)
def test_columns_make_the_convolution(strides: int, dilations: int, groups: int, pad: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (2, 4, 7, 8))
    w = rng.integers(-9, 9, (4, 4 // groups, 3, 3))
    node = onnx.helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=[strides] * 2, dilations=[dilations] * 2,
        group=groups, pads=[pad] * 4,
    )  # fmt: skip
    expected = naive_conv(x, w, strides, dilations, groups, pad)
    made = np.concatenate([a @ b for a, b in columns(node, x, w)], 1)
    shape = (2, *expected.shape[2:], 4)
    np.testing.assert_array_equal(np.moveaxis(made.reshape(shape), -1, 1), expected)


def test_the_sums_of_a_layer_are_integers_that_its_multiplier_makes_real() -> None:
    case = ZOO["conv_bn_relu6"]()
    pieces = Pieces(pipeline(case.model, case.feeds).graph)
    name = pieces.names[1]
    feed = {n: np.arange(192).reshape(1, 3, 8, 8).astype(np.uint8) for n in pieces.feeds(name)}
    proto = pieces.model(name, {**feed, name: np.zeros((1, 8, 8, 8), np.uint8)})
    values = evaluate(proto, feed)
    found = products(proto, values)
    assert found is not None
    (conv,) = (node for node in proto.graph.node if node.op_type == "Conv")
    real = values[conv.output[0]]
    np.testing.assert_allclose(found.sums * found.multiplier, real, atol=1e-5)
    for what, sums in found.others():
        same = what.endswith("float16") and np.abs(found.sums).max() < 2**11
        assert sums.shape == found.sums.shape
        assert not same or np.array_equal(sums, found.sums)


def test_pairs_end_at_the_bounds_of_int16() -> None:
    x = np.array([[255, 255, 255, 1, 2]])
    w = np.array([[127], [127], [-128], [3], [5]])
    assert saturating_pairs(x, w).tolist() == [[32767 - 255 * 128 + 3 + 10]]


def test_adding_in_float16_loses_what_is_below_its_last_bit() -> None:
    x, w = np.array([[255, 255, 1, 1]]), np.array([[127], [1], [1], [1]])
    assert adding_in(np.float16, x, w).tolist() == [[32640.0]]  # its numbers there are 16 apart
    assert adding_in(np.float64, x, w).tolist() == [[32642.0]]


# ── roundings ────────────────────────────────────────────────────────────────────────────────────


def exact(sums: Array, multiplier: float, zero: int = 0) -> Exact:
    factor = np.array(multiplier)
    return Exact(sums * factor, zero, 0, 255, sums, factor)


def test_halves() -> None:
    layer = exact(np.array([1, 3, 5, -1, -3]), 0.5, zero=10)
    assert half_to_even(layer).tolist() == [10, 12, 12, 10, 8]
    assert half_up(layer).tolist() == [11, 12, 13, 10, 9]


def test_codes_that_wrap_begin_again() -> None:
    assert wrapped(exact(np.array([255, 256, -1, 513]), 1.0)).tolist() == [255, 0, 255, 1]


def test_numbers_of_so_many_bits() -> None:
    values = np.array([1.0, 1 + 2**-10, 1 + 2**-11, 0.064, 3000.0])
    expected = [1.0, 1 + 2**-10, 1.0, 1049 / 2**14, 3000.0]
    assert to_bits(values, 11).tolist() == expected


@pytest.mark.parametrize("zero", [0, 129])
@pytest.mark.parametrize("multiplier", [0.0037, 0.0043, 0.03, 0.12, 0.9])
def test_a_sum_is_cut_then_multiplied(multiplier: float, zero: int) -> None:
    """Against the same in Python's integers."""
    shift = 0
    while multiplier * 2 ** (shift + 1) < 1 / 8:
        shift += 1
    factor, bits = multiplier * 2**shift, 0
    while round(factor * 2 ** (bits + 1)) < 2**11:
        bits += 1
    sums = np.arange(-3000, 40000, 7)
    expected = []
    for a in sums.tolist():
        kept = (a + round(zero / multiplier)) >> shift
        code = (2 * kept * round(factor * 2**bits) + 2**bits) >> (bits + 1)
        expected.append(min(max(code, 0), 255))
    assert shifted(11, 4)(exact(sums, multiplier, zero)).tolist() == expected
