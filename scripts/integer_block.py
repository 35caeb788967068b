"""One block of an integer model: its operators, their constants, what each gives for a sample."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

import onnxq
from onnxq.ops import DOMAIN, FUNCTIONS

Array = NDArray[Any]
MODELS = Path(__file__).parents[1] / "models"
MOVERS = ("Reshape", "Transpose", "Flatten")


@dataclass(frozen=True)
class Block:
    """The nodes whose results have names that begin with `prefix`, in order.

    `values` are the constants and, for one sample, what every node gave.
    """

    prefix: str
    nodes: list[onnx.NodeProto]
    constants: set[str]
    values: dict[str, Array]

    @classmethod
    def of(cls, name: str, prefix: str, sample: int) -> Block:
        """A block of models/<name>.onnx, quantized, on a calibration sample."""
        samples = MODELS / f"{name}.calib.npz"
        quantized = onnxq.quantize(
            MODELS / f"{name}.onnx", "integer-only", samples=samples, check=False, write=False
        )
        model = quantized.to_proto()
        with np.load(samples) as file:
            feed = {t.name: file[t.name][sample : sample + 1] for t in model.graph.input}
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        nodes = [node for node in model.graph.node if node.output[0].startswith(prefix)]
        wanted = {t for node in nodes for t in (*node.input, *node.output)} - constants.keys()
        values = constants | feed | _run(model, feed, wanted - feed.keys())
        return cls(prefix, nodes, set(constants), values)

    @cached_property
    def makers(self) -> dict[str, onnx.NodeProto]:
        return {node.output[0]: node for node in self.nodes}

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if tensor in node.input]

    def named(self, op: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type == op]

    def before(self, node: onnx.NodeProto, op: str) -> onnx.NodeProto:
        """The nearest operator of a kind before a node, along the first operands."""
        found = self.makers[node.input[0]]
        return found if found.op_type == op else self.before(found, op)

    def operands(self, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
        """Each operand's name in the operator's definition, and the tensor's."""
        if node.domain == DOMAIN:
            names = list(FUNCTIONS[node.op_type].input)
        else:
            names = [each.name for each in onnx.defs.get_schema(node.op_type).inputs]
        yield from zip(names, node.input, strict=False)

    def constant(self, node: onnx.NodeProto, operand: str) -> Array:
        return self.values[dict(self.operands(node))[operand]]

    def title(self, tensor: str) -> str:
        """The operator of the float model that a tensor is of, within the block or before it."""
        if tensor.startswith(self.prefix):
            whole = tensor.removeprefix(self.prefix).strip("/.")
        else:
            whole = tensor.rpartition("/")[2]
        return re.sub(r"_[A-Za-z]+_out(_\d+)?$", "", whole)

    def is_wide(self, tensor: str) -> bool:
        """Whether an int32 tensor holds codes of 16 bits, and not sums."""
        node = self.makers.get(tensor)
        if node is not None and node.op_type in MOVERS:
            return self.is_wide(node.input[0])
        return self.values[tensor].dtype == np.int32 and (node is None or node.domain == DOMAIN)

    def kind(self, tensor: str) -> str:
        """Type and shape, as in `u8 [1, 32, 8, 8]`."""
        value = self.values[tensor]
        name = "s16 in i32" if self.is_wide(tensor) else short(value.dtype)
        return f"{name} {list(value.shape)}"


def short(dtype: np.dtype[Any]) -> str:
    return f"{dtype.kind}{8 * dtype.itemsize}"


def _run(model: onnx.ModelProto, feed: dict[str, Array], wanted: set[str]) -> dict[str, Array]:
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    names = sorted(wanted)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(watched.SerializeToString(), options)
    return dict(zip(names, session.run(names, feed), strict=True))
