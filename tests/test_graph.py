from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from awkward import ZOO, if_body, loop_body, nested_if, old_if
from graphs import Array, bn, model, normal, ops, run
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.qtype import QType, quantize
from onnxq.runtime import Session


def node_of(source: onnx.ModelProto, op: str | None = None) -> g.Node:
    graph = g.load(source)
    return next(n for n in graph.nodes if op in (None, n.op))


# ── load, save, copy ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ZOO)
def test_a_model_survives_loading_and_writing(name: str) -> None:
    case = ZOO[name]()
    again = g.to_proto(g.load(case.model))
    if name != "no_shapes":  # which the checker refuses as it comes
        onnx.checker.check_model(again, full_check=True)
    if "bfloat16" in name or name == "names":  # which the runtime refuses as they come
        return
    for key, values in run(case.model, case.feeds[0], optimize=False).items():
        np.testing.assert_array_equal(run(again, case.feeds[0], optimize=False)[key], values)


def test_metadata_and_doc_strings_are_carried_and_extended() -> None:
    source = ZOO["gemm"]().model
    onnx.helper.set_model_props(source, {"author": "me", "note": "old"})
    source.doc_string, source.domain, source.model_version = "a model", "some.where", 3
    graph = g.copy(g.load(source))
    g.set_metadata(graph, {"note": "new", "onnxq.x": "1"})
    made = g.to_proto(graph)
    props = {p.key: p.value for p in made.metadata_props}
    assert props == {"author": "me", "note": "new", "onnxq.x": "1"}
    assert (made.doc_string, made.domain, made.model_version) == ("a model", "some.where", 3)
    assert {p.key: p.value for p in source.metadata_props} == {"author": "me", "note": "old"}


def test_a_copy_has_nodes_of_its_own_and_the_same_weights() -> None:
    graph = g.load(ZOO["attention"]().model)
    twin = g.copy(graph)
    twin.nodes[0].name = "changed"
    assert graph.nodes[0].name != "changed"
    assert len(twin.nodes) == len(graph.nodes)
    for a, b in zip(g.constants(graph), g.constants(twin), strict=True):
        assert a is not b
        assert a._values is b._values


