"""Perplexity against its definition, as whole samples and in steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import PAST, decoder
from graphs import model, normal, run
from numpy.typing import NDArray
from typer.testing import CliRunner

import onnxq
from onnxq.cli import app
from onnxq.errors import OnnxqError
from onnxq.metrics import metric
from onnxq.perplexity import NextToken, Perplexity
from onnxq.runtime import Session
from onnxq.samples import open_samples
from onnxq.states import States

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 24, (1, n)) for n in (12, 9, 2, 15)]


def whole(ids: NDArray[Any], mask: NDArray[Any] | None = None) -> dict[str, NDArray[Any]]:
    shown = np.ones_like(ids) if mask is None else mask
    positions = np.arange(ids.shape[1])[None] + np.zeros_like(ids)
    return {"input_ids": ids, "attention_mask": shown, "position_ids": positions}


def naive(source: onnx.ModelProto, texts: list[NDArray[Any]]) -> float:
    losses = []
    for ids in texts:
        scores = run(source, whole(ids))["logits"][0].astype(float)
        for place in range(ids.shape[1] - 1):
            p = np.exp(scores[place]) / np.exp(scores[place]).sum()
            losses.append(-np.log(p[ids[0, place + 1]]))
    return float(np.exp(np.mean(losses)))


def measured(a: onnx.ModelProto, b: onnx.ModelProto, feeds: Any) -> Perplexity:
    feeds = list(feeds)
    made = metric("perplexity", feeds[0], run(a, feeds[0])).start()
    for feed in feeds:
        made.update(feed, run(a, feed), run(b, feed))
    assert isinstance(made, Perplexity)
    return made


FLOAT, OTHER = decoder(past=False), decoder(past=False, seed=1)


def test_it_is_that_of_the_samples_own_tokens() -> None:
    found = measured(FLOAT, OTHER, map(whole, TEXTS))
    assert found.scored() == pytest.approx((naive(FLOAT, TEXTS), naive(OTHER, TEXTS)), rel=1e-5)
    left, right = found.scored()
    assert found.drop() == pytest.approx(right / left - 1)
    assert found.value() == pytest.approx(np.log(right / left))


def test_tokens_that_are_fed_in_steps_count_as_those_of_one_feed() -> None:
    source = decoder()
    states = States(source, source, threads=1)
    samples = states.carry(open_samples(list(map(whole, TEXTS)), states.specs))
    steps = list(samples)
    assert len(steps) == 2 * len(TEXTS)
    assert steps[1][f"{PAST}.key"].size
    found = measured(source, source, steps)
    assert found.scored()[0] == pytest.approx(naive(FLOAT, TEXTS), rel=1e-5)


def test_one_token_at_a_time_too() -> None:
    source, feeds = decoder(), []
    for ids in TEXTS:
        past = np.zeros((1, 1, 0, 16), np.float32)
        state = {f"{PAST}.key": past, f"{PAST}.value": past}
        for k in range(ids.shape[1]):
            step = whole(ids[:, k : k + 1], np.ones((1, k + 1), int))
            feeds.append({**step, "position_ids": np.array([[k]]), **state})
            said = run(source, feeds[-1])
            state = {f"{PAST}.{x}": said[f"present.0.{x}"] for x in ("key", "value")}
    found = measured(source, source, feeds)
    assert found.scored()[0] == pytest.approx(naive(FLOAT, TEXTS), rel=1e-5)


def test_a_past_that_is_none_of_the_feed_before_joins_nothing() -> None:
    source = decoder()
    past = {f"{PAST}.{x}": normal(1, 1, 5, 16, seed=3) for x in ("key", "value")}
    feed = {**whole(TEXTS[0], np.ones((1, 17), int)), **past}
    assert measured(source, source, [feed, feed]).places == 2 * 11


def test_places_that_the_mask_hides_do_not_count() -> None:
    ids = np.zeros((2, 12), int)
    mask = np.zeros((2, 12), int)
    for row, text in enumerate((TEXTS[0], TEXTS[1])):
        ids[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1
    found = measured(FLOAT, OTHER, [whole(ids, mask)])
    assert found.places == 11 + 8
    assert found.scored()[0] == pytest.approx(naive(FLOAT, TEXTS[:2]), rel=1e-5)


def test_models_that_predict_no_token_have_none() -> None:
    text = """(int64[n,s] input_ids) => (float[n,s,24] logits) {
        x = Gather (table, input_ids)
        all = ReduceMean <axes = [1]> (x)
        y = Add (x, all)
        logits = MatMul (y, w)
    }"""
    both_ways = model(text, table=normal(24, 8), w=normal(8, 24))
    feed = {"input_ids": TEXTS[0]}
    found = NextToken.find(feed, run(both_ways, feed))
    assert found == NextToken("input_ids", "logits")
    assert not found.holds(Session(both_ways), feed)
    assert found.holds(Session(FLOAT), whole(TEXTS[0]))
    few = {"logits": np.zeros((1, 12, 3), np.float32)}  # a class for each token
    assert NextToken.find(feed, few) is None
    with pytest.raises(OnnxqError, match="perplexity is for models that score the next token"):
        metric("perplexity", feed, few)


def test_samples_of_one_token_have_none() -> None:
    with pytest.raises(OnnxqError, match="give longer samples"):
        measured(FLOAT, FLOAT, [whole(TEXTS[0][:, :1])]).value()


def test_reports_show_it(tmp_path: Path) -> None:
    onnx.save(decoder(past=False), tmp_path / "m.onnx")
    feeds = list(map(whole, 6 * TEXTS))
    report = onnxq.quantize(tmp_path / "m.onnx", "int8-dynamic", samples=feeds).report
    assert [m.name for m in report.metrics] == ["kl", "perplexity"]
    onnx.save(decoder(), tmp_path / "past.onnx")
    made = onnxq.quantize(tmp_path / "past.onnx", "int8-dynamic", samples=feeds).report
    assert [m.name for m in made.metrics] == ["kl", "perplexity"]
    for n, ids in enumerate(TEXTS):
        np.savez(tmp_path / f"{n}.npz", **whole(ids))
    command = ["validate", str(tmp_path / "m.onnx"), str(tmp_path / "m.int8-dynamic.onnx")]
    command += ["--data", str(tmp_path), "--metric", "perplexity"]
    shown = CliRunner().invoke(app, [*command, "--json"])
    found = {row["name"]: row for row in json.loads(shown.stdout)["metrics"]}
    assert found["perplexity"]["float_score"] == pytest.approx(naive(FLOAT, TEXTS), rel=1e-5)
    assert found["kl"]["distance"] > 0
    assert "perplexity" in CliRunner().invoke(app, command).stdout


def test_tuning_keeps_to_a_rise_of_it(tmp_path: Path) -> None:
    onnx.save(decoder(past=False), tmp_path / "m.onnx")
    feeds = list(map(whole, 6 * TEXTS))
    found = onnxq.tune(
        tmp_path / "m.onnx", samples=feeds, metric="perplexity", max_drop="1%",
        presets=["int8-dynamic"],
    )  # fmt: skip
    assert found.chosen.drop <= 0.01
    effects = onnxq.sensitivity(
        tmp_path / "m.onnx", "int8-dynamic", samples=feeds, metric="perplexity"
    )
    assert effects.unit == "nat"
    assert effects.ranked
