"""What every pass owes every graph, on the zoo of awkward ones."""

import numpy as np
import onnx
import pytest
from graphs import ZOO, context, pipeline, run, samples_of, sqnr
from trained import as_trained

from onnxq import graph as g
from onnxq.calibrate import observe
from onnxq.recipe import load_recipe

LEAST_SQNR = {  # dB
    "int8-static": 20.0,
    "int8-static-qoperator": 20.0,
    "int16x8": 28.0,
    "int8-dynamic": 25.0,
}
STATIC = ("int8-static", "int8-static-qoperator", "int16x8")
LOWERINGS = ("insert-qdq", "qoperator", "dynamic")
EXACT_WEIGHTS = 40.0  # dB: biases round, and kernels fall to either side of a tie
CONVOLUTIONS_ONLY = {"conv_bn_relu6", "residual", "shared_weights", "inner_output"}
PAIRS = [(n, preset) for preset in STATIC for n in ZOO] + [
    (n, "int8-dynamic") for n in ZOO if n not in CONVOLUTIONS_ONLY
]


@pytest.mark.parametrize(("name", "preset"), PAIRS)
def test_each_pass_leaves_a_graph_that_runs_and_a_second_apply_changes_nothing(
    name: str, preset: str
) -> None:
    case = ZOO[name]()
    expected = [run(case.model, feed) for feed in case.feeds]
    samples = samples_of(case.model, case.feeds)
    graph, ctx = g.load(case.model), context(samples=samples)
    for step in load_recipe(preset).passes:
        wanted = step.observe(graph, ctx)
        ctx.stats |= observe(graph, wanted, samples, threads=1) if wanted else {}
        step.apply(graph, ctx)
        once = g.to_proto(graph).SerializeToString(deterministic=True)
        assert step.apply(graph, ctx) == 0, step.name
        assert g.to_proto(graph).SerializeToString(deterministic=True) == once, step.name
        onnx.checker.check_model(g.to_proto(graph), full_check=True)
        lowered = step.name in LOWERINGS
        for feed, outputs in zip(case.feeds, expected, strict=True):
            for optimize in (False, True):
                actual = run(graph, feed, optimize)
                assert list(actual) == list(outputs)
                for key, values in outputs.items():
                    assert actual[key].dtype == values.dtype
                    if not lowered:
                        np.testing.assert_allclose(
                            actual[key], values, rtol=1e-5, atol=1e-5 * np.abs(values).max()
                        )
                    else:
                        assert sqnr(actual[key], values) > LEAST_SQNR[preset]


@pytest.mark.parametrize("name", ZOO)
def test_passes_leave_the_graph_that_was_loaded_alone(name: str) -> None:
    case = ZOO[name]()
    before = case.model.SerializeToString(deterministic=True)
    pipeline(case.model, case.feeds)
    assert case.model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ZOO)
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
