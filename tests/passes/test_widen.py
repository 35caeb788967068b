from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from awkward import ZOO, bfloat16, double, float16, float16_body, mixed_types
from graphs import Array, apply, context, model, normal, ops, relative, run
from onnxq.passes import Widen

from onnxq import graph as g

F16, BF16 = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
HALF = np.float16
NARROW = (np.dtype(HALF), np.dtype(ml_dtypes.bfloat16))
X = {"x": normal(2, 4).astype(HALF)}


def half(*shape: int, seed: int = 0) -> Array:
    return normal(*shape, seed=seed).astype(HALF)


def widened(source: onnx.ModelProto) -> g.Graph:
    """Through the pass, which leaves a model that is right, and changes nothing a second time."""
    graph, changes, _ = apply(Widen(), source)
    assert changes > 0
    made = g.to_proto(graph)
    assert Widen().apply(graph, context()) == 0
    assert g.to_proto(graph).SerializeToString(deterministic=True) == made.SerializeToString(
        deterministic=True
    )
    onnx.checker.check_model(made, full_check=not custom_nodes(made))
    return graph


def custom_nodes(made: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in made.graph.node if node.domain == "mine"]


def types_inside(graph: g.Graph) -> dict[str, Any]:
    """Of all that is not an input or output of the model."""
    g.infer_types(graph)
    border = {t.name for t in (*graph.inputs, *graph.outputs)}
    return {name: g.dtype(t) for name, t in g.tensors(graph).items() if name not in border}


def assert_wide(graph: g.Graph) -> None:
    narrow = [name for name, kind in types_inside(graph).items() if kind in NARROW]
    assert not narrow
    codes = [
        value for body in g.subgraphs(graph) for node in body.nodes
        for key, value in node.attrs.items() if key in ("to", "dtype")
        if not any(g.is_output(graph, t) for t in node.outputs)
    ]  # fmt: skip
    assert F16 not in codes
    assert BF16 not in codes


# ── float16 and bfloat16 ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [float16, float16_body, bfloat16, mixed_types])
def test_all_is_float32_but_the_inputs_and_outputs(make: Any) -> None:
    source = make().model
    graph = widened(source)
    assert_wide(graph)
    made = g.to_proto(graph)
    for before, after in ((source.graph.input, made.graph.input),
                          (source.graph.output, made.graph.output)):  # fmt: skip
        assert list(before) == list(after)
    for tensor in graph.outputs:
        assert g.dtype(tensor) not in NARROW or g.producer(tensor).op == "Cast"


@pytest.mark.parametrize("make", [float16, float16_body, mixed_types])
def test_the_function_stays_but_for_the_roundings(make: Any) -> None:
    case = make()
    graph = widened(case.model)
    for feed in case.feeds:
        for key, values in run(case.model, feed).items():
            found = run(graph, feed)[key]
            assert found.dtype == values.dtype
            assert relative(found, values) < 5e-3


def test_bfloat16_is_computed_in_float32_with_the_same_weights() -> None:
    case = bfloat16()
    graph = widened(case.model)
    w, v = (onnx.numpy_helper.to_array(t).astype(np.float32) for t in case.model.graph.initializer)
    for feed in case.feeds:
        expected = np.maximum(feed["x"] @ w, 0) @ v  # not even its input is rounded any more
        np.testing.assert_allclose(run(graph, feed)["y"], expected, rtol=1e-5, atol=1e-5)


def test_widened_weights_are_exactly_those_that_were_there() -> None:
    source = model("(float16[n,4] x) => (float16[n,3] y) { y = MatMul (x, w) }", w=half(4, 3))
    (weight,) = (t for t in g.constants(widened(source)) if t.name == "w")
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight.values, half(4, 3).astype(np.float32))