def test_local_functions_are_inlined_on_load() -> None:
    source = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 13, "mine" : 1]>
        main (float[n,4] x) => (float[n,4] y) { y = mine.twice (x) }
        <domain: "mine", opset_import: ["" : 13]>
        twice (a) => (b) { b = Add (a, a) }
    """)
    graph = g.load(source)
    assert ops(graph) == ["Add"]
    x = normal(2, 4)
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], 2 * x)


@pytest.mark.parametrize(("opset", "ir"), [(13, 7), (18, 8), (21, 10)])
def test_the_ir_version_is_the_oldest_that_carries_the_opset(opset: int, ir: int) -> None:
    assert g.minimum_ir_version(opset) == ir


def test_raising_the_opset_keeps_the_function_and_the_metadata() -> None:
    case = ZOO["opset_11"]()
    onnx.helper.set_model_props(case.model, {"author": "me"})
    graph = g.load(case.model)
    raised = g.raise_opset(graph, 13)
    made = g.to_proto(raised)
    assert made.opset_import[0].version == 13
    assert made.metadata_props[0].value == "me"
    expected = run(case.model, case.feeds[0])["y"]
    np.testing.assert_allclose(run(made, case.feeds[0])["y"], expected, rtol=1e-6)
    assert g.raise_opset(raised, 12) is raised


def test_raising_the_opset_keeps_a_large_weight_that_both_branches_read() -> None:
    text = """(float[n,256] x, bool choice) => (float[n,256] y) {
        y = If (choice) <
            then_branch = yes () => (float[n,256] out) { out = MatMul (x, w) },
            else_branch = no () => (float[n,256] out) { h = MatMul (x, w) out = Relu (h) }
        >
    }"""
    source = model(text, w=normal(256, 256))
    raised = g.raise_opset(g.load(source), 21)
    assert {tensor.name for tensor in g.constants(raised)} == {"w"}
    for choice in (True, False):
        feed = {"x": normal(2, 256), "choice": np.array(choice)}
        np.testing.assert_array_equal(run(raised, feed)["y"], run(source, feed)["y"])


@pytest.mark.parametrize("text", ["s4", "u4a", "s2", "u2a"])
def test_small_integers_can_be_written(text: str) -> None:
    qtype = QType.parse(text)
    codes = quantize(normal(3, 5, scale=4), np.float32(1), np.array(qtype.middle), qtype)
    source = model("(float[n,5] x) => (float[n,5] y) { y = Add (x, w) }", opset=21, w=normal(3, 5))
    graph = g.load(source)
    graph.nodes[0].inputs[1] = g.constant("codes", codes)
    stored = g.to_proto(graph).graph.initializer[0]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored).astype(int), codes.astype(int))
    assert len(stored.raw_data) == -(-codes.size * qtype.bits // 8)


# ── walking and editing ──────────────────────────────────────────────────────────────────────────


def test_walking_goes_into_bodies_and_meets_each_weight_once() -> None:
    graph = g.load(if_body().model)
    assert ops(graph).count("MatMul") == 3
    assert len(list(g.subgraphs(graph))) == 3
    names = [tensor.name for tensor in g.constants(graph)]
    assert sorted(names) == ["w1", "w2"]


def test_every_node_gets_a_name_of_its_own() -> None:
    graph = g.load(if_body().model)
    graph.nodes[0].name = "same"
    graph.nodes[1].name = "same"
    assert g.name_nodes(graph) > 0
    names = [node.name for node in g.walk(graph)]
    assert len(set(names)) == len(names)
    assert "same" in names
    assert all(names)
    assert g.name_nodes(graph) == 0


def test_fresh_names_avoid_tensors_and_nodes_of_bodies_too() -> None:
    graph = g.load(if_body().model)
    g.name_nodes(graph)
    namer = g.Namer(graph)
    taken = {t for body in g.subgraphs(graph) for t in body.tensors()} | {
        n.name for n in g.walk(graph)
    }
    assert "m" in taken
    assert len({namer("m") for _ in range(5)} - taken) == 5
    assert namer("free") == "free"


IDENTITIES = {
    "in the middle": ("{ a = Relu (x) b = Identity (a) y = Relu (b) }", True),
    "before the output": ("{ a = Relu (x) y = Identity (a) }", True),
    "input to output": ("{ y = Identity (x) }", False),
    "between two outputs": ("{ z = Relu (x) y = Identity (z) }", False),
}


@pytest.mark.parametrize("where", IDENTITIES)
def test_a_bypassed_node_is_gone_and_names_at_the_border_stay(where: str) -> None:
    body, possible = IDENTITIES[where]
    outputs = "float[n] y" + (", float[n] z" if "z" in body else "")
    graph = g.load(model(f"(float[n] x) => ({outputs}) {body}"))
    node = next(n for n in graph.nodes if n.op == "Identity")
    assert g.bypass(graph, node) is possible
    g.tidy(graph)
    assert ("Identity" in ops(graph)) is not possible
    x = np.array([-1, 2], np.float32)
    expected = x if where == "input to output" else np.maximum(x, 0)
    assert run(graph, {"x": x})["y"].tolist() == expected.tolist()


# ── names ────────────────────────────────────────────────────────────────────────────────────────

TWINS = """(float[n,4] x, bool choice) => (float[n,4] y) {
    y = If (choice) <
        then_branch = yes () => (float[n,4] out) { m = MatMul (x, w) out = Tanh (m) },
        else_branch = no () => (float[n,4] out) { m = MatMul (x, v) out = Neg (m) }
    >
}"""


def twins(**weights: Array) -> onnx.ModelProto:
    return model(TWINS, **({"w": normal(4, 4), "v": normal(4, 4, seed=1)} | weights))


def test_one_name_in_two_branches_becomes_two() -> None:
    source = twins()
    graph = g.load(source)
    then, other = list(g.subgraphs(graph))[1:]
    assert {"m", "out"} <= set(then.tensors())
    assert not {"m", "out"} & set(other.tensors())
    assert set(other.tensors()) == {"x", "v", "m_no", "out_no"}
    assert g.name_tensors(graph) == 0
    for choice in (True, False):
        feed = {"x": normal(2, 4), "choice": np.array(choice)}
        np.testing.assert_array_equal(run(graph, feed)["y"], run(source, feed)["y"])


def test_constants_of_one_name_and_different_values_become_two() -> None:
    source = twins()
    for attribute, seed in zip(source.graph.node[0].attribute, (5, 6), strict=True):
        weight = onnx.numpy_helper.from_array(normal(4, 4, seed=seed), "own")
        attribute.g.initializer.append(weight)
        attribute.g.node[0].input[1] = "own"
    graph = g.load(source)
    found = {t.name: t.values for t in g.constants(graph)}
    assert sorted(found) == ["own", "own_no"]
    for name, seed in (("own", 5), ("own_no", 6)):
        np.testing.assert_array_equal(found[name], normal(4, 4, seed=seed))
    for choice in (True, False):
        feed = {"x": normal(2, 4), "choice": np.array(choice)}
        np.testing.assert_array_equal(run(graph, feed)["y"], run(source, feed)["y"])


def test_a_weight_that_two_branches_read_keeps_its_name() -> None:
    graph = g.load(if_body().model)
    source = nested_if().model
    for each in (graph, g.load(source)):
        before = sorted(t.name for t in g.constants(each))
        for again in (each, g.copy(each)):
            assert g.name_tensors(again) == 0
            assert sorted({t.name for t in g.constants(again)}) == before


def test_tensors_are_those_of_all_bodies_by_name() -> None:
    graph = g.load(twins())
    found = g.tensors(graph)
    assert set(found) == {"x", "choice", "y", "w", "v", "m", "out", "m_no", "out_no"}
    nodes = {node.op: node for node in g.walk(graph)}
    assert found["m"] is nodes["Tanh"].inputs[0]
    assert found["m_no"] is nodes["Neg"].inputs[0]


# ── order ────────────────────────────────────────────────────────────────────────────────────────


def order_of(graph: g.Graph) -> str:
    return "".join(node.name for node in graph.nodes)


def chain(*edges: str) -> g.Graph:
    """A node for each text like `b:ac`, which reads tensors a and c and makes b."""
    tensors: dict[str, Any] = {}

    def tensor(name: str) -> Any:
        return tensors.setdefault(name, gs.Variable(name))

    nodes = [
        g.Node("Sum", made, {}, [tensor(t) for t in read], [tensor(made)])
        for made, read in (edge.split(":") for edge in edges)
    ]
    return gs.Graph(nodes, [tensor("x")], [])


@pytest.mark.parametrize(
    ("edges", "order"),
    [
        (["a:x", "b:x", "c:ab"], "abc"),
        (["b:x", "a:x", "c:ab"], "bac"),  # right already, so it stays
        (["c:ab", "a:x", "b:x"], "abc"),
        (["c:b", "b:a", "a:x"], "abc"),
        (["a:x", "d:c", "b:a", "c:x"], "abcd"),
        (["b:aa", "a:x"], "ab"),
    ],
)
def test_nodes_are_put_in_order_and_those_that_are_stay(edges: list[str], order: str) -> None:
    graph = chain(*edges)
    g.sort(graph)
    assert order_of(graph) == order
    g.sort(graph)
    assert order_of(graph) == order


def test_a_cycle_is_an_error_that_names_a_node_of_it() -> None:
    with pytest.raises(OnnxqError, match=r"cycle through node 'b'"):
        g.sort(chain("a:x", "b:ac", "c:b"))
    with pytest.raises(OnnxqError, match="cycle"):
        g.sort(chain("a:a"))


def test_two_nodes_that_write_one_tensor_are_an_error() -> None:
    graph = chain("a:x", "b:x")
    graph.nodes[1].outputs[0] = gs.Variable("a")
    with pytest.raises(OnnxqError, match="two nodes write 'a'"):
        g.sort(graph)


def test_a_node_stands_after_what_its_bodies_read() -> None:
    graph = g.load(nested_if().model)
    x = graph.tensors()["x"]
    bodies = list(g.subgraphs(graph))
    moved = gs.Variable("moved")
    deepest = next(node for node in g.walk(graph) if node.op == "Relu")
    graph.nodes.append(g.Node("MatMul", "late", {}, [x, g.constant("q", normal(4, 5))], [moved]))
    deepest.inputs[0] = moved
    inner = bodies[1]
    inner.nodes.reverse()
    g.sort(graph)
    assert [node.op for node in graph.nodes] == ["MatMul", "If"]
    assert [node.op for node in inner.nodes] == ["MatMul", "If"]


# ── types ────────────────────────────────────────────────────────────────────────────────────────


def test_types_that_are_not_declared_follow_from_what_makes_a_tensor() -> None:
    text = """(float16[n,4] x, bool choice) => (float[n,4] y) {
        h = Relu (x)
        i = Cast <to = 7> (h)
        y = If (choice) <
            then_branch = t () => (float[n,4] a) { d = Cast <to = 11> (i) a = Cast <to = 1> (d) },
            else_branch = e () => (float[n,4] b) { b = Cast <to = 1> (h) }
        >
    }"""
    graph = g.load(model(text))
    found = g.tensors(graph)
    assert g.dtype(found["h"]) is None
    g.infer_types(graph)
    kinds = {name: g.dtype(tensor) for name, tensor in found.items()}
    expected = {"x": "float16", "h": "float16", "i": "int64", "d": "float64", "a": "float32"}
    assert {name: str(kinds[name]) for name in expected} == expected


def test_types_that_are_declared_and_large_weights_stay() -> None:
    w = normal(300, 300)
    source = model("(float[n,300] x) => (float[n,300] y) { h = MatMul (x, w) y = Neg (h) }", w=w)
    graph = g.load(source)
    g.infer_types(graph)
    assert g.dtype(graph.tensors()["h"]) == np.float32
    np.testing.assert_array_equal(next(g.constants(graph)).values, w)
    graph.tensors()["h"].dtype = np.dtype(np.float16)
    g.infer_types(graph)
    assert g.dtype(graph.tensors()["h"]) == np.float16


# ── bodies in files ──────────────────────────────────────────────────────────────────────────────


def stored_in(proto: onnx.GraphProto) -> dict[str, list[str]]:
    """The initializers of a graph and its bodies, by the graph's name."""
    found = {proto.name: [t.name for t in proto.initializer]}
    for node in proto.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= stored_in(attribute.g)
    return found


