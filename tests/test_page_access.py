"""The report page as a screen reader, a keyboard and weak eyes meet it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chrome import Page
from pages import effects, report, shown, tuning

from onnxq.page import runs_in
from onnxq.page.runs import Run

pytest.importorskip("vl_convert", reason="needs the extra report")
pytest.importorskip("jinja2", reason="needs the extra report")


def tuned() -> Run:
    (run,) = runs_in(json.dumps(tuning()), "tuned")
    return run


def measured() -> Run:
    (run,) = runs_in(json.dumps(effects()), "effects")
    return run


def validated() -> Run:
    """Without preset, recipe and what calibration saw."""
    whole = report(preset="", recipe="", passes=[])
    for record in whole.ranges:
        record.calibration_low = record.calibration_high = record.calibration_clipped = None
    bare = [replace(layer, weights=[], parameters=0, macs=0) for layer in whole.layers]
    return Run("v", replace(whole, layers=bare))


VIEWS = {
    "quantize": lambda: [Run("a", report())],
    "tune": lambda: [tuned()],
    "validate": lambda: [validated()],
    "sensitivity": lambda: [measured()],
    "comparison": lambda: [Run("a", report()), Run("b", report(layers=7)), tuned(), measured()],
}


@pytest.fixture(params=VIEWS)
def view(request: pytest.FixtureRequest, tab: Page, tmp_path: Path) -> Page:
    """Each kind of page, with all that it has unfolded."""
    shown(tab, tmp_path, *VIEWS[request.param]())
    tab.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    tab.wait("[...document.querySelectorAll('.chart')].every(c => c.querySelector('svg'))")
    return tab


# ── by ear ───────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Heard:
    """What a screen reader says of an element, and of those in it."""

    role: str
    name: str
    level: int
    inside: list[Heard] = field(default_factory=list)

    def walk(self) -> Iterator[Heard]:
        yield self
        for one in self.inside:
            yield from one.walk()

    def all(self, *roles: str) -> list[Heard]:
        return [one for one in self.walk() if one.role in roles]

    @property
    def text(self) -> str:
        return " ".join(one.name for one in self.all("StaticText"))


def heard(tab: Page) -> Heard:
    """The page's accessibility tree, of which what is ignored is passed over."""
    nodes = {n["nodeId"]: n for n in tab.call("Accessibility.getFullAXTree")["nodes"]}

    def below(node: dict[str, Any]) -> list[Heard]:
        found = []
        for child in (nodes[i] for i in node.get("childIds", ()) if i in nodes):
            inside = below(child)
            if child["ignored"]:
                found += inside
                continue
            level = [p["value"]["value"] for p in child["properties"] if p["name"] == "level"]
            name = child.get("name", {}).get("value", "")
            role = child["role"]["value"]
            found.append(Heard(role, name.strip(), int(level[0]) if level else 0, inside))
        return found

    root = next(n for n in nodes.values() if "parentId" not in n)
    return Heard("page", "", 0, below(root))


def test_everything_is_in_a_landmark(view: Page) -> None:
    page = heard(view)
    for role in ("banner", "main", "contentinfo", "navigation"):
        assert len(page.all(role)) == 1, role
    around = {"banner", "main", "contentinfo", "link"}  # a link over all of them
    assert {one.role for one in page.inside} <= around
    assert all(one.name for one in page.all("region", "navigation", "form"))


def test_headings_are_in_order_and_leave_out_no_level(view: Page) -> None:
    levels = [one.level for one in heard(view).all("heading")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(level <= before + 1 for before, level in pairwise(levels))
    assert "" not in [one.name for one in heard(view).all("heading")]


def test_every_table_says_what_it_is_of_and_every_cell_what_it_is_in(view: Page) -> None:
    tables = heard(view).all("table")
    assert len(tables) >= 1
    for table in tables:
        assert table.name
        heads = table.all("columnheader")
        assert heads
        assert "" not in [one.name for one in heads], table.name
        for row in table.all("row"):
            cells = row.all("cell", "columnheader", "rowheader")
            assert len(cells) == len(heads), table.name
            assert row.all("columnheader", "rowheader"), table.name


def test_every_control_has_a_name_of_its_own(view: Page) -> None:
    page = heard(view)
    roles = ("button", "combobox", "searchbox", "textbox", "link", "DisclosureTriangle")
    controls = page.all(*roles)
    assert controls
    assert "" not in [one.name for one in controls]
    ids = view.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)


