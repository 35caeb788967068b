import numpy as np
import onnx
import pytest
from awkward import lstm_with_states
from graphs import Array, Feeds, feeds_of, model, normal, ops, pipeline, run, sqnr
from onnxq.passes.solve.round_to_nearest import worst_pair

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Result

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, WIDTH, HIDDEN = 5, 2, 7, 3
ORDER = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P",
         "W_scale", "W_zero_point", "R_scale", "R_zero_point")  # fmt: skip


def recurrence(
    op: str = "LSTM", directions: int = 1, slots: str = "b", extra: str = "", opset: int = 13
) -> onnx.ModelProto:
    """`slots` names the optional inputs that it has: b(ias), l(engths), h, c(ell), p(eepholes)."""
    gates = GATES[op]
    names = ["b", "l", "h", "c", "p"] if op == "LSTM" else ["b", "l", "h"]
    direction = ("forward", "bidirectional")[directions - 1]
    inputs = ", ".join(name if name in slots else "" for name in names).rstrip(", ")
    results = "y, last, cell" if op == "LSTM" else "y, last"
    outputs = ", ".join(f"float[i_{k},j_{k},k_{k}] {k}" for k in results.split(", ")[1:])
    text = f"""(float[s,n,{WIDTH}] x) => (float[s,d,n,h] y, {outputs}) {{
        {results} = {op} <hidden_size = {HIDDEN}, direction = "{direction}"{extra}>
            (x, w, r, {inputs})
    }}"""
    state = (directions, BATCH, HIDDEN)
    weights = {
        "w": normal(directions, gates * HIDDEN, WIDTH, scale=0.5),
        "r": normal(directions, gates * HIDDEN, HIDDEN, seed=1, scale=0.5),
        "b": normal(directions, 2 * gates * HIDDEN, seed=2, scale=0.3),
        "l": np.array([STEPS, STEPS - 2], np.int32),
        "h": normal(*state, seed=3),
        "c": normal(*state, seed=4),
        "p": normal(directions, 3 * HIDDEN, seed=5, scale=0.5),
    }
    return model(text, opset, **{k: v for k, v in weights.items() if k in ("w", "r", *slots)})


def feeds(n: int = 4) -> Feeds:
    return feeds_of(n, x=(STEPS, BATCH, WIDTH))


def stored(node: g.Node, slot: int) -> Array:
    return np.asarray(node.inputs[slot].values)


def lstm_of(result: Result) -> g.Node:
    return next(n for n in result.graph.nodes if n.op == "DynamicQuantizeLSTM")


# ── the integer LSTM ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic"])
@pytest.mark.parametrize("directions", [1, 2])
def test_an_lstm_becomes_one_integer_operator_with_the_codes_of_the_solver(
    preset: str, directions: int
) -> None:
    result = pipeline(recurrence(directions=directions), feeds(), preset)
    assert ops(result.graph) == ["DynamicQuantizeLSTM"]
    node = lstm_of(result)
    assert node.domain == "com.microsoft"
    assert node.attrs["hidden_size"] == HIDDEN
    for name, slot, scale_slot, columns in (("w", 1, 8, WIDTH), ("r", 2, 10, HIDDEN)):
        q = result.context.weights[name]
        rows = 4 * HIDDEN
        assert q.codes.shape == (directions * rows, columns)
        codes = q.codes.reshape(directions, rows, columns)
        np.testing.assert_array_equal(stored(node, slot), np.swapaxes(codes, 1, 2))
        assert stored(node, slot).dtype == np.int8
        np.testing.assert_array_equal(stored(node, scale_slot), q.scale.reshape(directions, rows))
        assert stored(node, scale_slot + 1).shape == (directions, rows)
        assert stored(node, scale_slot + 1).dtype == np.int8
        assert not stored(node, scale_slot + 1).any()


@pytest.mark.parametrize("slots", ["", "b", "l", "h", "c", "p", "bh", "blhcp"])
def test_inputs_stand_in_the_order_that_the_operator_documents(slots: str) -> None:
    result = pipeline(recurrence(slots=slots), None, "int8-dynamic")
    names = [tensor.name for tensor in lstm_of(result).inputs]
    expected = {"X": "x", "W": "w_quantized", "R": "r_quantized"}
    expected |= {"W_scale": "w_scale", "W_zero_point": "w_zero_point"}
    expected |= {"R_scale": "r_scale", "R_zero_point": "r_zero_point"}
    own = {"B": "b", "sequence_lens": "l", "initial_h": "h", "initial_c": "c", "P": "p"}
    expected |= {key: name for key, name in own.items() if name in slots}
    assert dict(zip(ORDER, names, strict=True)) == {key: expected.get(key, "") for key in ORDER}


