"""A hypothesis strategy that composes random graphs, and what must hold for each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import onnx
from awkward import Case
from graphs import Array, Feeds, context, pipeline, run, sqnr
from hypothesis import strategies as st
from onnxq.passes import FoldBatchNorm, Normalize, Widen

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.ops.evaluate import evaluate
from onnxq.qtype import QType
from onnxq.runtime import Session
from onnxq.target import OpRule, Target, load_target

T = TypeVar("T")
Shape = tuple[int, ...]
LEAST_COSINE = 0.98
LEAST_SQNR = 20.0  # dB, between graph optimizations off and on
SCHEMES = ("int8-per-tensor", "int8-symmetric", "int8-power-of-two")
FORMATS = ("w8a8", "w4a8", "w8a16", "w4a16", "w8a4", "w8", "a8", "float")
REFUSALS = ("nothing in this model can be quantized",)


@dataclass(frozen=True)
class Value:
    name: str
    shape: Shape


@dataclass
class Builder:
    """Grows a graph node by node; all sizes are known, so that every node fits."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    count: int = 0
    seed: int = 0

    def pick(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(list(options)))

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        rng = np.random.default_rng([self.seed, self.count])
        return self.constant((scale * rng.standard_normal(shape)).astype(np.float32))

    def constant(self, values: Array) -> str:
        name = self.name("w")
        self.weights[name] = values
        return name

    def node(self, op: str, inputs: Sequence[str], shape: Shape, **attrs: Any) -> Value:
        value = Value(self.name("t"), shape)
        self.nodes.append(onnx.helper.make_node(op, inputs, [value.name], **attrs))
        self.values.append(value)
        return value

    def of_rank(self, *ranks: int) -> Value | None:
        fitting = [v for v in self.values if len(v.shape) in ranks]
        return self.pick(fitting[-4:]) if fitting else None


def matmul(b: Builder) -> None:
    x = b.of_rank(2, 3, 4)
    if x is None:
        return
    inner, out = x.shape[-1], b.pick([1, 3, 6, 8])
    batch = b.pick([(), x.shape[:-2], (1,) * len(x.shape[:-2])])
    w = b.weight(*batch, inner, out, scale=inner**-0.5)
    b.node("MatMul", [x.name, w], (*x.shape[:-1], out))


def product(b: Builder) -> None:
    x = b.of_rank(2, 3, 4)
    if x is None:
        return
    order = (*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2)
    t = b.node("Transpose", [x.name], tuple(x.shape[i] for i in order), perm=order)
    b.node("MatMul", [x.name, t.name], (*x.shape[:-1], x.shape[-2]))


def gemm(b: Builder) -> None:
    x = b.of_rank(2)
    if x is None:
        return
    trans_a, trans_b = b.pick([0, 1]), b.pick([0, 1])
    rows, inner = x.shape[::-1] if trans_a else x.shape
    out = b.pick([1, 4, 7])
    w = b.weight(*((out, inner) if trans_b else (inner, out)), scale=inner**-0.5)
    inputs = [x.name, w]
    bias = b.pick([None, (out,), (1, out), (rows, 1), (), (rows, out)])
    if bias is not None:
        inputs.append(b.weight(*bias))
    attrs: dict[str, Any] = {"transA": trans_a, "transB": trans_b}
    attrs |= {"alpha": b.pick([1.0, 0.5, -1.5]), "beta": b.pick([1.0, 2.0, 0.0])}
    b.node("Gemm", inputs, (rows, out), **attrs)


