"""What targets from documentation ask of a model, seen in the model."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from awkward import ZOO
from graphs import feeds_of, model, normal, pipeline, run

from onnxq import graph as g
from onnxq.devices.place import Job, Place, ask
from onnxq.target import load_target, target_names

DOCUMENTED = [
    name
    for name in target_names()
    if name in ("tensorrt", "cuda", "coreml", "nnapi", "xnnpack", "web-webgpu", "generic-qdq")
]


def net() -> onnx.ModelProto:
    """Conv → Relu → Conv → pooling → Gemm."""
    return model(
        """(float[n,3,8,8] x) => (float[n,6] y) {
            a = Conv <pads = [1,1,1,1]> (x, w, b)
            r = Relu (a)
            c = Conv <pads = [1,1,1,1]> (r, u)
            p = MaxPool <kernel_shape = [8,8]> (c)
            f = Flatten (p)
            y = Gemm <transB = 1> (f, v, g)
        }""",
        w=normal(8, 3, 3, 3, scale=0.3), b=normal(8, seed=1),
        u=normal(32, 8, 3, 3, scale=0.3, seed=2), v=normal(6, 32, seed=5), g=normal(6, seed=6),
    )  # fmt: skip


def quantized(name: str, preset: str = "int8-static") -> g.Graph:
    return pipeline(net(), feeds_of(8, x=(2, 3, 8, 8)), preset, name).graph


def zero_points(graph: g.Graph, op: str) -> Iterator[np.ndarray]:
    for node in g.walk(graph):
        if node.op == op:
            yield np.asarray(g.values(node.inputs[2]))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_int8_static_says_what_float_says(name: str) -> None:
    graph = quantized(name)
    (feed,) = feeds_of(1, x=(2, 3, 8, 8))
    said, want = run(graph, feed, optimize=False)["y"].ravel(), run(net(), feed)["y"].ravel()
    assert said @ want / np.linalg.norm(said) / np.linalg.norm(want) > 0.99
    assert "QuantizeLinear" in {node.op for node in graph.nodes}


@pytest.mark.parametrize("name", ["tensorrt", "cuda"])
@pytest.mark.parametrize("preset", ["int8-static", "fp8"])
def test_nvidia_gets_zero_points_of_zero_and_float_biases(name: str, preset: str) -> None:
    graph = quantized(name, preset)
    for op in ("QuantizeLinear", "DequantizeLinear"):
        kinds = {zero.dtype.name for zero in zero_points(graph, op)}
        assert kinds == {"int8" if preset == "int8-static" else "float8_e4m3fn"}
        assert not any(zero.astype(np.float32).any() for zero in zero_points(graph, op))
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm") and len(node.inputs) > 2:
            assert g.is_constant(node.inputs[2])
            assert g.is_float(node.inputs[2])


def test_nnapi_gets_a_scale_per_channel_for_convolutions_alone() -> None:
    graph = quantized("nnapi")
    scales = {
        reader.op: g.values(node.inputs[1]).ndim
        for node in graph.nodes
        if node.op == "DequantizeLinear"
        for reader in node.outputs[0].outputs
        if len(reader.inputs) > 1 and reader.inputs[1] is node.outputs[0]
    }
    assert scales == {"Conv": 1, "Gemm": 0}
    assert {zero.dtype.name for zero in zero_points(graph, "QuantizeLinear")} == {"uint8"}


def test_xnnpack_gets_signed_activations() -> None:
    zeros = list(zero_points(quantized("xnnpack"), "QuantizeLinear"))
    assert {zero.dtype.name for zero in zeros} == {"int8"}
    assert any(zeros)


@pytest.mark.parametrize("name", [n for n in DOCUMENTED if load_target(n).formats("weights")])
@pytest.mark.parametrize("preset", ["int4-rtn", "int4-qdq"])
def test_blocks_of_weights_are_what_the_target_runs(name: str, preset: str) -> None:
    case = ZOO["matmul"]()
    graph = pipeline(case.model, case.feeds, preset, name).graph
    domains = {node.domain or "" for node in g.walk(graph)}
    if load_target(name).standard_only or preset == "int4-qdq":
        assert domains <= {"", "ai.onnx"}
        assert "DequantizeLinear" in {node.op for node in g.walk(graph)}
    for feed in case.feeds:
        run(graph, feed)


@pytest.mark.cuda
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="this onnxruntime has no CUDAExecutionProvider: pip install onnxruntime-gpu",
)
@pytest.mark.parametrize("preset", ["int8-static", "fp8", "int4-rtn", "int8-weights"])
def test_a_gpu_says_what_the_cpu_says(preset: str) -> None:
    proto = g.to_proto(quantized("cuda", preset))
    feeds = feeds_of(3, x=(2, 3, 8, 8))
    config = load_target("cuda").session
    jobs = [Job(proto, feeds, config=config)]
    (gpu,) = ask(Place.parse("cuda"), jobs)
    assert gpu.error == ""
    for said, feed in zip(gpu.outputs, feeds, strict=True):
        want = run(proto, feed, optimize=False)["y"]
        difference = np.abs(said["y"] - want).max()
        assert difference < 0.05 * np.abs(want).max()