EXTRAS = {
    "plain": ("LSTM", 1, "", ""),
    "bias": ("LSTM", 1, "b", ""),
    "both ways": ("LSTM", 2, "b", ""),
    "states": ("LSTM", 1, "hc", ""),
    "lengths": ("LSTM", 1, "l", ""),
    "peepholes": ("LSTM", 1, "p", ""),
    "everything": ("LSTM", 2, "blhcp", ""),
    "clip": ("LSTM", 1, "b", ", clip = 0.4"),
    "input_forget": ("LSTM", 1, "b", ", input_forget = 1"),
    "activations": ("LSTM", 1, "b", ', activations = ["HardSigmoid", "Relu", "Tanh"]'),
    "GRU": ("GRU", 1, "blh", ""),
    "GRU both ways": ("GRU", 2, "blh", ", linear_before_reset = 1"),
    "RNN": ("RNN", 1, "blh", ""),
    "RNN both ways": ("RNN", 2, "b", ', activations = ["Relu", "Tanh"]'),
}


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic", "int16x8"])
@pytest.mark.parametrize("what", EXTRAS)
def test_a_recurrence_with(what: str, preset: str) -> None:
    """All outputs, with graph optimizations and without."""
    source = recurrence(*EXTRAS[what])
    result = pipeline(source, feeds(), preset)
    for feed in feeds(3):
        expected = run(source, feed)
        for optimize in (False, True):
            found = run(result.graph, feed, optimize)
            assert list(found) == list(expected)
            for key, values in expected.items():
                assert found[key].shape == values.shape
                assert sqnr(found[key], values) > 25, key


def numpy_lstm(x: Array, w: Array, r: Array, b: Array) -> Array:
    """The equations of ONNX's LSTM, gates in the order i, o, f, c; x (steps, batch, in)."""
    h = c = np.zeros((x.shape[1], r.shape[1]))
    made = []
    for step in x.astype(np.float64):
        i, o, f, z = np.split(step @ w.T + h @ r.T + sum(np.split(b, 2)), 4, axis=1)
        sigmoid = [1 / (1 + np.exp(-gate)) for gate in (i, o, f)]
        c = sigmoid[2] * c + sigmoid[0] * np.tanh(z)
        h = sigmoid[1] * np.tanh(c)
        made.append(h)
    return np.stack(made)


@pytest.mark.parametrize(("preset", "least"), [("int8-dynamic", 33), ("int16x8", 100)])
def test_numbers_are_those_of_the_equations_on_dequantized_weights(
    preset: str, least: float
) -> None:
    """Weights alone: nothing else is rounded. With integer products: activations are, too."""
    source = recurrence()
    result = pipeline(source, feeds(), preset)
    w, r = (result.context.weights[name].dequantize() for name in "wr")
    b = next(onnx.numpy_helper.to_array(t) for t in source.graph.initializer if t.name == "b")[0]
    for feed in feeds(3):
        y = numpy_lstm(feed["x"], w, r, b)
        assert sqnr(run(result.graph, feed)["y"][:, 0], y) > least


def test_neighbouring_weights_keep_the_bound_of_a_cpu_that_adds_pairs() -> None:
    """As many as stand beside each other in a row of W and of R."""
    source = recurrence()
    for name, bound in (("cpu", 128), ("cpu-vnni", 254)):
        weights = pipeline(source, None, "int8-dynamic", name).context.weights
        worst = max(worst_pair(weights[key]) for key in "wr")
        assert 128 * (bound > 128) < worst <= bound


def test_two_layers_that_share_their_weights_share_the_codes_too() -> None:
    text = """(float[s,n,4] x) => (float[s,1,n,4] y, float[s,1,n,4] z) {
        y, yh = LSTM <hidden_size = 4> (x, w, r)
        back = Neg (x)
        z, zh = LSTM <hidden_size = 4> (back, w, r)
    }"""
    source = model(text, w=normal(1, 16, 4, scale=0.5), r=normal(1, 16, 4, seed=1, scale=0.5))
    result = pipeline(source, None, "int8-dynamic")
    names = [t.name for t in g.to_proto(result.graph).graph.initializer]
    parts = ("quantized", "scale", "zero_point")
    assert sorted(names) == sorted(f"{w}_{part}" for w in "wr" for part in parts)
    feed = {"x": normal(5, 2, 4)}
    for key, values in run(source, feed).items():
        assert sqnr(run(result.graph, feed)[key], values) > 28


