"""What every pass and preset owes every graph, on the awkward ones."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import Array, Feeds, context, pipeline, run, samples_of, sqnr
from onnxq.passes import AWQ, Equalize, FoldBatchNorm, Normalize, SmoothQuant, SplitOutliers, Widen
from onnxq.passes.solve.assign import HEAVY
from random_graphs import SCHEMES, check_finely
from trained import as_trained

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.errors import OnnxqError
from onnxq.float_operators import float_operators
from onnxq.pipeline import Context, NodePlan, Pass
from onnxq.qtype import QType
from onnxq.recipe import load_recipe
from onnxq.runtime import Session
from onnxq.target import load_target

SOLVERS = str(Path(__file__).parent / "solvers.toml")
INTEGER = "integer-only"
ALWAYS = ("int8-static", "int8-dynamic", "int16x8", "int8-static-qoperator", "w4a8", INTEGER, "fp8")
TARGETS = {"fp8": "generic-qdq"}  # where it is not cpu
OPERATORS = ("nf4 --ops", "int3 --ops", "int2 --ops")
IN_TURN = (SCHEMES, ("int4-rtn", "int4-qdq"), ("nf4", "int3", "int2"), OPERATORS)  # one of each
FEW_BITS = ("w4a8", *IN_TURN[1], *IN_TURN[2])
CASES = [
    pytest.param(name, preset, id=f"{name}-{Path(preset).stem}")
    for turn, name in enumerate(ZOO)
    for preset in (*ALWAYS, SOLVERS, *(some[turn % len(some)] for some in IN_TURN))
]
LOWERING = ("insert-qdq", "dynamic", "fuse-integer", "matmul-nbits", INTEGER)
CHANGE_THE_FUNCTION = (
    "assign", "bias-correct", "reconstruct-layers", "codebook-matmul", "expand", "add-low-rank",
)  # fmt: skip
LEAST_COSINE = 0.99
LEAST_COSINE_OF_FEW_BITS = 0.75  # 4 bits keep about 18 dB, and a layer adds to the next
LEAST_COSINE_OF_TWO_BITS = 0.5  # which keep some 6 to 10 dB of layers as small as these
LEAST_SQNR = 25.0  # dB, between graph optimizations off and on
LEAST_SQNR_OF_BLOCKS = 20.0  # kernels for blocks round activations to 8 bits, with optimizations on
EXACT_WEIGHTS = 40.0  # dB: biases round, and kernels fall to either side of a tie


# What stays float among integers, the runtime may compute otherwise when it optimizes.
FLOAT_INSIDE = {"lstm_in_if"}


def cosine(actual: list[Array], expected: list[Array]) -> float:
    a, b = (np.concatenate([np.ravel(x) for x in y]).astype(np.float64) for y in (actual, expected))
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm else float(np.array_equal(a, b))


def check_the_same(
    graph: g.Graph, feeds: Feeds, expected: list[dict[str, Array]], loose: bool
) -> None:
    for feed, outputs in zip(feeds, expected, strict=True):
        for optimize in (False, True):
            actual = run(graph, feed, optimize)
            assert list(actual) == list(outputs)
            for key, values in outputs.items():
                assert actual[key].dtype == values.dtype
                narrow = values.dtype == np.float16 or loose
                np.testing.assert_allclose(
                    actual[key], values, rtol=2e-3 if narrow else 1e-5,
                    atol=(4e-3 if narrow else 1e-5) * np.abs(values).max(initial=0),
                )  # fmt: skip


def check_close(
    graph: g.Graph,
    feeds: Feeds,
    expected: list[dict[str, Array]],
    least: float,
    to_the_bit: bool = False,
) -> float:
    """The least cosine; optimizations on and off agree."""
    blocks = any(node.op == "MatMulNBits" for node in g.walk(graph))
    agree = LEAST_SQNR_OF_BLOCKS if blocks else LEAST_SQNR
    cosines = [1.0]
    proto = g.to_proto(graph)
    sessions = [Session(proto, optimize=optimize, threads=1) for optimize in (False, True)]
    plain, optimized = ([session.run(f) for f in feeds] for session in sessions)
    for key in expected[0]:
        want = [outputs[key] for outputs in expected]
        for said in (plain, optimized):
            assert [o[key].dtype for o in said] == [w.dtype for w in want]
            assert [o[key].shape for o in said] == [w.shape for w in want]
            cosines.append(cosine([o[key] for o in said], want))
        for one, other in zip(plain, optimized, strict=True):
            if to_the_bit:
                np.testing.assert_array_equal(one[key], other[key])
            if one[key].dtype.kind == "f" and one[key].any():
                assert sqnr(other[key], one[key]) >= agree
    assert min(cosines) >= least
    return min(cosines)


def check_what_stays_float_is_reported(graph: g.Graph, ctx: Context) -> None:
    """Quantizers beside a float operator, and what has none, need no word of their own."""
    reported = {record.name for record in ctx.report.layers if record.reason}
    for each in float_operators(g.to_proto(graph)):
        if each.op not in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            assert each.name in reported, each


def check_nothing_is_left_out_silently(graph: g.Graph, ctx: Context) -> None:
    for node in g.walk(graph):
        if node.op in HEAVY and (node.op != "Gather" or g.weight_view(node)):
            plan = ctx.plan[node.name]
            assert plan.quantized or plan.reason, node.name


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_each_pass_leaves_a_graph_that_runs_and_a_second_apply_changes_nothing(
    name: str, preset: str
) -> None:
    case = ZOO[name]()
    expected = case.expected()
    samples = samples_of(case.model, case.feeds)
    graph = g.load(case.model)
    preset, own_operators, _ = preset.partition(" --ops")
    device = load_target(TARGETS.get(preset, "cpu"))
    device = device.with_custom_operators() if own_operators else device
    ctx = context(device, samples=samples)
    for step in load_recipe(preset).passes:
        wanted = step.observe(graph, ctx)
        ctx.stats |= observe(graph, wanted, samples, threads=1) if wanted else {}
        if step.name == "assign" and preset in case.refused:
            with pytest.raises(OnnxqError, match=case.refused[preset]):
                step.apply(graph, ctx)
            return
        step.apply(graph, ctx)
        once = g.to_proto(graph).SerializeToString(deterministic=True)
        assert step.apply(graph, ctx) == 0, step.name
        assert g.to_proto(graph).SerializeToString(deterministic=True) == once, step.name
        if name != "no_shapes":  # which the checker refuses as it comes
            onnx.checker.check_model(g.to_proto(graph), full_check=True)
        if step.name == "assign":
            check_nothing_is_left_out_silently(graph, ctx)
        if step.name in LOWERING:
            least = LEAST_COSINE_OF_FEW_BITS if preset in FEW_BITS else LEAST_COSINE
            least = LEAST_COSINE_OF_TWO_BITS if preset == "int2" else least
            if preset == INTEGER:
                check_what_stays_float_is_reported(graph, ctx)
            exact = preset == INTEGER and name not in FLOAT_INSIDE
            if check_close(graph, case.feeds, expected, least, exact) < LEAST_COSINE:
                check_finely(case, expected, graph, preset)  # then it was the rounding alone
        elif not step.analysis and step.name not in CHANGE_THE_FUNCTION:
            check_the_same(graph, case.feeds, expected, loose="casts" in name)


@pytest.mark.parametrize(
    "step",
    [
        Equalize(), SmoothQuant(), SmoothQuant(alpha=0.5, explicit=-1e9), SplitOutliers(),
        SplitOutliers(of="activations", ratio=0.2), AWQ(), AWQ(explicit=-1e9),
    ],
    ids=lambda step: ",".join([step.name, *map(str, step.settings().values())]),
)  # fmt: skip
@pytest.mark.parametrize("name", ZOO)
def test_each_preparing_pass_keeps_the_function(name: str, step: Pass) -> None:
    case = ZOO[name]()
    samples = samples_of(case.model, case.feeds)
    graph, ctx = g.load(case.model), context(samples=samples)
    for first in (Widen(), Normalize(), FoldBatchNorm()):
        first.apply(graph, ctx)
    expected = [run(graph, feed) for feed in case.feeds]
    for node in g.walk(graph):
        if g.weight_view(node):
            ctx.plan[node.name] = NodePlan(weight=QType.parse("u4a:16"))
    wanted = step.observe(graph, ctx)
    ctx.stats |= observe(graph, wanted, samples, threads=1) if wanted else {}
    step.apply(graph, ctx)
    once = g.to_proto(graph).SerializeToString(deterministic=True)
    assert step.apply(graph, ctx) == 0
    assert g.to_proto(graph).SerializeToString(deterministic=True) == once
    if name != "no_shapes":
        onnx.checker.check_model(g.to_proto(graph), full_check=True)
    check_the_same(graph, case.feeds, expected, loose=False)


@pytest.mark.parametrize("name", ZOO)
def test_passes_leave_the_graph_that_was_loaded_alone(name: str) -> None:
    case = ZOO[name]()
    before = case.model.SerializeToString(deterministic=True)
    pipeline(case.model, case.feeds)
    assert case.model.SerializeToString(deterministic=True) == before


# Recurrences of integers and types that are no more float32 have no trained form made by hand; an
# integer Softmax rounds.
UNTRAINED = {"float16_body", "no_shapes", "softmax_of_codes", "rnn"}
UNTRAINED |= {name for name in ZOO if "lstm" in name or "gru" in name}


@pytest.mark.parametrize("name", sorted(set(ZOO) - UNTRAINED))
def test_a_trained_model_gets_back_the_codes_it_was_trained_with(name: str) -> None:
    """Float weights in the place of codes, then `qat`: its passes owe what all passes owe."""
    case = ZOO[name]()
    done = pipeline(case.model, case.feeds, target="cpu-vnni")
    trained = as_trained(done)
    graph, ctx = g.load(trained), context("cpu-vnni")
    for step in load_recipe("qat").passes:
        step.apply(graph, ctx)
        once = g.to_proto(graph).SerializeToString(deterministic=True)
        assert step.apply(graph, ctx) == 0, step.name
        assert g.to_proto(graph).SerializeToString(deterministic=True) == once, step.name
        onnx.checker.check_model(g.to_proto(graph), full_check=True)
    before, after = (
        sorted(t.values.tobytes() for t in g.constants(each) if t.dtype == np.int8)
        for each in (done.graph, graph)
    )
    assert set(before) == set(after)
    for feed in case.feeds:
        expected = run(trained, feed, False)
        for optimize in (False, True):
            for key, values in run(graph, feed, optimize).items():
                assert sqnr(values, expected[key]) > EXACT_WEIGHTS