@pytest.mark.parametrize("size", [4, 300])
def test_a_weight_that_two_bodies_read_is_stored_once(size: int) -> None:
    """Small or large; one that a single body reads stays there while it is small."""
    text = TWINS.replace("4]", f"{size}]").replace("MatMul (x, v)", "MatMul (x, w)")
    w, own = normal(size, size, scale=0.1), normal(size, seed=1)
    source = model(text, w=w)
    other = source.graph.node[0].attribute[1].g
    other.initializer.append(onnx.numpy_helper.from_array(own, "own"))
    other.node[1].op_type = "Mul"
    other.node[1].input.append("own")
    graph = g.load(source)
    made = g.to_proto(graph)
    assert stored_in(made.graph) == {"g": ["w"], "yes": [], "no": ["own"]}
    onnx.checker.check_model(made, full_check=True)
    light, weights = g.to_proto_without_weights(graph)
    assert list(weights) == (["w"] if size == 300 else [])
    for choice in (True, False):
        feed = {"x": normal(2, size), "choice": np.array(choice)}
        want = run(source, feed)["y"]
        np.testing.assert_array_equal(run(made, feed)["y"], want)
        session = Session(light, threads=1, initializers=weights)
        np.testing.assert_array_equal(session.run(feed)["y"], want)