BORDERS = {
    "an output that is read inside": (
        "(float16[n,4] x) => (float16[n,4] y, float16[n,4] z)",
        "y = Relu (x) z = MatMul (y, w)",
        ["Cast", "Relu", "MatMul", "Cast", "Cast"],
    ),
    "an input that is an output": (
        "(float16[n,4] x) => (float16[n,4] x, float16[n,4] z)",
        "z = MatMul (x, w)",
        ["Cast", "MatMul", "Cast"],
    ),
    "a constant that is an output and is read": (
        "(float16[n,4] x) => (float16[4,4] w, float16[n,4] z)",
        "z = MatMul (x, w)",
        None,
    ),
    "an output straight from a Cast": (
        "(float[n,4] x) => (float16[n,4] z)",
        "z = Cast <to = 10> (x)",
        ["Cast"],
    ),
    "an output from a Cast that is read inside": (
        "(float[n,4] x) => (float16[n,4] y, float16[n,4] z)",
        "y = Cast <to = 10> (x) z = MatMul (y, w)",
        ["Cast", "Cast", "MatMul"],
    ),
    "an input that is cast already": (
        "(float16[n,4] x) => (float[n,4] z)",
        "a = Cast <to = 1> (x) b = Cast <to = 10> (a) c = Cast <to = 1> (b) z = Relu (c)",
        ["Cast", "Relu"],
    ),
    "an output that a body reads": (
        "(float16[n,4] x) => (float16[n,4] y, float16[n,4] z)",
        """y = Relu (x)
        z = If (yes) <
            then_branch = t () => (float16[n,4] a) { a = MatMul (y, w) },
            else_branch = e () => (float16[n,4] b) { b = MatMul (x, w) }
        >""",
        ["Cast", "Relu", "If", "MatMul", "MatMul", "Cast", "Cast"],
    ),
}


@pytest.mark.parametrize("what", BORDERS)
def test_at_the_border(what: str) -> None:
    border, nodes, left = BORDERS[what]
    source = model(f"{border} {{ {nodes} }}", w=half(4, 4), yes=np.array(True))
    feed = {"x": normal(2, 4).astype(HALF if "float16[n,4] x" in border else np.float32)}
    expected = run(source, feed)
    graph, _, _ = apply(Widen(), source)
    assert Widen().apply(graph, context()) == 0
    onnx.checker.check_model(g.to_proto(graph), full_check=True)
    found = run(graph, feed)
    assert left is None or sorted(ops(graph)) == sorted(left)
    assert list(found) == list(expected)
    for key, values in expected.items():
        assert found[key].dtype == values.dtype
        np.testing.assert_allclose(found[key], values, rtol=4e-3, atol=4e-3)


# The nodes that name a type. The parser reads a float16 as its bits: 15360 is 1, 16896 is 3.
NAMED = {
    "Cast": "a = Cast <to = 10> (i) y = Mul (x, a)",
    "Constant": "a = Constant <value = float16[4] {15360,16384,16896,17408}> () y = Mul (x, a)",
    "ConstantOfShape": "a = ConstantOfShape <value = float16[1] {16896}> (shape) y = Mul (x, a)",
    "RandomUniform": (
        "a = RandomUniform <dtype = 10, low = 3.0, high = 3.0, shape = [4]> () y = Mul (x, a)"
    ),
}


@pytest.mark.parametrize("what", NAMED)
def test_types_in_attributes_change(what: str) -> None:
    text = f"(float16[2,4] x, int64[4] i) => (float16[2,4] y) {{ {NAMED[what]} }}"
    graph = widened(model(text, shape=np.array([4])))
    assert_wide(graph)
    found = run(graph, {"x": X["x"], "i": np.arange(4)})["y"]
    factor = {"Cast": np.arange(4), "Constant": np.arange(1, 5)}.get(what, 3)
    np.testing.assert_array_equal(found, (X["x"].astype(np.float32) * factor).astype(HALF))


def test_casts_to_other_types_stay() -> None:
    text = """(float16[n,4] x) => (int64[n,4] y) {
        a = Relu (x)
        b = Cast <to = 11> (a)
        c = Mul (b, b)
        y = Cast <to = 7> (c)
    }"""
    graph = widened(model(text))
    assert [n.attrs["to"] for n in graph.nodes if n.op == "Cast"] == [1, 11, 7]


