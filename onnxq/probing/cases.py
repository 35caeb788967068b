"""What each operator is measured on: one small and one large call of every kind of shape."""

from __future__ import annotations

import numpy as np

from onnxq.devices.calls import Call, Fed, Shape, Weight, ints

SMALL: Shape = (1, 16, 14, 14)
LARGE: Shape = (1, 64, 56, 56)
_PADS = {"pads": [1, 1, 1, 1]}
_HALVES = {"kernel_shape": [2, 2], "strides": [2, 2]}


def _conv(channels: int, size: int, kernel: int, out: int, group: int = 1) -> Call:
    weight = Weight((out, channels // group, kernel, kernel))
    attributes = {"group": group} | ({} if kernel == 1 else _PADS)
    return Call(((1, channels, size, size), weight, Weight((out,))), attributes)


def _recurrent(gates: int) -> Call:
    shapes = (1, 64 * gates, 32), (1, 64 * gates, 64), (1, 128 * gates)
    return Call(((16, 1, 32), *map(Weight, shapes)), {"hidden_size": 64})


def _gather(rows: int) -> Call:
    return Call((Weight((2000, 64)), Fed(np.arange(rows, dtype=np.int64)[None] * 7 % 2000)))


LAYERS: dict[str, dict[str, Call]] = {
    "Conv": {
        "3×3, 16 → 32 channels, 14×14": _conv(16, 14, 3, 32),
        "3×3, 64 → 64 channels, 28×28": _conv(64, 28, 3, 64),
        "1×1, 64 → 128 channels, 28×28": _conv(64, 28, 1, 128),
        "depthwise 3×3, 32 channels, 14×14": _conv(32, 14, 3, 32, 32),
        "depthwise 3×3, 96 channels, 56×56": _conv(96, 56, 3, 96, 96),
    },
    "ConvTranspose": {
        "2×2, 32 → 32 channels, 14×14": Call(
            ((1, 32, 14, 14), Weight((32, 32, 2, 2)), Weight((32,))), {"strides": [2, 2]}
        ),
    },
    "Gemm": {
        "1 row, 512 → 512": Call(((1, 512), Weight((512, 512)), Weight((512,)))),
        "64 rows, 512 → 512": Call(((64, 512), Weight((512, 512)), Weight((512,)))),
    },
    "MatMul": {
        "1 row, 512 → 512": Call(((1, 512), Weight((512, 512)))),
        "128 rows, 512 → 512": Call(((128, 512), Weight((512, 512)))),
        "2 × 32 rows, 256 → 1024": Call(((2, 32, 256), Weight((256, 1024)))),
        "4 matrices, 64 → 64": Call(((4, 64, 64), Weight((4, 64, 64)))),
        "two activations, 4 × 128×32": Call(((1, 4, 128, 32), (1, 4, 32, 128))),
    },
    "Gather": {"8 rows of 64": _gather(8), "256 rows of 64": _gather(256)},
    "LSTM": {"16 steps, 32 → 64": _recurrent(4)},
    "GRU": {"16 steps, 32 → 64": _recurrent(3)},
    "RNN": {"16 steps, 32 → 64": _recurrent(1)},
}


def of_codes(op: str) -> dict[str, Call]:
    """Calls of an operator that stands between the codes of others; none where it is not known."""
    return {
        f"{'×'.join(map(str, shape))}": call
        for shape in (SMALL, LARGE)
        if (call := _between(op, shape)) is not None
    }


def _between(op: str, shape: Shape) -> Call | None:
    n, channels, *_ = shape
    calls = {
        "Add": Call((shape, shape)),
        "Mul": Call((shape, shape)),
        "Concat": Call((shape, shape), {"axis": 1}),
        "AveragePool": Call((shape,), _HALVES),
        "MaxPool": Call((shape,), _HALVES),
        "GlobalAveragePool": Call((shape,)),
        "LeakyRelu": Call((shape,), {"alpha": 0.1}),
        "Sigmoid": Call((shape,)),
        "Reshape": Call((shape, ints(n, channels, -1))),
        "Transpose": Call((shape,), {"perm": [0, 2, 3, 1]}),
        "Flatten": Call((shape,)),
        "Squeeze": Call((shape, ints(0))),
        "Unsqueeze": Call((shape, ints(0))),
        "Slice": Call((shape, ints(0), ints(channels // 2), ints(1))),
        "Split": Call((shape,), {"axis": 1, "num_outputs": 2}, 2),
        "Pad": Call((shape, ints(0, 0, 1, 1, 0, 0, 1, 1))),
        "DepthToSpace": Call((shape,), {"blocksize": 2}),
        "SpaceToDepth": Call((shape,), {"blocksize": 2}),
        "Relu": Call((shape,)),
        "Clip": Call((shape, Weight((), 0.0), Weight((), 6.0))),
        "Sub": Call((shape, shape)),
        "Div": Call((shape, shape), low=0.5, high=2.0),
        "Softmax": Call((shape,)),
        "Tanh": Call((shape,)),
        "HardSwish": Call((shape,)),
        "HardSigmoid": Call((shape,)),
        "Resize": Call((shape, None, np.array([1, 1, 2, 2], "f4")), {"mode": "nearest"}),
    }
    return calls.get(op)


def saturating(op: str, depthwise: bool, batched: bool) -> Call:
    """The products that a kernel with 16-bit sums of pairs gets wrong: all of them the largest.

    Weights are +1 in one half of the outputs and -1 in the other, for `saturating_weight`.
    """
    if op == "Conv" and depthwise:
        return Call(((1, 16, 3, 9), Weight((16, 1, 3, 3))), {"group": 16, "strides": [1, 3]})
    if op == "Conv":
        return Call(((1, 32, 3, 9), Weight((16, 32, 3, 3))), {"strides": [1, 3]})
    if op == "MatMul" and batched:
        return Call(((2, 3, 256), Weight((2, 256, 16))))
    return Call(((3, 256), Weight((256, 16))))
