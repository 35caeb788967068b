"""An operator that has kernels: what it takes, and what it means in NumPy and in ONNX itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx.defs import OpSchema

from onnxq.ops.function import DOMAIN, VERSION

Array = NDArray[Any]
Shape = tuple[int | str | None, ...]
OPTIONAL = OpSchema.FormalParameterOption.Optional


@dataclass(frozen=True)
class Operator:
    """`function` computes it with standard operators where no kernel is registered, all inputs
    given, in float32; `reference` in float64, from the equation alone. `calls` are the functions
    that `function` calls, each after what it calls itself.
    """

    schema: OpSchema
    function: onnx.FunctionProto
    reference: Callable[..., Array]
    calls: tuple[onnx.FunctionProto, ...] = ()

    @property
    def name(self) -> str:
        return str(self.schema.name)


def schema(
    function: onnx.FunctionProto,
    inputs: Sequence[OpSchema.FormalParameter],
    types: Mapping[str, Sequence[str]],
    shape: Callable[[list[Shape | None]], Shape | None],
    attributes: Sequence[OpSchema.Attribute],
) -> OpSchema:
    """The schema of a function whose one output y has the type T of its first input.

    `types` are the element types that each of the `inputs`' type variables may have, `shape` says
    that of y from those of the inputs, None where one is not known.
    """
    made = OpSchema(
        function.name,
        DOMAIN,
        VERSION,
        function.doc_string,
        inputs=list(inputs),
        outputs=[OpSchema.FormalParameter("y", "T", "the result")],
        type_constraints=[
            (name, [f"tensor({kind})" for kind in kinds], "") for name, kinds in types.items()
        ],
        attributes=list(attributes),
    )

    def infer(context: Any) -> None:
        given = [context.get_input_type(k) for k in range(context.get_num_inputs())]
        found = shape([_shape(value) for value in given])
        kind = given[0].tensor_type.elem_type
        context.set_output_type(0, onnx.helper.make_tensor_type_proto(kind, found))

    made.set_type_and_shape_inference_function(infer)
    return made


def _shape(value: onnx.TypeProto | None) -> Shape | None:
    if value is None or not value.tensor_type.HasField("shape"):
        return None
    dims = value.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims)
