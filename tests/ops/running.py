"""Functions of `ai.onnxq` in ONNX Runtime, in every way that must give the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxq.ops import DOMAIN, FUNCTIONS, OPSET, VERSION, closure
from onnxq.ops.reference import REFERENCES
from onnxq.runtime import Session

Array = NDArray[Any]
Kind = tuple[np.dtype[Any], int | None]  # type, and rank if it is known


def proto(
    name: str,
    inputs: Sequence[Kind],
    output: Kind,
    constants: dict[str, Array],
    opset: int = OPSET,
    **attributes: int,
) -> onnx.ModelProto:
    """A model of one function; the inputs that are not among `constants` are its own."""
    names = FUNCTIONS[name].input
    infos = [_info(n, k) for n, k in zip(names, inputs, strict=True)]
    graph = helper.make_graph(
        [helper.make_node(name, names, ["result"], domain=DOMAIN, **attributes)],
        "g",
        [info for info in infos if info.name not in constants],
        [_info("result", output)],
        [numpy_helper.from_array(values, n) for n, values in constants.items()],
    )
    made = helper.make_model(
        graph,
        functions=closure([name], opset),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    return made


def _info(name: str, kind: Kind) -> onnx.ValueInfoProto:
    dtype, rank = kind
    dims = None if rank is None else [f"{name}_{k}" for k in range(rank)]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), dims)


def sessions(model: onnx.ModelProto) -> list[Session]:
    """Optimizations off and on, one thread and two."""
    return [
        Session(model, optimize=optimize, threads=threads)
        for optimize in (False, True)
        for threads in (1, 2)
    ]


@cache
def _sessions(
    name: str,
    inputs: tuple[np.dtype[Any], ...],
    output: np.dtype[Any],
    attributes: tuple[tuple[str, int], ...],
) -> list[Session]:
    kinds = [(dtype, None) for dtype in inputs]
    return sessions(proto(name, kinds, (output, None), {}, **dict(attributes)))


def assert_exact(name: str, *arguments: Any, **attributes: int) -> Array:
    """The function's result, in which the reference and every way to run it agree."""
    arrays = [np.asarray(a) for a in arguments]
    expected = REFERENCES[name](*arrays, **attributes)
    dtypes = tuple(a.dtype for a in arrays)
    feed = dict(zip(FUNCTIONS[name].input, arrays, strict=True))
    for session in _sessions(name, dtypes, expected.dtype, tuple(sorted(attributes.items()))):
        result = session.run(feed)["result"]
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)
    return expected
