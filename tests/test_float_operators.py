"""What counts as floating-point arithmetic in a model, and what stands at its border."""

import numpy as np
import onnx
import pytest
from graphs import model, normal

from onnxq import ops
from onnxq.float_operators import float_operators

SCALE = {"s": np.float32(0.5), "z": np.uint8(3)}


def found(made: onnx.ModelProto) -> list[str]:
    return [each.op for each in float_operators(made)]


@pytest.mark.parametrize(
    ("kind", "enters", "leaves"),
    [
        ("float", "q = QuantizeLinear (x, s, z)", "y = DequantizeLinear (p, s, z)"),
        (
            "float16",
            "f = Cast <to = 1> (x) q = QuantizeLinear (f, s, z)",
            "d = DequantizeLinear (p, s, z) y = Cast <to = 10> (d)",
        ),
    ],
)
def test_quantizers_at_the_border_do_not_count(kind: str, enters: str, leaves: str) -> None:
    text = f"({kind}[n,4] x) => ({kind}[n,4] y) {{ {enters} p = Max (q, z) {leaves} }}"
    assert found(model(text, **SCALE)) == []


def test_quantizers_inside_a_model_count() -> None:
    text = """(float[n,4] x) => (float[n,4] y) {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        r = Relu (d)
        p = QuantizeLinear (r, s, z)
        y = DequantizeLinear (p, s, z)
    }"""
    assert found(model(text, **SCALE)) == ["DequantizeLinear", "Relu", "QuantizeLinear"]


def test_what_asks_for_a_shape_does_not_count() -> None:
    text = "(float[n,4] x) => (int64[k] y) { a = Shape (x) b = Size (x) y = Add (a, b) }"
    assert found(model(text)) == []


def test_a_cast_of_floats_into_integers_counts() -> None:
    text = "(float[n,4] x) => (int64[n,4] y) { y = Cast <to = 7> (x) }"
    assert found(model(text)) == ["Cast"]


def test_bodies_are_looked_into() -> None:
    text = """(uint8[n,4] x, bool choice) => (uint8[n,4] y) {
        y = If (choice) <
            then_branch = yes () => (uint8[n,4] a) { a = Max (x, z) },
            else_branch = no () => (uint8[n,4] b) {
                d = DequantizeLinear (x, s, z)
                b = QuantizeLinear (d, s, z)
            }
        >
    }"""
    assert found(model(text, **SCALE)) == ["DequantizeLinear", "QuantizeLinear"]


def function_model(body: str) -> onnx.ModelProto:
    made = model("(uint8[n,4] x) => (uint8[n,4] y) { y = Max (x) }")
    function = onnx.parser.parse_function(
        f'<domain: "some.where", opset_import: ["": 13]> F (a) => (b) {{ {body} }}'
    )
    made.functions.append(function)
    made.opset_import.add(domain="some.where", version=1)
    made.graph.node[0].op_type, made.graph.node[0].domain = "F", "some.where"
    return made


def test_functions_are_looked_into() -> None:
    assert found(function_model("c = Cast <to = 7> (a) b = Cast <to = 2> (c)")) == []
    assert found(function_model("c = Cast <to = 1> (a) b = Cast <to = 2> (c)")) == ["F"]


def test_functions_of_this_project_have_no_floats() -> None:
    for function in ops.FUNCTIONS.values():
        for node in function.node:
            for attribute in node.attribute:
                if attribute.name == "to":
                    assert attribute.i in (ops.function.INT64, ops.function.UINT64)


def test_operators_nobody_knows_count() -> None:
    made = model("(uint8[n,4] x) => (uint8[n,4] y) { y = Max (x) }")
    made.graph.node[0].domain = "some.where"
    made.opset_import.add(domain="some.where", version=1)
    made.graph.output[0].type.Clear()
    assert found(made) == ["Max"]


def test_float_constants_alone_make_an_operator_count() -> None:
    """QLinearConv and its kin requantize in float."""
    text = "(uint8[n,3,5,5] x) => (uint8[n,4,5,5] y) { y = QLinearConv (x, s, z, w, s, z, s, z) }"
    made = model(text, w=np.ones((4, 3, 1, 1), np.uint8), **SCALE)
    assert found(made) == ["QLinearConv"]


def test_large_weights_are_not_copied() -> None:
    made = model("(float[n,64] x) => (float[n,64] y) { y = MatMul (x, w) }", w=normal(64, 64))
    before = made.SerializeToString()
    assert found(made) == ["MatMul"]
    assert made.SerializeToString() == before
