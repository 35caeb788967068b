"""The report page: what it says, and what a browser makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chrome import Page
from pages import effects, layer, output, report, shown, tuning

from onnxq.details import weight_record
from onnxq.distribution import Distribution, WeightRecord
from onnxq.errors import OnnxqError
from onnxq.folder import FolderResult
from onnxq.page import page, read_runs, render, runs_in
from onnxq.page.compare import differences
from onnxq.page.data import packed
from onnxq.page.runs import Run
from onnxq.page.tuned import sensitivity
from onnxq.page.words import verdict

pytest.importorskip("vl_convert", reason="needs the extra report")
pytest.importorskip("jinja2", reason="needs the extra report")

EVIL = "</script><script>alert(1)</script>&<b>"


# ── what it says ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "mark", "title"),
    [
        ({"warnings": []}, "good", "It holds"),
        ({}, "look", "It holds; look at 1 warning"),
        ({"verified": False}, "unknown", "Not verified"),
        ({"outputs": [output(0.99), output(0.5)]}, "bad", "The answers changed"),
    ],
)
def test_the_verdict_is_in_words(changes: dict[str, Any], mark: str, title: str) -> None:
    found = verdict(Run("x", report(**changes)))
    assert (found.mark, found.title) == (mark, title)
    assert "4.00× smaller and 2.00× faster" in found.text


def test_the_verdict_of_effects_says_what_was_measured() -> None:
    (run,) = runs_in(json.dumps(effects()), "x")
    assert verdict(run).text == (
        "What each of 5 layers does to the outputs of m.onnx as int8-static: KL divergence, on 9 "
        "samples. With all of them quantized it is 0.3 nat."
    )


def test_names_are_text_wherever_they_stand() -> None:
    named = layer(3, name=EVIL, op=EVIL, reason=EVIL)
    made = page([Run(EVIL, report(layers=2, warnings=[EVIL], recipe=EVIL, model=EVIL))])
    made += page([Run("x", replace(report(), layers=[named]))])
    assert "<script>alert" not in made
    assert made.count("</script>") == 6


def test_a_page_of_many_layers_keeps_its_size_by_leaving_out_details_of_the_least() -> None:
    many = report(layers=200)
    runs = [Run("x", many)]
    rng = np.random.default_rng(0)
    for record in many.layers[:-1]:
        record.weights = [weight_record("w", rng.normal(size=(70, 9)).astype(np.float32), None)]
    whole = len(packed(runs, {}, 10**9))
    less = packed(runs, {}, whole * 2 // 3)
    assert len(less) <= whole * 2 // 3
    kept = [layer for layer in opened(less)["runs"][0]["layers"] if "weights" in layer]
    assert 0 < len(kept) < 200
    worst = [record.name for record in report(layers=200).ranked[: len(kept)]]
    assert sorted(layer["name"] for layer in kept) == sorted(worst)


def opened(text: str) -> dict[str, Any]:
    import base64
    import gzip

    return dict(json.loads(gzip.decompress(base64.b64decode(text))))


def test_the_same_runs_make_the_same_page() -> None:
    assert page([Run("x", report())]) == page([Run("x", report())])


def test_layers_that_differ_come_first_where_they_are_farthest_apart() -> None:
    other = report()
    other.layers[4].sqnr_db = 3.0
    other.layers[7].form = "float"
    other.layers[7].sqnr_db = None
    found = differences([Run("a", report()), Run("b", other)])
    assert [row["name"] for row in found] == ["/block.4/MatMul", "/block.7/MatMul"]
    assert found[0]["apart"] == "21.0 dB"
    assert found[1]["cells"] == [("27.0 dB", "int8 × uint8"), ("–", "float")]


def test_a_report_from_before_details_were_kept_makes_a_page(tmp_path: Path) -> None:
    data = json.loads(report().to_json())
    for record in data["layers"]:
        for key in ("inputs", "before", "after", "weights"):
            del record[key]
    for record in data["ranges"]:
        del record["values"]
    del data["providers"]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(data))
    assert "<title>old" in page(read_runs([file]))


def test_the_layers_that_lose_most_in_any_format_come_first() -> None:
    data = tuning()
    data["sensitivities"][1]["losses"]["/block.1/x"] = 0.5
    seen = sensitivity(Run("a", report(), tuning=data))
    assert [row["name"] for row in seen["rows"]] == [f"/block.{n}/x" for n in (1, 3, 2, 0)]
    assert seen["formats"] == ["int8-static, w8a8", "int8-accurate, w8a8"]
    assert seen["rows"][0]["cells"][1] == {"loss": "0.5", "time": "−0.100 ms"}
    assert [row["place"] for row in seen["rows"]] == [2, 4, 3, 1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"models": 1}', '{"model": 1, "layers": [3]}'])
def test_what_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(OnnxqError, match=r"x\.json' is no report"):
        read_runs([file])


def test_a_folder_of_models_is_a_run_for_each() -> None:
    folder = FolderResult("f", "g", {"encoder.onnx": report(), "decoder.onnx": report(layers=3)})
    found = runs_in(folder.to_json(), "g")
    assert [run.name for run in found] == ["encoder.onnx", "decoder.onnx"]
    assert found[1].report == report(layers=3)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [tmp_path / name / "run.json" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(report().to_json())
    assert [run.name for run in read_runs(files)] == ["run (1)", "run (2)"]


def test_without_its_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "LIBRARIES", {"no_such_module": "no-such-package"})
    with pytest.raises(OnnxqError, match=r"no-such-package: pip install 'onnxq\[report\]'"):
        page([Run("x", report())])


# ── in a browser ─────────────────────────────────────────────────────────────────────────────────


def bars(tab: Page, chart: str) -> int:
    """Bars, lines or points that a chart shows."""
    return int(tab.run(f"document.querySelectorAll('{chart} svg .role-mark path').length"))


def test_every_chart_renders(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report(), tuning={**tuning(), "report": None}))
    assert bars(tab, "#bars") == 12
    assert bars(tab, "#run0-front") == 3  # two that were timed and float
    sizes = "[...document.querySelectorAll('#run0-front .role-legend')].at(-1).textContent"
    assert "file, bytes" in tab.run(sizes)
    assert bars(tab, "#run0-losses") == 2 + 2 * 4  # lines and their points
    assert bars(tab, "#run0-latency") == 2
    assert bars(tab, "#run0-ranges-chart") == 3 * 12
    empty = "[...document.querySelectorAll('.chart')].filter(c => !c.querySelector('svg')).length"
    assert tab.run(empty) == 0


def test_layers_are_filtered_searched_and_sorted(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report()))
    names = "[...document.querySelectorAll('#table tbody th')].map(e => e.textContent)"
    assert len(tab.run(names)) == 13
    tab.choose("op", "Conv")
    assert tab.run(names) == [f"/block.{n}/Conv" for n in (0, 3, 6, 9)]
    tab.wait("document.querySelectorAll('#bars svg .role-mark path').length === 4")
    tab.choose("op", "")
    tab.choose("form", "float")
    assert tab.run(names) == ["/head/Softmax"]
    assert tab.run("document.getElementById('count').textContent") == (
        "1 of 13 layers, of which 0 have a measured error."
    )
    tab.choose("form", "")
    tab.run("controls.search.value = 'BLOCK.1'; controls.search.dispatchEvent(new Event('input'))")
    tab.wait("document.querySelectorAll('#table tbody tr').length === 3")
    tab.run("controls.search.value = ''; controls.search.dispatchEvent(new Event('input'))")
    tab.wait("document.querySelectorAll('#table tbody tr').length === 13")
    tab.click("#table [data-key=sqnr] button")
    assert tab.run(names)[0] == "/block.0/Conv"
    tab.click("#table [data-key=sqnr] button")
    assert tab.run("document.querySelector('[data-key=sqnr]').ariaSort") == "descending"
    assert tab.run(names)[0] == "/block.11/Gemm"
    assert tab.run(names)[-1] == "/head/Softmax"  # what was not measured stands last
    tab.choose("order", "worst")
    assert tab.run(names)[:2] == ["/block.0/Conv", "/block.1/MatMul"]
    tab.run("run().layers[5].sqnr = 1")
    tab.choose("measure", "sqnr")
    assert tab.run(names)[:2] == ["/block.5/Gemm", "/block.0/Conv"]


def test_a_bar_opens_its_layer(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report()))
    tab.click("#bars svg .role-mark path")  # the largest is drawn first
    assert tab.run("document.getElementById('layer').open")
    assert tab.run("document.getElementById('layer-name').textContent") == "/block.0/Conv"
    tab.wait("document.querySelectorAll('#layer svg').length === 3")
    text = tab.run("document.getElementById('layer-body').textContent")
    assert "Target cpu runs Conv as int8/channel × uint8." in text
    assert "rank 1 of 12" in text
    tab.click("#next")
    assert tab.run("document.getElementById('layer-name').textContent") == "/block.1/MatMul"
    tab.wait("document.querySelectorAll('#layer svg').length === 4")
    clipped = "[...document.querySelectorAll('#layer svg [fill=\"var(--bad)\"]')].length"
    assert tab.run(clipped) > 0
    tab.press("Escape")
    assert not tab.run("document.getElementById('layer').open")


def test_a_weight_that_does_not_clip_or_has_no_scale_is_drawn(tab: Page, tmp_path: Path) -> None:
    whole = WeightRecord("w", Distribution(-1, 1, [1, 50, 9]), 4, [0.1, 0.2], -1.5, 1.5, 0.0)
    table = WeightRecord("w", Distribution(-1, 1, [1, 50, 9]), 4)
    layers = [layer(0, weights=[whole], inputs=[], output=""), layer(1, weights=[table], inputs=[])]
    shown(tab, tmp_path, Run("a", report(layers=2)), Run("b", replace(report(), layers=layers)))
    tab.choose("run", "1")
    tab.run("document.querySelector('#table tbody button').click()")
    tab.wait("document.querySelectorAll('#layer svg').length === 2")
    tab.click("#next")
    tab.wait("document.querySelectorAll('#layer svg').length === 2")


def test_runs_are_laid_side_by_side(tab: Page, tmp_path: Path) -> None:
    other = report()
    other.layers[4].sqnr_db = 3.0
    (tuned,) = runs_in(json.dumps(tuning()), "tuned")
    (measured,) = runs_in(json.dumps(effects()), "effects")
    shown(tab, tmp_path, Run("a", report()), Run("b", other), tuned, measured)
    assert tab.run("document.querySelectorAll('#lines svg .role-mark path').length") > 2
    assert "/block.4/MatMul" in tab.run("document.querySelector('main').innerText")
    tab.choose("run", "3")
    assert tab.run("document.querySelectorAll('#table tbody tr').length") == 5
    assert tab.run("document.querySelector('[data-key=alone]').textContent") == (
        "it alone quantized"
    )
    tab.click("details:nth-of-type(3) summary")
    tab.wait("document.querySelectorAll('#run2-front svg').length === 1")


@pytest.mark.parametrize(("width", "scale"), [(360, 2.0), (600, 2.0), (1200, 1.0)])
def test_nothing_is_wider_than_the_window(
    tab: Page, tmp_path: Path, width: int, scale: float
) -> None:
    tab.size(width, 800, scale)
    long = "/" + "a_long_name_without_any_break" * 8
    wide = report()
    wide.layers[0].name = wide.ranges[0].tensor = wide.outputs[0].name = wide.model = long
    shown(tab, tmp_path, Run(long, wide, tuning={**tuning(), "report": None}))
    assert tab.run("document.documentElement.scrollWidth") <= width
    tab.run("document.querySelector('#table tbody button').click()")
    tab.wait("document.querySelectorAll('#layer svg').length >= 2")
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("(d => d.scrollWidth <= d.clientWidth)(document.getElementById('layer'))")


def test_colours_follow_the_system_and_print_is_light(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report()))
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    bar = "getComputedStyle(document.querySelector('#bars svg .role-mark path')).fill"
    light = tab.run(paper), tab.run(bar)
    tab.media(prefers_color_scheme="dark")
    assert tab.run(paper) != light[0]
    assert tab.run(bar) != light[1]
    tab.media("print", prefers_color_scheme="dark")
    assert (tab.run(paper), tab.run(bar)) == light
    assert tab.pdf().startswith(b"%PDF")


def test_two_thousand_layers_are_there(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("big", report(layers=2000)))
    assert bars(tab, "#bars") == 2000
    assert tab.run("document.querySelectorAll('#table tbody tr').length") == 100
    tab.click("#more")
    assert tab.run("document.querySelectorAll('#table tbody tr').length") == 1100
