"""Codes as inputs and outputs: the QuantizeLinear and DequantizeLinear at the borders go away."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import graph as g
from onnxq.coded_io import CodedValue, to_metadata
from onnxq.graph import Graph, Node


def give_codes(graph: Graph) -> None:
    """Every input that is read as codes alone becomes codes, and every output that is made of them.

    Wide ones are int16 at an input and int32 at an output. The metadata tells what they stand for.
    """
    coded: dict[str, CodedValue] = {}
    for tensor in graph.inputs:
        readers = list(tensor.outputs)
        if len(readers) == 1 and readers[0].op == "Cast":  # from another float type
            readers = list(readers[0].outputs[0].outputs)
        if len(readers) == 1 and readers[0].op == "QuantizeLinear" and g.is_float(tensor):
            value = _value(readers[0])
            tensor.dtype = readers[0].inputs[2].dtype
            codes = readers[0].outputs[0]
            for reader in list(codes.outputs):
                g.replace_input(reader, codes, tensor)
            coded[tensor.name] = value
    for tensor in graph.outputs:
        maker = g.producer(tensor)
        if maker is not None and maker.op == "Cast":
            maker = g.producer(maker.inputs[0])
        if maker is not None and maker.op == "DequantizeLinear" and not tensor.outputs:
            coded[tensor.name] = _value(maker)
            _make(graph, maker.inputs[0], tensor)
    g.tidy(graph)
    g.set_metadata(graph, to_metadata(coded))


def _make(graph: Graph, codes: gs.Variable, output: gs.Variable) -> None:
    """Let what makes the codes make the output instead; of other outputs or inputs, a copy."""
    output.inputs.clear()
    output.dtype = codes.dtype
    if not codes.inputs or g.is_output(graph, codes):
        name = g.Namer(graph)(f"{output.name}_Identity")
        graph.nodes.append(gs.Node("Identity", name, {}, [codes], [output]))
        return
    maker = codes.inputs[0]
    maker.outputs[maker.outputs.index(codes)] = output
    for reader in list(codes.outputs):
        g.replace_input(reader, codes, output)


def _value(node: Node) -> CodedValue:
    zero = node.inputs[2].values if len(node.inputs) > 2 else np.zeros(())
    return CodedValue(float(node.inputs[1].values), int(zero))
