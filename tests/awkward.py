"""Small graphs, each awkward in its own way, with inputs. Every pass and preset runs over all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from graphs import Array, Feeds, batch_norm, bn, context, feeds_of, model, normal, run
from onnxq.passes import Widen

from onnxq import graph as g
from onnxq.errors import OnnxqError

ZOO: dict[str, Callable[[], Case]] = {}


@dataclass
class Case:
    """`refused` says, by preset, with what reason a graph may be refused."""

    model: onnx.ModelProto
    feeds: Feeds
    refused: dict[str, str] = field(default_factory=dict)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing case."""
        printer.text("\n" + onnx.printer.to_text(self.model.graph))

    def expected(self) -> list[dict[str, Array]]:
        """What the float model says, in float32 where the runtime has no kernels for its types."""
        try:
            return [run(self.model, feed) for feed in self.feeds]
        except OnnxqError:
            graph = g.load(self.model)  # which gives nodes names of their own
            Widen().apply(graph, context())
            return [run(graph, feed) for feed in self.feeds]


def awkward(make: Callable[[], Case]) -> Callable[[], Case]:
    ZOO[make.__name__] = make
    return make


# What onnx.reference cannot evaluate (its BatchNormalization of opset 9 is another), or where a
# code that falls to the other side of a tie is fed back and grows.
NOT_IN_REFERENCE = {
    "opset_8",
    "loop_body", "lstm", "lstm_bidirectional", "lstm_with_states", "lstm_in_if", "gru",
    "gru_bidirectional", "rnn", "no_shapes", "optionals",
}  # fmt: skip
NO_RECURRENCE = {
    "integer-only": "its state passes through float",
    "fp8": "no static rule for (LSTM|GRU|RNN) as w8a8e4m3",
}
NO_DYNAMIC = {"int8-dynamic": "ConvInteger runs ten times slower than float"}


# ── convolutions ─────────────────────────────────────────────────────────────────────────────────


