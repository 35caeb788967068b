"""Operators on real numbers that have kernels in `native/`, and work without them: `OPERATORS`.

A session that has the library (`onnxq.ops.library_path()`) computes them there; any other by the
functions of standard operators that come with each model.
"""

from __future__ import annotations

import onnx

from onnxq.ops.accelerated.codebook import MATMUL_3, MATMUL_CODEBOOK
from onnxq.ops.accelerated.hadamard import HADAMARD_TRANSFORM
from onnxq.ops.accelerated.lattice import MATMUL_LATTICE
from onnxq.ops.accelerated.operator import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (MATMUL_CODEBOOK, MATMUL_3, MATMUL_LATTICE, HADAMARD_TRANSFORM)
}

for _operator in OPERATORS.values():  # so that ONNX's checker and shape inference know them
    onnx.defs.register_schema(_operator.schema)
