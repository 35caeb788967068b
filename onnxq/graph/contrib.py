"""Standard operators in place of ONNX Runtime's own, of which ONNX's inference knows nothing."""

from __future__ import annotations

import onnx

from onnxq.graph.walk import CONTRIB
from onnxq.tensors import graphs

_LIKE_ITS_INPUT = {
    "BiasGelu", "FastGelu", "Gelu", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax",
    "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip
_LIKE = {  # the standard operator, and those of the inputs that it reads
    "QLinearAdd": ("Add", slice(0, 4, 3)),
    "QLinearMul": ("Mul", slice(0, 4, 3)),
    "QLinearAveragePool": ("AveragePool", slice(0, 1)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", slice(0, 1)),
    "FusedConv": ("Conv", slice(0, 2)),
    "QLinearConcat": ("Concat", slice(2, None, 3)),
}
_OF_SHAPES = {
    "auto_pad", "axis", "ceil_mode", "count_include_pad", "dilations", "group", "kernel_shape",
    "pads", "strides",
}  # fmt: skip


def use_stand_ins(model: onnx.ModelProto) -> None:
    """Put standard operators in the place of others. The model computes another thing after it."""
    for graph in graphs(model):
        for node in graph.node:
            if node.domain != CONTRIB:
                continue
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "MatMulNBits":
                size = attributes["K"], attributes["N"]
                weight = onnx.TensorProto(
                    name=f"weight of {node.name}", dims=size, data_type=onnx.TensorProto.FLOAT,
                    data_location=onnx.TensorProto.EXTERNAL,
                )  # fmt: skip
                model.graph.initializer.append(weight)
                _replace(node, "MatMul", [node.input[0], weight.name])
            elif node.op_type in _LIKE_ITS_INPUT:
                _replace(node, "Identity", [node.input[0]])
            elif node.op_type in _LIKE and not attributes.get("channels_last"):
                op, read = _LIKE[node.op_type]
                _replace(node, op, list(node.input)[read])


def _replace(node: onnx.NodeProto, op: str, inputs: list[str]) -> None:
    kept = [a for a in node.attribute if op != "Identity" and a.name in _OF_SHAPES]
    output = node.output[0]
    for field in ("attribute", "input", "output", "domain"):
        node.ClearField(field)
    node.op_type = op
    node.input.extend(inputs)
    node.output.append(output)
    node.attribute.extend(kept)