@pytest.mark.parametrize("size", [4, 300])
def test_names_that_mean_two_things_are_left_where_they_are(size: int) -> None:
    v, x = normal(size, size, scale=0.1), normal(2, size)
    source = model(TWINS.replace("4]", f"{size}]"), w=v, v=v)
    graph = g.load(source)
    for tensor in list(g.constants(graph)):
        tensor._values = g.constant("same", v + (tensor.name == "w"))._values
        tensor.name = "same"
    made = g.to_proto(graph)
    assert stored_in(made.graph) == {"g": [], "yes": ["same"], "no": ["same"]}
    light, weights = g.to_proto_without_weights(graph)
    assert not weights
    for choice in (True, False):
        m = x @ (v + choice)
        for each in (made, light):
            found = run(each, {"x": x, "choice": np.array(choice)})["y"]
            np.testing.assert_allclose(found, np.tanh(m) if choice else -m, rtol=1e-3, atol=1e-4)


def test_bodies_rise_to_the_opset_with_the_graph_around_them() -> None:
    case = old_if()
    raised = g.raise_opset(g.load(case.model), 13)
    made = g.to_proto(raised)
    onnx.checker.check_model(made, full_check=True)
    squeezes = [node for node in g.walk(raised) if node.op == "Squeeze"]
    assert len(squeezes) == 2
    for node in squeezes:
        assert "axes" not in node.attrs
        assert node.inputs[1].inputs[0].op == "Constant" or g.is_constant(node.inputs[1])
    for feed in case.feeds:
        np.testing.assert_array_equal(run(made, feed)["y"], run(case.model, feed)["y"])


