"""Inputs and outputs of a model that are codes, for hardware that has no floats at all.

What they stand for, real = scale · (code − zero), is in the model's metadata under `onnxq.codes`,
as JSON: {"input": {"scale": 0.0078, "zero": 128}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY = "onnxq.codes"


@dataclass(frozen=True)
class CodedValue:
    """The scale and zero point of an input or output."""

    scale: float
    zero: int

    def codes(self, real: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The nearest codes, as QuantizeLinear gives them."""
        limits = np.iinfo(dtype)
        steps = np.rint(real.astype(np.float32) / np.float32(self.scale)) + self.zero
        return np.clip(steps, limits.min, limits.max).astype(dtype)

    def real(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        centered = (codes.astype(np.int32) - self.zero).astype(np.float32)
        return centered * np.float32(self.scale)


def to_metadata(values: Mapping[str, CodedValue]) -> dict[str, str]:
    return {KEY: json.dumps({name: asdict(value) for name, value in values.items()})}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, CodedValue]:
    """By the name of the input or output; none of a model without such."""
    rows = json.loads(metadata.get(KEY, "{}"))
    return {name: CodedValue(**row) for name, row in rows.items()}
