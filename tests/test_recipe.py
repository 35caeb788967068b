import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from awkward import matmul
from graphs import samples_of
from onnxq.passes import Calibrate, Dynamic, InsertQDQ

import onnxq.recipe as recipes
from onnxq import graph as g
from onnxq.errors import OnnxqError
from onnxq.pipeline import Context, Pass
from onnxq.recipe import load_pass, load_recipe, parse_recipe, pass_types, preset_names, preset_text
from onnxq.target import load_target


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_its_text_gives_the_same_passes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.summary == tomllib.loads(preset_text(name))["summary"]
    again = parse_recipe(name, recipe.text)
    assert again.passes == recipe.passes
    assert again == recipe
    assert recipe.pipeline.names == [
        row["name"] for row in tomllib.loads(preset_text(name))["pass"]
    ]


@pytest.mark.parametrize("name", pass_types())
def test_every_registered_pass_can_be_built_and_bears_its_name(name: str) -> None:
    kind = load_pass(name)
    assert kind.name == name
    assert kind() == parse_recipe("r", f'[[pass]]\nname = "{name}"').passes[0]
    assert kind.__doc__


def test_settings_survive_the_text() -> None:
    settings = [
        "calibrate.method=mse",
        'assign.exclude=["a\\"b", "re:\\\\d"]',
        "calibrate.percentile=99",
    ]
    recipe = load_recipe("int8-static", settings)
    assign = next(step for step in recipe.passes if step.name == "assign")
    assert assign.settings()["exclude"] == ('a"b', "re:\\d")
    assert parse_recipe(recipe.name, recipe.text) == recipe


@pytest.mark.parametrize(
    ("setting", "number", "field", "value"),
    [
        ("calibrate.method=entropy", 5, "method", "entropy"),
        ('calibrate.method="entropy"', 5, "method", "entropy"),
        ("calibrate.percentile=99", 5, "percentile", 99.0),
        ("calibrate.percentile=99.5", 5, "percentile", 99.5),
        ("assign.include=Conv", 4, "include", ("Conv",)),
        ("assign.include=[]", 4, "include", ()),
        ('assign.exclude=["a", "b"]', 4, "exclude", ("a", "b")),
        ("assign.exclude=re:x=1", 4, "exclude", ("re:x=1",)),
    ],
)
def test_one_field_is_changed_and_has_its_type(
    setting: str, number: int, field: str, value: object
) -> None:
    found = getattr(load_recipe("int8-static", [setting]).passes[number], field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("calibrate.method", "--set wants pass.field=value"),
        ("method=mse", "--set wants pass.field=value"),
        ("calibrat.method=mse", "no pass 'calibrat'; nearest: calibrate"),
        ("dynamic.per_row=true", "no pass 'dynamic'"),
        ("calibrate.metod=mse", "no field 'metod'; nearest: method"),
        ("calibrate.method=best", "calibrate.method is one of minmax, percentile, entropy, mse"),
        ("calibrate.percentile=high", "calibrate.percentile wants float, not 'high'"),
        ("calibrate.percentile=true", "calibrate.percentile wants float, not True"),
        ("assign.include=[1]", "assign.include wants str, not 1"),
    ],
)
def test_a_wrong_setting_says_what_is_wrong(setting: str, message: str) -> None:
    with pytest.raises(OnnxqError) as error:
        load_recipe("int8-static", [setting])
    assert message in str(error.value)


