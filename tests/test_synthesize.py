from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxq.dead_leaves import dead_leaves
from onnxq.errors import OnnxqError
from onnxq.synthesize import synthesize

Array = NDArray[Any]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RNG = np.random.default_rng(7)
WORDS = 60


def model(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Sequence[str],
    weights: dict[str, Array] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, kind, shape) for k, (kind, shape) in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def together(feeds: list[dict[str, Array]], name: str) -> Array:
    return np.concatenate([feed[name] for feed in feeds])


# Images


def convolved(x: Array, kernel: Array) -> Array:
    """The 3×3 convolution with padding 1 of x (n, c, h, w): (n, out, h, w)."""
    wide = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (2, 3))
    return np.asarray(np.einsum("nchwij,ocij->nohw", windows, kernel, optimize=True))


def trained_on(images: Array, shape: list[int | str], layout: str = "NCHW") -> onnx.ModelProto:
    """Convolution and a BatchNormalization that measured what the convolution made of images."""
    kernel = RNG.normal(size=(16, 3, 3, 3)).astype(np.float32)
    made = convolved(images, kernel)
    weights = {
        "kernel": kernel,
        "gamma": np.ones(16, np.float32),
        "beta": np.zeros(16, np.float32),
        "mean": made.mean((0, 2, 3)).astype(np.float32),
        "variance": made.var((0, 2, 3)).astype(np.float32),
    }
    norm = ["made", "gamma", "beta", "mean", "variance"]
    nodes = [
        helper.make_node("Transpose", ["x"], ["first"], perm=[0, 3, 1, 2])
        if layout == "NHWC"
        else helper.make_node("Identity", ["x"], ["first"]),
        helper.make_node("Conv", ["first", "kernel"], ["made"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", norm, ["y"]),
    ]
    return model(nodes, {"x": (FLOAT, shape)}, ["y"], weights)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("gain", "offset"),
    [(0.5, (0, 0, 0)), (1.0, (0.3, 0.0, -0.4)), (0.25, (0.5, 0.45, 0.4)), (60, (120, 115, 100))],
)
def test_images_get_the_range_the_model_was_trained_on(
    gain: float, offset: tuple[float, ...], layout: str
) -> None:
    real = gain * dead_leaves(RNG, 16, 3, 48, 48) + np.array(offset).reshape(1, 3, 1, 1)
    shape: list[int | str] = ["batch", 3, 48, 48] if layout == "NCHW" else ["batch", 48, 48, 3]
    feeds, kind = synthesize(trained_on(real, shape, layout), n=16)
    assert kind == "images"
    made = together(feeds, "x")
    made = made if layout == "NCHW" else made.transpose(0, 3, 1, 2)
    assert made.std() == pytest.approx(gain, rel=0.2)
    np.testing.assert_allclose(made.mean((0, 2, 3)), offset, atol=0.3 * gain)


def test_preprocessing_inside_the_model_is_seen_through() -> None:
    inner = trained_on(dead_leaves(RNG, 16, 3, 48, 48), ["batch", 3, 48, 48])
    inner.graph.node[0].CopyFrom(helper.make_node("Div", ["shifted", "sixty"], ["first"]))
    inner.graph.node.insert(0, helper.make_node("Sub", ["x", "middle"], ["shifted"]))
    for name, value in (("middle", 120.0), ("sixty", 60.0)):
        inner.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    made = together(synthesize(inner, n=16)[0], "x")
    assert made.std() == pytest.approx(60, rel=0.2)
    assert made.mean() == pytest.approx(120, abs=18)


def test_statistics_in_external_data_are_read_beside_the_model(tmp_path: Path) -> None:
    real = 60 * dead_leaves(RNG, 16, 3, 48, 48) + 120
    path = tmp_path / "model.onnx"
    onnx.save(
        trained_on(real, ["batch", 3, 48, 48]),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    lean = onnx.load(path, load_external_data=False)
    made = together(synthesize(lean, n=16, path=path)[0], "x")
    assert made.std() == pytest.approx(60, rel=0.2)
    assert not lean.graph.initializer[0].raw_data


def test_without_normalization_images_are_standard_and_clipped() -> None:
    relu = model([helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, ["n", 1, 28, 28])}, ["y"])
    made = together(synthesize(relu, n=20)[0], "x")
    assert made.shape == (20, 1, 28, 28)
    assert made.mean() == pytest.approx(0, abs=0.1)
    assert made.std() == pytest.approx(1, abs=0.1)
    assert np.abs(made).max() <= 2.5


def test_byte_images_fill_the_bytes() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=FLOAT)]
    feeds, kind = synthesize(model(nodes, {"x": (TensorProto.UINT8, [1, 32, 32, 3])}, ["y"]), n=8)
    assert kind == "images"
    made = together(feeds, "x")
    assert made.dtype == np.uint8
    assert made.min() < 30
    assert made.max() > 225


