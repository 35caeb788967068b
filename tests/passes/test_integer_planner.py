"""Which tensor gets 8 bits and which 16, and what belongs to one rounding."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import Array, apply, feeds_of, model, normal, pipeline
from onnxq.passes import Assign

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Context
from onnxq.target import Target


def planned(made: onnx.ModelProto) -> Context:
    return apply(Assign(form="integer"), made)[2]


def bits(ctx: Context, node: str) -> int:
    """Of what a node hands on."""
    result = ctx.plan[node].handed_on
    assert result is not None, node
    return result.bits


CHAIN: dict[str, Array] = {"w": normal(8, 8), "v": normal(8, 8, seed=1)}


def test_what_is_multiplied_is_narrow_and_what_leaves_is_wide() -> None:
    ctx = planned(model(
        "(float[n,8] x) => (float[n,8] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }",
        21, **CHAIN,
    ))  # fmt: skip
    assert (bits(ctx, "r"), bits(ctx, "y")) == (8, 16)


def test_a_sum_that_is_normalized_and_all_that_is_added_to_it_is_wide() -> None:
    text = """(float[n,8] x) => (float[n,8] y) {
        h = MatMul (x, w) a = Add (h, x) b = Add (a, x)
        l = LayerNormalization (b, s) y = MatMul (l, v)
    }"""
    ctx = planned(model(text, 21, s=normal(8), **CHAIN))
    assert [bits(ctx, node) for node in ("h", "a", "b", "l")] == [16, 16, 16, 8]


def test_a_chain_of_sums_that_nothing_wide_reads_is_narrow() -> None:
    text = """(float[n,8] x) => (float[n,8] y) {
        h = MatMul (x, w) a = Add (h, h) b = Neg (a) y = MatMul (b, v)
    }"""
    ctx = planned(model(text, 21, **CHAIN))
    assert [bits(ctx, node) for node in ("h", "a", "b")] == [8, 8, 8]


def test_readers_of_the_narrow_format_read_a_copy_of_a_wide_tensor() -> None:
    text = """(float[n,8] x) => (float[n,8] y) {
        h = MatMul (x, w) m = MatMul (h, v) a = Add (m, h) y = Neg (a)
    }"""
    graph, _, ctx = apply(Assign(form="integer"), model(text, 21, **CHAIN))
    reader = next(node for node in graph.nodes if node.name == "m")
    copy = g.producer(reader.inputs[0])
    assert copy is not None
    assert (copy.op, copy.inputs[0].name, bits(ctx, "h")) == ("Identity", "h", 16)


def test_a_product_takes_in_its_bias_its_factor_and_its_bound() -> None:
    text = """(float[n,8] x) => (float[n,8] y) {
        h = MatMul (x, w) b = Add (h, c) f = Mul (b, two) r = Relu (f) y = Neg (r)
    }"""
    ctx = planned(model(text, 21, c=normal(8), two=np.float32(2), **CHAIN))
    assert [ctx.plan[node].output for node in ("h", "b", "f", "r")] == [False, False, False, True]


@pytest.mark.parametrize(
    ("constant", "taken"),
    [
        (normal(6, 1, 1), True),  # by channel
        (normal(1, 6, 1, 1), True),
        (normal(1), True),
        (normal(6), False),  # along the last axis
        (normal(1, 1, 6, 1, 1), False),  # which adds an axis
        (normal(6, 6, 6), False),
    ],
)
def test_a_convolution_takes_in_constants_by_channel_alone(constant: Array, taken: bool) -> None:
    text = "(float[2,4,6,6] x) => (float y) { c = Conv (x, k) a = Add (c, b) y = Neg (a) }"
    ctx = planned(model(text, 21, k=normal(6, 4, 1, 1), b=constant))
    assert ctx.plan["c"].output != taken


def test_what_is_read_twice_is_rounded_before_it_is_bounded() -> None:
    text = "(float[n,8] x) => (float[n,8] y) { h = MatMul (x, w) r = Relu (h) y = Add (h, r) }"
    assert planned(model(text, 21, **CHAIN)).plan["h"].output


def test_a_target_without_such_rules_is_refused() -> None:
    target = Target("bare", "", ("CPUExecutionProvider",), 21, {})
    made = model("(float[n,8] x) => (float[n,8] y) { y = MatMul (x, w) }", 21, w=normal(8, 8))
    with pytest.raises(OnnxqError, match="bare has no integer rule for w8a8"):
        apply(Assign(form="integer"), made, target=target)


def test_every_operator_without_a_rule_is_reported() -> None:
    text = """(float[n,8] x) => (float[n,8] y) {
        h = MatMul (x, w) l = LogSoftmax (h) y = Neg (l)
    }"""
    done = pipeline(model(text, 21, **CHAIN), feeds_of(x=(3, 8)), "integer-only")
    assert "logarithm" in {r.name: r.reason for r in done.report.layers}["l"]
