"""Which operators of a model read or make floating-point numbers, functions and bodies included.

What stands at the border does not count: a QuantizeLinear of a model's input and a DequantizeLinear
to a model's output, each with a Cast to the type that the model has there. Nor does what asks for
no values: Shape and Size, and constants themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx.inliner
import onnx.shape_inference

from onnxq.tensors import bodies, graphs

_FLOATS = {
    getattr(onnx.TensorProto, name)
    for name in onnx.TensorProto.DataType.keys()  # noqa: SIM118 - no mapping
    if name.startswith(("FLOAT", "BFLOAT", "DOUBLE", "COMPLEX"))
}
_LARGE = 1 << 10  # bytes of an initializer beyond which its values say nothing about types
_NO_VALUES = ("Shape", "Size", "Constant")
_STANDARD = ("", "ai.onnx")

Types = Mapping[str, int]


@dataclass(frozen=True)
class FloatOperator:
    """A node by its name, or that of its first result where it has none; of a function the call."""

    name: str
    op: str


def float_operators(model: onnx.ModelProto) -> list[FloatOperator]:
    """The operators of a model that compute with floats, in the order of its nodes.

    An operator of unknown types counts if its schema takes no other, or if it has no schema.
    """
    return _Audit(_without_values(model)).run()


class _Audit:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = _inferred(model)
        self.opsets = {o.domain: o.version for o in model.opset_import}
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self._verdicts: dict[tuple[object, ...], bool] = {}

    def run(self) -> list[FloatOperator]:
        border = {node.output[0] for node in _border(self.model.graph)}
        return [
            FloatOperator(node.name or next(filter(None, node.output), ""), node.op_type)
            for node, types in _walk(self.model.graph, {})
            if not border & set(node.output) and self.is_float(node, types)
        ]

    def is_float(self, node: onnx.NodeProto, types: Types) -> bool:
        standard = node.domain in _STANDARD
        if standard and node.op_type in _NO_VALUES:
            return False
        known = [types.get(name, 0) for name in (*node.input, *node.output) if name]
        if any(kind in _FLOATS for kind in known):
            return True
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            return self._computes_floats(node, types)
        return not all(known) and not (standard and self._may_be_integer(node, types))

    def _computes_floats(self, node: onnx.NodeProto, types: Types) -> bool:
        """Whether some operator in the body of a function does, for a call with these types."""
        kinds = tuple(types.get(name, 0) if name else 0 for name in node.input)
        attributes = tuple(sorted(a.SerializeToString() for a in node.attribute))
        key = (node.domain, node.op_type, kinds, attributes)
        if key not in self._verdicts:
            inlined = _Audit(onnx.inliner.inline_local_functions(self._call(node, kinds)))
            self._verdicts[key] = any(
                inlined.is_float(part, known) for part, known in _walk(inlined.model.graph, {})
            )
        return self._verdicts[key]

    def _call(self, node: onnx.NodeProto, kinds: tuple[int, ...]) -> onnx.ModelProto:
        """A model of one call alone."""
        inputs = [
            onnx.helper.make_tensor_value_info(name, kind, None) if kind
            else onnx.ValueInfoProto(name=name)
            for name, kind in dict(zip(node.input, kinds, strict=True)).items() if name
        ]  # fmt: skip
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        return onnx.helper.make_model(
            onnx.helper.make_graph([node], "call", inputs, outputs),
            functions=self.model.functions,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
        )

    def _may_be_integer(self, node: onnx.NodeProto, types: Types) -> bool:
        """Whether its schema takes integers or the like wherever a type is unknown."""
        version = max(self.opsets.get(domain, 1) for domain in ("", "ai.onnx"))
        try:
            schema = onnx.defs.get_schema(node.op_type, version, "")
        except onnx.defs.SchemaError:
            return False
        for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for slot, name in enumerate(names):
                if name and not types.get(name) and formal:
                    allowed = formal[min(slot, len(formal) - 1)].types
                    if all("float" in kind or "double" in kind for kind in allowed):
                        return False
        return True


def _border(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Quantizers of inputs and dequantizers to outputs, with their Casts."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    entering = {value.name for value in graph.input}
    leaving = {value.name for value in graph.output}
    for node in graph.node:
        if node.domain not in _STANDARD:
            continue
        if node.op_type == "QuantizeLinear":
            maker = makers.get(node.input[0])
            if node.input[0] in entering:
                yield node
            elif maker is not None and maker.op_type == "Cast" and maker.input[0] in entering:
                yield from (node, maker)
        if node.op_type == "DequantizeLinear":
            casts = [n for n in readers.get(node.output[0], []) if n.op_type == "Cast"]
            last = [n for n in casts if n.output[0] in leaving]
            if last or node.output[0] in leaving:
                yield from (node, *last)


def _walk(graph: onnx.GraphProto, outside: Types) -> Iterator[tuple[onnx.NodeProto, Types]]:
    """Each node of a graph and its bodies with the types that are seen from it."""
    own = {tensor.name: tensor.data_type for tensor in graph.initializer}
    own |= {sparse.values.name: sparse.values.data_type for sparse in graph.sparse_initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if kind := _element(value.type):
            own[value.name] = kind
    types = {**outside, **own}
    for node in graph.node:
        yield node, types
        for attribute in node.attribute:
            for body in bodies(attribute):
                yield from _walk(body, types)


def _element(kind: onnx.TypeProto) -> int:
    """The element type of a tensor, or of the tensors in a sequence or an optional; 0: unknown."""
    which = kind.WhichOneof("value")
    if which in ("sequence_type", "optional_type"):
        return _element(getattr(kind, which).elem_type)
    if which in ("tensor_type", "sparse_tensor_type"):
        return int(getattr(kind, which).elem_type)
    return 0


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # of a model that contradicts itself; what is not known stays unknown
        return model


def _without_values(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with names, types and shapes of large initializers alone."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for graph in graphs(light):
        for tensor in graph.initializer:
            if tensor.ByteSize() > _LARGE:
                tensor.CopyFrom(
                    onnx.TensorProto(
                        name=tensor.name,
                        dims=tensor.dims,
                        data_type=tensor.data_type,
                        data_location=onnx.TensorProto.EXTERNAL,
                    )
                )
                tensor.external_data.add(key="location", value="left out")
    return light
