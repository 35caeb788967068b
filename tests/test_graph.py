from typing import Any

import numpy as np
import onnx
import pytest
from awkward import ZOO, if_body
from graphs import Array, bn, model, normal, ops, run
from onnx import TensorProto

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.qtype import QType, quantize


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
    if name in ("bfloat16", "names"):  # which the runtime refuses as they come
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
    assert matrix.shape == (weight.shape[view.axis], weight.size // weight.shape[view.axis])
    np.testing.assert_array_equal(view.from_matrix(matrix), weight)
    np.testing.assert_array_equal(
        np.sort(matrix[1]), np.sort(np.take(weight, 1, view.axis).ravel())
    )


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