def test_every_chart_has_words_in_its_place(view: Page) -> None:
    charts = view.run(
        "[...document.querySelectorAll('.chart')].filter(c => c.checkVisibility()).length"
    )
    images = heard(view).all("image")
    assert len(images) == charts
    for image in images:
        assert len(image.name.split()) > 5
        assert list(image.walk()) == [image]  # and not its thousands of marks


def test_what_a_filter_leaves_is_said(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report()))
    (status,) = heard(tab).all("main")[0].all("status")[:1]
    assert status.text == "13 layers, of which 12 have a measured error."
    tab.choose("op", "Conv")
    (status,) = heard(tab).all("main")[0].all("status")[:1]
    assert status.text == "4 of 13 layers, of which 4 have a measured error."
    (bars,) = (one for one in heard(tab).all("image") if one.name.startswith("Bars"))
    assert "The worst: /block.0/Conv" in bars.name
    assert "4 layers" in bars.name


def test_only_the_dialog_is_heard_while_it_is_open(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report()))
    tab.run("document.querySelector('#table tbody tr:nth-child(3) button').click()")
    tab.wait("document.querySelectorAll('#layer svg').length === 4")
    page = heard(tab)
    (dialog,) = page.all("dialog")
    assert dialog.name == "/block.2/Gemm"
    assert page.all("main") == []
    assert [one.name for one in dialog.all("button")][:3] == [
        "The layer before in this list", "The next layer in this list", "Close",
    ]  # fmt: skip
    assert [one.level for one in dialog.all("heading")] == [2, 3, 3, 3, 3, 3]
    assert all(len(one.name.split()) > 5 for one in dialog.all("image"))
    assert len(dialog.all("image")) == 4


# ── by keyboard ──────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize("width", [360, 1200])
def test_what_scrolls_is_a_stop_on_the_way_and_nothing_else_is(
    tab: Page, tmp_path: Path, width: int
) -> None:
    tab.size(width)
    shown(tab, tmp_path, Run("a", report()), tuned())
    tab.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    tab.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    boxes = tab.run(
        "[...document.querySelectorAll('.wide')].map(e => "
        "[e.scrollWidth > e.clientWidth, e.tabIndex === 0, e.getAttribute('aria-label') || ''])"
    )
    assert all(scrolls == stop == bool(name) for scrolls, stop, name in boxes)
    assert any(scrolls for scrolls, *_ in boxes) == (width == 360)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_recipe_is_copied_and_the_page_says_so(
    tab: Page, tmp_path: Path, allowed: bool
) -> None:
    recipe = '[[pass]]\nname = "assign"\n'
    shown(tab, tmp_path, Run("a", report(recipe=recipe)))
    setting = {"name": "clipboard-write"}
    tab.call(
        "Browser.setPermission", permission=setting, setting="granted" if allowed else "denied"
    )
    tab.call("Browser.setPermission", permission={"name": "clipboard-read"}, setting="granted")
    tab.click("[data-copy]")
    tab.wait("document.querySelector('.copy [role=status]').textContent === 'Copied'")
    copied = tab.run("navigator.clipboard.readText()")
    assert copied == (recipe if allowed else recipe.rstrip())  # a selection ends before the last


# ── by eye ───────────────────────────────────────────────────────────────────────────────────────

FAINT = Path(__file__).with_name("contrast.js").read_text("utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_from_the_paper(view: Page, scheme: str) -> None:
    """By WCAG 2.2 AA: text 4.5 : 1, edges of controls and marks of charts 3 : 1."""
    view.media(prefers_color_scheme=scheme)
    assert view.run(FAINT) == []
    view.run("document.querySelector('#table tbody button').click()")
    view.wait("[...document.querySelectorAll('#layer .chart')].every(c => c.querySelector('svg'))")
    assert view.run(FAINT) == []


def test_print_stands_out_too(tab: Page, tmp_path: Path) -> None:
    shown(tab, tmp_path, Run("a", report()))
    tab.media("print", prefers_color_scheme="dark")
    assert tab.run(FAINT) == []