def test_true_and_false_are_no_strings() -> None:
    assert load_recipe("int8-dynamic", ["dynamic.per_row=false"]).passes[-1] == Dynamic(False)
    with pytest.raises(OnnxqError, match="wants bool"):
        load_recipe("int8-dynamic", ["dynamic.per_row=no"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no \\[\\[pass\\]\\]"),
        ("summary = 'x'\npass = 3", "write \\[\\[pass\\]\\] above each"),
        ("pass = [3]", "write \\[\\[pass\\]\\] above each"),
        ("summary = 3\n[[pass]]\nname='assign'", "summary wants str"),
        ("x = " + "[" * 5000, "not valid TOML"),
        ("x = " + "9" * 5000, "not valid TOML"),
        ("colour = 1\n[[pass]]\nname='assign'", "unknown key 'colour'"),
        ("[[pass]]\nform='static'", "needs a name"),
        ("[[pass]]\nname='asign'", "no pass 'asign'; nearest: assign"),
        ("[[pass]]\nname='assign'\nform='fast'", "assign.form is one of static, dynamic"),
        ("[[pass", "not valid TOML"),
    ],
)
def test_a_broken_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(OnnxqError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize("preset", ["int8-static", "int8-smooth", "w4a8"])
def test_a_fused_recipe_ends_in_the_runtimes_operators_once(preset: str) -> None:
    fused = load_recipe(preset).fused()
    assert [step.name for step in fused.passes][-2:] == ["insert-qdq", "fuse-integer"]
    assert fused.fused() == fused
    assert parse_recipe("again", fused.text).passes == fused.passes


@pytest.mark.parametrize("preset", ["int4", "int4-qdq", "int8-dynamic", "integer-only"])
def test_what_is_in_no_qdq_form_of_activations_is_not_fused(preset: str) -> None:
    with pytest.raises(OnnxqError, match=f"--fuse is for .*{preset!r} is not one"):
        load_recipe(preset).fused()


def test_names_that_are_not_there() -> None:
    with pytest.raises(OnnxqError, match="no preset 'int8-statik'; nearest: int8-static"):
        load_recipe("int8-statik")
    with pytest.raises(OnnxqError, match="no recipe file"):
        load_recipe("nowhere.toml")


def test_a_preset_copied_to_a_file_and_edited(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(preset_text("int8-static").replace('"percentile"', '"mse"'))
    recipe = load_recipe(str(path))
    assert recipe.name == "mine"
    assert recipe.passes[5] == Calibrate(method="mse")


# ── passes of others ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rename(Pass):
    """A pass that somebody else ships."""

    suffix: str = "_x"
    times: int | None = None
    mode: Literal["a", "b"] = "a"
    name: ClassVar[str] = "rename"

    def apply(self, graph: g.Graph, ctx: Context) -> int:
        fresh = [node for node in graph.nodes if not node.name.endswith(self.suffix)]
        for node in fresh:
            node.name += self.suffix
        return len(fresh)


class Entry:
    def __init__(self, name: str, kind: object) -> None:
        self.name, self.kind = name, kind

    def load(self) -> object:
        return self.kind


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = list(metadata.entry_points(group=recipes.ENTRY_POINTS))
    theirs = [Entry("rename", Rename), Entry("wrong", dict)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: [*ours, *theirs])


@pytest.mark.usefixtures("installed")
def test_a_third_partys_pass_is_found_set_and_run() -> None:
    text = preset_text("int8-dynamic").replace(
        "[[pass]]", '[[pass]]\nname = "rename"\n\n[[pass]]', 1
    )
    recipe = parse_recipe("mine", text, ["rename.suffix=_mine", "rename.times=3"])
    assert recipe.passes[0] == Rename("_mine", 3)
    case = matmul()
    result = recipe.pipeline.run(
        g.load(case.model), samples_of(case.model, case.feeds), load_target("cpu")
    )
    assert result.report.passes[0].name == "rename"
    assert result.report.passes[0].changes == 4
    assert all("_mine" in name for name in result.context.plan)
    assert parse_recipe("mine", recipe.text) == recipe


@pytest.mark.usefixtures("installed")
def test_an_entry_point_that_is_no_pass_is_refused() -> None:
    with pytest.raises(OnnxqError, match="'wrong' is not an onnxq Pass"):
        load_pass("wrong")


def test_passes_are_found_without_importing_them() -> None:
    assert pass_types()["insert-qdq"].value.endswith(":InsertQDQ")
    assert load_pass("insert-qdq") is InsertQDQ
