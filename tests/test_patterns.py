import numpy as np
import onnx
import pytest
from graphs import MODELS, context, feeds_of, model, normal, pipeline
from onnxq.passes import FoldBatchNorm, Normalize

from onnxq import graph as g
from onnxq.graph.patterns import Pattern, find, inside, projections

SIZE = 8
NUMBERS = {
    "two": 2, "three": 3, "half": 0.5, "one": 1, "eps": 1e-5, "root2": 2**0.5, "inv": 0.5**0.5,
    "k": (2 / np.pi) ** 0.5, "cube": 0.044715, "fast": 1.702, "minus": -0.5, "other": 1.3,
}  # fmt: skip
VECTORS = {"gain": normal(SIZE, seed=1), "bias": normal(SIZE, seed=2)}
CENTRE = "m = ReduceMean <axes = [-1]> (x) d = Sub (x, m)"
VARIANCE = "v = ReduceMean <axes = [-1]> (s) e = Add (v, eps) r = Sqrt (e)"
ERF = "a = Div (x, root2) f = Erf (a)"
SQUARES = ["s = Pow (z, two)", "s = Mul (z, z)"]
FORMS: list[tuple[str, str]] = [
    *[("layernorm", f"{CENTRE} {s.replace('z', 'd')} {VARIANCE} n = Div (d, r) "
       "h = Mul (n, gain) y = Add (h, bias)") for s in SQUARES],
    ("layernorm", f"{CENTRE} m2 = ReduceMean <axes = [-1]> (x) d2 = Sub (x, m2) s = Pow (d2, two) "
     f"{VARIANCE} n = Div (d, r) h = Mul (gain, n) y = Add (bias, h)"),
    *[("rmsnorm", f"{s.replace('z', 'x')} {VARIANCE} n = Div (x, r) y = Mul (gain, n)")
      for s in SQUARES],
    ("rmsnorm", f"s = Pow (x, two) {VARIANCE} i = Reciprocal (r) n = Mul (i, x) y = Mul (n, gain)"),
    ("rmsnorm", f"s = Mul (x, x) {VARIANCE} i = Div (one, r) n = Mul (x, i) y = Mul (n, gain)"),
    ("rmsnorm", "s = Mul (x, x) v = ReduceMean <axes = [-1]> (s) e = Add (eps, v) "
     "i = Pow (e, minus) n = Mul (x, i) y = Mul (n, gain)"),
    ("gelu", f"{ERF} b = Add (f, one) c = Mul (x, b) y = Mul (c, half)"),
    ("gelu", f"{ERF} b = Add (one, f) c = Mul (half, x) y = Mul (b, c)"),
    ("gelu", f"{ERF} b = Add (f, one) c = Mul (half, b) y = Mul (x, c)"),
    ("gelu", "a = Mul (inv, x) f = Erf (a) b = Add (f, one) y = Mul (b, x)"),
    ("gelu", "p = Pow (x, three) q = Mul (p, cube) u = Add (x, q) t = Mul (k, u) f = Tanh (t) "
     "b = Add (f, one) c = Mul (x, half) y = Mul (c, b)"),
    ("gelu", "a = Mul (x, fast) f = Sigmoid (a) y = Mul (f, x)"),
    ("silu", "f = Sigmoid (x) y = Mul (x, f)"),
    ("attention", "q = MatMul (x, w) t = Transpose <perm = [1,0]> (x) s = MatMul (q, t) "
     "e = Div (s, two) p = Softmax (e) y = MatMul (p, x)"),
    ("rotary", "a, b = Split <axis = -1> (x) n = Neg (b) h = Concat <axis = -1> (n, a) "
     "c = Cos (x) s = Sin (x) u = Mul (x, c) v = Mul (h, s) y = Add (u, v)"),
]  # fmt: skip
NOT = [
    "a = Div (x, other) f = Erf (a) b = Add (f, one) y = Mul (x, b)",
    "f = Sigmoid (x) z = Neg (x) y = Mul (z, f)",
    f"{CENTRE} s = Pow (d, three) {VARIANCE} y = Div (d, r)",
    f"s = Mul (x, x) {VARIANCE} z = Neg (x) y = Div (z, r)",
    "s = MatMul (x, w) p = Softmax (s) y = MatMul (p, w)",  # a layer's output, no scores
]


