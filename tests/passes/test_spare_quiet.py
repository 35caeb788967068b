from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import Feeds, model, normal, ops, pipeline, run, sqnr
from onnxq.passes import SpareQuiet

from onnxq.pipeline import Result

WARNING = "weights only are quantized, since the samples differ so much in loudness"


def layers() -> onnx.ModelProto:
    """A layer on the signal as it comes, and one on it after all samples were made equally loud."""
    text = """(float[n,16] x) => (float[n,8] y, float[n,4] z) {
        y = MatMul (x, w)
        s = Mul (y, y)
        m = ReduceMean <axes = [-1], keepdims = 1> (s)
        r = Sqrt (m)
        e = Div (y, r)
        z = MatMul (e, v)
    }"""
    return model(text, w=normal(16, 8, scale=0.3), v=normal(8, 4, seed=1))


def samples(*decibels: float) -> Feeds:
    return [
        {"x": normal(4, 16, seed=k, scale=10 ** (level / 20))} for k, level in enumerate(decibels)
    ]


EVEN = samples(*[0] * 8)
UNEVEN = samples(*[0, 0], *[-40] * 8)
LEFT_OUT = ["spare-quiet.least_db=-1000"]


def floats(result: Result) -> list[str]:
    """The layers whose weights are codes and whose activations are not."""
    plans = result.context.plan.items()
    return [name for name, plan in plans if plan.weight is not None and plan.activation is None]


def test_a_layer_of_which_most_samples_are_forty_db_quieter_keeps_float_activations() -> None:
    result = pipeline(layers(), UNEVEN)
    assert floats(result) == ["y"]
    plan = result.context.plan["y"]
    assert plan.inputs == ()
    assert not plan.output
    assert result.context.plan["z"].inputs == (0,)
    made = {node.name: node for node in result.graph.nodes}
    assert made["y"].inputs[0].name == "x"
    assert made["y"].inputs[1].inputs[0].op == "Mul"  # of codes and scale, when it is loaded
    assert made["z"].inputs[0].inputs[0].op == "DequantizeLinear"
    assert [w.split(": ")[0] for w in result.report.warnings if WARNING in w] == ["'y'"]


def test_even_samples_change_nothing() -> None:
    result, without = pipeline(layers(), EVEN), pipeline(layers(), EVEN, settings=LEFT_OUT)
    assert floats(result) == []
    assert not [w for w in result.report.warnings if WARNING in w]
    assert result.to_proto() == without.to_proto()


def test_the_quiet_samples_get_better_by_twenty_db_and_the_loud_ones_no_worse() -> None:
    """What the pass is for, against the pass left out."""
    source = layers()
    result, without = pipeline(source, UNEVEN), pipeline(source, UNEVEN, settings=LEFT_OUT)
    assert floats(without) == []
    for number, feed in enumerate(UNEVEN):
        exact = run(source, feed)["y"]
        better, worse = (sqnr(run(r.graph, feed)["y"], exact) for r in (result, without))
        assert better > worse
        if number >= 2:
            assert better > worse + 20
            assert better > 30


def test_weights_are_stored_as_codes_all_the_same() -> None:
    kept = {t.name: t for t in pipeline(layers(), UNEVEN).to_proto().graph.initializer}
    for name in "wv":
        assert name not in kept
        assert kept[f"{name}_quantized"].data_type == onnx.TensorProto.INT8


@pytest.mark.parametrize(
    ("decibels", "spared"),
    [
        ([0] * 8, False),
        ([0, *[-40] * 8], True),
        ([*[0] * 6, *[-40] * 2], False),  # most are loud
        ([0, *[-5] * 8], False),  # not quiet enough to be lost
        ([*np.linspace(-3, 0, 8)], False),
    ],
)
def test_what_counts_is_how_far_most_samples_are_below_the_loudest(
    decibels: list[float], spared: bool
) -> None:
    assert floats(pipeline(layers(), samples(*decibels))) == (["y"] if spared else [])


@pytest.mark.parametrize(
    ("settings", "spared"),
    [
        ([], True),
        (["spare-quiet.least_db=9"], True),
        (["spare-quiet.least_db=1"], False),
        (["spare-quiet.spread_db=25"], True),
        (["spare-quiet.spread_db=45"], False),
    ],
)
def test_both_bounds_are_in_decibels(settings: list[str], spared: bool) -> None:
    """The mean is 10·log₁₀(2/10) = 7 dB below the loud ones, the median 40 dB.

    256 steps over ±2.5σ leave 45 dB at the level of the loud ones, 5 dB at that of the median.
    """
    assert floats(pipeline(layers(), UNEVEN, settings=settings)) == (["y"] if spared else [])