@awkward
def conv_bn_relu6() -> Case:
    text = f"""(float[n,3,8,8] x) => (float[n,4,8,8] y) {{
        c = Conv <pads = [1,1,1,1]> (x, w)
        b = {bn("c", "one")}
        r = Clip (b, low, high)
        y = Conv (r, v, bias)
    }}"""
    weights = {
        "w": normal(8, 3, 3, 3, scale=0.4),
        "v": normal(4, 8, 1, 1, seed=1),
        "bias": normal(4, seed=2),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    return Case(
        model(text, **weights, **batch_norm(8, "one")), feeds_of(x=(1, 3, 8, 8)), NO_DYNAMIC
    )


@awkward
def depthwise() -> Case:
    text = f"""(float[n,3,8,8] x) => (float[n,5] y) {{
        a = Conv (x, w)
        b = {bn("a", "one")}
        c = Relu (b)
        d = Conv <group = 8, pads = [1,1,1,1]> (c, dw)
        e = {bn("d", "two")}
        f = Relu (e)
        p = GlobalAveragePool (f)
        t = Flatten (p)
        y = Gemm <transB = 1> (t, fc, bias)
    }}"""
    weights = {
        "w": normal(8, 3, 1, 1),
        "dw": normal(8, 1, 3, 3, seed=1),
        "fc": normal(5, 8, seed=2),
        "bias": normal(5, seed=3),
    }
    made = model(text, **weights, **batch_norm(8, "one"), **batch_norm(8, "two", 1))
    return Case(made, feeds_of(x=(1, 3, 8, 8)))


@awkward
def residual() -> Case:
    text = """(float[n,4,6,6] x) => (float[n,4,1,1] y) {
        a = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r = Relu (a)
        c = Conv <pads = [1,1,1,1]> (r, w2, b2)
        s = Add (c, r)
        t = Relu (s)
        m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t)
        z = Conv (m, w3)
        y = GlobalAveragePool (z)
    }"""
    weights = {
        "w1": normal(4, 4, 3, 3, scale=0.3),
        "b1": normal(4, seed=1),
        "w2": normal(4, 4, 3, 3, seed=2, scale=0.3),
        "b2": normal(4, seed=3),
        "w3": normal(4, 4, 1, 1, seed=4),
    }
    return Case(model(text, **weights), feeds_of(x=(1, 4, 6, 6)), NO_DYNAMIC)


@awkward
def gemm() -> Case:
    text = """(float[12,3] x) => (float[3,5] y) {
        a = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (x, w1, b1)
        r = Relu (a)
        y = Gemm (r, w2, b2)
    }"""
    weights = {
        "w1": normal(16, 12),
        "b1": normal(16, seed=1),
        "w2": normal(16, 5, seed=2),
        "b2": normal(5, seed=3),
    }
    return Case(model(text, **weights), feeds_of(x=(12, 3)))


@awkward
def matmul() -> Case:
    text = """(float[n,l,16] x) => (float[n,l,6] y) {
        a = MatMul (x, w1)
        b = Add (a, b1)
        r = Relu (b)
        y = MatMul (r, w2)
    }"""
    weights = {"w1": normal(16, 24), "b1": normal(24, seed=1), "w2": normal(24, 6, seed=2)}
    feeds = [{"x": normal(1, length, 16, seed=length)} for length in (3, 5, 7, 4)]
    return Case(model(text, **weights), feeds)


@awkward
def tied() -> Case:
    """An embedding table that is the output layer too, behind a Transpose."""
    text = """(int64[n,l] ids) => (float[n,l,20] y) {
        e = Gather (table, ids)
        h = MatMul (e, w)
        t = Transpose <perm = [1,0]> (table)
        y = MatMul (h, t)
    }"""
    rng = np.random.default_rng(0)
    feeds = [{"ids": rng.integers(0, 20, (1, 6))} for _ in range(6)]
    return Case(model(text, table=normal(20, 16), w=normal(16, 16, seed=1)), feeds)


@awkward
def constant_nodes() -> Case:
    """Weights in Constant nodes, one of them flat and behind a Reshape."""
    text = """(float[n,4] x) => (float[n,2] y) {
        flat = Constant <value = float[12] {1.5,-2,0.5,0.25,1,-1,0.75,2,-0.5,0.3,-0.9,1.1}> ()
        shape = Constant <value_ints = [4,3]> ()
        w = Reshape (flat, shape)
        h = MatMul (x, w)
        i = Identity (h)
        v = Constant <value = float[3,2] {1,-1,0.5,2,-0.25,0.125}> ()
        y = MatMul (i, v)
    }"""
    return Case(model(text), feeds_of(x=(3, 4)))


@awkward
def attention() -> Case:
    text = """(float[n,l,16] x) => (float[n,l,16] y) {
        q = MatMul (x, wq)
        k = MatMul (x, wk)
        v = MatMul (x, wv)
        t = Transpose <perm = [0,2,1]> (k)
        s = MatMul (q, t)
        d = Div (s, root)
        p = Softmax <axis = -1> (d)
        c = MatMul (p, v)
        o = MatMul (c, wo)
        y = Add (o, x)
    }"""
    weights = {f"w{name}": normal(16, 16, seed=k) for k, name in enumerate("qkvo")}
    made = model(text, **weights, root=np.float32(4))
    return Case(made, [{"x": normal(2, length, 16, seed=length)} for length in (3, 5, 7, 6)])


@awkward
def if_body() -> Case:
    """A body that reads a tensor and a weight of the graph around it."""
    text = """(float[n,4] x, bool choice) => (float[n,3] y) {
        h = MatMul (x, w1)
        y = If (choice) <
            then_branch = yes () => (float[n,3] a) { a = MatMul (h, w2) },
            else_branch = no () => (float[n,3] b) {
                v = Constant <value = float[4,3] {1,2,3,4,5,6,7,8,9,1,2,3}> ()
                m = MatMul (h, v)
                b = Identity (m)
            }
        >
    }"""
    made = model(text, w1=normal(4, 4), w2=normal(4, 3, seed=1))
    feeds = feeds_of(x=(2, 4))
    return Case(made, [feed | {"choice": np.array(k % 2 == 0)} for k, feed in enumerate(feeds)])


@awkward
def opset_11() -> Case:
    text = """(float[n,3,6,6] x) => (float[n,2] y) {
        c = Conv (x, w)
        r = Clip (c, low, high)
        d = Dropout <ratio = 0.5> (r)
        p = GlobalAveragePool (d)
        s = Squeeze <axes = [2,3]> (p)
        y = Gemm (s, fc, bias)
    }"""
    weights = {
        "w": normal(8, 3, 3, 3, scale=0.3),
        "fc": normal(8, 2, seed=1),
        "bias": normal(2, seed=2),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    return Case(model(text, opset=11, **weights), feeds_of(x=(1, 3, 6, 6)))


@awkward
def shared_weights() -> Case:
    """One weight read by two Conv, one of which has a BatchNormalization to fold."""
    text = f"""(float[n,4,5,5] x) => (float[n,4,5,5] y) {{
        a = Conv (x, w)
        b = {bn("a", "one")}
        c = Conv (b, w)
        y = Add (c, x)
    }}"""
    return Case(
        model(text, w=normal(4, 4, 1, 1), **batch_norm(4, "one")),
        feeds_of(x=(1, 4, 5, 5)),
        NO_DYNAMIC,
    )


@awkward
def inner_output() -> Case:
    """A Conv whose float result is an output of the model, and read inside it as well."""
    text = f"""(float[n,3,6,6] x) => (float[n,4,6,6] middle, float[n,2,6,6] y) {{
        middle = Conv (x, w)
        b = {bn("middle", "one")}
        r = Relu (b)
        y = Conv (r, v)
    }}"""
    weights = {"w": normal(4, 3, 1, 1), "v": normal(2, 4, 1, 1, seed=1)}
    return Case(
        model(text, **weights, **batch_norm(4, "one")), feeds_of(x=(1, 3, 6, 6)), NO_DYNAMIC
    )


@awkward
def three_dimensions() -> Case:
    """A MatMul whose constant operand has a batch of its own: no matrix, so not a weight to us."""
    text = """(float[n,2,3,8] x) => (float[n,2,3,5] y) {
        h = MatMul (x, w)
        y = MatMul (h, v)
    }"""
    made = model(text, w=normal(2, 8, 6), v=normal(6, 5, seed=1))
    return Case(made, feeds_of(x=(1, 2, 3, 8)))


@awkward
def moves() -> Case:
    """Integer layers with nothing but moved values between them."""
    text = """(float[n,4,6,6] x) => (float[n,3] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        r = Relu (c)
        p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
        a, b = Split <axis = 1> (p)
        j = Concat <axis = 1> (b, a)
        t = Transpose <perm = [0,2,3,1]> (j)
        f = Reshape (t, shape)
        y = Gemm (f, fc, bias)
    }"""
    weights = {
        "w": normal(8, 4, 3, 3, scale=0.3),
        "shape": np.array([-1, 72]),
        "fc": normal(72, 3, seed=1, scale=0.2),
        "bias": normal(3, seed=2),
    }
    return Case(model(text, **weights), feeds_of(x=(1, 4, 6, 6)))


@awkward
def conv_1d() -> Case:
    """Strides, dilations, groups and an automatic padding."""
    text = """(float[n,4,l] x) => (float[n,6,m] y) {
        a = Conv <pads = [2,2], strides = [2], dilations = [2]> (x, w, b)
        r = LeakyRelu <alpha = 0.1> (a)
        y = Conv <group = 2, auto_pad = "SAME_UPPER"> (r, v)
    }"""
    weights = {"w": normal(8, 4, 3), "b": normal(8, seed=1), "v": normal(6, 4, 3, seed=2)}
    feeds = [{"x": normal(1, 4, length, seed=length)} for length in (16, 20, 33, 24)]
    return Case(model(text, **weights), feeds, NO_DYNAMIC)


@awkward
def conv_3d() -> Case:
    text = """(float[n,2,4,5,6] x) => (float[n,3,1,1,1] y) {
        a = Conv <pads = [1,1,1,1,1,1]> (x, w, b)
        r = Relu (a)
        p = MaxPool <kernel_shape = [2,2,2], strides = [2,2,2]> (r)
        c = Conv (p, v)
        y = GlobalAveragePool (c)
    }"""
    weights = {
        "w": normal(4, 2, 3, 3, 3, scale=0.3), "b": normal(4, seed=1), "v": normal(3, 4, 1, 1, 1),
    }  # fmt: skip
    return Case(model(text, **weights), feeds_of(x=(1, 2, 4, 5, 6)), NO_DYNAMIC)


@awkward
def conv_transpose() -> Case:
    text = """(float[n,4,5,5] x) => (float[n,3,10,10] y) {
        c = Conv (x, w)
        r = Relu (c)
        y = ConvTranspose <group = 1, strides = [2,2]> (r, v, b)
    }"""
    weights = {"w": normal(6, 4, 1, 1), "v": normal(6, 3, 2, 2, seed=1), "b": normal(3, seed=2)}
    return Case(model(text, **weights), feeds_of(x=(1, 4, 5, 5)), NO_DYNAMIC)


@awkward
def zero_channels() -> Case:
    """A channel of zeros, one of nearly nothing, and biases too large for its scale."""
    w = normal(4, 3, 1, 1)
    w[1], w[2] = 0, w[2] * 1e-12
    text = """(float[n,3,4,4] x) => (float[n,2,4,4] y) {
        a = Conv (x, w, b)
        r = Relu (a)
        y = Conv (r, v)
    }"""
    weights = {"w": w, "b": np.float32([0.5, 0.1, 3, -1]), "v": normal(2, 4, 1, 1, seed=1)}
    return Case(model(text, **weights), feeds_of(x=(1, 3, 4, 4)), NO_DYNAMIC)


@awkward
def shared_weight_two_biases() -> Case:
    """One nearly empty weight, two biases, each too large for its int32 form."""
    text = """(float[n,3,4,4] x) => (float[n,3,4,4] y) {
        a = Conv (x, w, b)
        c = Conv (x, w, d)
        s = Add (a, c)
        y = Conv (s, v)
    }"""
    w = normal(3, 3, 1, 1)
    w[0] *= 1e-11
    weights = {
        "w": w, "b": np.float32([2, 1, 1]), "d": np.float32([5, -1, 1]), "v": normal(3, 3, 1, 1),
    }  # fmt: skip
    return Case(model(text, **weights), feeds_of(x=(1, 3, 4, 4)), NO_DYNAMIC)


@awkward
def constant_activations() -> Case:
    """What a layer reads is the same whatever the input."""
    text = """(float[n,3,4,4] x) => (float[n,2,4,4] y) {
        z = Mul (x, zero)
        c = Add (z, one)
        a = Conv (c, w)
        n = Neg (z)
        b = Conv (n, w)
        s = Add (a, b)
        d = Conv (x, w)
        y = Add (s, d)
    }"""
    weights = {"zero": np.float32(0), "one": np.float32(1.5), "w": normal(2, 3, 1, 1)}
    return Case(model(text, **weights), feeds_of(x=(1, 3, 4, 4)), NO_DYNAMIC)


@awkward
def nothing_but_zeros() -> Case:
    """Layers that are fed zeros alone: no sample says which of their codes are good."""
    text = """(float[n,4,6,6] x) => (float[n,4,6,3] y, float[n,4,6,6] z) {
        a = Abs (x)
        b = Neg (a)
        off = Relu (b)
        c = Conv <pads = [1,1,1,1]> (off, w)
        z = Add (c, x)
        m = MatMul (off, v)
        n = MatMul (x, u)
        y = Add (m, n)
    }"""
    weights = {"w": normal(4, 4, 3, 3), "v": normal(6, 3, seed=1), "u": normal(6, 3, seed=2)}
    return Case(model(text, **weights), feeds_of(x=(2, 4, 6, 6)))


@awkward
def branches() -> Case:
    """Concat of codes and floats, a Split whose parts go separate ways, and an Add of twins."""
    text = """(float[n,4,6,6] x) => (float[n,5,6,6] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        r = Relu (c)
        a, b = Split <axis = 1> (r)
        d = Add (a, a)
        e = Exp (b)
        j = Concat <axis = 1> (d, e, x)
        y = Conv (j, v)
    }"""
    weights = {"w": normal(6, 4, 3, 3, scale=0.2), "v": normal(5, 10, 1, 1, seed=1)}
    return Case(model(text, **weights), feeds_of(x=(1, 4, 6, 6)), NO_DYNAMIC)


@awkward
def open_clips() -> Case:
    """A Clip with a lower bound alone, one with an upper alone, one with none."""
    text = """(float[n,3,4,4] x) => (float[n,3,4,4] y) {
        a = Conv (x, w)
        b = Clip (a, low)
        c = Conv (b, w)
        d = Clip (c, , high)
        e = Conv (d, w)
        f = Clip (e)
        y = Conv (f, w)
    }"""
    weights = {"w": normal(3, 3, 1, 1), "low": np.float32(-0.5), "high": np.float32(2)}
    return Case(model(text, **weights), feeds_of(x=(1, 3, 4, 4)), NO_DYNAMIC)


@awkward
def pools() -> Case:
    text = """(float[n,3,9,9] x) => (float[n,4] y) {
        a = Conv (x, w)
        p = AveragePool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (a)
        q = MaxPool <kernel_shape = [2,2], strides = [2,2], ceil_mode = 1> (p)
        m = Sigmoid (q)
        s = Mul (q, m)
        g = ReduceMean <axes = [2,3], keepdims = 0> (s)
        y = Gemm (g, fc)
    }"""
    weights = {"w": normal(6, 3, 3, 3, scale=0.3), "fc": normal(6, 4, seed=1)}
    return Case(model(text, **weights), feeds_of(x=(1, 3, 9, 9)))


# ── matrices ─────────────────────────────────────────────────────────────────────────────────────


def _gemm(attrs: str, a: tuple[int, ...], b: tuple[int, ...], c: tuple[int, ...] | None) -> Case:
    bias, weights = "", {"w": normal(*b)}
    if c is not None:
        bias, weights["c"] = ", c", normal(*c, seed=1)
    text = f"""(float[{a[0]},{a[1]}] x) => (float[p,q] y) {{
        h = Gemm <{attrs}> (x, w{bias})
        y = Relu (h)
    }}"""
    return Case(model(text, **weights), feeds_of(x=a))


@awkward
def gemm_plain() -> Case:
    return _gemm("alpha = 1.0", (4, 8), (8, 6), None)


@awkward
def gemm_trans_a() -> Case:
    return _gemm("transA = 1, beta = 0.5", (8, 4), (8, 6), (6,))


@awkward
def gemm_trans_b_row_bias() -> Case:
    return _gemm("transB = 1, alpha = -2.0", (4, 8), (6, 8), (1, 6))


@awkward
def gemm_scalar_bias() -> Case:
    return _gemm("transA = 1, transB = 1", (8, 4), (6, 8), ())


@awkward
def gemm_column_bias() -> Case:
    return _gemm("beta = 3.0", (4, 8), (8, 6), (4, 1))


@awkward
def gemm_no_beta() -> Case:
    return _gemm("beta = 0.0", (4, 8), (8, 6), (6,))


@awkward
def gemm_computed_bias() -> Case:
    text = """(float[4,8] x, float[6] b) => (float[4,6] y) {
        y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)
    }"""
    return Case(model(text, w=normal(8, 6)), feeds_of(x=(4, 8), b=(6,)))


@awkward
def weights_of_many_ranks() -> Case:
    """Batches of weights that broadcast, a vector, a constant on the left."""
    text = """(float[n,3,5,8] x) => (float[n,2,2,3] y, float[n,3,5] z) {
        h = MatMul (x, w3)
        i = MatMul (h, w4)
        z = MatMul (i, vector)
        j = MatMul (left, i)
        s = ReduceMean <axes = [1], keepdims = 0> (j)
        u = Unsqueeze (s, one)
        y = MatMul (u, w3b)
    }"""
    weights = {
        "w3": normal(3, 8, 6), "w4": normal(1, 1, 6, 7, seed=1), "vector": normal(7, seed=2),
        "left": normal(2, 5, seed=3), "w3b": normal(2, 7, 3, seed=4), "one": np.array([1]),
    }  # fmt: skip
    return Case(model(text, **weights), feeds_of(x=(1, 3, 5, 8)))


@awkward
def odd_inner_dimension() -> Case:
    """Batches of an odd number of columns: pairs of products do not cross from one to the next."""
    text = "(float[n,3,4,5] x) => (float[n,3,4,6] y) { h = MatMul (x, w) y = MatMul (h, v) }"
    return Case(model(text, w=normal(3, 5, 7), v=normal(3, 7, 6)), feeds_of(x=(1, 3, 4, 5)))


@awkward
def product_of_activations() -> Case:
    text = """(float[n,2,4,8] x) => (float[n,2,4,4] y) {
        a = MatMul (x, w)
        t = Transpose <perm = [0,1,3,2]> (x)
        y = MatMul (a, t)
    }"""
    return Case(model(text, w=normal(8, 8)), feeds_of(x=(1, 2, 4, 8)))


@awkward
def same_weight_many_ways() -> Case:
    """One initializer as a MatMul's weight, a Gemm's transposed, and an operand of a Mul."""
    text = """(float[n,8] x) => (float[n,8] y) {
        a = MatMul (x, w)
        b = Gemm <transB = 1> (a, w)
        s = Mul (w, half)
        c = MatMul (b, s)
        y = Add (c, row)
    }"""
    made = model(text, w=normal(8, 8), half=np.float32(0.5), row=normal(8, seed=1))
    return Case(made, feeds_of(x=(3, 8)))


@awkward
def embedding() -> Case:
    """Ids of two dimensions, a lone id, ids that count from the end."""
    text = """(int64[n,l] ids, int64 one) => (float[n,l,6] y) {
        e = Gather (table, ids)
        o = Gather (table, one)
        s = Add (e, o)
        y = MatMul (s, w)
    }"""
    rng = np.random.default_rng(0)
    feeds = [{"ids": rng.integers(-20, 20, (2, 5)), "one": np.array(k)} for k in range(6)]
    return Case(model(text, table=normal(20, 16), w=normal(16, 6, seed=1)), feeds)


# ── control flow ─────────────────────────────────────────────────────────────────────────────────


def _choices(case: Case) -> Case:
    feeds = [feed | {"choice": np.array(k % 3 > 0)} for k, feed in enumerate(case.feeds)]
    return Case(case.model, feeds, case.refused)


@awkward
def nested_if() -> Case:
    """Three levels; weights of the outermost graph; branches that use one name twice."""
    text = """(float[n,4] x, bool choice) => (float[n,3] y) {
        y = If (choice) <
            then_branch = yes () => (float[n,3] out) {
                h = MatMul (x, w)
                out = If (choice) <
                    then_branch = deep () => (float[n,3] inner) {
                        r = Relu (h)
                        inner = MatMul (r, v)
                    },
                    else_branch = low () => (float[n,3] inner) { inner = MatMul (h, v) }
                >
            },
            else_branch = no () => (float[n,3] out) { h = MatMul (x, u) out = Sigmoid (h) }
        >
    }"""
    made = model(text, w=normal(4, 5), v=normal(5, 3, seed=1), u=normal(4, 3, seed=2))
    return _choices(Case(made, feeds_of(x=(2, 4))))


@awkward
def if_with_convolutions() -> Case:
    text = """(float[n,3,6,6] x, bool choice) => (float[n,4,6,6] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        r = Relu (c)
        y = If (choice) <
            then_branch = yes () => (float[n,4,6,6] out) {
                a = Conv (r, v, b)
                s = Relu (a)
                out = Conv <pads = [1,1,1,1], group = 4> (s, dw)
            },
            else_branch = no () => (float[n,4,6,6] out) { out = Conv (r, v, b) }
        >
    }"""
    weights = {
        "w": normal(8, 3, 3, 3, scale=0.3), "v": normal(4, 8, 1, 1, seed=1),
        "b": normal(4, seed=2), "dw": normal(4, 1, 3, 3, seed=3),
    }  # fmt: skip
    return _choices(Case(model(text, **weights), feeds_of(x=(1, 3, 6, 6)), NO_DYNAMIC))


@awkward
def moved_into_a_body() -> Case:
    """Codes that are moved and then read by the branches of an If, and an output besides."""
    text = """(float[n,3,6,6] x, bool choice) => (float[n,4,9] y, float[n,4,9] r) {
        c = Conv (x, w)
        s = Slice (c, zero, three, axis)
        r = Reshape (s, shape)
        y = If (choice) <
            then_branch = yes () => (float[n,4,9] out) { out = Neg (r) },
            else_branch = no () => (float[n,4,9] out) { out = MatMul (r, v) }
        >
    }"""
    made = model(
        text, w=normal(4, 3, 1, 1), v=normal(9, 9, seed=1), zero=np.array([0, 0]),
        three=np.array([3, 3]), axis=np.array([2, 3]), shape=np.array([0, 4, 9]),
    )  # fmt: skip
    return _choices(Case(made, feeds_of(x=(1, 3, 6, 6))))


@awkward
def casts_before_a_body() -> Case:
    """Casts that turn into nothing once all is float32, before a body that reads what they make."""
    text = """(float[n,4] x, bool choice) => (float[n,4] y) {
        h = Cast <to = 10> (x)
        f = Cast <to = 1> (h)
        y = If (choice) <
            then_branch = yes () => (float[n,4] out) { out = MatMul (f, w) },
            else_branch = no () => (float[n,4] out) { out = Neg (f) }
        >
    }"""
    return _choices(Case(model(text, w=normal(4, 4)), feeds_of(x=(2, 4))))


@awkward
def loop_body() -> Case:
    """A recurrence written out: a state is carried, each step's result stacked."""
    text = """(float[n,4] x, int64 steps) => (float[n,4] y, float[k,n,4] all) {
        y, all = Loop (steps, yes, x) <
            body = b (int64 i, bool go, float[n,4] h)
                => (bool on, float[n,4] next, float[n,4] out) {
                on = Identity (go)
                m = MatMul (h, w)
                next = Tanh (m)
                out = MatMul (next, v)
            }
        >
    }"""
    made = model(text, w=normal(4, 4), v=normal(4, 4, seed=1), yes=np.array(True))
    feeds = feeds_of(x=(2, 4))
    return Case(made, [feed | {"steps": np.array(2 + k % 3)} for k, feed in enumerate(feeds)])


@awkward
def loop_that_grows() -> Case:
    """A tensor in the body has another shape in each iteration."""
    text = """(float[1,4] x) => (float[m,4] y) {
        y = Loop (three, yes, x) <
            body = b (int64 i, bool go, float[r,4] h) => (bool on, float[q,4] next) {
                on = Identity (go)
                m = MatMul (h, w)
                t = Tanh (m)
                next = Concat <axis = 0> (h, t)
            }
        >
    }"""
    made = model(text, w=normal(4, 4), three=np.array(3), yes=np.array(True))
    return Case(made, feeds_of(x=(1, 4)))


@awkward
def if_in_loop() -> Case:
    """A branch that runs in some iterations, and maybe in none."""
    text = """(float[n,4] x) => (float[n,4] y) {
        y = Loop (four, yes, x) <
            body = b (int64 i, bool go, float[n,4] h) => (bool on, float[n,4] next) {
                on = Identity (go)
                late = Greater (i, one)
                next = If (late) <
                    then_branch = t () => (float[n,4] a) { k = MatMul (h, w) a = Tanh (k) },
                    else_branch = e () => (float[n,4] b) { k = MatMul (h, v) b = Sigmoid (k) }
                >
            }
        >
    }"""
    made = model(
        text, w=normal(4, 4), v=normal(4, 4, seed=1),
        four=np.array(4), one=np.array(1), yes=np.array(True),
    )  # fmt: skip
    return Case(made, feeds_of(x=(2, 4)))


@awkward
def loop_in_if() -> Case:
    text = """(float[n,4] x, bool choice) => (float[n,4] y) {
        y = If (choice) <
            then_branch = t () => (float[n,4] a) {
                a = Loop (two, yes, x) <
                    body = b (int64 i, bool go, float[n,4] h) => (bool on, float[n,4] next) {
                        on = Identity (go)
                        m = MatMul (h, w)
                        next = Tanh (m)
                    }
                >
            },
            else_branch = e () => (float[n,4] b) { b = MatMul (x, w) }
        >
    }"""
    made = model(text, w=normal(4, 4), two=np.array(2), yes=np.array(True))
    return _choices(Case(made, feeds_of(x=(2, 4))))


@awkward
def scan_body() -> Case:
    text = """(float[n,4] h, float[s,n,4] x) => (float[n,4] last, float[s,n,3] y) {
        last, y = Scan <num_scan_inputs = 1,
            body = b (float[n,4] state, float[n,4] step) => (float[n,4] next, float[n,3] out) {
                m = MatMul (step, w)
                a = Add (m, state)
                next = Tanh (a)
                out = MatMul (next, v)
            }
        > (h, x)
    }"""
    made = model(text, w=normal(4, 4), v=normal(4, 3, seed=1))
    feeds = [{"h": normal(2, 4, seed=k), "x": normal(3 + k, 2, 4, seed=k)} for k in range(5)]
    return Case(made, feeds)


@awkward
def if_in_scan() -> Case:
    """Activations that cannot be brought out; another layer can be quantized all the same."""
    text = """(float[n,4] h, float[s,n,4] x) => (float[n,4] last, float[s,n,4] y) {
        p = MatMul (x, v)
        last, y = Scan <num_scan_inputs = 1,
            body = b (float[n,4] state, float[n,4] step) => (float[n,4] next, float[n,4] out) {
                s = ReduceSum <keepdims = 0> (step)
                positive = Greater (s, zero)
                a = If (positive) <
                    then_branch = t () => (float[n,4] u) { u = MatMul (step, w) },
                    else_branch = e () => (float[n,4] k) { k = Neg (step) }
                >
                next = Tanh (a)
                out = Identity (next)
            }
        > (h, p)
    }"""
    made = model(text, w=normal(4, 4), v=normal(4, 4, seed=1), zero=np.float32(0))
    return Case(made, [{"h": normal(2, 4, seed=k), "x": normal(3, 2, 4, seed=k)} for k in range(5)])


@awkward
def old_if() -> Case:
    """Bodies in an opset that is raised, with operators that changed since."""
    text = """(float[n,4,1] x, bool choice) => (float[n,3] y) {
        y = If (choice) <
            then_branch = t () => (float[n,3] a) { s = Squeeze <axes = [2]> (x) a = MatMul (s, w) },
            else_branch = e () => (float[n,3] b) {
                s = Squeeze <axes = [2]> (x)
                m = MatMul (s, w)
                b = Neg (m)
            }
        >
    }"""
    return _choices(Case(model(text, opset=11, w=normal(4, 3)), feeds_of(x=(2, 4, 1))))


# ── recurrent ────────────────────────────────────────────────────────────────────────────────────


def _recurrent(op: str, gates: int, directions: int = 1, extra: str = "") -> Case:
    hidden, width = 6, 5
    direction = "bidirectional" if directions == 2 else "forward"
    text = f"""(float[s,b,{width}] x) => (float[s,{directions},b,{hidden}] y, float[k,b,h] last) {{
        y, last = {op} <hidden_size = {hidden}, direction = "{direction}"{extra}> (x, w, r, b)
    }}"""
    weights = {
        "w": normal(directions, gates * hidden, width, scale=0.5),
        "r": normal(directions, gates * hidden, hidden, seed=1, scale=0.3),
        "b": normal(directions, 2 * gates * hidden, seed=2, scale=0.2),
    }
    feeds = [{"x": normal(3 + k % 3, 2, width, seed=k)} for k in range(6)]
    return Case(model(text, **weights), feeds, NO_RECURRENCE)


@awkward
def lstm() -> Case:
    return _recurrent("LSTM", 4)


@awkward
def lstm_bidirectional() -> Case:
    return _recurrent("LSTM", 4, directions=2)


@awkward
def gru() -> Case:
    return _recurrent("GRU", 3, extra=", linear_before_reset = 1")


@awkward
def gru_bidirectional() -> Case:
    return _recurrent("GRU", 3, directions=2)


@awkward
def rnn() -> Case:
    return _recurrent("RNN", 1)


@awkward
def lstm_with_states() -> Case:
    """Lengths and states; weights that are put together from parts, as exporters do."""
    text = """(float[s,b,4] x, float[1,b,3] h, float[1,b,3] c, int32[b] lengths)
            => (float[1,b,3] hn, float[1,b,3] cn) {
        first = Slice (flat, zero, six)
        rest = Slice (flat, six, twelve)
        both = Concat <axis = 0> (rest, first)
        w = Unsqueeze (both, zero)
        y, hn, cn = LSTM <hidden_size = 3> (x, w, r, , lengths, h, c)
    }"""
    weights = {
        "flat": normal(12, 4, scale=0.5), "r": normal(1, 12, 3, seed=1, scale=0.3),
        "zero": np.array([0]), "six": np.array([6]), "twelve": np.array([12]),
    }  # fmt: skip
    feeds = [
        {
            "x": normal(5, 2, 4, seed=k), "h": normal(1, 2, 3, seed=k + 9),
            "c": normal(1, 2, 3, seed=k + 5), "lengths": np.array([5, 3], np.int32),
        }
        for k in range(6)
    ]  # fmt: skip
    return Case(model(text, **weights), feeds, NO_RECURRENCE)


@awkward
def lstm_in_if() -> Case:
    text = """(float[s,b,4] x, bool choice) => (float[s,1,b,3] y) {
        y = If (choice) <
            then_branch = t () => (float[s,1,b,3] a) { a, ah = LSTM <hidden_size = 3> (x, w, r) },
            else_branch = e () => (float[s,1,b,3] c) {
                n = Neg (x)
                c, ch = LSTM <hidden_size = 3> (n, w, r)
            }
        >
    }"""
    made = model(text, w=normal(1, 12, 4, scale=0.5), r=normal(1, 12, 3, seed=1, scale=0.3))
    return _choices(Case(made, feeds_of(x=(5, 2, 4)), {"fp8": NO_RECURRENCE["fp8"]}))


# ── types ────────────────────────────────────────────────────────────────────────────────────────


@awkward
def float16() -> Case:
    text = """(float16[n,3,6,6] x) => (float16[n,5] y) {
        c = Conv <pads = [1,1,1,1]> (x, w, b)
        r = Relu (c)
        k = Cast <to = 10> (half)
        m = Mul (r, k)
        p = GlobalAveragePool (m)
        f = Flatten (p)
        y = Gemm (f, fc)
    }"""
    half = np.float16
    weights = {
        "w": normal(8, 3, 3, 3, scale=0.3).astype(half), "b": normal(8, seed=1).astype(half),
        "fc": normal(8, 5, seed=2).astype(half), "half": np.float32([0.5]),
    }  # fmt: skip
    feeds = [{"x": feed["x"].astype(half)} for feed in feeds_of(x=(1, 3, 6, 6))]
    return Case(model(text, **weights), feeds)


@awkward
def float16_body() -> Case:
    """An input that a body reads, an output that the graph reads too, a state that is carried."""
    text = """(float16[n,4] x) => (float16[n,4] y, float16[n,4] z) {
        y = Loop (two, yes, x) <
            body = b (int64 i, bool go, float16[n,4] h) => (bool on, float16[n,4] next) {
                on = Identity (go)
                m = MatMul (h, w)
                a = Add (m, x)
                next = Tanh (a)
            }
        >
        z = MatMul (y, w)
    }"""
    made = model(text, w=normal(4, 4).astype(np.float16), two=np.array(2), yes=np.array(True))
    return Case(made, [{"x": normal(2, 4, seed=k).astype(np.float16)} for k in range(6)])


@awkward
def bfloat16() -> Case:
    """No kernel of the CPU takes bfloat16: the model as it came does not even load there."""
    import ml_dtypes

    text = """(float[n,8] x) => (float[n,4] y) {
        a = Cast <to = 16> (x)
        h = MatMul (a, w)
        r = Relu (h)
        o = MatMul (r, v)
        y = Cast <to = 1> (o)
    }"""
    weights = {"w": normal(8, 8), "v": normal(8, 4, seed=1)}
    made = model(text, **{k: v.astype(ml_dtypes.bfloat16) for k, v in weights.items()})
    return Case(made, feeds_of(x=(3, 8)))


@awkward
def bfloat16_ends() -> Case:
    """bfloat16 in, bfloat16 out; NumPy knows it through ml_dtypes alone."""
    import ml_dtypes

    text = """(bfloat16[n,8] x) => (bfloat16[n,4] y) {
        h = MatMul (x, w)
        r = Relu (h)
        y = MatMul (r, v)
    }"""
    weights = {"w": normal(8, 8), "v": normal(8, 4, seed=1)}
    made = model(text, **{k: v.astype(ml_dtypes.bfloat16) for k, v in weights.items()})
    return Case(made, [{"x": normal(3, 8, seed=k).astype(ml_dtypes.bfloat16)} for k in range(6)])


@awkward
def double() -> Case:
    text = """(double[n,8] x) => (double[n,4] y) {
        h = MatMul (x, w)
        r = Relu (h)
        s = Mul (r, r)
        y = Gemm (s, v, b)
    }"""
    weights = {"w": normal(8, 8), "v": normal(8, 4, seed=1), "b": normal(4, seed=2)}
    made = model(text, **{k: v.astype(np.float64) for k, v in weights.items()})
    return Case(made, [{"x": normal(3, 8, seed=k).astype(np.float64)} for k in range(6)])


@awkward
def mixed_types() -> Case:
    """float16 in the middle of float32, int8 and bool beside them."""
    text = """(float[n,8] x, int8[n,8] codes, bool[n,4] keep) => (float[n,4] y) {
        c = Cast <to = 1> (codes)
        s = Add (x, c)
        h = Cast <to = 10> (s)
        m = MatMul (h, w)
        f = Cast <to = 1> (m)
        o = MatMul (f, v)
        y = Where (keep, o, zero)
    }"""
    w = normal(8, 6).astype(np.float16)
    made = model(text, w=w, v=normal(6, 4, seed=1), zero=np.float32(0))
    rng = np.random.default_rng(0)
    feeds = [
        {
            "x": normal(3, 8, seed=k), "codes": rng.integers(-2, 3, (3, 8)).astype(np.int8),
            "keep": rng.random((3, 4)) > 0.3,
        }
        for k in range(6)
    ]  # fmt: skip
    return Case(made, feeds)


# ── versions and structure ───────────────────────────────────────────────────────────────────────


@awkward
def opset_8() -> Case:
    """IR 3: initializers are inputs too."""
    text = """(float[1,3,6,6] x) => (float[1,2] y) {
        c = Conv <pads = [1,1,1,1]> (x, w, b)
        r = Relu (c)
        n = BatchNormalization (r, gamma, beta, mean, var)
        p = MaxPool <kernel_shape = [6,6]> (n)
        f = Reshape (p, shape)
        y = MatMul (f, fc)
    }"""
    weights = {
        "w": normal(4, 3, 3, 3, scale=0.4), "b": normal(4, seed=1), "shape": np.array([1, 4]),
        "fc": normal(4, 2, seed=2),
    }  # fmt: skip
    weights |= {key[2:]: value for key, value in batch_norm(4, "n").items()}
    made = model(text, opset=8, **weights)
    made.ir_version = 3
    for tensor in made.graph.initializer:
        made.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    onnx.checker.check_model(made)
    return Case(made, feeds_of(x=(1, 3, 6, 6)))


@awkward
def newest_opset() -> Case:
    text = """(float[n,3,6,6] x) => (float[n,4] y) {
        c = Conv <pads = [1,1,1,1]> (x, w)
        g = Gelu (c)
        m = ReduceMean <keepdims = 0> (g, axes)
        l = LayerNormalization (m, gamma)
        y = Gemm (l, fc)
    }"""
    weights = {
        "w": normal(8, 3, 3, 3, scale=0.3), "axes": np.array([2, 3]),
        "gamma": normal(8, seed=1), "fc": normal(8, 4, seed=2),
    }  # fmt: skip
    return Case(model(text, opset=24, **weights), feeds_of(x=(1, 3, 6, 6)))


@awkward
def no_shapes() -> Case:
    """Neither rank nor dimensions of anything; opsets imported that nothing uses."""
    case = moves()
    made = onnx.ModelProto()
    made.CopyFrom(case.model)
    del made.graph.value_info[:]
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.ClearField("shape")
    made.opset_import.extend(
        onnx.helper.make_opsetid(domain, version)
        for domain, version in (("ai.onnx.ml", 3), ("com.example", 1), ("com.microsoft", 1))
    )
    return Case(made, case.feeds)


@awkward
def names() -> Case:
    """Nodes without names, with one name for all; tensors with odd names."""
    case = matmul()
    made = onnx.ModelProto()
    made.CopyFrom(case.model)
    odd = {"a": "a b/ü:0", "r": "x_scale", "w2": "x_quantized"}
    for number, node in enumerate(made.graph.node):
        node.name = ("", "twin")[number % 2]
        for names in (node.input, node.output):
            for slot, name in enumerate(names):
                names[slot] = odd.get(name, name)
    for tensor in made.graph.initializer:
        tensor.name = odd.get(tensor.name, tensor.name)
    return Case(made, case.feeds)


@awkward
def local_function() -> Case:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[n,8] x) => (float[n,4] y) {
        h = local.Layer (x, w)
        y = local.Layer (h, v)
    }
    <domain: "local", opset_import: ["" : 17]>
    Layer (a, weight) => (b) {
        m = MatMul (a, weight)
        b = Relu (m)
    }"""
    made = onnx.parser.parse_model(text)
    for name, values in {"w": normal(8, 8), "v": normal(8, 4, seed=1)}.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return Case(made, feeds_of(x=(3, 8)))


@awkward
def sequences() -> Case:
    text = """(float[n,8] x) => (float[n,6] y) {
        a = MatMul (x, w)
        s = SequenceConstruct (a, x)
        e = SequenceAt (s, zero)
        y = MatMul (e, v)
    }"""
    made = model(text, w=normal(8, 8), v=normal(8, 6, seed=1), zero=np.array(0))
    return Case(made, feeds_of(x=(3, 8)))


@awkward
def softmax_of_codes() -> Case:
    """Probabilities of which the samples show few that are large; an integer Softmax wraps."""
    text = """(float[n,3,8] x) => (float[n,2,4] y) {
        c = Conv (x, w)
        s = Softmax <axis = -1> (c)
        t = Transpose <perm = [0,2,1]> (s)
        u = Transpose <perm = [0,2,1]> (t)
        y = MatMul (u, v)
    }"""
    made = model(text, w=normal(2, 3, 1, scale=2), v=normal(8, 4, seed=1))
    return Case(made, feeds_of(n=20, x=(1, 3, 8)))


@awkward
def optionals() -> Case:
    text = """(float[n,8] x) => (float[n,6] y) {
        a = MatMul (x, w)
        o = Optional (a)
        e = OptionalGetElement (o)
        y = MatMul (e, v)
    }"""
    made = model(text, opset=18, w=normal(8, 8), v=normal(8, 6, seed=1))
    return Case(made, feeds_of(x=(3, 8)))


@awkward
def outputs_of_every_kind() -> Case:
    """A constant, an input, one tensor under two names, and a node's second output."""
    text = """(float[n,8] x, int64[n] label)
            => (float[n,4] y, float[4] fixed, int64[n] label, float[n,4] twin, int64[n,2] place) {
        h = MatMul (x, w)
        y = Relu (h)
        twin = Identity (y)
        top, place = TopK (h, two)
    }"""
    made = model(text, w=normal(8, 4), fixed=normal(4, seed=3), two=np.array([2]))
    feeds = feeds_of(x=(3, 8))
    return Case(made, [feed | {"label": np.arange(3)} for feed in feeds])


@awkward
def zero_sizes() -> Case:
    """An empty past beside the new, an initializer of nothing."""
    text = """(float[n,8] x, float[p,6] past) => (float[q,4] y) {
        h = MatMul (x, w)
        e = Concat <axis = 0> (past, h, none)
        y = MatMul (e, v)
    }"""
    made = model(text, w=normal(8, 6), v=normal(6, 4, seed=1), none=np.zeros((0, 6), np.float32))
    sizes = ((3, 0), (2, 4), (4, 1), (5, 2))
    return Case(made, [{"x": normal(n, 8, seed=n), "past": normal(p, 6, seed=p)} for n, p in sizes])


@awkward
def scalars() -> Case:
    text = """(float[n,8] x, float temperature) => (float[n,4] y, float largest) {
        s = Mul (x, half)
        h = MatMul (s, w)
        d = Div (h, temperature)
        y = Add (d, half)
        largest = ReduceMax <keepdims = 0> (y)
    }"""
    made = model(text, w=normal(8, 4), half=np.float32(0.5))
    return Case(made, [f | {"temperature": np.array(2, np.float32)} for f in feeds_of(x=(3, 8))])


@awkward
def deep_chain() -> Case:
    """More nodes in a row than Python recurses."""
    steps = "".join(f"m{k} = Neg (t{k}) t{k + 1} = Abs (m{k}) " for k in range(1, 520))
    text = f"(float[n,4] x) => (float[n,4] y) {{ t1 = MatMul (x, w) {steps} y = MatMul (t520, w) }}"
    return Case(model(text, w=normal(4, 4)), feeds_of(n=4, x=(2, 4)))


@awkward
def unused_parts() -> Case:
    """Nodes, initializers and an input that nothing needs."""
    text = """(float[n,8] x, float[n] ignored) => (float[n,4] y) {
        dead = MatMul (x, v)
        deader = Relu (dead)
        y = MatMul (x, w)
    }"""
    made = model(text, w=normal(8, 4), v=normal(8, 4, seed=1), idle=normal(9, 9))
    return Case(made, feeds_of(x=(3, 8), ignored=(3,)))
