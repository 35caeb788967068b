import numpy as np
import pytest
from graphs import Array, apply, batch_norm, bn, context, model, normal, ops, relative, run
from onnxq.passes import FoldBatchNorm

from onnxq import graph as g

CHANNEL = normal(6, seed=9) + 2
# operator: (attributes, weight, input, output rank, channels before)
LINEAR: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "Conv": ("Conv", (6, 4, 3, 3), (2, 4, 5, 5)),
    "Conv in groups": ("Conv <group = 2>", (6, 4, 3, 3), (2, 8, 5, 5)),
    "Conv depthwise": ("Conv <group = 6>", (6, 1, 3, 3), (2, 6, 5, 5)),
    "Conv 1-D": ("Conv", (6, 4, 3), (2, 4, 7)),
    "ConvTranspose": ("ConvTranspose <strides = [2,2]>", (4, 6, 3, 3), (2, 4, 5, 5)),
    "ConvTranspose in groups": ("ConvTranspose <group = 2>", (4, 3, 3, 3), (2, 4, 5, 5)),
    "Gemm": ("Gemm", (4, 6), (3, 4)),
    "Gemm transB": ("Gemm <transB = 1>", (6, 4), (3, 4)),
    "MatMul": ("MatMul", (4, 6), (3, 4)),
}
BIASED = [name for name in LINEAR if name != "MatMul"]


def kind(shape: tuple[int, ...]) -> str:
    return f"float[{','.join(['n', *map(str, shape[1:])])}]"


def net(name: str, body: str, bias: bool = True, **weights: Array):  # type: ignore[no-untyped-def]
    """`z = <the operator>(x, w[, b])`, then `body`, which makes y of z."""
    op, shape, entry = LINEAR[name]
    with_bias = ", b" if bias and name != "MatMul" else ""
    names = ",".join(f"d{k}" for k in range(len(entry)))
    text = f"({kind(entry)} x) => (float[{names}] y) {{ z = {op} (x, w{with_bias}) {body} }}"
    extra = {"b": normal(6, seed=3)} if with_bias else {}
    return model(text, w=normal(*shape), **extra, **weights), {"x": normal(*entry, seed=5)}