@pytest.mark.parametrize("name", ["nested_if", "if_in_loop", "loop_body", "scan_body"])
@pytest.mark.parametrize("opset", [17, 21])
def test_bodies_of_every_kind_can_be_raised(name: str, opset: int) -> None:
    case = ZOO[name]()
    raised = g.raise_opset(g.load(case.model), opset)
    assert raised.opset == opset
    onnx.checker.check_model(g.to_proto(raised), full_check=True)
    for feed in case.feeds[:2]:
        for key, values in run(case.model, feed).items():
            np.testing.assert_allclose(run(raised, feed)[key], values, rtol=1e-5, atol=1e-6)


# ── new nodes ────────────────────────────────────────────────────────────────────────────────────


def test_a_maker_gives_fresh_names_and_one_constant_for_a_key() -> None:
    graph = g.load(loop_body().model)
    body = list(g.subgraphs(graph))[1]
    maker = g.Maker(graph)
    one = maker.constant("m", np.float32(1))  # a name that a tensor of the body has
    assert one.name == "m_1"
    assert maker.constant("m", np.float32(2)) is one
    assert maker.constant("other", np.float32(2)).name == "other"
    made = [maker.emit(body, "Add", [body.inputs[2], one], "h", axis=3) for _ in range(2)]
    assert [t.name for t in made] == ["h_Add_out", "h_Add_out_1"]
    assert [node.name for node in body.nodes[-2:]] == ["h_Add", "h_Add_1"]
    assert body.nodes[-1].attrs == {"axis": 3}
    assert body.nodes[-1].outputs[0] is made[1]
    assert all(node.op != "Add" for node in graph.nodes)


