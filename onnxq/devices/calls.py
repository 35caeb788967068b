"""Calls of every ONNX operator that computes on tensors, as data: layers in `layer_calls`.

An input is a shape (data of the element type that is asked for), `Weight` (the same, constant), an
array (a constant of its own type), `Fed` (an array that is fed) or None (left out). Left out of the
table: strings, sequences, optionals, images, and what is random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A constant of the element type asked for; of `values`, or random ones."""

    shape: Shape = ()
    value: float | None = None


@dataclass(frozen=True)
class Fed:
    """An array of a type of its own that the model is fed."""

    array: Array


Input = Shape | Weight | Array | Fed | None


@dataclass(frozen=True)
class Call:
    """Inputs and attributes of one node. Data is drawn evenly from `low` to `high`."""

    inputs: tuple[Input, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    low: float = -1.0
    high: float = 1.0
    types: tuple[str, ...] = ()  # empty: all of the operator's schema
    domain: str = ""

    @property
    def rank(self) -> int:
        """Of the data: the first input whose type is the one asked for."""
        shapes = [shape for i in self.inputs if (shape := _data_shape(i)) is not None]
        return len(shapes[0]) if shapes else 0


def _data_shape(value: Input) -> Shape | None:
    """Of an input whose type is the one asked for."""
    if isinstance(value, Weight):
        return value.shape
    return value if isinstance(value, tuple) else None


def is_data(value: Input) -> bool:
    return _data_shape(value) is not None


SHAPES: tuple[Shape, ...] = (
    (24,), (4, 24), (2, 4, 24), (1, 8, 6, 6), (1, 2, 4, 6, 6), (1, 2, 2, 2, 6, 6),
)  # fmt: skip
IMAGE: Shape = (1, 8, 6, 6)
FLOATS = ("float32", "float16")


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def any_rank(*more: Input, ranks: Sequence[int] = range(1, 7), **how: Any) -> tuple[Call, ...]:
    return tuple(Call((SHAPES[rank - 1], *more), **how) for rank in ranks)


def each(name: str, *values: Any, inputs: tuple[Input, ...] = (IMAGE,)) -> tuple[Call, ...]:
    return tuple(Call(inputs, {name: value}) for value in values)


def elementwise() -> dict[str, tuple[Call, ...]]:
    anywhere = (
        "Abs Asin Asinh Atan Ceil Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity "
        "IsInf IsNaN LeakyRelu Mish Neg Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus "
        "Softsign Swish Tan Tanh ThresholdedRelu Not BitwiseNot Celu Acos Atanh"
    )
    found = {op: any_rank(low=-0.9, high=0.9) for op in anywhere.split()}
    positive = {"Log": (0.1, 2), "Sqrt": (0.1, 2), "Reciprocal": (0.5, 2), "Acosh": (1.1, 3)}
    found |= {op: any_rank(low=low, high=high) for op, (low, high) in positive.items()}
    found["Gelu"] += each("approximate", "tanh")
    found["Clip"] = (
        *any_rank(Weight((), 0.0), Weight((), 6.0)),
        Call((IMAGE, Weight((), 0.0))),
        Call((IMAGE, None, Weight((), 6.0))),
    )
    found["Dropout"] = any_rank()
    return found


def pairs() -> dict[str, tuple[Call, ...]]:
    ops = (
        "Add Sub Mul Div And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual Mod Pow "
        "BitwiseAnd BitwiseOr BitwiseXor Max Min Mean Sum PRelu"
    )
    found: dict[str, tuple[Call, ...]] = {}
    for op in ops.split():
        how: dict[str, Any] = {"low": 0.5, "high": 2.0}
        how |= {"attributes": {"fmod": 1}, "types": FLOATS} if op == "Mod" else {}
        same = tuple(Call((shape, shape), **how) for shape in SHAPES)
        spread = (Call((IMAGE, Weight((8, 1, 1))), **how), Call((IMAGE, Weight(())), **how))
        found[op] = same + spread
    found["Mod"] += (Call((IMAGE, IMAGE), low=1, types=("int32", "int64", "uint8", "int8")),)
    found["BitShift"] = (Call((IMAGE, IMAGE), {"direction": "LEFT"}),)
    return found


def reductions() -> dict[str, tuple[Call, ...]]:
    found: dict[str, tuple[Call, ...]] = {}
    kinds = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
    for kind in kinds.split():
        how: dict[str, Any] = {"low": 0.5, "high": 1.5}
        last = any_rank(ints(-1), **how)
        image = Call((IMAGE, ints(2, 3)), {"keepdims": 0}, **how)
        found[f"Reduce{kind}"] = (*last, image, Call((IMAGE, ints(1)), {"keepdims": 1}, **how))
    for op in ("ArgMax", "ArgMin"):
        found[op] = tuple(Call((shape,), {"axis": -1}) for shape in SHAPES)
        found[op] += (Call((IMAGE,), {"axis": 1, "keepdims": 0}),)
    for op in ("Softmax", "LogSoftmax", "Hardmax", "LpNormalization"):
        found[op] = tuple(Call((shape,), {"axis": -1}) for shape in SHAPES)
        found[op] += each("axis", 1)
    found["CumSum"] = any_rank(np.array(0))
    found["CumProd"] = any_rank(np.array(0))
    found["TopK"] = tuple(Call((shape, ints(3)), outputs=2) for shape in SHAPES)
    return found
