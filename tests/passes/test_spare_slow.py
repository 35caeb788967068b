"""What is slower in integers stays float. Times are made up here: what counts is what follows."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from awkward import ZOO
from graphs import feeds_of, fused, model, normal, ops, pipeline, relative, run, samples_of, sqnr
from onnxq.passes.solve import spare_slow
from onnxq.passes.solve.regions import regions
from onnxq.passes.solve.spare_slow import plan_without

from onnxq import graph as g
from onnxq.pipeline import Pipeline, Plan, Result
from onnxq.recipe import load_recipe
from onnxq.target import load_target
from onnxq.verify import latency

PAIRS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def stack() -> onnx.ModelProto:
    """Depthwise Conv, HardSwish, pointwise Conv, HardSwish: nothing hands codes on."""
    text = """(float[n,8,10,10] x) => (float[n,16,8,8] y) {
        a = Conv <group = 8> (x, d)
        b = HardSwish (a)
        c = Conv (b, p)
        y = HardSwish (c)
    }"""
    return model(text, opset=14, d=normal(8, 1, 3, 3), p=normal(16, 8, 1, 1, seed=1))


def chain() -> onnx.ModelProto:
    """Three Conv that hand codes on, of which the first has three channels."""
    text = """(float[n,3,10,10] x) => (float[n,4,10,10] y) {
        a = Conv (x, first)
        b = Relu (a)
        c = Conv (b, second)
        d = Relu (c)
        y = Conv (d, third)
    }"""
    weights = {
        "first": normal(8, 3, 1, 1),
        "second": normal(8, 8, 1, 1),
        "third": normal(4, 8, 1, 1),
    }
    return model(text, **weights)


def quantized(source: onnx.ModelProto, preset: str = "int8-static") -> Result:
    """The whole recipe, stopwatch included."""
    dims = [d.dim_value or 1 for d in source.graph.input[0].type.tensor_type.shape.dim]
    samples = samples_of(source, feeds_of(4, x=tuple(dims)))
    steps = load_recipe(preset).passes
    return Pipeline(steps).run(g.load(source), samples, load_target("cpu"), threads=1)


def integer(node: g.Node) -> bool:
    """Whether the runtime computes a Conv, and the Relu in it, on codes."""
    while node.op == "Relu":
        node = node.inputs[0].inputs[0]
    return node.op == "Conv" and all(
        t.inputs and t.inputs[0].op == "DequantizeLinear" for t in node.inputs
    )


def cost(graph: g.Graph, prices: dict[str, float]) -> float:
    """What a graph takes, where pairs between integer kernels cost nothing."""
    total = 0.0
    for node in graph.nodes:
        key = node.op
        if key == "Conv" and integer(node):
            key = f"int {node.name}" if f"int {node.name}" in prices else "int"
        elif key == "QuantizeLinear" and node.inputs[0].inputs:
            key = "" if integer(node.inputs[0].inputs[0]) else key
        elif key == "DequantizeLinear":
            key = (
                ""
                if all(map(integer, node.outputs[0].outputs)) and node.outputs[0].outputs
                else key
            )
        total += prices.get(key, 0.0)
    return total


@pytest.fixture
def price(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What an operator costs; `int` stands for a Conv on codes, `int a` for that of one node."""
    prices: dict[str, float] = {}
    monkeypatch.setattr(
        spare_slow._Stopwatch,
        "_time",
        lambda self, one, other, *feeds: (cost(one, prices), cost(other, prices)),
    )
    return prices


def reasons(result: Result) -> dict[str, str]:
    return {layer.name: layer.reason for layer in result.report.layers}


def test_regions_are_what_hands_codes_on(price: dict[str, float]) -> None:
    for source, expected in ((stack(), [["a"], ["c"]]), (chain(), [["a", "b", "c", "d", "y"]])):
        price |= {"Conv": 10, "int": 1}
        result = quantized(source)
        found = regions(result.prepared, result.context.plan)
        assert [[node.name for node in part.nodes] for part in found] == expected


def test_a_region_that_its_pairs_make_slower_stays_float_with_stored_weights(
    price: dict[str, float],
) -> None:
    price |= {"Conv": 10, "int": 4, "QuantizeLinear": 3, "DequantizeLinear": 4}
    result = quantized(stack())
    made = result.to_proto()
    assert not set(ops(made)) & set(PAIRS)
    assert ops(made).count("Cast") == 2
    large = [t for t in made.graph.initializer if np.prod(t.dims) > 16]
    assert {t.data_type for t in large} == {onnx.TensorProto.INT8}
    assert reasons(result)["a"] == "slower here: 11.000 ms in integers, 10.000 ms in float"
    assert all(plan.weights_alone for plan in result.context.plan.values() if plan.weight)


