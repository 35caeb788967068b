"""Effects of layers are those of models built for real, and the layer that hurts comes first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import awkward
import onnx
import pytest
from graphs import Feeds, feeds_of, model, normal, run, samples_of

from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.metrics import metric
from onnxq.pipeline import Pipeline
from onnxq.recipe import load_recipe
from onnxq.target import load_target
from onnxq.tuning import segments
from onnxq.tuning.sensitivity import Sensitivity, sensitivity


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def measured(source: onnx.ModelProto, feeds: Feeds, folder: Path, **options: Any) -> Sensitivity:
    return sensitivity(saved(source, folder), samples=feeds, threads=1, **options)


def built(
    source: onnx.ModelProto, feeds: Feeds, preset: str = "int8-static", **options: Any
) -> onnx.ModelProto:
    """Quantized by a preset, without the pass that goes by the clock."""
    steps = [step for step in load_recipe(preset).passes if step.name != "spare-slow"]
    samples, target = samples_of(source, feeds), load_target("cpu")
    return Pipeline(steps).run(g.load(source), samples, target, threads=1, **options).to_proto()


def for_real(
    source: onnx.ModelProto, feeds: Feeds, name: str, preset: str, **options: Any
) -> float:
    """The distance of a model that was quantized with `include` or `exclude`."""
    made = built(source, feeds, preset, **options)
    distance = metric(name, feeds[0], run(source, feeds[0])).start()
    for feed in feeds:
        distance.update(feed, run(source, feed), run(made, feed))
    return distance.value()


def plain_chain(layers: int = 6, width: int = 16, worst: int | None = None) -> onnx.ModelProto:
    """MatMul and Relu in turns; the layer `worst` has one weight that spoils its column's scale."""
    weights: dict[str, Any] = {}
    text = ""
    for k in range(layers):
        weights[f"w{k}"] = normal(width, width, seed=k, scale=width**-0.5)
        if k == worst:
            weights[f"w{k}"][0] *= 300  # its input 0 is all but silent
            weights[f"w{k - 1}"][:, 0] *= 1e-3
        text += f"m{k} = MatMul ({'x' if not k else f'r{k - 1}'}, w{k}) r{k} = Relu (m{k})\n"
    body = text.replace(f"r{layers - 1} = Relu", "y = Relu")
    return model(f"(float[n,{width}] x) => (float[n,{width}] y) {{ {body} }}", **weights)


# ── against models built for real ────────────────────────────────────────────────────────────────

CASES: list[tuple[Callable[[], awkward.Case], str]] = [
    (awkward.conv_bn_relu6, "int8-static"),
    (awkward.depthwise, "int8-static"),
    (awkward.residual, "int8-static"),
    (awkward.branches, "int8-static"),
    (awkward.attention, "int8-static"),
    (awkward.attention, "int8-dynamic"),
    (awkward.gemm, "int8-dynamic"),
    (awkward.if_body, "int8-static"),
    (awkward.loop_body, "int8-static"),
    (awkward.lstm, "int8-static"),
    (awkward.embedding, "int8-static"),
    (awkward.shared_weights, "int8-static"),
    (awkward.float16, "int8-static"),
    (awkward.residual, "int8-static-qoperator"),
]


@pytest.mark.parametrize(("make", "preset"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_effects_are_those_of_models_built_for_real(
    make: Callable[[], awkward.Case], preset: str, tmp_path: Path
) -> None:
    case = make()
    found = measured(case.model, case.feeds, tmp_path, preset=preset, metric="cosine")
    everything = for_real(case.model, case.feeds, "cosine", preset)
    assert found.all_quantized == pytest.approx(everything, rel=0.005, abs=1e-8)
    assert found.layers
    names = [layer.name for layer in found.layers if layer.alone is not None]
    for layer in found.layers:
        if layer.alone is None or layer.spared is None:
            assert layer.reason
            continue
        one = f"re:^{layer.name}$"
        alone = for_real(case.model, case.feeds, "cosine", preset, include=(one,))
        assert layer.alone == pytest.approx(alone, rel=0.005, abs=1e-8)
        if len(names) > 1:
            spared = for_real(case.model, case.feeds, "cosine", preset, exclude=(one,))
            assert layer.spared == pytest.approx(spared, rel=0.005, abs=1e-8)


@pytest.mark.parametrize("name", awkward.ZOO)
def test_awkward_graphs_are_cut_and_put_together_again(name: str, tmp_path: Path) -> None:
    case = awkward.ZOO[name]()
    if "int8-static" in case.refused:
        with pytest.raises(OnnxqError, match=case.refused["int8-static"]):
            measured(case.model, case.feeds, tmp_path, metric="cosine")
        return
    found = measured(case.model, case.feeds, tmp_path, metric="cosine")
    made = built(case.model, case.feeds)
    expected = case.expected()
    distance = metric("cosine", case.feeds[0], expected[0]).start()
    for feed, said in zip(case.feeds, expected, strict=True):
        distance.update(feed, said, run(made, feed, False))  # the runtime fuses less across cuts
    assert found.all_quantized == pytest.approx(distance.value(), rel=0.1, abs=1e-5)
    assert all(layer.alone is not None for layer in found.layers if not layer.reason)


def test_a_planted_bad_layer_comes_first(tmp_path: Path) -> None:
    found = measured(plain_chain(worst=3), feeds_of(12, x=(4, 16)), tmp_path, metric="sqnr")
    worst, second = found.ranked[:2]
    node = next(n for n in plain_chain().graph.node if n.output[0] == "m3")
    assert worst.name in (node.name, found.layers[3].name)
    assert worst.alone is not None
    assert second.alone is not None
    assert worst.alone > second.alone + 6  # dB
    assert worst.spared == min(layer.spared for layer in found.layers if layer.spared is not None)


def test_no_model_is_built_for_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 52 layers each costs a piece of the model: together a few models, not 104."""
    built: list[int] = []
    original = segments.Session.__init__

    def counted(self: Any, source: Any, **options: Any) -> None:
        built.append(len(source.graph.node))
        original(self, source, **options)

    source = plain_chain(layers=52)
    with monkeypatch.context() as patch:
        patch.setattr(segments.Session, "__init__", lambda s, m, **o: (
            counted(s, m, **o) if isinstance(m, onnx.ModelProto) else original(s, m, **o)
        ))  # fmt: skip
        found = measured(source, feeds_of(4, x=(4, 16)), tmp_path, measure=2)
    assert found.evaluations == 2 * 52 + 1
    assert sum(built) < 16 * len(source.graph.node)
    assert max(built[5:]) < len(source.graph.node) / 4


def test_layers_that_stay_float_are_listed_with_the_reason(tmp_path: Path) -> None:
    found = measured(
        plain_chain(), feeds_of(6, x=(4, 16)), tmp_path, exclude=["m2"], metric="cosine"
    )
    left = [layer for layer in found.layers if layer.alone is None]
    assert [(layer.name, layer.reason) for layer in left] == [("m2", "excluded by the user")]