def test_open_sizes_and_fixed_batches_of_images() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    fixed = model(nodes, {"x": (FLOAT, [4, 3, 16, 16])}, ["y"])
    assert [feed["x"].shape for feed in synthesize(fixed, n=10)[0]] == [(4, 3, 16, 16)] * 2
    free = model(nodes, {"x": (FLOAT, ["n", 3, "height", "width"])}, ["y"])
    assert [feed["x"].shape for feed in synthesize(free, n=2)[0]] == [(1, 3, 224, 224)] * 2


def test_dead_leaves_have_the_spectrum_and_the_edges_of_photographs() -> None:
    images = dead_leaves(RNG, 16, 1, 128, 128)[:, 0]
    power = (np.abs(np.fft.fft2(images)) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    low, high = (power[(frequency > f) & (frequency < 1.5 * f)].mean() for f in (0.03, 0.15))
    slope = np.log(high / low) / np.log(5)
    assert -3.5 < slope < -1.5  # of photographs about −2, of noise 0
    step = np.diff(images, axis=-1)
    kurtosis = (step**4).mean() / (step**2).mean() ** 2
    assert kurtosis > 6  # of photographs far above the 3 of noise: flat faces, few edges


# Language models

NEXT = np.zeros((WORDS, WORDS), np.float32)
NEXT[np.arange(WORDS), (np.arange(WORDS) + 1) % WORDS] = 50


def counting(
    ids: Sequence[int | str] = ("batch", "seq"),
    table: Array = NEXT,
    others: Mapping[str, tuple[int, Sequence[int | str]]] | None = None,
) -> onnx.ModelProto:
    """A language model that goes on with the next number."""
    others = others or {}
    nodes = [helper.make_node("Gather", ["next", "input_ids"], ["logits"])]
    nodes += [helper.make_node("Identity", [name], [f"{name}_out"]) for name in others]
    outputs = [f"{name}_out" for name in others] + ["logits"]
    return model(nodes, {"input_ids": (INT64, ids), **others}, outputs, {"next": table})


@pytest.mark.parametrize("ids", [("batch", "seq"), (1, "seq"), ("batch", 24), (2, 24)])
def test_language_model_writes_its_own_samples(ids: Sequence[int | str]) -> None:
    feeds, kind = synthesize(counting(ids), n=6)
    assert kind == "language model"
    text = together(feeds, "input_ids")
    assert text.shape == (6, 24 if 24 in ids else 64)
    assert text.dtype == np.int64
    np.testing.assert_array_equal((text[:, :-1] + 1) % WORDS, text[:, 1:])
    assert len(set(text[:, 0])) > 1


def test_text_is_drawn_from_the_forty_likeliest_tokens() -> None:
    flat = np.zeros((WORDS, WORDS), np.float32)
    flat[:, :20] = -1
    feeds, _ = synthesize(counting(table=flat), n=8)
    drawn = set(together(feeds, "input_ids")[:, 1:].ravel().tolist())
    assert drawn == set(range(20, 60))


def test_past_is_empty_and_what_goes_with_the_ids_fits() -> None:
    feeds, kind = synthesize(
        counting(
            others={
                "attention_mask": (INT64, ["batch", "total"]),
                "position_ids": (INT64, ["batch", "seq"]),
                "past_key_values.0.key": (FLOAT, ["batch", 4, "past", 8]),
            }
        ),
        n=2,
    )
    assert kind == "language model"
    assert feeds[0]["past_key_values.0.key"].shape == (1, 4, 0, 8)
    np.testing.assert_array_equal(feeds[0]["attention_mask"], np.ones((1, 64)))
    np.testing.assert_array_equal(feeds[0]["position_ids"], np.arange(64)[None])


def test_large_language_model_writes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxq.synthetic_text._TEXT_BUDGET", 3 * WORDS**2 * 64**2 / 2 + 1e6)
    assert len(synthesize(counting(), n=6)[0]) == 3


# Encoders


def encoder(both_ways: bool = False) -> onnx.ModelProto:
    """Sums embeddings and token types; with `both_ways`, scores tokens from all of the text."""
    width = WORDS if both_ways else 4
    nodes = [
        helper.make_node("Identity", ["words"], ["table"]),
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("Gather", ["types", "token_type_ids"], ["typed"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["embedded", "column"], ["masked"]),
        helper.make_node("Add", ["masked", "typed"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Add", ["sum", "mean"], ["y"]),
    ]
    inputs = {
        name: (INT64, ["batch", "seq"])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    weights = {
        "words": RNG.normal(size=(WORDS, width)).astype(np.float32),
        "types": np.zeros((2, width), np.float32),
        "last": np.array([-1]),
    }
    return model(nodes, inputs, ["y"], weights)


@pytest.mark.parametrize("both_ways", [False, True], ids=["embedding", "masked language model"])
def test_encoders_get_random_ids_of_many_lengths(both_ways: bool) -> None:
    feeds, kind = synthesize(encoder(both_ways), n=32)
    assert kind == "tokens"
    assert len(feeds) == 32
    lengths = {feed["input_ids"].shape[1] for feed in feeds}
    assert min(lengths) >= 8
    assert max(lengths) <= 64
    assert len(lengths) > 10
    ids = np.concatenate([feed["input_ids"][0] for feed in feeds])
    assert set(ids.tolist()) == set(range(WORDS))
    for feed in feeds:
        assert feed["attention_mask"].all()
        assert not feed["token_type_ids"].any()
        assert feed["attention_mask"].shape == feed["input_ids"].shape


# Anything else


def test_anything_else_gets_noise_and_an_empty_state() -> None:
    nodes = [
        helper.make_node("Where", ["flag", "x", "zero"], ["chosen"]),
        helper.make_node("Identity", ["state"], ["state_out"]),
        helper.make_node("Gather", ["chosen", "which"], ["y"], axis=1),
    ]
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {
        "x": (FLOAT, ["batch", "time"]),
        "state": (FLOAT, [2, "batch", 8]),
        "flag": (TensorProto.BOOL, []),
        "which": (INT64, []),
    }
    zero = {"zero": np.zeros((1, 1), np.float32)}
    feeds, kind = synthesize(model(nodes, inputs, ["y", "state_out"], zero), n=50)
    assert kind == "random"
    x = together(feeds, "x")
    assert x.shape == (50, 16)
    assert x.mean() == pytest.approx(0, abs=0.15)
    assert x.std() == pytest.approx(1, abs=0.15)
    assert feeds[0]["state"].shape == (2, 1, 8)
    assert not together(feeds, "state").any()
    assert feeds[0]["flag"].all()
    assert feeds[0]["which"] == 0


RATES = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 4] x, int64 rate, int64[1] mode) => (float[1, 4] y) {{
    {constants}
    known = Equal (rate, high)
    y = If (known) <
        then_branch = yes () => (float[1, 4] a) {{
            m = Squeeze (mode)
            two = Constant <value_int = 2> ()
            second = Equal (two, m)
            a = If (second) <
                then_branch = inner () => (float[1, 4] b) {{ b = Neg (x) }},
                else_branch = other () => (float[1, 4] c) {{ c = Relu (x) }}
            >
        }},
        else_branch = no () => (float[1, 4] d) {{ d = Identity (x) }}
    >
}}"""


@pytest.mark.parametrize(
    "constants",
    ["high = Constant <value = int64 {16000}> ()", "high = Constant <value_ints = [16000]> ()"],
)
def test_integers_are_what_the_graph_compares_them_with(constants: str) -> None:
    made = onnx.parser.parse_model(RATES.format(constants=constants))
    for feed in synthesize(made, n=2)[0]:
        assert feed["rate"].shape == ()
        assert feed["rate"] == 16000
        assert feed["mode"].tolist() == [2]


def test_inputs_to_leave_are_left_out() -> None:
    nodes = [helper.make_node("Add", ["x", "h"], ["y"])]
    made = model(nodes, {"x": (FLOAT, [1, 4]), "h": (FLOAT, [1, 4])}, ["y"])
    assert [set(feed) for feed in synthesize(made, n=2, leave={"h"})[0]] == [{"x"}, {"x"}]


def projection(rows: int) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weights = {"w": np.ones((rows, 2), np.float32)}
    return model(nodes, {"x": (FLOAT, ["batch", "time"])}, ["y"], weights)


def test_open_size_is_one_that_runs() -> None:
    assert synthesize(projection(128), n=2)[0][1]["x"].shape == (1, 128)


@pytest.mark.parametrize("make", [lambda: counting(), lambda: encoder(), lambda: projection(16)])
def test_same_seed_same_samples(make: Any) -> None:
    first, again, other = (synthesize(make(), n=3, seed=seed)[0] for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert any(
        a[name].shape != b[name].shape or (a[name] != b[name]).any()
        for a, b in zip(first, other, strict=True)
        for name in a
    )


# What is refused


def refused(strange: onnx.ModelProto) -> str:
    with pytest.raises(OnnxqError) as error:
        synthesize(strange, n=2)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("samples cannot be made up for this model (")
    assert message.endswith("); give --data")
    return message


def test_model_that_runs_on_nothing_made_up() -> None:
    assert "MatMul" in refused(projection(100))


def test_model_that_does_not_load() -> None:
    nodes = [helper.make_node("NoSuchOperator", ["x"], ["y"])]
    with pytest.raises(OnnxqError, match="has no operator NoSuchOperator"):
        synthesize(model(nodes, {"x": (FLOAT, ["n", 4])}, ["y"]), n=2)


def test_model_that_wants_strings() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    assert "'x' is a tensor(string)" in refused(
        model(nodes, {"x": (TensorProto.STRING, ["n"])}, ["y"])
    )


def test_model_that_gives_no_numbers() -> None:
    nodes = [helper.make_node("Div", ["state", "state"], ["y"])]
    assert "output is not a number" in refused(model(nodes, {"state": (FLOAT, [1, 4])}, ["y"]))
