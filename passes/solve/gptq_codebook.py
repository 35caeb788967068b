"""GPTQ for weights that have a table: see `gptq`, of which only the rounding differs.

Each column goes to the level nearest to w + f under the scale of its block, the levels as they are.
Scales are refitted to the codes in between, as the layer's output sees them (see `refit_scales`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from onnxq.passes.solve.gptq import Columns, feedback
from onnxq.passes.solve.hessian import Array, Codes, output_error
from onnxq.passes.solve.refit_scales import refit_scales

from onnxq.codebook import CodebookTensor, ScaleCodes, nearest
from onnxq.errors import OnnxqError
from onnxq.qtype import spread
from onnxq.solver import CodebookSolver, Layer


@dataclass(frozen=True)
class GPTQCodebook(CodebookSolver):
    """Better codes, and `rounds` - 1 times better scales, for weights that have a table.

    `damping` is λ.
    """

    damping: float = 0.01
    rounds: int = 3
    name: ClassVar[str] = "gptq-codebook"

    def solve(self, layer: Layer) -> CodebookTensor:
        return gptq_codebook(layer, self.damping, self.rounds)


def gptq_codebook(layer: Layer, damping: float = 0.01, rounds: int = 3) -> CodebookTensor:
    """A weight with a table, whose error is at most that of `layer.start` in every row."""
    best = layer.start
    if not isinstance(best, CodebookTensor):
        raise OnnxqError("put the pass 'codebook' before 'gptq-codebook' in the recipe")
    (hessian,) = layer.hessian
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    fed = feedback(hessian, order, damping)
    error = row_error(layer.weight, best, hessian)
    tried = best
    for number in range(rounds):
        if number:
            refitted = _refitted(layer.weight, tried, hessian)
            if refitted is None:
                break
            tried = refitted
        tried = replace(tried, codes=_propagated(layer, tried, fed, order))
        now = row_error(layer.weight, tried, hessian)
        better = now < error
        best, error = _rows(better, tried, best), np.where(better, now, error)
    return best


def row_error(weight: Array, q: CodebookTensor, hessian: Array) -> Array:
    """dHdᵀ of each row, (out,)."""
    return output_error((weight - q.dequantize())[None], hessian[None])[0]


@dataclass
class LevelColumns(Columns):
    """Columns that are rounded to levels, ascending."""

    levels: Array

    def round(self, k: int) -> None:
        scale = self.scale[k]
        codes = nearest(self.target[k] / np.where(scale == 0, 1, scale), self.levels)
        self.codes[k] = codes
        self.error[k] = self.weight[k] - self.levels[codes] * scale


def _propagated(
    layer: Layer, q: CodebookTensor, fed: Array, order: Array
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    scale = spread(q.scales, q.codes.shape, q.group)
    weight, scale = (np.ascontiguousarray(a.T[order]) for a in (layer.weight, scale))
    zero = np.zeros_like(scale[:1])
    columns = LevelColumns(weight, scale, zero, fed, order, layer, q.levels.astype(np.float32))
    columns.solve(0, len(order))
    codes = np.empty(q.codes.shape, np.uint8)
    codes[:, order] = columns.codes.T
    return codes


def _refitted(weight: Array, q: CodebookTensor, hessian: Array) -> CodebookTensor | None:
    """With the best scales for its codes; None where they have only 8 bits."""
    if isinstance(q.scale, ScaleCodes):
        return None
    levels = q.levels.astype(np.float32)[q.codes]
    scale = spread(q.scale, q.codes.shape, q.group)
    now = Codes(levels[None], scale[None], np.zeros((1, 1, 1), np.float32))
    return replace(q, scale=refit_scales(weight[None], now, hessian[None], q.scale, q.group))


def _rows(better: Array, q: CodebookTensor, other: CodebookTensor) -> CodebookTensor:
    """The rows of `q` where they are better, else those of `other`."""
    chosen = better[:, None]
    codes = np.where(chosen, q.codes, other.codes)
    if isinstance(q.scale, ScaleCodes) or isinstance(other.scale, ScaleCodes):
        return replace(q, codes=codes)
    return replace(q, codes=codes, scale=np.where(chosen, q.scale, other.scale))