# ── weights as matrices ──────────────────────────────────────────────────────────────────────────

LAYERS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "Conv 1x1": ("Conv", (6, 4, 1, 1), {}),
    "Conv 3x2": ("Conv", (6, 3, 3, 2), {}),
    "Conv 1-D": ("Conv", (6, 3, 5), {}),
    "Conv grouped": ("Conv", (6, 2, 3, 3), {"group": 3}),
    "Conv depthwise": ("Conv", (4, 1, 3, 3), {"group": 4}),
    "ConvTranspose": ("ConvTranspose", (3, 5, 2, 2), {}),
    "Gemm": ("Gemm", (4, 6), {}),
    "Gemm transB": ("Gemm", (6, 4), {"transB": 1}),
    "MatMul": ("MatMul", (4, 6), {}),
    "Gather": ("Gather", (9, 4), {}),
    "MatMul with batches": ("MatMul", (2, 3, 4, 6), {}),
}


def layer(name: str) -> tuple[g.Node, Array]:
    op, shape, attributes = LAYERS[name]
    weight = normal(*shape)
    attrs = ", ".join(f"{k} = {v}" for k, v in attributes.items())
    if op == "Gather":
        text = "(int64[n] x) => (float[n,4] y) { y = Gather (w, x) }"
    else:
        rank = len(shape)
        kind = lambda first: "float[" + ",".join([first, *"abcdef"[: rank - 1]]) + "]"  # noqa: E731
        text = f"({kind('n')} x) => ({kind('n')} y) {{ y = {op} <{attrs}> (x, w) }}"
        text = text.replace("<>", "")
    return node_of(model(text, w=weight)), weight


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_written_back_is_the_weight(name: str) -> None:
    node, weight = layer(name)
    view = g.weight_view(node)
    assert view is not None
    matrix = view.matrix()
    rows = weight.shape[view.axis] * view.batches
    assert matrix.shape == (rows, weight.size // rows)
    np.testing.assert_array_equal(view.from_matrix(matrix), weight)
    if view.batches > 1:  # the next test says which rows are whose
        return
    np.testing.assert_array_equal(
        np.sort(matrix[1]), np.sort(np.take(weight, 1, view.axis).ravel())
    )


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 4, 6), (2, 3, 5, 2), (1, 1, 1, 1), (2, 1, 3)])
def test_the_rows_of_a_weight_with_batches_are_those_of_each_batch(shape: tuple[int, ...]) -> None:
    weight, kind = normal(*shape), ",".join("abcd"[: len(shape)])
    text = f"(float[{kind}] x) => (float[{kind}] y) {{ y = MatMul (x, w) }}"
    view = g.weight_view(node_of(model(text, w=weight)))
    assert view is not None
    assert view.batched
    expected = [batch.T for batch in weight.reshape(-1, *shape[-2:])]
    assert view.batches == len(expected)
    np.testing.assert_array_equal(view.matrix(), np.concatenate(expected))
    np.testing.assert_array_equal(view.from_matrix(view.matrix()), weight)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_rows_of_recurrent_weights_are_the_gates_of_each_direction(
    op: str, gates: int, directions: int
) -> None:
    w, r = normal(directions, gates * 3, 5), normal(directions, gates * 3, 3, seed=1)
    direction = ("forward", "bidirectional")[directions - 1]
    text = f"""(float[s,n,5] x) => (float[s,d,n,3] y) {{
        y, h = {op} <hidden_size = 3, direction = "{direction}"> (x, w, r)
    }}"""
    views = g.weight_views(node_of(model(text, w=w, r=r)))
    assert [(view.slot, view.input_slot) for view in views] == [(1, 0), (2, None)]
    for view, weight in zip(views, (w, r), strict=True):
        assert (view.axis, view.block_axis, view.batches) == (1, 2, directions)
        assert view.batched is (directions > 1)
        np.testing.assert_array_equal(view.matrix(), np.concatenate(list(weight)))
        np.testing.assert_array_equal(view.from_matrix(view.matrix()), weight)