def test_bodies_and_what_they_carry_become_float32() -> None:
    text = """(float16[n,4] x, bool choice) => (float16[n,4] y, float16[k,n,4] all) {
        y, all = Loop (two, yes, x) <
            body = b (int64 i, bool go, float16[n,4] h)
                => (bool on, float16[n,4] next, float16[n,4] out) {
                on = Identity (go)
                next = If (choice) <
                    then_branch = t () => (float16[n,4] a) { m = MatMul (h, w) a = Tanh (m) },
                    else_branch = e () => (float16[n,4] c) {
                        k = Constant <value = float16[4] {15360,16384,16896,17408}> ()
                        c = Mul (h, k)
                    }
                >
                out = Add (next, x)
            }
        >
    }"""
    source = model(text, w=half(4, 4), two=np.array(2), yes=np.array(True))
    graph = widened(source)
    assert_wide(graph)
    bodies = list(g.subgraphs(graph))[1:]
    assert len(bodies) == 3
    for body in bodies:
        for tensor in (*body.inputs, *body.outputs):
            assert g.dtype(tensor) not in NARROW
    for choice in (True, False):
        feed = X | {"choice": np.array(choice)}
        for key, values in run(source, feed).items():
            assert relative(run(graph, feed)[key], values) < 5e-3


# ── operators of other domains ───────────────────────────────────────────────────────────────────


def custom(nodes: str, border: str = "(float16[n,4] x) => (float16[n,4] y)") -> onnx.ModelProto:
    source = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 13, "mine" : 1]> g {border} {{ {nodes} }}'
    )
    source.graph.initializer.append(onnx.numpy_helper.from_array(half(4, 4), "w"))
    for name in ("a", "b", "c", "d"):
        if any(name in node.output for node in source.graph.node):
            source.graph.value_info.append(onnx.helper.make_tensor_value_info(name, F16, ["n", 4]))
    return source


CUSTOM = {
    "in the middle": "a = MatMul (x, w) b = mine.Op (a) y = Neg (b)",
    "on an input": "b = mine.Op (x) y = MatMul (b, w)",
    "on an input that others read": "b = mine.Op (x) c = MatMul (x, w) y = Add (b, c)",
    "that makes an output": "a = MatMul (x, w) y = mine.Op (a)",
    "one after another": "a = Relu (x) b = mine.Op (a) c = mine.Op (b) y = Neg (c)",
    "that shares what it reads": "a = Relu (x) b = mine.Op (a) c = MatMul (a, w) y = Add (b, c)",
    "whose result several read": "b = mine.Op (x) c = Relu (b) d = mine.Op (b) y = Add (c, d)",
    "on a weight": "b = mine.Op (x, w) y = MatMul (b, w)",
    "behind a Cast that others read": (
        "f = Cast <to = 1> (x) a = Cast <to = 10> (f) b = mine.Op (a) c = MatMul (a, w) "
        "y = Add (b, c)"
    ),
}


@pytest.mark.parametrize("what", CUSTOM)
def test_a_custom_operator_reads_and_makes_what_it_did(what: str) -> None:
    """The rest is in float32, and no operator meets two types."""
    graph = widened(custom(CUSTOM[what]))
    # A stand-in whose type can be inferred: Identity, of the type that it is given.
    found = 0
    for node in graph.nodes:
        if node.domain == "mine":
            assert [g.dtype(t) for t in (*node.inputs, *node.outputs)] == [np.dtype(HALF)] * (
                len(node.inputs) + len(node.outputs)
            )
            node.op, node.domain, node.inputs = "Identity", "", node.inputs[:1]
            found += 1
    assert found == what.count("one after") + 1 + what.count("several")
    stand_in = g.to_proto(graph)
    onnx.checker.check_model(stand_in, full_check=True)
    expected = custom(CUSTOM[what].replace("mine.Op (x, w)", "mine.Op (x)"))
    for node in expected.graph.node:
        if node.domain == "mine":
            node.op_type, node.domain = "Identity", ""
    assert relative(run(stand_in, X)["y"], run(expected, X)["y"]) < 5e-3


def test_operators_that_the_runtime_brings_are_no_custom_ones() -> None:
    source = custom("a = mine.Gelu (x) y = MatMul (a, w)")
    source.opset_import[1].domain = source.graph.node[0].domain = "com.microsoft"
    graph = widened(source)
    assert_wide(graph)
    assert ops(graph) == ["Cast", "Gelu", "MatMul", "Cast"]


# ── float64 ──────────────────────────────────────────────────────────────────────────────────────


