import numpy as np
import onnx
import pytest
from awkward import ZOO, constant_nodes, opset_11, tied
from graphs import apply, context, model, normal, ops, relative, run
from onnxq.passes import Normalize

from onnxq import graph as g

X = {"x": normal(3, 4)}
W = {"w": normal(4, 4), "s": np.array([4, 4]), "zero": np.float32(0)}

# (nodes, those left): each law by itself
LAWS = {
    "Constant value": ("c = Constant <value = float[4] {1,2,3,4}> () y = Add (x, c)", ["Add"]),
    "Constant float": ("c = Constant <value_float = 2.5> () y = Mul (x, c)", ["Mul"]),
    "Constant floats": ("c = Constant <value_floats = [2.5]> () y = Mul (x, c)", ["Mul"]),
    "Constant ints": ("c = Constant <value_ints = [4,3]> () y = Reshape (x, c)", ["Reshape"]),
    "Identity": ("i = Identity (x) y = Relu (i)", ["Relu"]),
    "Identity before the output": ("r = Relu (x) y = Identity (r)", ["Relu"]),
    "Identity of a weight": ("i = Identity (w) y = MatMul (x, i)", ["MatMul"]),
    "Dropout": ("r = Relu (x) d = Dropout (r) y = Relu (d)", ["Relu", "Relu"]),
    "Transpose": ("t = Transpose <perm = [1,0]> (w) y = MatMul (x, t)", ["MatMul"]),
    "Reshape": ("t = Reshape (w, s) y = MatMul (x, t)", ["MatMul"]),
    "Cast": ("t = Cast <to = 11> (w) u = Cast <to = 1> (t) y = MatMul (x, u)", ["MatMul"]),
    "chain": ("t = Transpose (w) i = Identity (t) u = Transpose (i) y = MatMul (x, u)", ["MatMul"]),
}  # fmt: skip
# What must not be touched, and why
KEPT = {
    "Identity between input and output": ("y = Identity (x)", ["Identity"]),
    "Transpose of an activation": ("y = Transpose (x)", ["Transpose"]),
    "Constant that is an output": ("y = Constant <value = float[1,1] {1}> ()", ["Constant"]),
    "Transpose of a weight that is an output": ("y = Transpose (w)", ["Transpose"]),
    "Dropout in training": (
        "t = Constant <value = bool {1}> () y = Dropout (x, zero, t)",
        ["Dropout"],
    ),
    "Dropout whose mask is read": (
        "d, m = Dropout (x) c = Cast <to = 1> (m) y = Add (d, c)",
        ["Dropout", "Cast", "Add"],
    ),
}


@pytest.mark.parametrize("law", LAWS | KEPT)
def test_each_law_by_itself(law: str) -> None:
    body, left = (LAWS | KEPT)[law]
    source = model(f"(float[3,4] x) => (float[a,b] y) {{ {body} }}", **W)
    expected = run(source, X)["y"]
    graph, changes, _ = apply(Normalize(), source)
    assert ops(graph) == left
    assert changes > 0 or law in KEPT
    np.testing.assert_array_equal(run(graph, X)["y"], expected)
    assert [t.name for t in graph.outputs] == ["y"]


@pytest.mark.parametrize("name", ZOO)
def test_the_function_stays_and_names_are_unique(name: str) -> None:
    case = ZOO[name]()
    graph, _, ctx = apply(Normalize(), case.model)
    assert graph.opset >= ctx.target.opset
    if "bfloat16" not in name:  # which the runtime knows only once it is float32
        for feed, expected in zip(case.feeds, case.expected(), strict=True):
            for key, values in run(graph, feed).items():
                assert relative(values, expected[key]) < 1e-5
    names = [node.name for node in g.walk(graph)]
    assert len(set(names)) == len(names)
    assert not {"Constant", "Dropout"} & set(ops(graph))


def test_weights_behind_constants_reshapes_and_transposes_are_weights_afterwards() -> None:
    for make in (constant_nodes, tied):
        graph, _, _ = apply(Normalize(), make().model)
        products = [node for node in graph.nodes if node.op in ("MatMul", "Gather")]
        assert products
        assert all(g.weight_view(node) is not None for node in products)


def test_opset_11_becomes_13() -> None:
    graph, changes, _ = apply(Normalize(), opset_11().model)
    made = g.to_proto(graph)
    assert made.opset_import[0].version == 13
    assert changes > 0
    squeeze = next(node for node in graph.nodes if node.op == "Squeeze")
    assert squeeze.inputs[1].values.tolist() == [2, 3]  # axes became an input in 13


@pytest.mark.parametrize(("least", "expected"), [(0, 13), (12, 13), (21, 21)])
def test_the_opset_rises_to_what_recipe_and_target_need(least: int, expected: int) -> None:
    case = opset_11()
    graph, _, _ = apply(Normalize(opset=least), case.model)
    assert g.to_proto(graph).opset_import[0].version == expected
    assert Normalize(opset=least).apply(graph, context()) == 0
    for feed in case.feeds:
        assert relative(run(graph, feed)["y"], run(case.model, feed)["y"]) < 1e-6


