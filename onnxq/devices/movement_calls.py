"""Calls of the operators that move data, look it up, or make it."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto as TYPES

from onnxq.devices.calls import IMAGE, SHAPES, Call, Fed, Weight, any_rank, each, ints


def movement() -> dict[str, tuple[Call, ...]]:
    """Operators that move data, look it up, or make it."""
    index = Fed(ints(0, 2))
    return {
        "Reshape": tuple(Call((s, ints(*s[:-2], -1))) for s in SHAPES[1:]),
        "Flatten": tuple(Call((s,), {"axis": 1}) for s in SHAPES),
        "Transpose": tuple(Call((s,), {"perm": [*range(len(s))][::-1]}) for s in SHAPES[1:]),
        "Squeeze": any_rank(ints(0), ranks=(4, 5, 6)),
        "Unsqueeze": any_rank(ints(0), ranks=range(1, 6)),
        "Slice": any_rank(ints(0), ints(4), ints(-1))
        + any_rank(ints(0), ints(4), ints(-1), ints(2), ranks=(4,))
        + any_rank(ints(-1), ints(-9), ints(-1), ints(-1), ranks=(4,)),
        "Split": (
            *(Call((s,), {"axis": -1, "num_outputs": 2}, 2) for s in SHAPES),
            Call((IMAGE, ints(2, 6)), {"axis": 1}, 2),
        ),
        "Concat": tuple(Call((s, s), {"axis": -1}) for s in SHAPES)
        + tuple(Call((IMAGE, IMAGE, Weight(IMAGE)), {"axis": axis}) for axis in (0, 1)),
        "Pad": (
            *(
                Call((IMAGE, ints(0, 0, 1, 1, 0, 0, 1, 1)), {"mode": mode})
                for mode in ("constant", "reflect", "edge", "wrap")
            ),
            Call(((4, 24), ints(0, 1, 0, 1))),
        ),
        "Expand": any_rank(ints(2, 1), ranks=(1,)) + any_rank(ints(3, 8, 6, 6), ranks=(4,)),
        "Tile": tuple(Call((s, ints(*[1] * (len(s) - 1), 2))) for s in SHAPES),
        "Gather": (
            *(Call((s, index), {"axis": -1}) for s in SHAPES),
            Call((Weight((9, 8)), Fed(ints(3, 1, 4)))),
            Call((IMAGE, ints(0, 2)), {"axis": 1}),
        ),
        "GatherElements": (Call(((4, 24), Fed(ints(0, 1, 2)[None])), {"axis": 1}),),
        "GatherND": (Call((IMAGE, Fed(ints(0, 1)[None]))),),
        "ScatterElements": tuple(
            Call(((4, 24), Fed(ints(0, 1, 2)[None]), (1, 3)), {"axis": 1} | more)
            for more in ({}, {"reduction": "add"})
        ),
        "ScatterND": tuple(
            Call(((4, 24), Fed(ints(1, 3)[:, None]), (2, 24)), more)
            for more in ({}, {"reduction": "add"})
        ),
        "TensorScatter": (Call(((1, 2, 4, 8), (1, 2, 1, 8), Fed(ints(2)))),),
        "Where": tuple(
            Call((Fed(np.arange(np.prod(s)).reshape(s) % 2 == 0), s, s)) for s in SHAPES
        ),
        "Compress": (Call(((4, 24), Fed(np.array([True, False, True, False]))), {"axis": 0}),),
        "DepthToSpace": tuple(
            Call((IMAGE,), {"blocksize": 2, "mode": mode}) for mode in ("DCR", "CRD")
        ),
        "SpaceToDepth": each("blocksize", 2),
        "CenterCropPad": (Call((IMAGE, ints(4, 8)), {"axes": [2, 3]}),),
        "Col2Im": (Call(((1, 8, 9), ints(4, 4), ints(2, 2))),),
        "Trilu": any_rank(ranks=(2, 3, 4)),
        "EyeLike": any_rank(ranks=(2,)),
        "OneHot": (Call((Fed(ints(1, 3)), np.array(5), Weight((2,)))),),
        "ReverseSequence": (Call(((4, 3, 6), ints(1, 2, 4))),),
        "Shape": any_rank(),
        "Size": any_rank(),
        "NonZero": any_rank(ranks=(1, 2, 4)),
        "Unique": any_rank(ranks=(1,)),
        "Range": (Call(((), Weight((), 9.0), Weight((), 2.0)), low=0, high=1),),
        "ConstantOfShape": (Call((Fed(ints(2, 3)),)),),
        "Det": (Call(((2, 4, 4),)),),
        "Cast": tuple(
            Call((IMAGE,), {"to": TYPES.DataType.Value(to)})
            for to in ("FLOAT", "FLOAT16", "INT32", "INT64", "UINT8", "BOOL")
        ),
        "CastLike": (Call((IMAGE, Weight((1,)))),),
        "BitCast": each("to", int(TYPES.INT32)),
        "Resize": tuple(
            Call((IMAGE, None, np.array([1, 1, 2, 2], "f4")), {"mode": mode} | more)
            for mode in ("nearest", "linear", "cubic")
            for more in ({}, {"coordinate_transformation_mode": "asymmetric"})
        )
        + tuple(
            Call((IMAGE, None, None, ints(1, 8, 9, 9)), {"mode": "linear"} | more)
            for more in (
                {"coordinate_transformation_mode": "align_corners"},
                {"coordinate_transformation_mode": "pytorch_half_pixel"},
            )
        ),
        "GridSample": tuple(
            Call((IMAGE, (1, 4, 4, 2)), {"mode": mode}) for mode in ("linear", "nearest", "cubic")
        ),
        "AffineGrid": (Call(((1, 2, 3), ints(1, 3, 4, 4))),),
        "NonMaxSuppression": (
            Call(
                (
                    Fed(np.random.default_rng(0).random((1, 6, 4), np.float32)),
                    Fed(np.random.default_rng(1).random((1, 1, 6), np.float32)),
                    ints(3), np.array([0.5], "f4"), np.array([0.1], "f4"),
                ),
            ),
        ),
        "DFT": (Call(((1, 8, 6, 1), None, np.array(1))),),
        "STFT": (Call(((1, 64, 1), np.array(8), None, np.array(16))),),
        "HannWindow": (Call((Fed(np.array(8)),)),),
        "HammingWindow": (Call((Fed(np.array(8)),)),),
        "BlackmanWindow": (Call((Fed(np.array(8)),)),),
    }  # fmt: skip
