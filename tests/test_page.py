"""The report page: what it says, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chrome import Page, chrome

from onnxq.details import weight_record
from onnxq.distribution import Distribution, WeightRecord
from onnxq.errors import OnnxqError
from onnxq.folder import FolderResult
from onnxq.page import page, read_runs, render, runs_in
from onnxq.page.compare import differences
from onnxq.page.data import packed
from onnxq.page.runs import Run
from onnxq.page.words import verdict
from onnxq.report import (
    DisagreementRecord,
    GroupRecord,
    Latency,
    LayerRecord,
    OutputRecord,
    PassRecord,
    ProviderRecord,
    RangeRecord,
    Report,
)

pytest.importorskip("vl_convert", reason="needs the extra report")
pytest.importorskip("jinja2", reason="needs the extra report")

EVIL = "</script><script>alert(1)</script>&<b>"


def layer(number: int, **more: Any) -> LayerRecord:
    op = ("Conv", "MatMul", "Gemm")[number % 3]
    weight = WeightRecord(Distribution(-1, 2, [1, 50, 9]), 4, [0.1, 0.2, 0.3, 0.4], -1, 1, 0.01)
    quantized = LayerRecord(
        f"/block.{number}/{op}", op, "w s8:channel, a u8a", output=f"t{number}",
        parameters=100 * number, macs=1000, sqnr_db=20.0 + number, contribution=1 / (number + 1),
        inputs=[f"t{number - 1}"], before=[f"/block.{number - 1}/x"], weight=weight,
    )  # fmt: skip
    return replace(quantized, **more)


def output(cosine: float = 0.99) -> OutputRecord:
    return OutputRecord("y", cosine, 20.0, 0.97)


def spread(number: int) -> RangeRecord:
    finding = "clipped" if number == 2 else ""
    return RangeRecord(f"t{number}", 0, 4, 0, 4, 0.0, 0, 6, 0.01, 5, None, finding,
                       Distribution(0, 6, [90, 5, 5]))  # fmt: skip


def report(layers: int = 12, **more: Any) -> Report:
    latency = Latency(0.5, 0.4, 0.6)
    wrong = DisagreementRecord("conv1", ["Conv"], "step", 0.03, 1, "rounds down", 1.0)
    full = Report(
        model="m.onnx", output="q.onnx", target="cpu", preset="int8-static", recipe="[[pass]]\n",
        samples="9 samples", verified=True, passes=[PassRecord("assign", {}, 3, 0.2, 90.0)],
        layers=[
            *map(layer, range(layers)),
            LayerRecord("/head/Softmax", "Softmax", "float", "rounding costs accuracy"),
        ],
        outputs=[output()],
        ranges=[spread(n) for n in range(layers)],
        groups=[GroupRecord("class 1", "y", 9, 0.1, 0.01, 0.9, 0.99, 20.0, True)],
        providers=[
            ProviderRecord("cpu", "CPUExecutionProvider", "1", 5, 0, outputs=[output()],
                           same_bits=True, latency=latency, ratio=0.5),
            ProviderRecord("npu", "NPUExecutionProvider", "2", 4, 1, "x", outputs=[output()],
                           against_cpu=[output()], disagreement=wrong, latency=latency, ratio=0.7),
        ],
        verification_samples=4, float_bytes=4000, quantized_bytes=1000,
        float_latency=Latency(1.0, 0.9, 1.1), quantized_latency=latency,
        environment={"onnxq": "0", "model_sha256": "f" * 64}, warnings=["look here"],
    )  # fmt: skip
    return replace(full, **more)


def tuning() -> dict[str, Any]:
    rows = [("int8-static", 0.5, 0.012), ("int8-static, 2 float", 0.55, 0.004), ("w4", None, 0.2)]
    return {
        "model": "m.onnx", "drop_title": "top-1", "held_out": 64, "chosen": rows[1][0],
        "float_bytes": 4000, "replay": "onnxq quantize m.onnx", "refused": {"int4": "too small"},
        "warnings": [],
        "candidates": [
            {"name": name, "ratio": ratio, "drop": drop, "cosine": 0.99, "bytes": 1000,
             "holds": drop < 0.01, "on_front": ratio is not None}
            for name, ratio, drop in rows
        ],
        "report": json.loads(report().to_json()),
    }  # fmt: skip


def effects() -> dict[str, Any]:
    layers = [
        {"name": f"l{n}", "op": "Conv", "alone": 0.1 * n if n else None, "spared": 0.2,
         "reason": "" if n else "no kernel"}
        for n in range(5)
    ]  # fmt: skip
    return {"model": "m.onnx", "all_quantized": 0.3, "unit": "nat", "layers": layers,
            "warnings": [], "environment": {}}  # fmt: skip


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
        record.weight = weight_record(rng.normal(size=(70, 9)).astype(np.float32), None)
    whole = len(packed(runs, {}, 10**9))
    less = packed(runs, {}, whole * 2 // 3)
    assert len(less) <= whole * 2 // 3
    kept = [layer for layer in opened(less)["runs"][0]["layers"] if "weight" in layer]
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
    assert found[1]["cells"] == ["int8 × uint8, 27.0 dB", "float, –"]


def test_a_report_from_before_details_were_kept_makes_a_page(tmp_path: Path) -> None:
    data = json.loads(report().to_json())
    for record in data["layers"]:
        for key in ("inputs", "before", "after", "weight"):
            del record[key]
    for record in data["ranges"]:
        del record["values"]
    del data["providers"]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(data))
    assert "<title>old" in page(read_runs([file]))


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chrome(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Page) -> Iterator[Page]:
    """A tab that must neither complain nor ask for anything but the page itself."""
    browser.problems.clear()
    browser.requests.clear()
    browser.media()
    browser.size(1200)
    yield browser
    assert browser.problems == []
    assert all(re.match(r"(file|data|blob):", url) for url in browser.requests), browser.requests


def shown(tab: Page, folder: Path, *runs: Run) -> None:
    file = folder / "page.html"
    file.write_text(page(list(runs)), "utf-8")
    assert file.stat().st_size < 2_000_000
    tab.open(file)


def bars(tab: Page, chart: str) -> int:
    """Bars, lines or points that a chart shows."""
    return int(tab.run(f"document.querySelectorAll('{chart} svg .role-mark path').length"))


def test_every_chart_renders(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report(), tuning={**tuning(), "report": None}))
    assert bars(tab, "#bars") == 12
    assert bars(tab, "#run0-front") == 3  # two that were timed and float
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
    whole = WeightRecord(Distribution(-1, 1, [1, 50, 9]), 4, [0.1, 0.2], -1.5, 1.5, 0.0)
    table = WeightRecord(Distribution(-1, 1, [1, 50, 9]), 4)
    layers = [layer(0, weight=whole, inputs=[], output=""), layer(1, weight=table, inputs=[])]
    shown(tab, tmp_path, Run("a", report(layers=2)), Run("b", replace(report(), layers=layers)))
    tab.choose("run", "1")
    tab.run("document.querySelector('#table tbody button').click()")
    tab.wait("document.querySelectorAll('#layer svg').length === 2")
    tab.click("#next")
    tab.wait("document.querySelectorAll('#layer svg').length === 2")


def test_the_keyboard_alone_opens_a_layer_and_returns(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report()))
    tab.press("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    for _ in range(60):
        tab.press("Tab")
        if tab.run("!!document.activeElement.closest('#table tbody')"):
            break
    name = tab.run("document.activeElement.textContent")
    assert name == "/block.0/Conv"
    tab.press("Enter")
    assert tab.run("document.activeElement.id") == "layer-name"
    tab.press("Escape")
    assert tab.run("document.activeElement.textContent") == name


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


def test_every_control_and_picture_has_a_name(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report(), tuning={**tuning(), "report": None}))
    tab.run("document.querySelector('#table tbody button').click()")
    tab.wait("document.querySelectorAll('#layer svg').length >= 2")
    tab.run("document.getElementById('layer').close()")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    wanted = {"button", "combobox", "searchbox", "image", "region", "link", "navigation", "table"}
    found = [n for n in nodes if n.get("role", {}).get("value") in wanted and not n["ignored"]]
    assert {n["role"]["value"] for n in found} >= wanted - {"link"}
    assert [n for n in found if not n.get("name", {}).get("value")] == []
    ids = "[...document.querySelectorAll('[id]')].map(e => e.id)"
    assert len(set(tab.run(ids))) == len(tab.run(ids))


def test_two_thousand_layers_are_there(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("big", report(layers=2000)))
    assert bars(tab, "#bars") == 2000
    assert tab.run("document.querySelectorAll('#table tbody tr').length") == 100
    tab.click("#more")
    assert tab.run("document.querySelectorAll('#table tbody tr').length") == 1100
