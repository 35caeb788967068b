"""Integer layers through ONNX Runtime against int64 arithmetic, on whatever CPU runs this script.

Prints JSON. For each layer, the largest difference of an accumulator (or of an output code, where
the kernel hands on codes) under the target `cpu`, whose rounding is pair-safe, and under
`cpu-vnni`, whose rounding is not. And what 256 ones times 256 ones give under either preset.

The activations are the worst there are: 0 and 255 alone; all 255; 255 just where weights have one
sign, or where pairs of them, from an even or from an odd column on, add up to the most.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from graphs import Array, model, pipeline, run

OUT = 12
LOWS = (0.0, -128 / 127)  # with 1 as the highest value: zero points 0 and 128


@dataclass
class Layer:
    """A model of one layer with weights (OUT, columns); `place` makes its input from rows."""

    model: onnx.ModelProto
    weights: Array
    place: Callable[[Array], Array] = lambda rows: rows
    groups: int = 1
    preset: str = "int8-static"


def hard_weights(columns: int) -> Array:
    """Rows near their largest magnitude almost everywhere, of one sign or of mixed signs."""
    rng = np.random.default_rng(columns)
    weights = rng.uniform(0.7, 1.0, (OUT, columns))
    weights[1] *= -1
    weights[4:] *= rng.choice([-1, 1], (OUT - 4, columns))
    weights[-1] = rng.standard_normal(columns)
    return weights.astype(np.float32)


def lone_pairs(columns: int) -> Array:
    """Rows of small weights and one large pair: broken for those alone who know the neighbours."""
    weights = np.random.default_rng(columns).uniform(-0.02, 0.02, (OUT, columns))
    for row in range(OUT):
        first = 2 * ((3 * row + 1) % (columns // 2))
        weights[row, first : first + 2] = np.array([1.0, 0.8]) * (-1) ** row
    return weights.astype(np.float32)


def convolution(
    channels: int,
    kernel: int,
    groups: int = 1,
    draw: Callable[[int], Array] = hard_weights,
) -> Layer:
    per_group = channels // groups
    weights = draw(kernel * kernel * per_group)
    stored = np.moveaxis(weights.reshape(OUT, kernel, kernel, per_group), -1, 1)
    text = f"""(float[1,{channels},h,w] x) => (float[1,{OUT},1,n] y) {{
        y = Conv <group = {groups}, strides = [{kernel},{kernel}]> (x, w, b)
    }}"""

    def place(rows: Array) -> Array:
        """Patches side by side in one image, the same in each group."""
        patches = rows.reshape(-1, kernel, kernel, per_group).transpose(3, 1, 0, 2)
        image = patches.reshape(1, per_group, kernel, -1)
        return np.tile(image, (1, groups, 1, 1))

    made = model(text, w=np.ascontiguousarray(stored), b=np.linspace(-9, 9, OUT, dtype="f4"))
    return Layer(made, weights, place, groups)


def gemm(columns: int, preset: str) -> Layer:
    weights = hard_weights(columns)
    bias = preset == "int8-static"
    text = f"""(float[n,{columns}] x) => (float[n,{OUT}] y) {{
        y = Gemm <transB = 1> (x, w{", b" * bias})
    }}"""
    initializers = {"w": weights} | ({"b": np.linspace(-9, 9, OUT, dtype="f4")} if bias else {})
    return Layer(model(text, **initializers), weights, preset=preset)


def matmul(columns: int, preset: str) -> Layer:
    weights = hard_weights(columns)
    text = f"(float[n,{columns}] x) => (float[n,{OUT}] y) {{ y = MatMul (x, w) }}"
    return Layer(model(text, w=np.ascontiguousarray(weights.T)), weights, preset=preset)


def batched_matmul(columns: int, preset: str) -> Layer:
    """Two batches of an odd number of columns: pairs must not cross from one to the next."""
    weights = hard_weights(columns)
    text = f"(float[n,{columns}] x) => (float[2,n,{OUT}] y) {{ y = MatMul (x, w) }}"
    stored = np.stack([weights[::-1].T, weights.T])
    return Layer(model(text, w=np.ascontiguousarray(stored)), weights, preset=preset)


def worst_rows(weights: Array) -> Array:
    """Where an activation should be 255, as (patterns, columns) of 0 and 1."""
    columns = weights.shape[1]
    patterns = [np.ones(columns, bool)]
    for w in (*weights, *-weights):
        patterns.append(w > 0)
        for start in (0, 1):
            pair = np.zeros(columns, bool)
            for k in range(start, columns - 1, 2):
                pair[k : k + 2] = w[k] + w[k + 1] > 1
            patterns.append(pair)
    patterns += list(np.random.default_rng(0).integers(0, 2, (16, columns)) > 0)
    return np.asarray(patterns, np.int64)


def difference(layer: Layer, target: str, low: float) -> float:
    """Between the runtime and int64, where the codes 0 and 255 stand for `low` and 1."""
    rows = worst_rows(layer.weights)
    feed = {"x": layer.place(np.where(rows, 1, low).astype(np.float32))}
    settings = ["calibrate.method=minmax"] if layer.preset == "int8-static" else []
    result = pipeline(layer.model, [feed], layer.preset, target, settings)
    ctx, weight = result.context, result.context.weights["w"]
    zero = 0 if low == 0 else 128
    if layer.preset == "int8-static":
        assert int(ctx.activations["x"].zero) == zero
    bias = ctx.weights["y#bias"].codes[:, 0].astype(np.int64) if "y#bias" in ctx.weights else 0
    codes, scale = weight.codes[-OUT:], weight.scale[-OUT:] if weight.scale.ndim else weight.scale
    unit = np.float32((1 - low) / 255) * scale
    w = codes.astype(np.int64).reshape(layer.groups, -1, rows.shape[1])
    exact = np.concatenate([(255 * rows - zero) @ part.T for part in w], axis=1) + bias
    y = run(result.graph, feed)["y"]
    y = y.reshape(OUT, -1).T if y.ndim == 4 else y[-1] if y.ndim == 3 else y
    if "y" not in ctx.activations:  # a float result: back to accumulators, which float32 holds
        assert np.abs(exact).max() < 1 << 22
        return float(np.abs(np.rint(y / unit) - exact).max())
    out = ctx.activations["y"]
    codes = np.rint(exact.astype(np.float32) * (unit / out.scale)) + int(out.zero)
    return float(np.abs(np.rint(y / out.scale) + int(out.zero) - np.clip(codes, 0, 255)).max())


def ones(preset: str) -> float:
    made = model(
        "(float[n,256] x) => (float[n,1] y) { y = MatMul (x, w) }", w=np.ones((256, 1), "f4")
    )
    feed = {"x": np.ones((4, 256), np.float32)}
    return float(run(pipeline(made, [feed], preset).graph, feed)["y"].max())


LAYERS = {
    "conv 1x1": lambda: convolution(32, 1),
    "conv 3x3": lambda: convolution(16, 3),
    "conv 3x3 of 3 channels": lambda: convolution(3, 3),
    "conv 3x3, lone pairs": lambda: convolution(16, 3, draw=lone_pairs),
    "conv 3x3 of 3 channels, lone pairs": lambda: convolution(3, 3, draw=lone_pairs),
    "conv 3x3 of 2 groups of 5": lambda: convolution(10, 3, groups=2),
    "conv 3x3 depthwise": lambda: convolution(OUT, 3, groups=OUT),
    "gemm": lambda: gemm(64, "int8-static"),
    "gemm of 33": lambda: gemm(33, "int8-static"),
    "matmul": lambda: matmul(64, "int8-static"),
    "matmul, batches of 33": lambda: batched_matmul(33, "int8-static"),
    "dynamic matmul, batches of 33": lambda: batched_matmul(33, "int8-dynamic"),
    "dynamic gemm": lambda: gemm(33, "int8-dynamic"),
    "dynamic matmul": lambda: matmul(64, "int8-dynamic"),
}


if __name__ == "__main__":
    found = {
        target: {
            name: max(
                difference(make(), target, low) for low in LOWS[: 1 + ("dynamic" not in name)]
            )
            for name, make in LAYERS.items()
        }
        for target in ("cpu", "cpu-vnni")
    }
    a, b = np.full((1, 256), 255, np.uint8), np.full((256, 1), 127, np.int8)
    raw = model("(uint8[1,256] a) => (int32[1,1] y) { y = MatMulInteger (a, b) }", b=b)
    saturates = int(run(raw, {"a": a})["y"].item()) != 255 * 127 * 256
    presets = ("int8-static", "int8-dynamic")
    print(json.dumps(found | {"ones": {p: ones(p) for p in presets}, "saturates": saturates}))
