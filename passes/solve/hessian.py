"""What rounding algorithms share: the error that a layer's output sees, and room for each code.

Matrices come as the layer's groups see them: W, codes and scales (groups, rows, in) for H
(groups, in, in). Errors are of one row each: dHdᵀ, the mean square of x dᵀ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.qtype import Floats, QTensor, QType, spread
from onnxq.solver import Layer

Array = NDArray[Any]  # float32


class Codes(NamedTuple):
    """A quantized weight in float32, (groups, rows, in) each: ŵ = scale · (codes − zero)."""

    codes: Array
    scale: Array
    zero: Array

    @property
    def real(self) -> Array:
        return (self.codes - self.zero) * self.scale


def by_group(q: QTensor, groups: int) -> Codes:
    shape = (groups, -1, q.codes.shape[1])
    scale, zero = (spread(a, q.codes.shape, q.qtype.group) for a in (q.scale, q.zero))
    whole = [
        np.broadcast_to(np.asarray(a, np.float32), q.codes.shape).reshape(shape)
        for a in (q.codes, scale, zero)
    ]
    return Codes(*whole)


def refuse_float8(layer: Layer, name: str) -> None:
    """For what learns which of two neighbouring integers a weight becomes."""
    if layer.qtype.float8:
        raise OnnxqError(
            f"{name} is for integers; for FP8 use the pass 'gptq' or 'coordinate-descent'"
        )


def from_groups(codes: Array, qtype: QType) -> NDArray[np.generic]:
    """Codes (out, in) in the format's own type."""
    return codes.reshape(-1, codes.shape[2]).astype(qtype.dtype)


def output_error(difference: Floats, hessian: Array) -> Array:
    """dHdᵀ for every row of W − Ŵ: (groups, rows)."""
    return np.asarray(np.sum((difference @ hessian) * difference, axis=2))


def started(layer: Layer) -> QTensor:
    if not isinstance(layer.start, QTensor):
        raise OnnxqError(
            "rounding can only be improved where there is one: put the pass 'round-to-nearest' "
            "before this one in the recipe"
        )
    return layer.start