def test_one_matrix_may_be_both_weights_of_a_layer() -> None:
    text = "(float[s,n,4] x) => (float[s,1,n,4] y) { y, h = LSTM <hidden_size = 4> (x, w, w) }"
    source = model(text, w=normal(1, 16, 4, scale=0.5))
    for preset in ("int8-dynamic", "int16x8"):
        result = pipeline(source, feeds_of(3, x=(5, 2, 4)), preset)
        feed = {"x": normal(5, 2, 4)}
        assert sqnr(run(result.graph, feed)["y"], run(source, feed)["y"]) > 28


# ── weights alone ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("op", "preset"),
    [("GRU", "int8-static"), ("RNN", "int8-dynamic"), ("LSTM", "int16x8"), ("GRU", "int16x8")],
)
@pytest.mark.parametrize("directions", [1, 2])
def test_without_an_integer_kernel_weights_are_codes_that_are_expanded_at_load(
    op: str, preset: str, directions: int
) -> None:
    result = pipeline(recurrence(op, directions), feeds(), preset)
    made = ops(result.graph)
    assert sorted(made) == sorted(["Cast", "Mul"] * 2 + [op])
    kept = {t.name: t for t in g.to_proto(result.graph).graph.initializer}
    assert "w" not in kept
    assert "r" not in kept
    for name, columns in (("w", WIDTH), ("r", HIDDEN)):
        q = result.context.weights[name]
        codes, scale = (
            onnx.numpy_helper.to_array(kept[f"{name}_{part}"]) for part in ("quantized", "Mul")
        )
        assert codes.dtype == np.int8
        assert codes.shape == (directions, GATES[op] * HIDDEN, columns)
        np.testing.assert_array_equal(codes.reshape(-1, columns), q.codes)
        np.testing.assert_array_equal(scale.ravel(), q.scale)
    plan = result.context.plan[next(n.name for n in result.graph.nodes if n.op == op)]
    assert plan.activation is None
    assert plan.weight is not None


# ── what stays float ─────────────────────────────────────────────────────────────────────────────


def reasons(result: Result) -> dict[str, str]:
    return {layer.op: layer.reason for layer in result.report.layers if layer.reason}


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic", "int16x8"])
@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("which", ["w", "r"])
def test_weights_that_are_computed_stay_float(op: str, preset: str, which: str) -> None:
    gates, other = GATES[op], "r" if which == "w" else "w"
    text = f"""(float[s,n,4] x, float[1,{gates * 4},4] moving) => (float[s,1,n,3] z) {{
        {which} = Tanh (moving)
        y, h = {op} <hidden_size = 4> (x, w, r)
        z = MatMul (y, v)
    }}"""
    source = model(text, v=normal(4, 3), **{other: normal(1, gates * 4, 4)})
    fed = feeds_of(3, x=(5, 2, 4), moving=(1, gates * 4, 4))
    result = pipeline(source, fed, preset)
    assert op in ops(result.graph)
    assert reasons(result)[op] == "its weights are computed, not constant"


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic"])
def test_an_lstm_with_its_batch_first_stays_float(preset: str) -> None:
    """The integer operator has no `layout`, and would take the batch for time."""
    text = """(float[n,s,4] x) => (float[n,s,1,3] z) {
        y, h = LSTM <hidden_size = 4, layout = 1> (x, w, r)
        z = MatMul (y, v)
    }"""
    weights = {"w": normal(1, 16, 4), "r": normal(1, 16, 4, seed=1), "v": normal(4, 3)}
    source = model(text, opset=14, **weights)
    # onnxruntime has no float kernel for it either, so there is nothing to calibrate on.
    result = pipeline(source, None, "int8-dynamic")
    assert "layout 1" in reasons(result)["LSTM"]
    (node,) = (n for n in result.graph.nodes if n.op == "LSTM")
    assert node.attrs["layout"] == 1
    alone = model(
        "(float[n,s,4] x) => (float[n,s,1,4] y) "
        "{ y, h = LSTM <hidden_size = 4, layout = 1> (x, w, r) }",
        opset=14, w=weights["w"], r=weights["r"],
    )  # fmt: skip
    with pytest.raises(OnnxqError, match="nothing in this model can be quantized: its batch"):
        pipeline(alone, feeds_of(2, x=(3, 5, 4)), preset)


def test_a_layout_that_is_said_to_be_the_usual_one_is_no_obstacle() -> None:
    source = recurrence(extra=", layout = 0", opset=14)
    result = pipeline(source, None, "int8-dynamic")
    assert "layout" not in lstm_of(result).attrs
    feed = feeds(1)[0]
    assert sqnr(run(result.graph, feed)["y"], run(source, feed)["y"]) > 28


def test_excluding_an_lstm_leaves_it_as_it_is() -> None:
    case = lstm_with_states()
    with pytest.raises(OnnxqError, match="excluded by the user"):
        pipeline(case.model, None, "int8-dynamic", exclude=("LSTM",))