def along(name: str, values: Array) -> Array:
    """Per-channel values in the shape that broadcasts against the operator's output."""
    return values.reshape(-1, *(1,) * (len(LINEAR[name][2]) - 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", BIASED)
def test_batch_normalization_disappears_and_the_function_stays(name: str, bias: bool) -> None:
    source, feed = net(name, f"y = {bn('z', 'p')}", bias, **batch_norm(6, "p"))
    graph, changes, _ = apply(FoldBatchNorm(), source)
    assert len(graph.nodes) == 1
    assert changes == 1
    assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-5


@pytest.mark.parametrize("size", ["channel", "scalar", "one"])
@pytest.mark.parametrize(
    "body", ["Mul (z, c)", "Mul (c, z)", "Div (z, c)", "Add (z, c)", "Add (c, z)", "Sub (z, c)"]
)
@pytest.mark.parametrize("name", LINEAR)
def test_neighbours_are_folded(name: str, body: str, size: str) -> None:
    sizes = {"channel": along(name, CHANNEL), "scalar": np.float32(1.7), "one": np.float32([1.7])}
    source, feed = net(name, f"y = {body}", c=sizes[size])
    graph, changes, _ = apply(FoldBatchNorm(), source)
    assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-5
    stays = name == "MatMul" and body.startswith(("Add", "Sub"))  # it has no bias to take it
    assert len(graph.nodes) == 1 + stays
    assert changes == 1 - stays


@pytest.mark.parametrize("name", BIASED)
def test_a_chain_of_neighbours_folds_whole(name: str) -> None:
    body = f"m = Mul (z, c) a = Add (m, d) y = {bn('a', 'p')}"
    shifts = {"c": along(name, CHANNEL), "d": along(name, -CHANNEL)}
    source, feed = net(name, body, **shifts, **batch_norm(6, "p"))
    graph, changes, _ = apply(FoldBatchNorm(), source)
    assert (len(graph.nodes), changes) == (1, 3)
    assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-5


@pytest.mark.parametrize(
    "body",
    [
        "y = Sub (c, z)",  # -z is no scale a reader may rely on, and is left alone
        "y = Div (c, z)",
        "y = Mul (z, z)",
        "y = Pow (z, c)",
        "y = Mul (z, pixels)",
        "r = Relu (z) y = Mul (r, c)",
    ],
)
def test_what_is_no_affine_map_per_channel_stays(body: str) -> None:
    source, feed = net("Conv", body, c=along("Conv", CHANNEL), pixels=normal(1, 1, 3, 3))
    graph, changes, _ = apply(FoldBatchNorm(), source)
    assert changes == 0
    np.testing.assert_array_equal(run(graph, feed)["y"], run(source, feed)["y"])


def test_a_vector_along_pixels_is_not_taken_for_one_along_channels() -> None:
    op = "(float[1,4,8,8] x) => (float[1,6,6,6] y) { z = Conv (x, w) y = Mul (z, c) }"
    source, feed = model(op, w=normal(6, 4, 3, 3), c=CHANNEL), {"x": normal(1, 4, 8, 8)}
    graph, changes, _ = apply(FoldBatchNorm(), source)
    assert changes == 0
    np.testing.assert_array_equal(run(graph, feed)["y"], run(source, feed)["y"])


@pytest.mark.parametrize("op", ["Mul (x, c)", "Mul (c, x)", "Div (x, c)"])
@pytest.mark.parametrize("name", [*LINEAR, "Gemm transA"])
def test_a_scale_before_goes_into_the_columns(name: str, op: str) -> None:
    if name == "Gemm transA":
        LINEAR[name] = ("Gemm <transA = 1>", (4, 6), (4, 3))
    linear, shape, entry = LINEAR[name]
    channels = entry[1]
    c = (normal(channels, seed=8) + 3).reshape(-1, *(1,) * (len(entry) - 2))
    names = ",".join(f"d{k}" for k in range(len(entry)))
    text = f"({kind(entry)} x) => (float[{names}] y) {{ s = {op} y = {linear} (s, w) }}"
    source, feed = model(text, w=normal(*shape), c=c), {"x": normal(*entry, seed=5)}
    graph, changes, _ = apply(FoldBatchNorm(), source)
    expected = run(source, feed)["y"]
    assert relative(run(graph, feed)["y"], expected) < 1e-5
    folds = name in ("Conv", "Conv 1-D", "Gemm", "Gemm transB", "MatMul")
    assert (changes, len(graph.nodes)) == ((1, 1) if folds else (0, 2))


@pytest.mark.parametrize(
    ("outputs", "body"),
    [
        ("float[a,b,c,d] y, float[e,f,g,h] z", ""),
        ("float[a,b,c,d] y, float[e,f,g,h] r", "r = Relu (z)"),
    ],
    ids=["an output of the model", "read by another node"],
)
def test_what_others_see_is_not_folded_into(outputs: str, body: str) -> None:
    text = f"(float[n,4,5,5] x) => ({outputs}) {{ z = Conv (x, w) y = {bn('z', 'p')} {body} }}"
    source = model(text, w=normal(6, 4, 3, 3), **batch_norm(6, "p"))
    graph, changes, _ = apply(FoldBatchNorm(), source)
    assert changes == 0
    assert "BatchNormalization" in ops(graph)


def test_a_weight_that_is_shared_does_not_change_under_its_other_reader() -> None:
    text = f"""(float[n,4,5,5] x) => (float[a,b,c,d] y, float[e,f,g,h] u) {{
        z = Conv (x, w)
        y = {bn("z", "p")}
        u = Conv (x, w)
    }}"""
    source = model(text, w=normal(6, 4, 3, 3), **batch_norm(6, "p"))
    feed = {"x": normal(2, 4, 5, 5)}
    expected = run(source, feed)
    graph, changes, _ = apply(FoldBatchNorm(), source)
    assert changes == 1
    found = run(graph, feed)
    assert relative(found["y"], expected["y"]) < 1e-5
    np.testing.assert_array_equal(found["u"], expected["u"])
    assert {tuple(t.values.shape) for t in g.constants(graph)} == {(6, 4, 3, 3), (6,)}
    assert len({n.inputs[1].name for n in graph.nodes}) == 2


def test_a_bias_that_is_computed_is_left_where_it_is() -> None:
    text = f"""(float[n,4,5,5] x, float[6] b) => (float[a,c,d,e] y) {{
        z = Conv (x, w, b)
        y = {bn("z", "p")}
    }}"""
    source = model(text, w=normal(6, 4, 3, 3), **batch_norm(6, "p"))
    feed = {"x": normal(2, 4, 5, 5), "b": normal(6, seed=3)}
    graph, _, _ = apply(FoldBatchNorm(), source)
    assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-5


def test_gemm_with_alpha_and_beta_keeps_its_function() -> None:
    text = """(float[n,4] x) => (float[n,6] y) {
        z = Gemm <alpha = 0.5, beta = 3.0> (x, w, b) m = Mul (z, c) y = Add (m, c)
    }"""
    source = model(text, w=normal(4, 6), b=normal(6, seed=3), c=CHANNEL)
    feed = {"x": normal(3, 4)}
    graph, _, _ = apply(FoldBatchNorm(), source)
    assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-5


def test_gemm_with_a_matrix_for_a_bias_keeps_its_function() -> None:
    text = "(float[3,4] x) => (float[3,6] y) { z = Gemm (x, w, b) y = Mul (z, c) }"
    source = model(text, w=normal(4, 6), b=normal(3, 6, seed=3), c=CHANNEL)
    feed = {"x": normal(3, 4)}
    graph, _, _ = apply(FoldBatchNorm(), source)
    assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-5


def test_what_batch_normalization_knew_is_remembered() -> None:
    source, _ = net("Conv", f"y = {bn('z', 'p')}", **batch_norm(6, "p"))
    graph, ctx = g.load(source), context()
    FoldBatchNorm().apply(graph, ctx)
    mean, deviation = ctx.batch_statistics["y"]
    parts = batch_norm(6, "p")
    np.testing.assert_allclose(mean, parts["p_beta"])
    np.testing.assert_allclose(deviation, np.abs(parts["p_gamma"]))


def test_bodies_are_folded_too() -> None:
    source = model(
        f"""(float[n,4,5,5] x, bool choice) => (float[n,6,3,3] y) {{
        y = If (choice) <
            then_branch = yes () => (float[n,6,3,3] a) {{ z = Conv (x, w) a = {bn("z", "p")} }},
            else_branch = no () => (float[n,6,3,3] b) {{ b = Conv (x, w) }}
        > }}""",
        w=normal(6, 4, 3, 3),
        **batch_norm(6, "p"),
    )
    graph, changes, _ = apply(FoldBatchNorm(), source)
    assert changes == 1
    for choice in (True, False):
        feed = {"x": normal(2, 4, 5, 5), "choice": np.array(choice)}
        assert relative(run(graph, feed)["y"], run(source, feed)["y"]) < 1e-5