def test_a_region_that_is_faster_in_integers_is_left_as_planned(price: dict[str, float]) -> None:
    price |= {"Conv": 10, "int": 1, "QuantizeLinear": 1, "DequantizeLinear": 1}
    result = quantized(stack())
    assert ops(result.to_proto()).count("QuantizeLinear") == 4
    assert not any(plan.weights_alone for plan in result.context.plan.values())


def test_one_slow_layer_of_a_fast_region_is_left_out(price: dict[str, float]) -> None:
    price |= {"Conv": 10, "int": 2, "int a": 50, "QuantizeLinear": 1, "DequantizeLinear": 1}
    result = quantized(chain())
    spared = [name for name, plan in result.context.plan.items() if plan.weights_alone]
    assert spared == ["a"]
    assert reasons(result)["a"] == "slower here: 50.000 ms in integers, 10.000 ms in float"


def test_a_slow_layer_whose_conversions_cost_more_stays_integer(price: dict[str, float]) -> None:
    price |= {"Conv": 10, "int": 2, "int c": 12, "QuantizeLinear": 3, "DequantizeLinear": 3}
    result = quantized(chain())
    assert not any(plan.weights_alone for plan in result.context.plan.values())


def test_the_whole_model_has_the_last_word(
    price: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    price |= {"Conv": 10, "int": 1}
    monkeypatch.setattr(spare_slow._Stopwatch, "time_model", lambda self, reasons: (3.0, 2.0))
    result = quantized(stack())
    assert not set(ops(result.to_proto())) & set(PAIRS)
    assert "the whole model takes 3.000 ms in integers" in reasons(result)["a"]


def test_nothing_is_timed_for_a_device_of_another_kind(price: dict[str, float]) -> None:
    price |= {"Conv": 1, "int": 10}
    source = stack()
    samples = samples_of(source, feeds_of(4, x=(1, 8, 10, 10)))
    target = replace(load_target("cpu"), machines=("another",))
    result = Pipeline(load_recipe("int8-static").passes).run(g.load(source), samples, target)
    assert ops(result.to_proto()).count("QuantizeLinear") == 4


def test_real_clocks_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they say, the model must come out right."""
    monkeypatch.setattr(spare_slow, "latency", latency)
    for source in (stack(), chain()):
        result = quantized(source)
        feed = {
            "x": normal(
                1, *[d.dim_value for d in source.graph.input[0].type.tensor_type.shape.dim][1:]
            )
        }
        expected, actual = run(source, feed)["y"], run(result.to_proto(), feed)["y"]
        assert relative(actual, expected) < 0.05


def all_stored(result: Result) -> g.Graph:
    """What becomes of a model of which every layer is spared."""
    planned = [node.name for node, plan in result.context.plan.quantized(g.walk(result.prepared))]
    result.context.plan = plan_without(planned, Plan(result.context.plan))
    return result.context.quantized(result.prepared)


def test_a_spared_layer_between_integer_ones_is_run_in_float(price: dict[str, float]) -> None:
    """The runtime makes an integer layer of any float one between codes, if it is let."""
    price |= {"Conv": 10, "int": 2, "int c": 50}
    result = quantized(chain())
    assert [name for name, plan in result.context.plan.items() if plan.weights_alone] == ["c"]
    for feed in feeds_of(3, x=(1, 3, 10, 10)):
        plain, optimized = (run(result.to_proto(), feed, o)["y"] for o in (False, True))
        assert sqnr(optimized, plain) > 60


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic"])
def test_stored_weights_mean_what_the_codes_mean(name: str, preset: str) -> None:
    """In every operator and body: the model computes in float with weights of 8 bits."""
    case = ZOO[name]()
    if preset in case.refused:
        pytest.skip("has nothing to quantize in this form")
    result = pipeline(case.model, case.feeds, preset)
    stored = all_stored(result)
    assert not set(ops(stored)) & {"MatMulInteger", "ConvInteger"}
    for feed, outputs in zip(case.feeds, case.expected(), strict=True):
        for optimize in (False, True):
            for key, actual in run(stored, feed, optimize).items():
                if actual.dtype.kind == "f" and np.any(outputs[key]):
                    assert relative(actual, outputs[key]) < 0.1


def test_the_runtime_expands_stored_weights_when_it_loads_them(tmp_path: Any) -> None:
    result = pipeline(stack(), feeds_of(4, x=(1, 8, 10, 10)))
    left = {
        node.op_type
        for node in fused(g.to_proto(all_stored(result)), tmp_path / "fused.onnx").graph.node
    }
    assert not left & {"Cast", "DequantizeLinear"}