def test_a_constant_read_inside_a_body_is_an_initializer_outside() -> None:
    source = model("""(float[n,2] x, bool choice) => (float[n,2] y) {
        w = Constant <value = float[2,2] {1,2,3,4}> ()
        t = Transpose (w)
        y = If (choice) <
            then_branch = yes () => (float[n,2] a) { a = MatMul (x, t) },
            else_branch = no () => (float[n,2] b) { i = Identity (x) b = Relu (i) }
        >
    }""")
    graph, _, _ = apply(Normalize(), source)
    assert sorted(ops(graph)) == ["If", "MatMul", "Relu"]
    onnx.checker.check_model(g.to_proto(graph), full_check=True)
    x = normal(3, 2)
    for choice in (True, False):
        feed = {"x": x, "choice": np.array(choice)}
        assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-6


def test_what_two_branches_compute_alike_is_stored_once() -> None:
    text = """(float[n,64] x, bool choice) => (float[n,64] y) {
        y = If (choice) <
            then_branch = t () => (float[n,64] a) { v = Transpose (w) a = MatMul (x, v) },
            else_branch = e () => (float[n,64] b) {
                v = Transpose (w)
                m = MatMul (x, v)
                b = Neg (m)
            }
        >
    }"""
    graph, _, _ = apply(Normalize(), model(text, w=normal(64, 64)))
    assert [len(t.dims) for t in g.to_proto(graph).graph.initializer].count(2) == 1
    assert g.to_proto(graph).ByteSize() < 1.5 * 4 * 64 * 64


BRANCHES = {
    "a constant": "known = Constant <value = bool {1}> () y = If (known) <BODIES>",
    "a shape": (
        "size = Shape (x) rows = Gather (size, zero) known = Equal (rows, three) "
        "y = If (known) <BODIES>"
    ),
    "inside, read by a body": (
        "known = Constant <value = bool {0}> () h = If (known) <BODIES> "
        "y = If (choice) <then_branch = t () => (float[3,4] p) { p = Relu (h) }, "
        "else_branch = e () => (float[3,4] q) { q = Neg (h) }>"
    ),
    "in a branch that is taken": (
        "known = Constant <value = bool {1}> () y = If (known) <"
        "then_branch = t () => (float[3,4] p) { h = If (known) <BODIES> p = Relu (h) }, "
        "else_branch = e () => (float[3,4] q) { q = Neg (x) }>"
    ),
}
BODIES = {
    "layers": ("p = MatMul (x, w)", "q = MatMul (x, v)"),
    "constants of one name": (
        "k = Constant <value = float {2}> () p = Mul (x, k)",
        "k = Constant <value = float {3}> () q = Mul (x, k)",
    ),
    "what stands outside": ("p = Identity (x)", "q = Identity (x)"),
}


@pytest.mark.parametrize("bodies", BODIES)
@pytest.mark.parametrize("condition", BRANCHES)
def test_a_branch_that_is_always_taken_takes_the_place_of_its_if(
    condition: str, bodies: str
) -> None:
    then, other = BODIES[bodies]
    branches = (
        f"then_branch = yes () => (float[3,4] p) {{ {then} }}, "
        f"else_branch = no () => (float[3,4] q) {{ {other} }}"
    )
    text = BRANCHES[condition].replace("BODIES", branches)
    values = {"v": normal(4, 4, seed=1), "zero": np.array(0), "three": np.array(3)}
    source = model(
        f"(float[3,4] x, bool choice) => (float[3,4] y) {{ {text} }}", w=normal(4, 4), **values
    )
    graph, changes, _ = apply(Normalize(), source)
    assert changes > 0
    assert ops(graph).count("If") == (condition == "inside, read by a body")
    assert [tuple(t.shape) for t in graph.inputs] == [(3, 4), ()]
    for choice in (True, False):
        feed = X | {"choice": np.array(choice)}
        np.testing.assert_array_equal(run(graph, feed)["y"], run(source, feed)["y"])


def test_a_branch_that_depends_on_a_size_that_has_but_a_name_stays() -> None:
    text = """(float[n,4] x) => (float[n,4] y) {
        size = Shape (x) rows = Gather (size, zero) known = Equal (rows, three)
        y = If (known) <
            then_branch = yes () => (float[n,4] p) { p = Relu (x) },
            else_branch = no () => (float[n,4] q) { q = Neg (x) }
        >
    }"""
    source = model(text, zero=np.array(0), three=np.array(3))
    graph, _, _ = apply(Normalize(), source)
    assert "If" in ops(graph)
    assert list(graph.inputs[0].shape) == ["n", 4]
