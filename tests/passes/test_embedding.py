import numpy as np
import onnx
import pytest
from awkward import embedding
from graphs import Array, model, normal, ops, pipeline, run
from onnxq.passes.lower.embedding import lower_embedding

from onnxq import graph as g
from onnxq.qtype import QType, quantize_weight, weight_scale

PRESETS = ("int8-static", "int8-dynamic", "int16x8")
FORMATS = ("s8:channel", "s8", "u8a:channel", "u8a", "s8a:channel")


def looked_up(table: Array, spec: str) -> tuple[g.Graph, Array]:
    """A Gather over codes of the table, and what the table is when it is dequantized."""
    rank = len(table.shape)
    shape = ",".join(["n", "l", *(f"d{k}" for k in range(1, rank))])
    kind = "float16" if table.dtype == np.float16 else "float"
    kind = "double" if table.dtype == np.float64 else kind
    text = f"(int64[n,l] ids) => ({kind}[{shape}] y) {{ y = Gather (table, ids) }}"
    graph = g.load(model(text, table=table))
    qtype = QType.parse(spec)
    matrix = table.reshape(len(table), -1).astype(np.float32)
    q = quantize_weight(matrix, *weight_scale(matrix, qtype), qtype)
    assert lower_embedding(graph, graph.nodes[0], q, g.Maker(graph)) == 1
    g.tidy(graph)
    return graph, q.dequantize().reshape(table.shape)


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("shape", [(20, 16), (7, 4, 5), (9, 1)])
def test_a_row_is_that_of_the_dequantized_table(spec: str, shape: tuple[int, ...]) -> None:
    """Exactly, ids that count from the end included."""
    table = normal(*shape) + 0.3
    graph, real = looked_up(table, spec)
    ids = np.array([[0, len(table) - 1, 1], [-1, -len(table), 2]])
    for optimize in (False, True):
        found = run(graph, {"ids": ids}, optimize)["y"]
        np.testing.assert_array_equal(found, real[ids])
    onnx.checker.check_model(g.to_proto(graph), full_check=True)


@pytest.mark.parametrize(
    ("spec", "gathers", "subtracts"),
    [("s8:channel", 2, 0), ("s8", 1, 0), ("u8a:channel", 3, 1), ("u8a", 1, 1)],
)
def test_what_is_the_same_for_all_rows_is_not_looked_up(
    spec: str, gathers: int, subtracts: int
) -> None:
    made = ops(looked_up(normal(20, 16) + 0.3, spec)[0])
    assert made.count("Gather") == gathers
    assert made.count("Sub") == subtracts
    assert "DequantizeLinear" not in made  # of the whole table, at every run


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_rows_keep_the_type_of_the_table(dtype: type) -> None:
    graph, real = looked_up(normal(20, 16).astype(dtype), "s8:channel")
    found = run(graph, {"ids": np.array([[3, 4]])})["y"]
    assert found.dtype == dtype
    np.testing.assert_allclose(found, real[[[3, 4]]], rtol=2e-3 if dtype == np.float16 else 1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_table_is_stored_as_the_codes_of_the_solver_and_once(preset: str) -> None:
    case = embedding()  # two Gather over one table
    result = pipeline(case.model, case.feeds, preset)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.to_proto().graph.initializer}
    q = result.context.weights["table"]
    np.testing.assert_array_equal(stored["table_quantized"], q.codes)
    assert stored["table_quantized"].dtype == np.int8
    np.testing.assert_array_equal(stored["table_scale"].ravel(), q.scale)
    assert sum(a.size == 20 * 16 for a in stored.values()) == 1
    table = q.dequantize()
    proto = result.to_proto()
    names = ("e", "o")
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    for feed in case.feeds:
        found = run(proto, feed)
        np.testing.assert_array_equal(found["e"], table[feed["ids"]])
        np.testing.assert_array_equal(found["o"], table[feed["one"]])


def test_rows_too_short_to_be_worth_a_scale_stay_float() -> None:
    text = """(int64[n] ids) => (float[n,4] y) { e = Gather (table, ids) y = MatMul (e, w) }"""
    source = model(text, table=normal(20, 15), w=normal(15, 4))
    result = pipeline(source, None, "int8-dynamic")
    reasons = {layer.name: layer.reason for layer in result.report.layers}
    assert "fewer than 16" in reasons["e"]
    assert "table" in [t.name for t in result.to_proto().graph.initializer]


def test_a_gather_of_integers_or_along_another_axis_is_no_embedding() -> None:
    text = """(int64[n] ids) => (float[16,n] y, int64[n,16] z, float[n,4] m) {
        y = Gather <axis = 1> (across, ids)
        z = Gather (integers, ids)
        f = Cast <to = 1> (z)
        m = MatMul (f, w)
    }"""
    source = model(
        text, across=normal(16, 20), integers=np.arange(320).reshape(20, 16), w=normal(16, 4)
    )
    result = pipeline(source, None, "int8-dynamic")
    feed = {"ids": np.array([3, 19, 0])}
    for key in "yz":
        np.testing.assert_array_equal(run(result.graph, feed)[key], run(source, feed)[key])


def test_a_table_read_in_two_branches_is_stored_once() -> None:
    text = """(int64[n] ids, bool choice) => (float[n,16] y) {
        y = If (choice) <
            then_branch = t () => (float[n,16] a) { a = Gather (table, ids) },
            else_branch = e () => (float[n,16] b) { k = Gather (table, ids) b = Neg (k) }
        >
    }"""
    source = model(text, table=normal(20, 16))
    result = pipeline(source, None, "int8-dynamic")
    proto = result.to_proto()
    assert sorted(t.name for t in proto.graph.initializer) == ["table_quantized", "table_scale"]
    table = result.context.weights["table"].dequantize()
    for choice, sign in ((True, 1), (False, -1)):
        found = run(proto, {"ids": np.array([3, 7]), "choice": np.array(choice)})["y"]
        np.testing.assert_array_equal(found, sign * table[[3, 7]])