@given(st.data())
def test_any_weight_of_any_shape_is_written_back_as_it_was(data: st.DataObject) -> None:
    op = data.draw(st.sampled_from(["Conv", "ConvTranspose", "MatMul", "Gemm", "Gather", "LSTM"]))
    least, most = {"Gemm": (2, 2), "LSTM": (3, 3), "Conv": (3, 5), "ConvTranspose": (3, 5)}.get(
        op, (2, 4)
    )
    shape = data.draw(st.lists(st.integers(1, 5), min_size=least, max_size=most))
    attrs = {"transB": data.draw(st.integers(0, 1))} if op == "Gemm" else {}
    weight = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    slot = 0 if op == "Gather" else 1
    inputs = [gs.Variable("x"), g.constant("w", weight)]
    inputs = inputs[::-1] if slot == 0 else inputs
    inputs += [g.constant("r", weight)] if op == "LSTM" else []
    view = g.weight_view(g.Node(op, "n", attrs, inputs, [gs.Variable("y")]))
    assert view is not None
    matrix = view.matrix()
    assert matrix.ndim == 2
    assert sorted(matrix.ravel()) == list(range(weight.size))
    np.testing.assert_array_equal(view.from_matrix(matrix), weight)


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("Conv ")])
def test_the_columns_of_conv_are_those_of_an_unfolded_input(name: str) -> None:
    """y[:, p] = W · unfold(x)[:, p] with kernel positions outermost, channels fastest."""
    node, weight = layer(name)
    view = g.weight_view(node)
    assert view is not None
    groups, kernel = view.groups, weight.shape[2:]
    channels = weight.shape[1] * groups
    x = normal(1, channels, *kernel, seed=1)  # one position alone
    spatial = ",".join("abcdef"[: len(kernel)])
    source = model(
        f"(float[1,{channels},{spatial}] x) => (float[1,{len(weight)},{spatial.upper()}] y) "
        f"{{ y = Conv <group = {groups}> (x, w) }}",
        w=weight,
    )
    expected = run(source, {"x": x})["y"].ravel()
    by_group = x[0].reshape(groups, weight.shape[1], *kernel)
    unfolded = np.moveaxis(by_group, 1, -1).reshape(groups, -1)
    rows = view.matrix().reshape(groups, -1, unfolded.shape[1])
    actual = np.einsum("grk,gk->gr", rows, unfolded).ravel()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    # A statistic per channel arrives at the weights that meet that channel.
    statistic = np.arange(1, channels + 1, dtype=float)
    scaled = view.matrix() * view.column_statistic(statistic)
    x_scaled = (x * statistic.reshape(1, -1, *(1,) * len(kernel))).astype("f4")
    rows = scaled.reshape(groups, -1, unfolded.shape[1])
    np.testing.assert_allclose(
        np.einsum("grk,gk->gr", rows, unfolded).ravel(),
        run(source, {"x": x_scaled})["y"].ravel(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_statistic_of_conv_transpose_arrives_at_the_weights_of_its_channel() -> None:
    node, weight = layer("ConvTranspose")
    view = g.weight_view(node)
    assert view is not None
    statistic = np.float32([2, 3, 5])
    scaled = view.from_matrix(view.matrix() * view.column_statistic(statistic))
    np.testing.assert_array_equal(scaled, weight * statistic[:, None, None, None])


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul (x, x)",
        "y = MatMul (x, flat)",
        "y = MatMul (w, x)",
        "y = Gather <axis = 1> (w, ids)",
        "y = Conv (x, integer)",
        "y = Add (x, w)",
    ],
)
def test_what_is_no_weight_is_not_seen_as_one(body: str) -> None:
    graph = onnx.parser.parse_graph(
        f"g (float[a,b] x, int64[c] ids) => (float[d,e] y) {{ {body} }}"
    )
    values = {"w": normal(4, 4), "flat": normal(4), "integer": np.ones((4, 4, 1), np.int8)}
    graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in values.items())
    assert g.weight_view(g.load(onnx.helper.make_model(graph)).nodes[0]) is None


