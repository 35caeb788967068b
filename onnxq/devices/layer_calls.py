"""Calls of the operators that multiply, normalize and pool, of quantizers and control flow."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser

from onnxq.devices.calls import FLOATS, IMAGE, SHAPES, Array, Call, Fed, Weight, each, ints


def layers() -> dict[str, tuple[Call, ...]]:
    dense, depthwise = Weight((16, 8, 3, 3)), Weight((8, 1, 3, 3))
    bias, eight = Weight((16,)), Weight((8,))
    positive = Weight((8,), 0.7)
    conv = (
        Call((IMAGE, dense, bias), {"pads": [1, 1, 1, 1]}),
        Call((IMAGE, dense)),
        Call((IMAGE, Weight((16, 8, 1, 1)), bias)),
        Call((IMAGE, dense, bias), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        Call((IMAGE, dense, bias), {"dilations": [2, 2]}),
        Call((IMAGE, depthwise, eight), {"group": 8}),
        Call((IMAGE, Weight((16, 4, 3, 3)), bias), {"group": 2}),
        Call((IMAGE, (16, 8, 3, 3))),
        Call(((2, 4, 24), Weight((8, 4, 3)), eight)),
        Call(((1, 2, 4, 6, 6), Weight((8, 2, 3, 3, 3)), eight)),
    )
    transposed = (
        Call((IMAGE, Weight((8, 16, 3, 3)), bias), {"strides": [2, 2]}),
        Call((IMAGE, Weight((8, 16, 2, 2))), {"strides": [2, 2]}),
        Call((IMAGE, Weight((8, 16, 3, 3))), {"output_padding": [1, 1], "strides": [2, 2]}),
        Call((IMAGE, depthwise), {"group": 8}),
        Call(((2, 4, 24), Weight((4, 8, 3)))),
    )
    matmul = (
        Call(((4, 24), Weight((24, 16)))),
        Call(((1, 24), Weight((24, 16)))),
        Call(((4, 24), (24, 16))),
        Call(((2, 4, 24), Weight((24, 16)))),
        Call(((2, 4, 24), Weight((2, 24, 16)))),
        Call(((2, 4, 24), (2, 24, 16))),
        Call(((1, 8, 6, 6), (1, 8, 6, 6))),
        Call(((1, 2, 4, 6, 6), (1, 2, 4, 6, 6))),
        Call(((24,), Weight((24, 16)))),
    )
    gemm = (
        Call(((4, 24), Weight((24, 16)), bias)),
        Call(((4, 24), Weight((16, 24)), bias), {"transB": 1}),
        Call(((4, 24), Weight((16, 24)), bias), {"transB": 1, "alpha": 0.5, "beta": 0.5}),
        Call(((24, 4), Weight((24, 16)), bias), {"transA": 1}),
        Call(((4, 24), (24, 16))),
    )
    norm = tuple(
        Call((shape, Weight(shape[-1:]), Weight(shape[-1:])), {"axis": -1}) for shape in SHAPES[1:]
    )
    scaled = tuple(Call((shape, Weight(shape[-1:])), {"axis": -1}) for shape in SHAPES[1:])

    def sequence(gates: int, outputs: int, **attributes: Any) -> tuple[Call, ...]:
        w, r, b = Weight((1, 8 * gates, 6)), Weight((1, 8 * gates, 8)), Weight((1, 16 * gates))
        data = (3, 1, 6)
        return (
            Call((data, w, r), {"hidden_size": 8} | attributes, outputs),
            Call((data, w, r, b), {"hidden_size": 8} | attributes, outputs),
        )

    return {
        "Conv": conv,
        "ConvTranspose": transposed,
        "MatMul": matmul,
        "Gemm": gemm,
        "Einsum": each("equation", "bij,bjk->bik", inputs=((2, 4, 6), (2, 6, 8))),
        "LSTM": sequence(4, 3),
        "GRU": sequence(3, 2) + sequence(3, 2, linear_before_reset=1)[1:],
        "RNN": sequence(1, 2),
        "BatchNormalization": tuple(
            Call((x, *[Weight((n,))] * 3, Weight((n,), 0.7)))
            for x, n in (((4, 24), 24), ((2, 4, 24), 4), (IMAGE, 8), ((1, 2, 4, 6, 6), 2))
        ),
        "InstanceNormalization": (
            Call((IMAGE, eight, eight)),
            Call(((2, 4, 24), Weight((4,)), Weight((4,)))),
        ),
        "GroupNormalization": (Call((IMAGE, positive, eight), {"num_groups": 2}),),
        "LayerNormalization": norm,
        "RMSNormalization": scaled,
        "MeanVarianceNormalization": (Call((IMAGE,)),),
        "LRN": each("size", 3),
        "Attention": (Call(((1, 2, 4, 8),) * 3),),
        "RotaryEmbedding": (
            Call(((1, 2, 4, 8), Weight((4, 4)), Weight((4, 4)), Fed(ints(0, 1, 2, 3)[None]))),
        ),
        "DeformConv": (Call((IMAGE, Weight((16, 8, 3, 3)), (1, 18, 4, 4))),),
        "MatMulInteger": tuple(
            Call((Fed(np.arange(96, dtype="u1").reshape(4, 24)), _codes(kind, 24, 16)))
            for kind in ("u1", "i1")
        ),
        "ConvInteger": tuple(
            Call((Fed(np.arange(288, dtype="i4").astype("u1").reshape(IMAGE)), codes))
            for codes in (_codes("u1", 16, 8, 3, 3), _codes("i1", 16, 8, 3, 3))
        ),
    }


def _codes(kind: str, *shape: int) -> Array:
    return (np.arange(np.prod(shape)) % 113).astype(kind).reshape(shape)


def pools() -> dict[str, tuple[Call, ...]]:
    two, three = {"kernel_shape": [2, 2]}, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    pool = (
        Call((IMAGE,), two | {"strides": [2, 2]}),
        Call((IMAGE,), three),
        Call((IMAGE,), two | {"strides": [2, 2], "ceil_mode": 1}),
        Call(((2, 4, 24),), {"kernel_shape": [2]}),
        Call(((1, 2, 4, 6, 6),), {"kernel_shape": [2, 2, 2]}),
    )
    whole = (Call((IMAGE,)), Call(((2, 4, 24),)), Call(((1, 2, 4, 6, 6),)))
    found: dict[str, tuple[Call, ...]]
    found = dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), pool)
    found |= {f"Global{op}Pool": whole for op in ("Average", "Max", "Lp")}
    found["AveragePool"] += (Call((IMAGE,), three | {"count_include_pad": 1}),)
    found["MaxPool"] += (Call((IMAGE,), two | {"dilations": [2, 2]}), Call((IMAGE,), two, 2))
    found["MaxUnpool"] = (
        Call(((1, 1, 2, 2), ints(0, 3, 8, 11).reshape(1, 1, 2, 2)), two | {"strides": [2, 2]}),
    )
    found["MaxRoiPool"] = (Call((IMAGE, Weight((1, 5), 0.0)), {"pooled_shape": [2, 2]}),)
    found["RoiAlign"] = (
        Call((IMAGE, Weight((1, 4)), ints(0)), {"output_height": 2, "output_width": 2}),
    )
    return found


def quantizers() -> dict[str, tuple[Call, ...]]:
    """Codes of 4, 8 and 16 bits: as the border of a quantized layer writes them."""
    scale = np.array(0.02, "f4")
    by_channel = np.full(8, 0.02, "f4")
    kinds = ("u1", "i1", "u2", "i2")
    zero = {kind: np.array(0 if kind[0] == "i" else 128, kind) for kind in kinds}
    codes = {kind: Fed(np.arange(288).astype(kind).reshape(IMAGE)) for kind in kinds}
    return {
        "QuantizeLinear": (
            *(Call((IMAGE, scale, zero[k]), types=("float32",)) for k in kinds),
            Call((IMAGE, by_channel, np.zeros(8, "i1")), {"axis": 1}, types=("float32",)),
        ),
        "DequantizeLinear": (
            *(Call((codes[k], scale, zero[k])) for k in kinds),
            Call((codes["i1"], by_channel, np.zeros(8, "i1")), {"axis": 1}),
        ),
        "DynamicQuantizeLinear": (Call((IMAGE,), outputs=3),),
    }


def control_flow() -> dict[str, tuple[Call, ...]]:
    one, other = (
        onnx.parser.parse_graph(f"g () => (float[2] z) {{ z = Constant <value_floats=[{v}]> () }}")
        for v in ("1.0, 2.0", "3.0, 4.0")
    )
    loop = onnx.parser.parse_graph(
        "g (int64 i, bool c, float[2] v) => (bool d, float[2] w) "
        "{ d = Identity (c) w = Add (v, v) }"
    )
    scan = onnx.parser.parse_graph(
        "g (float[2] s, float[2] x) => (float[2] t, float[2] y) { t = Add (s, x) y = Identity (t) }"
    )
    two = Fed(np.ones(2, "f4"))
    return {
        "If": (Call((Fed(np.array(True)),), {"then_branch": one, "else_branch": other}),),
        "Loop": (Call((Fed(np.array(3)), Fed(np.array(True)), two), {"body": loop}),),
        "Scan": (Call((two, Fed(np.ones((3, 2), "f4"))), {"body": scan, "num_scan_inputs": 1}, 2),),
    }


def microsoft() -> dict[str, tuple[Call, ...]]:
    """Operators of the runtime's own domain, which its optimizations and onnxq write."""
    how: dict[str, Any] = {"types": FLOATS, "domain": "com.microsoft"}
    rows = (2, 4, 24)
    last = Weight((24,))
    blocks = {"K": 32, "N": 16, "bits": 4, "block_size": 16}
    return {
        "FastGelu": (Call((rows,), **how),),
        "QuickGelu": (Call((rows,), **how),),
        "BiasGelu": (Call((rows, last), **how),),
        "FusedMatMul": (Call((rows, Weight((24, 16))), {"alpha": 0.5}, **how),),
        "SkipLayerNormalization": (Call((rows, rows, last, last), **how),),
        "SkipSimplifiedLayerNormalization": (Call((rows, rows, last), **how),),
        "MatMulNBits": (
            Call(((4, 32), _codes("u1", 16, 2, 8), Weight((16, 2))), blocks, **how),
            Call(
                ((4, 32), _codes("u1", 16, 2, 8), Weight((16, 2))),
                blocks | {"accuracy_level": 4}, **how,
            ),
        ),
        "GatherBlockQuantized": (
            Call(
                (_codes("u1", 16, 16), Fed(ints(0, 2)), Weight((16, 2))),
                {"block_size": 16, "bits": 4, "quantize_axis": 1}, **how,
            ),
        ),
    }  # fmt: skip
