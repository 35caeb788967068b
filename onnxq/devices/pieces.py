"""A graph cut into pieces of one layer each, from codes to codes, that a provider can run alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import graph as g

Array = NDArray[Any]
_HEAVY = {
    "Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Attention", "MatMulNBits",
    "ConvInteger", "MatMulInteger", "MultiHeadAttention", "GroupQueryAttention",
}  # fmt: skip
_MOVES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Concat", "Split",
    "Identity", "Expand", "Gather", "Pad", "MaxPool", "DepthToSpace", "SpaceToDepth"}  # fmt: skip
_CODERS = ("QuantizeLinear", "DequantizeLinear")
_CODES = (np.int8, np.uint8, np.int16, np.uint16)


class Pieces:
    """The layers of a quantized graph, each named by the tensor it ends in, in order.

    A layer ends where codes are made, at a model's output, and where floats go into a Conv, MatMul
    or the like after they have come out of another.
    """

    def __init__(self, graph: g.Graph) -> None:
        self.graph = graph
        g.infer_types(graph)
        self.inputs = {t.name for t in graph.inputs}
        self._makers = {t.name: node for node in graph.nodes for t in node.outputs}
        self._moving = set(self.inputs)  # tensors that depend on the model's inputs
        heavy: set[str] = set()  # floats that came out of a heavy operator
        ends: set[str] = set()
        for node in graph.nodes:
            read = {t.name for t in node.inputs} & self._moving
            if not read:
                continue
            if node.op in _HEAVY:
                ends |= read & heavy
            behind = node.op in _HEAVY or bool((read & heavy) - ends)
            for tensor in node.outputs:
                self._moving.add(tensor.name)
                if _is_codes(tensor, node) or g.is_output(graph, tensor):
                    ends.add(tensor.name)
                elif behind:
                    heavy.add(tensor.name)
        order = {name: k for k, name in enumerate(self._makers)}
        self.names = sorted(ends, key=order.__getitem__)

    def feeds(self, name: str, deeper: bool = False) -> list[str]:
        """What a layer reads: ends of other layers, and inputs of the model.

        `deeper`: what it reads together with the layers that it reads.
        """
        ends = set(self.names) | self.inputs
        found, _ = self._behind(name, ends)
        if deeper:
            found = sorted(
                {n for f in found for n in ([f] if f in self.inputs else self._behind(f, ends)[0])}
            )
        return found

    def label(self, name: str) -> str:
        """The name of a layer's chief node: the one with weights, else the one before codes."""
        nodes = self._behind(name, set(self.names) | self.inputs)[1]
        chief = [n for n in nodes if n.op in _HEAVY] or [n for n in nodes if n.op not in _CODERS]
        return str((chief or nodes)[-1].name)

    def operators(self, name: str) -> list[str]:
        """The operators of a layer, without those that quantize."""
        nodes = self._behind(name, set(self.names) | self.inputs)[1]
        return [op for op in dict.fromkeys(n.op for n in nodes) if op not in _CODERS]

    def _behind(self, name: str, ends: set[str]) -> tuple[list[str], list[g.Node]]:
        """What a layer reads of `ends`, and its nodes in order."""
        found: set[str] = set()
        nodes: list[g.Node] = []
        seen, waiting = {name}, [name]
        while waiting:
            node = self._makers[waiting.pop()]
            nodes.append(node)
            for tensor in node.inputs:
                if tensor.name in seen or tensor.name not in self._moving:
                    continue
                seen.add(tensor.name)
                if tensor.name in ends:
                    found.add(tensor.name)
                else:
                    waiting.append(tensor.name)
        return sorted(found), nodes[::-1]

    def model(
        self, name: str, arrays: Mapping[str, Array], deeper: bool = False
    ) -> onnx.ModelProto:
        """A layer as a model of its own, of fixed shapes: those of `arrays`."""
        feeds = {n: arrays[n].dtype for n in self.feeds(name, deeper)}
        proto = g.to_proto(g.cut(self.graph, feeds, [name]))
        del proto.metadata_props[:]  # which may say that inputs stand for other numbers
        fix_shapes(proto, arrays)
        return proto


def _is_codes(tensor: gs.Tensor, node: g.Node) -> bool:
    made = g.dtype(tensor) in _CODES or node.op.startswith(("QLinear", "QGemm"))
    return made and node.op not in _MOVES


def fix_shapes(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> None:
    """Give inputs and outputs the types and shapes of these arrays: NPUs compile fixed shapes."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name in arrays:
            array = arrays[value.name]
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, array.shape))
