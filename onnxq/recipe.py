"""A recipe is a TOML list of passes and their fields; a preset is a recipe that ships."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from onnxq.errors import OnnxqError, suggest
from onnxq.pipeline import Pass, Pipeline

ENTRY_POINTS = "onnxq.passes"


@dataclass(frozen=True)
class Recipe:
    """A named pipeline. `text` is the TOML that gives the same pipeline again."""

    name: str
    summary: str
    passes: tuple[Pass, ...]

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.passes)

    @property
    def text(self) -> str:
        blocks = [f"summary = {_toml(self.summary)}"]
        for step in self.passes:
            changed = {k: v for k, v in step.settings().items() if v != _default(step, k)}
            rows = [f"{key} = {_toml(value)}" for key, value in changed.items()]
            blocks.append("\n".join(["[[pass]]", f'name = "{step.name}"', *rows]))
        return "\n\n".join(blocks) + "\n"


def load_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A preset by name, or a recipe from a `.toml` file, with `pass.field=value` changes applied.

    Raises OnnxqError for an unknown preset, pass or field, and for a value of the wrong type.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise OnnxqError(f"there is no recipe file {name!r}")
        return parse_recipe(path.stem, path.read_text("utf-8"), settings)
    return parse_recipe(name, preset_text(name), settings)


def preset_names() -> list[str]:
    folder = resources.files("onnxq") / "presets"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """The TOML of a preset, to copy and edit."""
    if name not in preset_names():
        raise OnnxqError(f"there is no preset {name!r}{suggest(name, preset_names())}")
    return (resources.files("onnxq") / "presets" / f"{name}.toml").read_text("utf-8")


def parse_recipe(name: str, text: str, settings: Sequence[str] = ()) -> Recipe:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OnnxqError(f"recipe {name!r} is not valid TOML: {error}") from None
    extra = set(data) - {"summary", "pass"}
    if extra or not isinstance(data.get("pass"), list) or not data["pass"]:
        wrong = f"unknown key {sorted(extra)[0]!r}" if extra else "no [[pass]] in it"
        raise OnnxqError(f"recipe {name!r} has {wrong}; see `onnxq presets show int8-static`")
    rows = [dict(row) for row in data["pass"]]
    for setting in settings:
        _apply_setting(rows, setting)
    return Recipe(name, data.get("summary", ""), tuple(_build(row) for row in rows))


def pass_types() -> dict[str, metadata.EntryPoint]:
    """Every installed pass by name, not yet imported: ours and third parties' alike."""
    return {entry.name: entry for entry in metadata.entry_points(group=ENTRY_POINTS)}


def load_pass(name: str) -> type[Pass]:
    """The class of a pass. Raises OnnxqError when there is none of that name."""
    known = pass_types()
    if name not in known:
        raise OnnxqError(f"there is no pass {name!r}{suggest(name, known)}")
    kind = known[name].load()
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise OnnxqError(f"the entry point {name!r} is not an onnxq Pass")
    return kind


def _apply_setting(rows: list[dict[str, Any]], setting: str) -> None:
    """`pass.field=value`, for every pass of that name in the recipe."""
    key, equals, value = setting.partition("=")
    name, dot, field_name = key.rpartition(".")
    if not equals or not dot:
        raise OnnxqError(f"--set wants pass.field=value, not {setting!r}")
    matching = [row for row in rows if row.get("name") == name]
    if not matching:
        known = [str(row.get("name")) for row in rows]
        raise OnnxqError(f"the recipe has no pass {name!r}{suggest(name, known)}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    for row in matching:
        row[field_name] = parsed


def _build(row: dict[str, Any]) -> Pass:
    name = row.pop("name", None)
    if not isinstance(name, str):
        raise OnnxqError("every [[pass]] of a recipe needs a name")
    kind = load_pass(name)
    hints = typing.get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    for key, value in row.items():
        if key not in known:
            raise OnnxqError(f"the pass {name!r} has no field {key!r}{suggest(key, known)}")
        row[key] = _coerce(value, hints[key], f"{name}.{key}")
    return kind(**row)


def _coerce(value: Any, wanted: Any, where: str) -> Any:
    """A TOML value as the type of a dataclass field."""
    origin = get_origin(wanted)
    if origin is Literal:
        if value not in get_args(wanted):
            choices = ", ".join(map(str, get_args(wanted)))
            raise OnnxqError(f"{where} is one of {choices}; not {value!r}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_coerce(item, get_args(wanted)[0], where) for item in items)
    if origin in (types.UnionType, typing.Union):
        for option in get_args(wanted):
            try:
                return _coerce(value, option, where)
            except OnnxqError:
                continue
    elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(wanted, type) and type(value) is wanted:
        return value
    raise OnnxqError(f"{where} wants {getattr(wanted, '__name__', wanted)}, not {value!r}")


def _default(step: Pass, key: str) -> Any:
    return next(f.default for f in fields(step) if f.name == key)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
