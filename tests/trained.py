"""Models as quantization-aware training leaves them: QuantizeLinear around float weights."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from awkward import Case
from graphs import Array, feeds_of, model, normal, pipeline, run
from onnxq.passes.solve.fake_quant import stored

from onnxq import graph as g
from onnxq.pipeline import Result

LIMITS = {np.int8: 127, np.uint8: 127, np.int16: 32767, np.uint16: 32767}


def fake(name: str, values: Array, axis: int | None = None, dtype: type = np.int8,
         clip: bool = False) -> tuple[str, dict[str, Array]]:  # fmt: skip
    """ONNX text that makes `name`_d out of a float weight, and the constants it reads."""
    others = None if axis is None else tuple(k for k in range(values.ndim) if k != axis)
    largest = np.abs(values).max(axis=others)
    scale = (largest / LIMITS[dtype]).astype(np.float32)
    middle = 0 if np.dtype(dtype).kind == "i" else (LIMITS[dtype] + 1)
    more = {f"{name}": values, f"{name}_s": scale, f"{name}_z": np.full(scale.shape, middle, dtype)}
    at = "" if axis is None else f"<axis = {axis}>"
    codes = f"{name}_q"
    text = f"{name}_q = QuantizeLinear {at} ({name}, {name}_s, {name}_z)\n"
    if clip:
        text += f"{name}_c = Clip ({name}_q, {name}_lo, {name}_hi)\n"
        more |= {f"{name}_lo": dtype(middle - 60), f"{name}_hi": dtype(middle + 60)}
        codes = f"{name}_c"
    return text + f"{name}_d = DequantizeLinear {at} ({codes}, {name}_s, {name}_z)\n", more


def around(x: str, scale: float = 0.04, zero: Array | None = None) -> tuple[str, dict[str, Array]]:
    """ONNX text that makes `x`_d out of an activation."""
    point = np.uint8(128) if zero is None else zero
    text = f"""{x}_q = QuantizeLinear ({x}, {x}_s, {x}_z)
        {x}_d = DequantizeLinear ({x}_q, {x}_s, {x}_z)\n"""
    return text, {f"{x}_s": np.float32(scale), f"{x}_z": point}


# (node that reads x_d and w_d, input shape, weight shape, the axis of its output channels)
LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int]] = {
    "Conv": ("Conv <pads = [1,1,1,1]> (x_d, w_d)", (2, 4, 6, 6), (5, 4, 3, 3), 0),
    "Conv 1-D": ("Conv (x_d, w_d)", (2, 4, 9), (5, 4, 3), 0),
    "Conv depthwise": ("Conv <group = 4> (x_d, w_d)", (2, 4, 6, 6), (4, 1, 3, 3), 0),
    "ConvTranspose": ("ConvTranspose <strides = [2,2]> (x_d, w_d)", (2, 4, 5, 5), (4, 3, 2, 2), 1),
    "Gemm": ("Gemm (x_d, w_d)", (3, 8), (8, 6), 1),
    "Gemm transB": ("Gemm <transB = 1> (x_d, w_d)", (3, 8), (6, 8), 0),
    "MatMul": ("MatMul (x_d, w_d)", (2, 3, 8), (8, 6), 1),
    "MatMul of a Transpose": ("MatMul (x_d, w_t)", (2, 3, 8), (6, 8), 0),
}


def layer(name: str, per_channel: bool = True, dtype: type = np.int8, clip: bool = False,
          opset: int = 13) -> Case:  # fmt: skip
    body, shape, weight_shape, axis = LAYERS[name]
    scale = np.logspace(-1, 1, weight_shape[axis], dtype=np.float32)
    lined = tuple(-1 if k == axis else 1 for k in range(len(weight_shape)))
    values = normal(*weight_shape) * scale.reshape(lined)
    w, w_more = fake("w", values, axis if per_channel else None, dtype, clip)
    x, x_more = around("x")
    turn = "w_t = Transpose (w_d)" if "w_t" in body else ""
    given, made = (",".join(letters[: len(shape)]) for letters in ("abcd", "nopq"))
    text = f"(float[{given}] x) => (float[{made}] y) {{ {x} {w} {turn} y = {body} }}"
    return Case(model(text, opset, **w_more, **x_more), feeds_of(4, x=shape))


def folded(case: Case, target: str = "cpu") -> Result:
    result = pipeline(case.model, None, "qat", target)
    onnx.checker.check_model(result.to_proto(), full_check=True)
    return result


def initializers(result: Result) -> dict[str, Array]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in result.to_proto().graph.initializer}


def assert_close(case: Case, result: Result, tolerance: float = 1e-5) -> None:
    for feed in case.feeds:
        for key, expected in run(case.model, feed, False).items():
            for optimize in (False, True):
                actual = run(result.graph, feed, optimize)[key]
                assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def network(bias: float = 1.0, tiny: float = 1.0, more: dict[str, Array] | None = None) -> Case:
    """Conv, Relu, Conv, Gemm as an exporter writes them: a pair after every layer."""
    w1 = normal(6, 3, 3, 3, scale=0.3)
    w1[2] *= tiny
    pieces = [around("x"), fake("w1", w1, 0), around("r", 0.05, np.uint8(0)),
              fake("w2", normal(4, 6, 1, 1, seed=1), 0), around("c", 0.1),
              fake("fc", normal(5, 64, seed=2, scale=0.2), 0)]  # fmt: skip
    x, w1_text, r, w2, c, fc = (text for text, _ in pieces)
    text = f"""(float[n,3,6,6] x) => (float[n,5] y) {{
        {x} {w1_text} a = Conv (x_d, w1_d, b1)
        r = Relu (a)
        {r} {w2} c = Conv (r_d, w2_d, b2)
        {c} f = Flatten (c_d)
        {fc} y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, fc_d, b3)
    }}"""
    weights = {key: value for _, found in pieces for key, value in found.items()}
    weights |= {"b1": normal(6, seed=3) * np.float32(bias), "b2": normal(4, seed=4),
                "b3": normal(5, seed=5)}  # fmt: skip
    return Case(model(text, **weights | (more or {})), feeds_of(4, x=(2, 3, 6, 6)))


def as_trained(result: Result) -> onnx.ModelProto:
    """A quantized model as training would have exported it: float weights and biases."""
    graph = g.load(result.to_proto())
    for node in [n for n in g.walk(graph) if n.op == "DequantizeLinear"]:
        codes = node.inputs[0]
        if not g.is_constant(codes):
            continue
        real = g.constant(f"{codes.name}_float", stored(node.outputs[0]))
        if np.dtype(codes.dtype) == np.int32:
            for reader in list(node.outputs[0].outputs):
                g.replace_input(reader, node.outputs[0], real)
            continue
        made = gs.Variable(f"{codes.name}_codes", dtype=codes.dtype)
        name, attrs = f"{node.name}_quantize", dict(node.attrs)
        body = next(b for b in g.subgraphs(graph) if any(n is node for n in b.nodes))
        body.nodes.append(gs.Node("QuantizeLinear", name, attrs, [real, *node.inputs[1:]], [made]))
        node.inputs[0] = made
    g.tidy(graph)
    return g.to_proto(graph)