def conv(b: Builder) -> None:
    x = b.of_rank(3, 4, 5)
    if x is None:
        return
    channels, space = x.shape[1], x.shape[2:]
    groups = b.pick([d for d in (1, 2, channels) if channels % d == 0])
    out = groups * b.pick([1, 2, 3])
    kernel = tuple(b.pick([k for k in (1, 2, 3) if k <= size]) for size in space)
    stride, dilation = b.pick([1, 1, 2]), b.pick([1, 1, 2])
    pads = tuple(b.pick([0, 1]) for _ in range(2 * len(space)))
    sizes = tuple(
        (size + pads[i] + pads[i + len(space)] - dilation * (k - 1) - 1) // stride + 1
        for i, (size, k) in enumerate(zip(space, kernel, strict=True))
    )
    if min(sizes) < 1:
        return
    fan_in = channels // groups * math.prod(kernel)
    inputs = [x.name, b.weight(out, channels // groups, *kernel, scale=fan_in**-0.5)]
    if b.pick([True, False]):
        inputs.append(b.weight(out))
    b.node(
        "Conv", inputs, (x.shape[0], out, *sizes), group=groups, pads=pads,
        strides=[stride] * len(space), dilations=[dilation] * len(space),
    )  # fmt: skip


def conv_transpose(b: Builder) -> None:
    x = b.of_rank(4)
    if x is None:
        return
    out, k = b.pick([1, 3]), b.pick([1, 2])
    w = b.weight(x.shape[1], out, k, k, scale=x.shape[1] ** -0.5)
    sizes = tuple((size - 1) * k + k for size in x.shape[2:])
    b.node("ConvTranspose", [x.name, w], (x.shape[0], out, *sizes), strides=[k, k])


def batch_normalization(b: Builder) -> None:
    x = b.of_rank(2, 3, 4)
    if x is None:
        return
    c = x.shape[1]
    parts = [b.weight(c), b.weight(c), b.weight(c)]
    variance = b.constant(np.abs(b.weights[b.weight(c)]) + np.float32(0.5))
    b.node("BatchNormalization", [x.name, *parts, variance], x.shape)


def activation(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    op = b.pick(["Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Neg", "Abs", "Identity"])
    inputs = [x.name]
    if op == "Clip":
        low = b.pick([-1.0, 0.0, None])
        inputs.append("" if low is None else b.constant(np.array(low, np.float32)))
        inputs.append(b.constant(np.array(b.pick([1.0, 6.0]), np.float32)))
    b.node(op, inputs, x.shape)


def softmax(b: Builder) -> None:
    x = b.of_rank(2, 3, 4)
    if x is not None and x.shape[-1] > 1:
        b.node("Softmax", [x.name], x.shape, axis=-1)


def with_constant(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    shape = b.pick([(), x.shape[-1:], (1,) * len(x.shape), x.shape])
    other = b.weight(*shape)
    inputs = [x.name, other] if b.pick([True, False]) else [other, x.name]
    b.node(b.pick(["Add", "Mul", "Sub"]), inputs, x.shape)


def with_another(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    same = [v for v in b.values if v.shape == x.shape]
    b.node(b.pick(["Add", "Mul", "Sub"]), [x.name, b.pick(same).name], x.shape)


def concat(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    if not x.shape:
        return
    axis = b.pick(range(-len(x.shape), len(x.shape)))
    same = [v for v in b.values if v.shape == x.shape]
    shape = list(x.shape)
    shape[axis] *= 2
    b.node("Concat", [x.name, b.pick(same).name], tuple(shape), axis=axis)


def split(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    axes = [i for i, size in enumerate(x.shape) if size % 2 == 0]
    if not axes:
        return
    axis = b.pick(axes)
    shape = tuple(size // 2 if i == axis else size for i, size in enumerate(x.shape))
    names = [b.name("t"), b.name("t")]
    attrs = {"num_outputs": 2} if b.opset >= 18 else {}
    b.nodes.append(onnx.helper.make_node("Split", [x.name], names, axis=axis, **attrs))
    b.values += [Value(name, shape) for name in names]


def transpose(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    order = b.draw(st.permutations(range(len(x.shape))))
    b.node("Transpose", [x.name], tuple(x.shape[i] for i in order), perm=order)


def reshape(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    size = math.prod(x.shape)
    shape = b.pick([(size,), (1, size), (x.shape[0], -1) if x.shape else (1,), (1, *x.shape)])
    made = np.zeros(x.shape).reshape(shape).shape
    b.node("Reshape", [x.name, b.constant(np.array(shape))], made)


def slice_(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    axes = [i for i, size in enumerate(x.shape) if size > 1]
    if not axes:
        return
    axis = b.pick(axes)
    stop = b.pick(range(1, x.shape[axis]))
    inputs = [x.name, *(b.constant(np.array([v])) for v in (0, stop, axis))]
    b.node("Slice", inputs, (*x.shape[:axis], stop, *x.shape[axis + 1 :]))


def pad(b: Builder) -> None:
    x = b.of_rank(2, 3, 4)
    if x is None:
        return
    pads = np.array([0] * (2 * len(x.shape) - 1) + [1])
    b.node("Pad", [x.name, b.constant(pads)], (*x.shape[:-1], x.shape[-1] + 1))


def pool(b: Builder) -> None:
    x = b.of_rank(4)
    if x is None or min(x.shape[2:]) < 2:
        return
    op = b.pick(["MaxPool", "AveragePool", "GlobalAveragePool"])
    if op == "GlobalAveragePool":
        b.node(op, [x.name], (*x.shape[:2], 1, 1))
    else:
        sizes = tuple((size - 2) // 2 + 1 for size in x.shape[2:])
        b.node(op, [x.name], (*x.shape[:2], *sizes), kernel_shape=[2, 2], strides=[2, 2])


def reduce_mean(b: Builder) -> None:
    x = b.of_rank(2, 3, 4)
    if x is None:
        return
    keep = b.pick([0, 1])
    shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
    if b.opset >= 18:
        b.node("ReduceMean", [x.name, b.constant(np.array([-1]))], shape, keepdims=keep)
    else:
        b.node("ReduceMean", [x.name], shape, keepdims=keep, axes=[-1])


def half(b: Builder) -> None:
    """To float16 and back."""
    x = b.pick(b.values[-4:])
    narrow = b.name("h")
    b.nodes.append(onnx.helper.make_node("Cast", [x.name], [narrow], to=onnx.TensorProto.FLOAT16))
    b.node("Cast", [narrow], x.shape, to=onnx.TensorProto.FLOAT)


def recurrent(b: Builder) -> None:
    x = b.of_rank(3)
    if x is None:
        return
    op, gates = b.pick([("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    directions, hidden = b.pick([1, 2]), b.pick([2, 5])
    width = x.shape[2]
    w = b.weight(directions, gates * hidden, width, scale=width**-0.5)
    r = b.weight(directions, gates * hidden, hidden, scale=hidden**-0.5)
    direction = "bidirectional" if directions == 2 else "forward"
    shape = (x.shape[0], directions, x.shape[1], hidden)
    b.node(op, [x.name, w, r], shape, hidden_size=hidden, direction=direction)


def branch(b: Builder) -> None:
    """An If on the input `choice`: a layer in one branch, a Neg in the other."""
    x = b.of_rank(2, 3)
    if x is None:
        return
    size = x.shape[-1]
    w = b.weight(size, size, scale=size**-0.5)
    out = [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, x.shape)]
    then = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", [x.name, w], ["out"])], "then", [], out
    )
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", [x.name], ["out"])], "e", [], out)
    b.node("If", ["choice"], x.shape, then_branch=then, else_branch=other)


GROWTHS = (
    matmul, matmul, product, gemm, gemm, conv, conv, conv_transpose, batch_normalization,
    activation, activation, softmax, with_constant, with_another, concat, split, transpose,
    reshape, slice_, pad, pool, reduce_mean, half, recurrent, branch,
)  # fmt: skip


def normalization(b: Builder) -> None:
    x = b.of_rank(2, 3, 4)
    if x is None or x.shape[-1] < 2:
        return
    size = x.shape[-1]
    if b.pick([True, False]):
        inputs = [x.name, b.weight(size), b.weight(size)]
        b.node("LayerNormalization", inputs, x.shape, axis=-1, epsilon=b.pick([1e-5, 1e-2]))
        return
    square = b.node("Mul", [x.name, x.name], x.shape)
    mean = b.node(
        "ReduceMean", [square.name, b.constant(np.array([-1]))], (*x.shape[:-1], 1), keepdims=1
    )
    sure = b.node("Add", [mean.name, b.constant(np.array(1e-5, np.float32))], mean.shape)
    root = b.node("Sqrt", [sure.name], mean.shape)
    normal = b.node("Div", [x.name, root.name], x.shape)
    b.node("Mul", [normal.name, b.weight(size)], x.shape)


def gate(b: Builder) -> None:
    """GELU and SiLU, spelled out or not."""
    x = b.pick(b.values[-4:])
    if b.pick([True, False]):
        b.node("Gelu", [x.name], x.shape)
        return
    sigmoid = b.node("Sigmoid", [x.name], x.shape)
    b.node("Mul", [x.name, sigmoid.name], x.shape)


def curve(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    op = b.pick(["HardSwish", "Elu", "Softplus", "Sin", "Cos", "HardSigmoid", "Mish", "Erf"])
    b.node(op, [x.name], x.shape)


def quotient(b: Builder) -> None:
    x = b.pick(b.values[-4:])
    if b.pick([True, False]):
        b.node("Div", [x.name, b.constant(np.array(b.pick([0.5, 3.0]), np.float32))], x.shape)
        return
    positive = b.node("Softplus", [x.name], x.shape)
    away = b.node("Add", [positive.name, b.constant(np.array(0.5, np.float32))], x.shape)
    b.node("Div", [x.name, away.name], x.shape)


def choice(b: Builder) -> None:
    """Where one tensor is above a number, that, elsewhere another; or Min and Max."""
    x = b.pick(b.values[-4:])
    other = b.pick([v for v in b.values if v.shape == x.shape])
    op = b.pick(["Min", "Max", "Where"])
    if op != "Where":
        b.node(op, [x.name, other.name], x.shape)
        return
    above = b.name("c")
    limit = b.constant(np.array(0.25, np.float32))
    compared = b.pick(["Greater", "LessOrEqual"])
    b.nodes.append(onnx.helper.make_node(compared, [x.name, limit], [above]))
    b.node("Where", [above, x.name, other.name], x.shape)


def reduction(b: Builder) -> None:
    x = b.of_rank(2, 3, 4)
    if x is None:
        return
    op = b.pick(["ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"])
    b.node(op, [x.name, b.constant(np.array([-1]))], (*x.shape[:-1], 1), keepdims=1)


INTEGER_GROWTHS = (
    *GROWTHS, normalization, normalization, gate, gate, curve, quotient, choice, reduction, softmax,
)  # fmt: skip


@st.composite
def random_regions(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    """The same of everything that has an integer form."""
    return draw(random_graphs(opsets=(21,), growths=INTEGER_GROWTHS))


@st.composite
def random_graphs(
    draw: Callable[[st.SearchStrategy[Any]], Any],
    opsets: tuple[int, ...] = (13, 15, 17, 19, 21),
    growths: tuple[Callable[[Builder], None], ...] = GROWTHS,
) -> Case:
    """A model of up to nine nodes with at least one layer to quantize, and feeds for it."""
    builder = Builder(draw, opset=draw(st.sampled_from(list(opsets))))
    builder.seed = draw(st.integers(0, 1 << 16))
    shape = draw(st.sampled_from([(3, 8), (2, 4, 6), (1, 4, 6, 6), (1, 2, 4, 4, 4), (4, 1, 5)]))
    builder.values.append(Value("x", shape))
    for _ in range(draw(st.integers(1, 8))):
        builder.pick(growths)(builder)
    last = builder.values[-1]
    if len(last.shape) >= 2:
        w = builder.weight(last.shape[-1], 3, scale=last.shape[-1] ** -0.5)
        last = builder.node("MatMul", [last.name, w], (*last.shape[:-1], 3))
    outputs = [last] + ([builder.pick(builder.values[1:])] if draw(st.booleans()) else [])
    outputs = list({value.name: value for value in outputs}.values())
    return _case(builder, shape, outputs)


def _case(builder: Builder, shape: Shape, outputs: list[Value]) -> Case:
    choose = any(node.op_type == "If" for node in builder.nodes)
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)]
    if choose:
        inputs.append(onnx.helper.make_tensor_value_info("choice", onnx.TensorProto.BOOL, []))
    graph = onnx.helper.make_graph(
        builder.nodes, "random", inputs,
        [onnx.helper.make_tensor_value_info(v.name, onnx.TensorProto.FLOAT, v.shape)
         for v in outputs],
        [onnx.numpy_helper.from_array(values, name) for name, values in builder.weights.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", builder.opset)], ir_version=10
    )
    rng = np.random.default_rng(builder.seed)
    feeds: Feeds = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]
    if choose:
        feeds = [feed | {"choice": np.array(k % 2 == 0)} for k, feed in enumerate(feeds)]
    return Case(model, feeds)


# ── what must hold ───────────────────────────────────────────────────────────────────────────────


def check_preset(case: Case, preset: str) -> str:
    """Quantized, it loads, means with graph optimizations what it means without, and is close.

    Where eight bits are not close, sixteen have to be: then it was the rounding, not the rewriting.
    Returns "quantized" or "refused".
    """
    # Not optimized: of MatMul, Transpose and BatchNormalization onnxruntime 1.31 fuses too much.
    expected = [run(case.model, feed, optimize=False) for feed in case.feeds]
    try:
        graph = pipeline(case.model, case.feeds, preset).graph
    except OnnxqError as error:
        if any(reason in str(error) for reason in REFUSALS):
            return "refused"
        raise
    onnx.checker.check_model(g.to_proto(graph), full_check=True)
    plain, optimized = (
        [run(graph, feed, optimize) for feed in case.feeds] for optimize in (False, True)
    )
    close = True
    for key in expected[0]:
        want, off, on = (
            np.concatenate([np.ravel(said[key]) for said in run]).astype(np.float64)
            for run in (expected, plain, optimized)
        )
        if off.any() and sqnr(on, off) < LEAST_SQNR:  # a code that fell to the other side of a tie
            assert np.square(on - want).sum() <= 4 * np.square(off - want).sum(), key
        close = close and cosine(on, want) >= LEAST_COSINE
    if not close:
        check_finely(case, expected, graph, preset)
    return "quantized"


def check_mixed(case: Case, seed: int) -> str:
    """Every node in a format of its own: each activation is read in the one that was planned, and
    with graph optimizations the model means what it means without.
    """
    graph, ctx = g.load(case.model), context()
    for step in (Widen(), Normalize(), FoldBatchNorm()):
        step.apply(graph, ctx)
    rng = np.random.default_rng(seed)
    layers = json.dumps([f"{node.name}={rng.choice(FORMATS)}" for node in g.walk(graph)])
    try:
        result = pipeline(case.model, case.feeds, settings=[f"assign.layers={layers}"])
    except OnnxqError as error:
        if any(reason in str(error) for reason in REFUSALS):
            return "refused"
        raise
    onnx.checker.check_model(result.to_proto(), full_check=True)
    for node, plan in result.context.plan.quantized(g.walk(result.graph)):
        for slot in plan.inputs if plan.activation else ():
            maker = g.producer(node.inputs[slot])
            if maker is not None and maker.op == "Clip" and plan.weight is None:
                maker = g.producer(maker.inputs[0])
            assert maker is not None, node.name
            assert maker.op == "DequantizeLinear", node.name
            wide = 16 if plan.activation.bits == 16 else 8
            assert maker.inputs[2].dtype == np.dtype(f"u{wide // 8}"), node.name
    for feed in case.feeds:
        want, off, on = (
            run(source, feed, optimize)
            for source, optimize in (
                (case.model, False),
                (result.graph, False),
                (result.graph, True),
            )
        )
        for key in want:
            if off[key].any() and sqnr(on[key], off[key]) < LEAST_SQNR:
                noise = [np.square(said[key] - want[key]).sum() for said in (on, off)]
                assert noise[0] <= 4 * noise[1], key
    return "quantized"


def check_integers(case: Case, settings: Sequence[str] = ()) -> str:
    """Made of integers, it gives the bits that integers of any size give, however it is run, and
    is not farther from float than its plan is with floats between quantizers.

    Returns "quantized", "refused", or "partly float" for a model with an operator that stays so.
    """
    expected = [run(case.model, feed, optimize=False) for feed in case.feeds]
    try:
        result = pipeline(case.model, case.feeds, "integer-only", settings=settings)
    except OnnxqError as error:
        if any(reason in str(error) for reason in REFUSALS):
            return "refused"
        raise
    model = result.to_proto()
    onnx.checker.check_model(model, full_check=True)
    if result.report.float_operators:  # a recurrence: its bits are the runtime's
        return "partly float"
    exact = [evaluate(model, feed) for feed in case.feeds]
    for optimize, threads in ((False, 1), (False, 2), (True, 1), (True, 2)):
        session = Session(model, optimize=optimize, threads=threads)
        for feed, wanted in zip(case.feeds, exact, strict=True):
            for key, values in session.run(feed).items():
                np.testing.assert_array_equal(values, wanted[key], f"{key} {optimize} {threads}")
    assert result.context.qdq_form is not None
    floats = [run(result.context.qdq_form, feed, optimize=False) for feed in case.feeds]
    for key in expected[0]:
        want, integers, quantized = (
            np.concatenate([np.ravel(said[key]) for said in run]).astype(np.float64)
            for run in (expected, exact, floats)
        )
        if cosine(integers, want) < LEAST_COSINE:
            noise = [float(np.square(said - want).sum()) for said in (integers, quantized)]
            assert noise[0] <= 4 * noise[1], key
    return "quantized"


def check_finely(
    case: Case, expected: list[dict[str, Array]], coarse: g.Graph, preset: str
) -> None:
    """Sixteen bits say the same to 30 dB; where that is out of reach, 20 dB better than eight.

    Of weights in blocks, which no kernel takes in sixteen bits, eight do.
    """
    if preset.startswith(("int2", "int3", "int4", "nf4")):
        fine = pipeline(case.model, case.feeds, preset, settings=["assign.format=w8:16"]).graph
    else:
        settings = ["calibrate.method=minmax", "assign.format=w16a16"]
        scheme = preset if preset in SCHEMES else "int8-static"
        fine = pipeline(case.model, case.feeds, scheme, fine_target(), settings).graph
    for key in expected[0]:
        want, eight, sixteen = (
            np.concatenate([np.ravel(said[key]) for said in run]).astype(np.float64)
            for run in (
                expected,
                [run(coarse, feed, optimize=False) for feed in case.feeds],
                [run(fine, feed, optimize=False) for feed in case.feeds],
            )
        )
        if np.abs(want).max(initial=0) > 1e-3:
            assert sqnr(sixteen, want) > min(30, sqnr(eight, want) + 20), key


def fine_target() -> Target:
    """The target `cpu` with 16 bits for weights and activations."""
    cpu = load_target("cpu")

    def fine(rule: OpRule) -> OpRule:
        wide = {"activation": "u16a", "weight": "s16:channel" if not rule.batched else "s16"}
        types = {k: QType.parse(v) for k, v in wide.items() if getattr(rule, k) is not None}
        return replace(rule, pair_limit=None, **types)

    ops = {op: tuple(map(fine, rules)) for op, rules in cpu.ops.items() if op != "LSTM"}
    return replace(cpu, opset=21, ops=ops)


def cosine(a: Array, b: Array) -> float:
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm else float(np.allclose(a, b, atol=1e-3))
