"""Plans of targets that want the whole graph in integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import feeds_of, model, normal, ops, pipeline, run, sqnr
from places import place

from onnxq import graph as g
from onnxq.devices import Job, ask
from onnxq.pipeline import Result
from onnxq.target import CPU, load_target

NPU = "qnn-htp"
BLOCK = model(
    """(float[1,6,16] x) => (float[1,6,8] y) {
        h = MatMul (x, w)
        b = Add (h, bias)
        n = LayerNormalization <axis = -1> (b, gain, shift)
        s = Softmax <axis = -1> (n)
        p = MatMul (s, n2)
        r = Sub (p, half)
        y = Relu (r)
    }""",
    17,
    w=normal(16, 8, scale=0.3), bias=normal(8, scale=0.3), gain=1 + normal(8, scale=0.1),
    shift=normal(8, scale=0.1), n2=normal(8, 8, seed=3), half=np.float32(0.05),
)  # fmt: skip
CONV = model(
    """(float[1,3,12,12] x) => (float[1,8,6,6] y) {
        c = Conv <pads = [1,1,1,1]> (x, w, b)
        r = Relu (c)
        m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
        d = Conv <pads = [1,1,1,1], group = 8> (m, v)
        y = Add (d, m)
    }""",
    w=normal(8, 3, 3, 3, scale=0.2), b=normal(8, scale=0.2), v=normal(8, 1, 3, 3, scale=0.3),
)  # fmt: skip
FEEDS = {"block": feeds_of(x=(1, 6, 16)), "conv": feeds_of(x=(1, 3, 12, 12))}
MODELS = {"block": BLOCK, "conv": CONV}
PRESETS = ("int8-static", "int16x8", "int8-symmetric", "int8-per-tensor")


def made(name: str, preset: str = "int8-static", **options: str) -> Result:
    return pipeline(MODELS[name], FEEDS[name], preset, NPU, **options)


def floats(graph: g.Graph) -> list[str]:
    """Operators that read or make a tensor that is no dequantized or about to be quantized one."""
    return [
        node.op
        for node in graph.nodes
        if node.op not in ("QuantizeLinear", "DequantizeLinear")
        and not (
            all(g.producer(t).op == "DequantizeLinear" for t in node.inputs if g.producer(t))
            and all(r.op == "QuantizeLinear" for t in node.outputs for r in t.outputs)
        )
    ]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_every_operator_stands_between_codes(name: str, preset: str) -> None:
    result = made(name, preset)
    assert floats(result.graph) in ([], ["Relu"]), ops(result.graph)
    feed = FEEDS[name][0]
    assert sqnr(run(result.graph, feed, False)["y"], run(MODELS[name], feed)["y"]) > 15


def test_a_relu_is_the_end_of_the_codes_before_it() -> None:
    assert "Relu" not in ops(made("conv").graph)


def test_what_moves_values_keeps_their_grid() -> None:
    activations = made("conv").context.activations
    assert activations["m"] is activations["r"]


def test_a_constant_operand_is_stored_as_codes() -> None:
    graph = made("block").graph
    add = next(node for node in graph.nodes if node.op == "Add")
    makers = [g.producer(t) for t in add.inputs]
    stored = [m for m in makers if m is not None and g.is_constant(m.inputs[0])]
    assert len(stored) == 1
    assert g.values(stored[0].inputs[0]).dtype == np.uint8


def test_a_weight_of_one_scale_has_a_bias_of_one_scale() -> None:
    result = made("conv", "int8-per-tensor")
    assert result.context.weights["c#bias"].scale.shape == ()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_npu_runs_all_of_it_and_says_what_the_cpu_says(name: str, preset: str) -> None:
    npu = place("qnn", load_target(NPU).provider_options)
    proto = g.to_proto(made(name, preset).graph)
    feeds = FEEDS[name][:2]
    answer = ask(npu, [Job(proto, feeds)])[0]
    assert answer.error == ""
    assert CPU not in answer.placement.values()
    for feed, said in zip(feeds, answer.outputs, strict=True):
        assert sqnr(said["y"], run(proto, feed, False)["y"]) > 20


def test_several_jobs_of_a_process_all_run_on_the_npu() -> None:
    npu = place("qnn", load_target(NPU).provider_options)
    proto: onnx.ModelProto = g.to_proto(made("conv").graph)
    for answer in ask(npu, [Job(proto, FEEDS["conv"][:1])] * 3):
        assert set(answer.placement.values()) == {"QNNExecutionProvider"}
