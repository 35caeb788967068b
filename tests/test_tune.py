"""What tune writes holds its bounds, is as fast as a preset that does, and can be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import MODELS, feeds_of, run
from test_sensitivity import plain_chain, saved

import onnxq
from onnxq import cache
from onnxq.errors import OnnxqError
from onnxq.knapsack import Choice
from onnxq.metrics import metric
from onnxq.report import Latency
from onnxq.tuning import candidates, mixing, tuner
from onnxq.tuning.bounds import Bounds, Limit, parse_bounds
from onnxq.tuning.mixing import last_that
from onnxq.tuning.result import Tuning

DIGITS = MODELS / "digits_cnn.onnx"
SAMPLES = str(MODELS / "digits_cnn.calib.npz")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "TIMED", 0.05)
    monkeypatch.setattr("onnxq.tuning.timing.SECONDS", 0.01)


def tuned(folder: Path, **options: Any) -> Tuning:
    """A chain of layers of which one is ruined by 8 bits."""
    path = saved(plain_chain(worst=3), folder)
    options = {"samples": feeds_of(24, x=(4, 16)), "threads": 1} | options
    return tuner.tune(path, **options)


def held_out(folder: Path, feeds: Any) -> tuple[float, float]:
    """(top-1 drop, cosine) of the tuned model in a folder, on feeds."""
    import onnx

    both = onnx.load(folder / "m.onnx"), onnx.load(folder / "m.tuned.onnx")
    first = run(both[0], feeds[0])
    drop, angle = (metric(n, feeds[0], first).start() for n in ("top1", "cosine"))
    for feed in feeds:
        said = [run(model, feed) for model in both]
        drop.update(feed, said[0], said[1])
        angle.update(feed, said[0], said[1])
    return drop.drop() or 0.0, 1 - angle.value()


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────


def test_the_layer_that_hurts_is_left_float_and_the_bound_holds(tmp_path: Path) -> None:
    found = tuned(tmp_path, min_cosine=0.9999, presets=["int8-static"])
    uniform = found.candidates[0]
    assert uniform.cosine < 0.9999  # so that there was something to do
    assert "float" in found.chosen.layers.values()
    assert len(found.chosen.layers) < 6
    worst = np.argmin([c.cosine for c in found.candidates])
    assert found.candidates[worst] is not found.chosen
    cosine = held_out(tmp_path, feeds_of(24, x=(4, 16))[12:])[1]
    assert cosine >= 0.9999
    assert cosine == pytest.approx(found.chosen.cosine, abs=1e-6)


def test_a_preset_that_holds_is_never_beaten_by_what_is_taken(tmp_path: Path) -> None:
    found = tuned(tmp_path, max_drop="20%")
    holding = [c for c in found.candidates if not c.layers and c.accurate(found.bounds)]
    assert holding
    fastest = min(c.ratio for c in holding if c.ratio is not None)
    assert found.chosen.ratio is not None
    assert found.chosen.ratio <= fastest
    assert held_out(tmp_path, feeds_of(24, x=(4, 16))[12:])[0] <= 0.2


def test_size_is_bounded_exactly_and_narrow_formats_help(tmp_path: Path) -> None:
    found = onnxq.tune(
        DIGITS,
        samples=SAMPLES,
        max_size="0.25x",
        output=tmp_path / "d.onnx",
        presets=["int8-static"],
    )
    assert (tmp_path / "d.onnx").stat().st_size <= 0.25 * DIGITS.stat().st_size
    assert "w4a8" in found.chosen.layers.values()
    assert found.candidates[0].bytes > 0.25 * found.float_bytes


def test_latency_is_bounded_and_the_most_accurate_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time(shop: Any, given: Any) -> Latency:
        """A float layer takes a ms, a quantized one half of it."""
        for c in given:
            taken = 3 + 0.5 * list(c.layers.values()).count("float")
            c.latency, c.ratio = Latency(taken, taken, taken), taken / 6
        return Latency(6, 6, 6)

    monkeypatch.setattr(candidates.Workshop, "time", time)
    times = {"layer_times": lambda v, *_: {n.name: (1.0, 0.5) for n in v.layers}}
    monkeypatch.setattr(mixing, "layer_times", times["layer_times"])
    found = tuned(tmp_path, max_latency="0.7x", presets=["int8-static"])
    assert found.chosen.ratio is not None
    assert found.chosen.ratio <= 0.7
    assert list(found.chosen.layers.values()) == ["float"] * 2
    with pytest.raises(OnnxqError, match=r"no model holds latency ≤ 0\.3 × float: the fastest"):
        tuned(tmp_path, max_latency="0.3x", presets=["int8-static"])


# ── the recipe ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bound", [{"min_cosine": 0.9999}, {"max_drop": 0.2}])
def test_the_recipe_makes_the_same_bytes(bound: Any, tmp_path: Path) -> None:
    feeds = feeds_of(40, x=(4, 16))
    found = tuned(tmp_path, samples=feeds, **bound)
    again = tmp_path / "again.onnx"
    onnxq.quantize(
        tmp_path / "m.onnx", recipe=found.recipe, samples=feeds, limit=found.calibrated_on,
        output=again, threads=1,
    )  # fmt: skip
    assert again.read_bytes() == (tmp_path / "m.tuned.onnx").read_bytes()
    assert f"--samples {found.calibrated_on}" in found.replay


def test_include_and_exclude_are_in_the_recipe(tmp_path: Path) -> None:
    found = tuned(tmp_path, max_drop="50%", exclude=["m0"], presets=["int8-static"])
    assert 'exclude = ["m0"]' in Path(found.recipe).read_text()
    assert next(r for r in found.report.layers if r.name == "m0").form == "float"


def test_json_has_every_candidate(tmp_path: Path) -> None:
    found = tuned(tmp_path, min_cosine=0.9999)
    data = json.loads(found.to_json())
    assert data["chosen"] == found.chosen.name
    assert [row["name"] for row in data["candidates"]] == [c.name for c in found.candidates]
    assert any(row["on_front"] for row in data["candidates"])
    assert any(row["holds"] for row in data["candidates"])


def test_json_has_what_each_layer_loses_and_takes_in_each_format(tmp_path: Path) -> None:
    found = tuned(tmp_path, min_cosine=0.9999, presets=["int8-static"], formats=["w4a8"])
    whole, half = json.loads(found.to_json())["sensitivities"]
    assert (whole["preset"], whole["format"], half["format"]) == ("int8-static", "w8a8", "w4a8")
    assert whole["unit"] == "nat"
    assert list(whole["losses"]) == [f"m{n}" for n in range(6)]
    assert max(whole["losses"], key=whole["losses"].get) == "m3"  # the layer that is ruined
    assert sum(half["losses"].values()) > sum(whole["losses"].values())
    assert all(len(pair) == 2 and min(pair) > 0 for pair in whole["times"].values())
    again = tuned(tmp_path, min_cosine=0.9999, presets=["int8-static"], formats=["w4a8"])
    assert again.sensitivities == found.sensitivities  # as the cache knows them


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(tmp_path, min_cosine=0.9999, presets=["int8-static"])
    assert whole.measured > 3
    repeated = tuned(tmp_path, min_cosine=0.9999, presets=["int8-static"])
    assert repeated.measured == 1  # the model of the recipe, before it is written
    assert repeated.chosen.name == whole.chosen.name
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path / "other"))
    score, scored = candidates.Workshop.score, list[str]()

    def interrupted(shop: Any, path: Path) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(str(path))
        return score(shop, path)

    (tmp_path / "m.tuned.onnx").unlink()
    monkeypatch.setattr(candidates.Workshop, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, min_cosine=0.9999, presets=["int8-static"])
    assert not (tmp_path / "m.tuned.onnx").exists()
    monkeypatch.setattr(candidates.Workshop, "score", score)
    resumed = tuned(tmp_path, min_cosine=0.9999, presets=["int8-static"])
    assert resumed.measured <= whole.measured - 3


def test_a_function_of_the_user_is_asked_again(tmp_path: Path) -> None:
    options = {"max_drop": 0.5, "metric": "metric_for_tests:mean", "presets": ["int8-static"]}
    (tmp_path / "metric_for_tests.py").write_text(
        "def mean(outputs):\n    return 10 + sum(o['y'].mean() for o in outputs) / len(outputs)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        tuned(tmp_path, **options)
        again = tuned(tmp_path, **options)
    assert again.measured > 1


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to tune for: give a bound"),
        ({"max_drop": "0.5x"}, "--max-drop 0.5x: write for example"),
        ({"max_drop": "lots"}, "--max-drop lots: write for example"),
        ({"max_drop": 2}, "a share from 0 to 1"),
        ({"min_cosine": 3.0}, "--min-cosine is between -1 and 1"),
        ({"max_latency": "5 MB"}, "--max-latency 5 MB: write for example 0.7x or 12ms"),
        ({"max_latency": "0x"}, "give more than 0"),
        ({"max_drop": 0.1, "samples": None}, "measuring on samples, and there are none"),
        ({"max_drop": 0.1, "samples": feeds_of(5, x=(4, 16))}, "5 samples are too few"),
        ({"max_drop": 0.1, "metric": "accuracy"}, "there is no metric 'accuracy'"),
        ({"max_drop": 0.1, "metric": "kl"}, "no value that the float model's could drop from"),
        ({"max_drop": 0.1, "metric": "nowhere:f"}, "importing 'nowhere' to be the metric failed"),
        ({"min_cosine": 1.0}, "no quantized model holds cosine ≥ 1.0: the nearest"),
        ({"max_drop": 0.1, "presets": ["int9"]}, "there is no preset 'int9'"),
        ({"max_drop": 0.1, "presets": ["qat"]}, "no weight of this model is fake-quantized"),
        ({"max_drop": 0.1, "formats": ["w4a99"]}, "w4a99"),
        ({"max_size": "10B"}, "no quantized model holds size ≤ 1e-05 MB"),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OnnxqError) as caught:
        tuned(tmp_path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no labels')", "the metric judge_for_tests:f failed with ValueError"),
        ("return float('nan')", "the metric judge_for_tests:f returned nan; it must"),
        ("return 'good'", "failed with ValueError: could not convert"),
    ],
)  # fmt: skip
def test_a_metric_that_fails_is_named(body: str, message: str, tmp_path: Path) -> None:
    import sys

    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "judge_for_tests.py").write_text(f"def f(outputs):\n    {body}\n")
    sys.modules.pop("judge_for_tests", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for call in (tuned, sensitive):
            with pytest.raises(OnnxqError, match=message[:60]):
                call(tmp_path, max_drop=0.1, metric="judge_for_tests:f")


def sensitive(folder: Path, *, max_drop: float, **options: Any) -> Any:
    path = saved(plain_chain(), folder)
    return onnxq.sensitivity(path, samples=feeds_of(6, x=(4, 16)), threads=1, **options)


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def test_bounds_are_read_as_they_are_written() -> None:
    assert parse_bounds("0.5%", None, "0.7x", "3MB") == Bounds(
        0.005, None, Limit(0.7, relative=True), Limit(3e6)
    )
    assert parse_bounds(0.01, 0.99, 12, "1 MiB") == Bounds(0.01, 0.99, Limit(12), Limit(2**20))
    assert parse_bounds("1e-3", None, "1.5 s", None).latency == Limit(1500)
    assert Limit(0.5, relative=True).holds(1, 2)
    assert not Limit(0.5, relative=True).holds(1.1, 2)


@pytest.mark.parametrize("last", range(-1, 9))
def test_bisection_finds_the_last_that_holds(last: int) -> None:
    choices = [Choice((k,), k, -k) for k in range(9)]
    built: list[int] = []

    def build(choice: Choice) -> Any:
        built.append(choice.options[0])
        return choice.options[0]

    assert last_that(choices, lambda number: number <= last, build) == last  # type: ignore[operator]
    assert len(built) <= 5


def test_the_cache_of_a_run_can_be_switched_off(tmp_path: Path) -> None:
    with cache.disabled():
        for _ in range(2):
            found = tuned(tmp_path, max_drop="20%", presets=["int8-static"])
            assert found.measured > 3