def test_several_layers_are_counted_in_one_warning() -> None:
    text = """(float[n,8] x) => (float[n,8] y) {
        a = MatMul (x, w) b = Abs (a) c = MatMul (b, w) d = Neg (c) y = MatMul (d, w)
    }"""
    feeds = [{"x": feed["x"][:, :8]} for feed in UNEVEN]
    result = pipeline(model(text, w=normal(8, 8, scale=0.4)), feeds)
    warnings = [w for w in result.report.warnings if WARNING in w]
    assert len(warnings) == 1
    assert warnings[0].startswith("'a' and 2 more: ")
    assert floats(result) == ["a", "c", "y"]


BETWEEN = {
    "Relu": "r = Relu (a)",
    "Clip": "r = Clip (a, low)",
    "MaxPool": "p = Relu (a) r = MaxPool <kernel_shape = [1,1]> (p)",
    "Add": "p = Relu (a) r = Add (p, a)",
    "Reshape": "p = Reshape (a, shape) q = Relu (p) r = Reshape (q, shape)",
}


@pytest.mark.parametrize("what", BETWEEN)
def test_nothing_between_two_spared_layers_brings_codes_back(what: str) -> None:
    text = f"""(float[1,4,6,6] x) => (float[1,4,6,6] y) {{
        a = Conv (x, w, b)
        {BETWEEN[what]}
        y = Conv (r, v)
    }}"""
    weights = {
        "w": normal(4, 4, 1, 1), "v": normal(4, 4, 1, 1, seed=1), "b": np.zeros(4, np.float32),
        "low": np.float32(0), "shape": np.array([1, 4, 6, 6]),
    }  # fmt: skip
    source = model(text, **{k: v for k, v in weights.items() if k in ("w", "v", "b") or k in text})
    feeds = [{"x": normal(1, 4, 6, 6, seed=k, scale=0.01 if k > 1 else 1)} for k in range(10)]
    result = pipeline(source, feeds)
    assert floats(result) == ["a", "y"]
    assert "QuantizeLinear" not in ops(result.graph)
    for feed in feeds:
        assert sqnr(run(result.graph, feed)["y"], run(source, feed)["y"]) > 30
    even = pipeline(source, feeds[2:])
    assert "QuantizeLinear" in ops(even.graph)


def test_silent_samples_ask_for_nothing() -> None:
    silent: Feeds = [{"x": np.zeros((4, 16), np.float32)} for _ in range(8)]
    source = model("(float[n,16] x) => (float[n,8] y) { y = MatMul (x, w) }", w=normal(16, 8))
    for feeds in (silent, EVEN[:2] + silent):
        with np.errstate(all="raise"):
            assert floats(pipeline(source, feeds)) == []


def test_a_second_apply_spares_nothing_more() -> None:
    result = pipeline(layers(), UNEVEN)
    warnings = list(result.report.warnings)
    assert SpareQuiet().apply(result.prepared, result.context) == 0
    assert result.report.warnings == warnings


def test_layers_without_weights_are_not_its_business() -> None:
    text = """(float[n,4,8] x) => (float[n,4,4] y) {
        t = Transpose <perm = [0,2,1]> (x)
        h = MatMul (x, w)
        y = MatMul (h, t)
    }"""
    feeds = [{"x": normal(1, 4, 8, seed=k, scale=0.01 if k > 1 else 1)} for k in range(10)]
    result = pipeline(model(text, w=normal(8, 8)), feeds)
    assert floats(result) == ["h"]
    assert result.context.plan["y"].activation is not None


def test_ranges_that_hold_every_sample_finely_are_left() -> None:
    """The same samples at 16 bits lose nothing."""
    result = pipeline(layers(), UNEVEN, settings=LEFT_OUT)
    ctx = result.context
    ctx.activations |= {
        name: replace(params, scale=np.float32(params.scale / 256))
        for name, params in ctx.activations.items()
    }
    assert SpareQuiet().apply(result.prepared, ctx) == 0
