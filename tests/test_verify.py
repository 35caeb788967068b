import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from awkward import Case, attention, matmul, residual
from graphs import Array, feeds_of, model, normal, pipeline, run

from onnxq import graph as g
from onnxq import verify
from onnxq.errors import OnnxqError
from onnxq.runtime import Session
from onnxq.target import load_target
from onnxq.verify import Comparison, check_optimizations, compare, latency, layer_errors

# ── comparing ────────────────────────────────────────────────────────────────────────────────────


def test_cosine_sqnr_and_agreement_are_those_of_all_samples_together() -> None:
    pairs = [(normal(3, 5, seed=k), normal(3, 5, seed=k) + normal(3, 5, seed=9 + k, scale=0.5))
             for k in range(4)]  # fmt: skip
    seen = Comparison()
    for left, right in pairs:
        seen.update(left, right)
    a, b = (np.concatenate(side).astype(float) for side in zip(*pairs, strict=True))
    assert seen.cosine == pytest.approx((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    assert seen.sqnr_db == pytest.approx(10 * np.log10((a * a).sum() / ((a - b) ** 2).sum()))
    assert seen.agreement == pytest.approx((a.argmax(1) == b.argmax(1)).mean())
    assert 0 < seen.agreement < 1


def test_equal_and_silent_outputs_have_finite_figures() -> None:
    same, silent, wrong = Comparison(), Comparison(), Comparison()
    same.update(normal(2, 3), normal(2, 3))
    silent.update(np.zeros(3), np.zeros(3))
    wrong.update(np.zeros(3), np.ones(3))
    assert (same.cosine, same.sqnr_db) == (pytest.approx(1), verify.MAX_SQNR)
    assert (silent.cosine, silent.sqnr_db) == (1, verify.MAX_SQNR)
    assert (wrong.cosine, wrong.sqnr_db) == (0, -verify.MAX_SQNR)


def test_outputs_of_differing_shape_are_an_error() -> None:
    with pytest.raises(OnnxqError, match="differ in shape"):
        Comparison().update(np.zeros((2, 3)), np.zeros((3, 2)))


def test_models_without_a_common_output_are_an_error() -> None:
    sessions = [
        Session(model(f"(float[n] x) => (float[n] {y}) {{ {y} = Relu (x) }}")) for y in "yz"
    ]
    with pytest.raises(OnnxqError, match="share no output: y and z"):
        compare(*sessions, [{"x": normal(3)}])


# ── optimizations off and on ─────────────────────────────────────────────────────────────────────


def doctored(source: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """The same model, but `tensor` has its sign turned: what a wrong fusion would do."""
    wrong = onnx.ModelProto()
    wrong.CopyFrom(source)
    for place, node in enumerate(wrong.graph.node):
        if tensor in node.output:
            node.output[list(node.output).index(tensor)] = "turned"
            wrong.graph.node.insert(place + 1, onnx.helper.make_node("Neg", ["turned"], [tensor]))
            break
    else:
        raise AssertionError(f"nothing makes {tensor}")
    return wrong


class MisfusingSession(Session):
    """A runtime whose graph optimizations turn the sign of the tensor `wrong`."""

    wrong = ""

    def __init__(
        self, source: onnx.ModelProto, *, optimize: bool = True, **options: object
    ) -> None:
        made = any(self.wrong in node.output for node in source.graph.node)
        super().__init__(doctored(source, self.wrong) if optimize and made else source)


@pytest.mark.parametrize(
    ("make", "preset", "wrong", "name"),
    [
        (residual, "int8-static", "c", "'c' (Conv)"),
        (residual, "int8-static", "a", "'a' (Conv)"),
        (attention, "int8-static", "s", "'s' (MatMul)"),
        (matmul, "int8-dynamic", "r", "'r' (Relu)"),
        (matmul, "int8-dynamic", "a", "'a_"),
    ],
)
def test_a_model_that_runs_as_another_is_an_error_that_names_the_node(
    make: object, preset: str, wrong: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make()  # type: ignore[operator]
    proto = g.to_proto(pipeline(case.model, case.feeds, preset).graph)
    plain, reference = Session(proto, optimize=False), Session(case.model)
    monkeypatch.setattr(MisfusingSession, "wrong", wrong)
    monkeypatch.setattr(verify, "Session", MisfusingSession)
    with pytest.raises(OnnxqError, match="optimizations change what the model says") as error:
        check_optimizations(proto, plain, MisfusingSession(proto), reference, case.feeds)
    assert f"first node that differs: {name}" in str(error.value)


@pytest.mark.parametrize("preset", ["int8-static", "int8-dynamic"])
def test_a_model_that_means_what_it_says_passes_and_is_measured(preset: str) -> None:
    case = attention()
    proto = g.to_proto(pipeline(case.model, case.feeds, preset).graph)
    plain, optimized = Session(proto, optimize=False), Session(proto)
    found = check_optimizations(proto, plain, optimized, Session(case.model), case.feeds)
    expected = min(c.sqnr_db for c in compare(plain, optimized, case.feeds).values())
    assert found == expected > 25


# ── error by layer ───────────────────────────────────────────────────────────────────────────────


def rounded(params: object, x: Array) -> Array:
    scale, zero = float(params.scale), int(params.zero)  # type: ignore[attr-defined]
    return (np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255) - zero) * scale


def test_errors_and_contributions_are_those_of_one_layer_changed_by_hand() -> None:
    case = matmul()
    result = pipeline(case.model, case.feeds)
    ctx = result.context
    found = layer_errors(result.prepared, result.graph, ["a", "y"], case.feeds)
    weights = {t.name: t.values.astype(float) for t in g.constants(result.prepared)}
    w1, w2 = (ctx.weights[n].dequantize().T.astype(float) for n in ("w1", "w2"))

    def tail(a: Array) -> Array:
        return np.maximum(a + weights["b1"], 0) @ weights["w2"]

    sums = {name: np.zeros(4) for name in ("a", "y")}
    for feed in case.feeds:
        x = feed["x"].astype(float)
        a = x @ weights["w1"]
        r, y = np.maximum(a + weights["b1"], 0), tail(a)
        wrong_a = rounded(ctx.activations["x"], x) @ w1
        wrong_y = rounded(ctx.activations["r"], r) @ w2
        for name, exact, wrong, output in (
            ("a", a, wrong_a, tail(wrong_a)),
            ("y", y, wrong_y, wrong_y),
        ):
            sums[name] += [np.sum(exact**2), np.sum((wrong - exact) ** 2),
                           np.sum(y**2), np.sum((output - y) ** 2)]  # fmt: skip
    for name, (signal, noise, output_signal, output_noise) in sums.items():
        assert found[name].sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=0.05)
        assert found[name].contribution == pytest.approx(output_noise / output_signal, rel=0.02)


def test_a_layer_that_did_not_change_makes_no_error() -> None:
    case = residual()
    result = pipeline(case.model, case.feeds, exclude=("a",))
    found = layer_errors(result.prepared, result.graph, ["a", "c", "z"], case.feeds[:2])
    assert set(found) == {"c", "z"}
    assert all(error.noise > 0 for error in found.values())


def chain(outlier: int | None, factor: float = 100.0, layers: int = 5) -> Case:
    """Convolutions with Relu. One channel of the outlier layer is large; the next takes it back,
    so that the function is the same."""
    weights = {f"w{k}": normal(8, 8, 3, 3, seed=k, scale=0.15) for k in range(layers)}
    if outlier is not None:
        weights[f"w{outlier}"][3] *= factor
        weights[f"w{outlier + 1}"][:, 3] /= factor
    nodes = " ".join(
        f"c{k} = Conv <pads = [1,1,1,1]> ({f'r{k - 1}' if k else 'x'}, w{k}) r{k} = Relu (c{k})"
        for k in range(layers - 1)
    )
    text = f"""(float[n,8,6,6] x) => (float[n,8,6,6] y) {{
        {nodes} y = Conv <pads = [1,1,1,1]> (r{layers - 2}, w{layers - 1})
    }}"""
    return Case(model(text, **weights), feeds_of(8, x=(1, 8, 6, 6)))


PER_TENSOR = """
summary = "one scale for a whole weight, and wide activations: only weights err"
providers = ["CPUExecutionProvider"]
opset = 21
[[rule]]
ops = ["Conv"]
form = "static"
activation = "u16a"
weight = "s8"
output = "float"
source = "a test"
"""


@pytest.mark.parametrize("outlier", range(4))
def test_a_planted_outlier_in_the_weights_comes_first(outlier: int, tmp_path: Path) -> None:
    import onnxq

    case = chain(outlier)
    np.testing.assert_allclose(
        run(case.model, case.feeds[0])["y"], run(chain(None).model, case.feeds[0])["y"], atol=1e-3
    )
    onnx.save(case.model, tmp_path / "m.onnx")
    (tmp_path / "mine.toml").write_text(PER_TENSOR)
    target = load_target(str(tmp_path / "mine.toml"))
    result = onnxq.quantize(
        tmp_path / "m.onnx",
        samples=case.feeds,
        target=target,
        write=False,
        settings=["assign.format=w8a16"],
    )
    ranked = result.report.ranked
    assert len(ranked) == 5
    assert ranked[0].name == f"c{outlier}"
    assert ranked[0].contribution > 2 * ranked[1].contribution


@pytest.mark.parametrize("outlier", range(4))
def test_a_planted_outlier_in_the_activations_comes_first(outlier: int, tmp_path: Path) -> None:
    """One channel is 1000 times the others: its reader has few codes for them."""
    import onnxq

    case = chain(outlier, factor=1000)
    onnx.save(case.model, tmp_path / "m.onnx")
    result = onnxq.quantize(
        tmp_path / "m.onnx", samples=case.feeds, write=False, settings=["calibrate.method=minmax"]
    )
    ranked = result.report.ranked
    assert ranked[0].name == (f"c{outlier + 1}" if outlier < 3 else "y")
    assert ranked[0].contribution > 2 * ranked[1].contribution


# ── speed ────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    """A session that takes its time, longer in the second half of the run."""

    def __init__(self, seconds: float, log: list[float]) -> None:
        self.seconds, self.log = seconds, log

    def run(self, feed: object) -> None:
        self.log.append(self.seconds)
        time.sleep(self.seconds * (1 + (len(self.log) > 20)))


def test_models_are_timed_in_turns() -> None:
    log: list[float] = []
    sessions = [Clock(0.002, log), Clock(0.004, log)]
    fast, slow = latency(sessions, {}, seconds=10, most=20)  # type: ignore[arg-type]
    assert log == [0.002, 0.004] * 21
    assert slow.median_ms > fast.median_ms  # though both slowed down half way
    assert fast.low_ms <= fast.median_ms <= fast.high_ms
    assert fast.median_ms >= 2


def test_timing_stops_in_time_after_five_rounds() -> None:
    log: list[float] = []
    latency([Clock(0.01, log)], {}, seconds=0.01, most=1000)  # type: ignore[list-item]
    assert len(log) == 6
