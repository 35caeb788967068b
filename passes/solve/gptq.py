"""Codes chosen column after column, the weights yet to come making up for what each one loses.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", in the form of Chee et al. 2023, "QuIP: 2-Bit Quantization of Large Language Models
With Guarantees", §3.1 (LDLQ): it gives the same codes and needs no inverse. With

    H + λ mean(diag H) I = R Rᵀ,    R (in, in) upper triangular,

what a row's error d = w − ŵ costs is a sum over columns,

    d H dᵀ = Σ_k R_kk² (d_k + f_k)²,    f_k = Σ_{j<k} d_j F_jk,    F_jk = R_jk / R_kk,

of which each term is least, the codes before it given, at the code nearest to w_k + f_k.

Columns go by falling H_kk (activation order), so that those which matter most are free of what
others lose. Scales and zero points stay those of the columns' own blocks ("static groups"): the
order leaves no trace in the result. Where a bound on pairs holds, the later code of a pair keeps
it. A row that ends no better than it came keeps its codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from onnxq.passes.solve.hessian import Array, by_group, from_groups, output_error, started

from onnxq.qtype import QTensor, nearest
from onnxq.solver import Layer, WeightSolver


@dataclass(frozen=True)
class GPTQ(WeightSolver):
    """Better codes for every weight that has some. `damping` is λ."""

    damping: float = 0.01
    name: ClassVar[str] = "gptq"

    def solve(self, layer: Layer) -> QTensor:
        return gptq(layer, self.damping)


def gptq(layer: Layer, damping: float = 0.01) -> QTensor:
    """A weight with codes, whose error is at most that of `layer.start` in every row.

    What W and H are, float32 or float64, it computes in.
    """
    begun, hessian = started(layer), layer.hessian
    start = by_group(begun, len(hessian))
    weight = layer.weight.reshape(start.codes.shape)
    codes = np.empty_like(start.codes)
    for group, h in enumerate(hessian):
        order = np.argsort(-np.diagonal(h), kind="stable")
        w, scale, zero = (
            np.ascontiguousarray(a[group].T[order]) for a in (weight, start.scale, start.zero)
        )
        columns = Columns(w, scale, zero, feedback(h, order, damping), order, layer)
        columns.solve(0, len(order))
        codes[group, :, order] = columns.codes
    before = output_error(weight - start.real, hessian)
    after = output_error(weight - start._replace(codes=codes).real, hessian)
    kept = np.where((after < before)[:, :, None], codes, start.codes)
    return replace(begun, codes=from_groups(kept, layer.qtype))


def feedback(hessian: Array, order: Array, damping: float) -> Array:
    """F (in, in), strictly upper triangular, of the columns in this order.

    Where rounding leaves H without a factor, float64 and at last more damping give it one.
    """
    size = len(hessian)
    back = order[::-1]  # the lower factor of the columns from last to first is R, turned round
    damped = hessian[np.ix_(back, back)]
    diagonal = np.einsum("ii->i", damped)
    mean = float(diagonal.mean()) or 1.0
    diagonal += damping * mean
    while True:
        try:
            factor = np.linalg.cholesky(damped)[::-1, ::-1]
            break
        except np.linalg.LinAlgError:
            if damped.dtype == np.float64:
                damping = max(10 * damping, 1e-6)
                np.einsum("ii->i", damped)[:] += damping * mean
            damped = damped.astype(np.float64)
    found = np.asarray(factor / np.diagonal(factor), hessian.dtype)
    found[np.arange(size), np.arange(size)] = 0
    return found


@dataclass
class Columns:
    """Columns (in, rows) of one group in the order in which they are solved."""

    weight: Array
    scale: Array
    zero: Array
    feedback: Array
    order: Array
    layer: Layer
    target: Array = field(init=False)  # w + f
    error: Array = field(init=False)  # d
    codes: Array = field(init=False)
    place: Array = field(init=False)  # where in the order each column is

    def __post_init__(self) -> None:
        self.target, self.error = self.weight.copy(), np.empty_like(self.weight)
        self.codes = np.empty_like(self.scale)
        self.place = np.argsort(self.order)

    def solve(self, first: int, last: int) -> None:
        """Codes of a range of columns: those of its first half, what they feed on, the rest.

        Halving makes most of the work products of large matrices, and the rest stay in the cache.
        """
        if last - first == 1:
            return self.round(first)
        middle = (first + last) // 2
        self.solve(first, middle)
        feed = self.feedback[first:middle, middle:last]
        self.target[middle:last] += feed.T @ self.error[first:middle]
        self.solve(middle, last)

    def round(self, k: int) -> None:
        qtype, limit = self.layer.qtype, self.layer.pair_limit
        codes = nearest(self.target[k] / self.scale[k], qtype, self.zero[k])
        partner = self.order[k] ^ 1
        if limit is not None and partner < len(self.order) and (at := self.place[partner]) < k:
            codes = np.clip(codes, -limit - self.codes[at], limit - self.codes[at])
        self.codes[k] = codes
        self.error[k] = self.weight[k] - (codes - self.zero[k]) * self.scale[k]
