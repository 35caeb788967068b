"""The operators of `ai.onnxq`, as functions of standard ONNX operators.

`OPERATORS` multiply and rotate real numbers, and have kernels: see `accelerated`. `FUNCTIONS` are
integer arithmetic. Their codes are uint8 (narrow) or int32 tensors of 16-bit numbers (wide); they
compute in int64 and saturate to [low, high]. Zero points have their codes' type, shifts are uint64,
all other parameters int64; everything broadcasts. `reference` says, in exact arithmetic, what each
must give.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from onnxq.ops.accelerated import OPERATORS
from onnxq.ops.dyadic import dyadic
from onnxq.ops.elementwise import ELEMENTWISE
from onnxq.ops.fixed_point import FIXED_POINT, LIFT, MOST_SHIFT, UNIT_BITS
from onnxq.ops.function import DOMAIN, OPSET, VERSION
from onnxq.ops.library import library_path
from onnxq.ops.normalization import L2_BITS, NORMALIZATION
from onnxq.ops.transcendental import EXP_BITS, EXP_FRACTION, TRANSCENDENTAL

__all__ = [
    "DOMAIN",
    "EXP_BITS",
    "EXP_FRACTION",
    "FUNCTIONS",
    "L2_BITS",
    "LIFT",
    "METADATA",
    "MOST_SHIFT",
    "OPERATORS",
    "OPSET",
    "UNIT_BITS",
    "VERSION",
    "WITH_KERNELS",
    "closure",
    "dyadic",
    "library_path",
]

METADATA = "onnxq.operators"  # where a model names those of its operators that have kernels

FUNCTIONS: dict[str, onnx.FunctionProto] = {
    function.name: function
    for function in (*FIXED_POINT, *ELEMENTWISE, *TRANSCENDENTAL, *NORMALIZATION)
}

WITH_KERNELS = tuple((DOMAIN, name) for name in OPERATORS)

_ALL = FUNCTIONS | {
    function.name: function
    for operator in OPERATORS.values()
    for function in (operator.function, *operator.calls)
}


def closure(names: Iterable[str], opset: int = OPSET) -> list[onnx.FunctionProto]:
    """The functions of these names and those that they call, each after what it calls.

    `opset`, at least 21, is that of the model they go into: a checker wants both to be the same.
    """
    found: dict[str, onnx.FunctionProto] = {}

    def add(name: str) -> None:
        if name in found:
            return
        for node in _ALL[name].node:
            if node.domain == DOMAIN:
                add(node.op_type)
        found[name] = _at(_ALL[name], opset)

    for name in names:
        add(name)
    return list(found.values())


def _at(function: onnx.FunctionProto, opset: int) -> onnx.FunctionProto:
    copy = onnx.FunctionProto()
    copy.CopyFrom(function)
    for entry in copy.opset_import:
        if entry.domain == "":
            entry.version = opset
    return copy