def made(body: str) -> g.Graph:
    weights = {k: np.float32(v) for k, v in NUMBERS.items()} | VECTORS
    weights |= {"w": normal(SIZE, SIZE, seed=3)}
    used = {k: v for k, v in weights.items() if k in body.replace("(", " ").replace(",", " ")
            .replace(")", " ").split()}  # fmt: skip
    return g.load(
        model(f"(float[{SIZE},{SIZE}] x) => (float[{SIZE},{SIZE}] y) {{ {body} }}", **used)
    )


@pytest.mark.parametrize(("kind", "body"), FORMS)
def test_every_exported_form_is_recognised(kind: str, body: str) -> None:
    (pattern,) = find(made(body))
    assert (pattern.kind, pattern.output.name) == (kind, "y")
    assert pattern.input.name == ("s" if kind == "attention" else "x")
    if kind in ("layernorm", "rmsnorm"):
        assert pattern.gain is not None
        np.testing.assert_array_equal(g.values(pattern.gain), VECTORS["gain"])
        assert (pattern.bias is None) == (kind == "rmsnorm")


@pytest.mark.parametrize("body", NOT)
def test_what_computes_something_else_is_not(body: str) -> None:
    assert find(made(body)) == []


def test_a_pattern_holds_all_nodes_that_lie_between_its_ends() -> None:
    graph = made(FORMS[0][1])
    (pattern,) = find(graph)
    assert {id(n) for n in pattern.nodes} == {id(n) for n in graph.nodes}
    assert set(inside([pattern]).values()) == {"layernorm"}
    assert len(inside([pattern])) == len(graph.nodes)


def test_fused_operators_and_bodies_count_too() -> None:
    source = model(
        """(float[n,8] x, bool choice) => (float[n,8] y) {
        y = If (choice) <
            then_branch = yes () => (float[n,8] a) { a = LayerNormalization (x, gain, bias) },
            else_branch = no () => (float[n,8] b) { b = Gelu (x) }
        > }""",
        opset=20,
        **VECTORS,
    )
    found = find(g.load(source))
    assert sorted(p.kind for p in found) == ["gelu", "layernorm"]
    (norm,) = (p for p in found if p.kind == "layernorm")
    assert norm.gain is not None
    assert norm.bias is not None


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("encoder_classifier", {"layernorm": 7, "gelu": 3, "attention": 3}),
        ("decoder_lm", {"rmsnorm": 9, "silu": 4, "attention": 4, "rotary": 8}),
    ],
)
def test_trained_transformers(name: str, counts: dict[str, int]) -> None:
    graph = g.load(onnx.load(MODELS / f"{name}.onnx"))
    for step in (Normalize(), FoldBatchNorm()):
        step.apply(graph, context())
    found: list[Pattern] = find(graph)
    assert {kind: sum(p.kind == kind for p in found) for kind in counts} == counts
    assert len(found) == sum(counts.values())
    assert not any(node.op == "MatMul" for node in graph.nodes if node.name in inside(found))


LAYER_OF_A_TRANSFORMER = """(float[n,l,16] x) => (float[n,l,16] y) {
    q = MatMul (x, w1) k = MatMul (x, w2) v = MatMul (x, w3)
    t = Transpose <perm = [0,2,1]> (k)
    s = MatMul (q, t) d = Div (s, four) p = Softmax <axis = -1> (d) c = MatMul (p, v)
    o = MatMul (c, w4)
    h = Add (o, x)
    u = MatMul (h, w5) r = Relu (u) f = MatMul (r, w6)
    y = Add (f, h)
}"""


def test_the_layers_of_attention_are_those_before_and_behind_it() -> None:
    weights = {f"w{k}": normal(16, 16, seed=k) for k in range(1, 7)}
    source = model(LAYER_OF_A_TRANSFORMER, four=np.float32(4), **weights)
    graph = g.load(source)
    maker = {node.outputs[0].name: node.name for node in graph.nodes}
    assert projections(find(graph)) == {maker[name] for name in "qkvo"}
    result = pipeline(source, feeds_of(8, x=(2, 5, 16)), "int4-feedforward")
    assert set(result.context.weights) == {"w5", "w6"}
    assert [node.op for node in result.graph.nodes].count("MatMulNBits") == 2
