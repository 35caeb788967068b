import numpy as np
import onnx
import pytest
from graphs import apply, model, normal, ops, relative, run
from onnxq.passes import Compose

X = {"x": normal(4, 16, scale=2.0)}
ERF = "e = Div (x, two) f = Erf (e) a = Add (f, one) m = Mul (x, a)"
TANH = """p = Pow (x, three) c = Mul (p, cube) s = Add (x, c) t = Mul (s, root) h = Tanh (t)
          a = Add (h, one) m = Mul (x, a)"""
NUMBERS = {
    "two": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5),
    "three": np.float32(3), "cube": np.float32(0.044715), "root": np.float32(np.sqrt(2 / np.pi)),
    "tiny": np.float32(1e-12), "large": np.float32(4),
}  # fmt: skip
NORM = "n = ReduceL2 <axes = [1], keepdims = 1> (x)"
FORMS = {
    "GELU by Erf": (f"{ERF} y = Mul (m, half)", ["Gelu"]),
    "GELU by Tanh": (f"{TANH} y = Mul (m, half)", ["Gelu"]),
    "norm": (f"{NORM} y = Div (x, n)", ["LpNormalization"]),
    "norm with a floor": (f"{NORM} c = Clip (n, tiny) y = Div (x, c)", ["LpNormalization"]),
    "norm of Max": (f"{NORM} c = Max (n, tiny) y = Div (x, c)", ["LpNormalization"]),
}
# What is not the function of that name, though it begins like it.
OTHERS = {
    "GELU without its half": f"{ERF} y = Relu (m)",
    "norm with a floor that matters": f"{NORM} c = Clip (n, large) y = Div (x, c)",
    "norm of something else": f"r = Relu (x) {NORM} y = Div (r, n)",
}


def written(body: str) -> onnx.ModelProto:
    used = {name: value for name, value in NUMBERS.items() if f"{name})" in body}
    return model(f"(float[4,16] x) => (float[4,16] y) {{ {body} }}", **used)


@pytest.mark.parametrize("form", FORMS)
def test_a_function_written_out_becomes_its_operator_and_says_the_same(form: str) -> None:
    body, left = FORMS[form]
    graph, changes, _ = apply(Compose(), written(body), target="qnn-htp")
    assert changes == 1
    assert ops(graph) == left
    assert relative(run(graph, X)["y"], run(written(body), X)["y"]) < 1e-5


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_another_function_stays(form: str) -> None:
    graph, changes, _ = apply(Compose(), written(OTHERS[form]), target="qnn-htp")
    assert changes == 0
    assert ops(graph) == ops(written(OTHERS[form]))


def test_a_target_without_the_operator_keeps_the_parts() -> None:
    body, _ = FORMS["GELU by Erf"]
    graph, changes, _ = apply(Compose(), written(body), target="cpu")
    assert changes == 0
    assert "Erf" in ops(graph)