def test_depthwise_means_one_input_channel_each() -> None:
    assert g.is_depthwise(layer("Conv depthwise")[0])
    assert not g.is_depthwise(layer("Conv grouped")[0])
    assert not g.is_depthwise(layer("Conv 1x1")[0])


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        ("Relu (x)", (0, np.inf)),
        ("Clip (x, low, high)", (-1, 6)),
        ("Clip (x, , high)", (-np.inf, 6)),
        ("Clip (x, low)", (-1, np.inf)),
        ("Clip (x)", (-np.inf, np.inf)),
        ("Clip (x, moving, high)", None),
        ("Abs (x)", None),
    ],
)
def test_bounds_of_relu_and_clip(body: str, bounds: tuple[float, float] | None) -> None:
    graph = onnx.parser.parse_graph(
        f"g (float[n] x, float moving) => (float[n] y) {{ y = {body} }}"
    )
    for name, value in (("low", -1), ("high", 6)):
        graph.initializer.append(onnx.helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    assert g.clip_bounds(g.load(onnx.helper.make_model(graph)).nodes[0]) == bounds


def test_an_opset_that_cannot_be_raised_is_an_error_that_says_what_to_do() -> None:
    text = f"(float[n,3,4,4] x) => (float[n,3,4,4] y) {{ y = {bn('x', 'p')} }}"
    parts = {f"p_{part}": np.ones(3, "f4") for part in ("gamma", "beta", "mean", "var")}
    graph = g.load(model(text, **parts))
    with pytest.raises(OnnxqError, match="export it again"):
        g.raise_opset(graph, 99)


def test_shapes_are_known_past_operators_of_the_runtime() -> None:
    """Against what the runtime then hands out."""
    weights = {
        "w": np.zeros((6, 1, 8), np.uint8), "s": np.ones((6, 1), np.float32),
        "k": normal(3, 2, 3, 3), "one": np.float32(1), "zero": np.uint8(0), "gain": normal(5),
    }  # fmt: skip
    source = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
      g (float[2, 3, 16] x, uint8[2, 4, 8, 8] q, float[1, 2, 9, 9] i, float[3, 1, 5] h)
      => (float n, uint8 a, uint8 p, uint8 b, uint8 c, float f, uint8 l, float u) {
        n = com.microsoft.MatMulNBits <K = 16, N = 6, bits = 4, block_size = 16> (x, w, s)
        a = com.microsoft.QLinearAdd (q, one, zero, q, one, zero, one, zero)
        p = com.microsoft.QLinearAveragePool <kernel_shape = [3, 3], strides = [2, 2]>
            (q, one, zero, one, zero)
        b = com.microsoft.QLinearGlobalAveragePool (q, one, zero, one, zero)
        c = com.microsoft.QLinearConcat <axis = 1> (one, zero, q, one, zero, a, one, zero)
        f = com.microsoft.FusedConv <activation = "Relu", pads = [1, 1, 0, 0]> (i, k)
        l = com.microsoft.QLinearSigmoid (q, one, zero, one, zero)
        u = com.microsoft.SkipLayerNormalization (h, h, gain)
      }""")
    for output in source.graph.output:
        output.type.tensor_type.ClearField("shape")
    for name, values in weights.items():
        source.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    feed = {
        "x": normal(2, 3, 16), "q": np.zeros((2, 4, 8, 8), np.uint8), "i": normal(1, 2, 9, 9),
        "h": normal(3, 1, 5),
    }  # fmt: skip
    found = g.shapes(g.load(source))
    for name, array in run(source, feed).items():
        assert found[name] == array.shape