def test_in_double_layers_with_weights_are_float32_and_the_rest_is_not() -> None:
    case = double()
    graph = widened(case.model)
    by_op: dict[str, set[Any]] = {}
    for node in graph.nodes:
        kinds = {g.dtype(t) for t in node.inputs if t.name}
        by_op[node.op] = by_op.get(node.op, set()) | kinds
    assert by_op["MatMul"] == by_op["Gemm"] == {np.dtype(np.float32)}
    assert by_op["Relu"] == by_op["Mul"] == {np.dtype(np.float64)}
    assert {g.dtype(t) for t in (*graph.inputs, *graph.outputs)} == {np.dtype(np.float64)}
    for feed in case.feeds:
        found = run(graph, feed)["y"]
        assert found.dtype == np.float64
        assert relative(found, run(case.model, feed)["y"]) < 1e-5


def test_a_table_in_double_keeps_its_precision() -> None:
    text = """(int64[n] ids, double[n,4] x) => (double[n,4] y) {
        e = Gather (table, ids)
        s = Mul (e, x)
        y = MatMul (s, w)
    }"""
    table = normal(9, 4).astype(np.float64) / 3
    graph = widened(model(text, table=table, w=normal(4, 4).astype(np.float64)))
    (found,) = (t for t in g.constants(graph) if t.name == "table")
    assert found.values.dtype == np.float64
    np.testing.assert_array_equal(found.values, table)
    assert [g.dtype(n.inputs[0]) for n in graph.nodes if n.op == "MatMul"] == [np.float32]


def test_a_recurrence_in_double_keeps_its_lengths() -> None:
    text = """(double[s,b,4] x, int32[b] lengths, double[1,b,3] h0) => (double[1,b,3] h) {
        y, h = GRU <hidden_size = 3> (x, w, r, , lengths, h0)
    }"""
    weights = {"w": normal(1, 9, 4).astype(np.float64), "r": normal(1, 9, 3).astype(np.float64)}
    graph = widened(model(text, **weights))
    (node,) = (n for n in graph.nodes if n.op == "GRU")
    assert [str(g.dtype(t)) for t in node.inputs if t.name] == [
        "float32", "float32", "float32", "int32", "float32"
    ]  # fmt: skip
    feed = {"x": normal(5, 2, 4).astype(np.float64), "lengths": np.array([5, 2], np.int32),
            "h0": normal(1, 2, 3).astype(np.float64)}  # fmt: skip
    found = run(graph, feed)["h"]
    single = model(
        text.replace("double", "float"), **{k: v.astype("f4") for k, v in weights.items()}
    )
    feed |= {k: feed[k].astype(np.float32) for k in ("x", "h0")}
    np.testing.assert_allclose(found, run(single, feed)["h"], rtol=1e-6)


def test_a_weight_in_double_that_something_else_reads_stays_for_it() -> None:
    text = """(double[4,4] x) => (double[4,4] y) {
        a = MatMul (x, w)
        y = Add (a, w)
    }"""
    w = normal(4, 4).astype(np.float64) / 3
    source = model(text, w=w)
    graph = widened(source)
    kinds = sorted(str(g.dtype(t)) for t in g.constants(graph))
    assert kinds == ["float32", "float64"]
    feed = {"x": normal(4, 4).astype(np.float64)}
    assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-6


# ── float32 ──────────────────────────────────────────────────────────────────────────────────────

# 10 and 16 are the codes of float16 and bfloat16, and numbers of groups or gates as well.
SIXTEEN = model(
    "(float[n,16,4,4] x) => (float[n,16,4,4] y) { c = Conv <group = 16> (x, w) y = Relu (c) }",
    w=normal(16, 1, 1, 1),
)
OTHERS = {"float16", "float16_body", "bfloat16", "bfloat16_ends", "mixed_types", "double"}
IN_FLOAT32 = sorted(set(ZOO) - OTHERS - {"casts_before_a_body"})


@pytest.mark.parametrize("name", [*IN_FLOAT32, "sixteen"])
def test_a_model_in_float32_is_not_touched(name: str) -> None:
    """Not even tidied, nor are types written down that were not there."""
    source = SIXTEEN if name == "sixteen" else ZOO[name]().model
    graph = g.load(source)
    before = g.to_proto(graph).SerializeToString(deterministic=True)
    assert Widen().apply(graph, context()) == 0
    assert g.to_proto(graph).SerializeToString(deterministic=True) == before
