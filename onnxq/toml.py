"""Recipes and targets as TOML: read, check against a dataclass's types, write back."""

from __future__ import annotations

import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from onnxq.errors import OnnxqError, suggest


def read_text(path: Path, what: str) -> str:
    """The text of a file. Raises OnnxqError, naming `what` it should be, when there is none."""
    if path.is_dir():
        raise OnnxqError(f"the {what} {str(path)!r} is a folder; name a .toml file")
    if not path.is_file():
        raise OnnxqError(f"there is no {what} file {str(path)!r}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise OnnxqError(
            f"the {what} {str(path)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def parse(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises OnnxqError when it is none."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise OnnxqError(f"{where} is not valid TOML: {error}") from None


def tables(data: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The `[[key]]` tables. Raises OnnxqError when the key holds something else."""
    rows = data.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise OnnxqError(f"{where}: {key!r} is no table; write [[{key}]] above each")
    return [dict(row) for row in rows]


def fill(kind: type[Any], row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row as arguments of a dataclass; `where` stands before a key in messages.

    Raises OnnxqError for unknown keys and wrong types.
    """
    of: object = kind  # mypy takes no class for hashable
    hints = _types(of)
    known = {f.name for f in fields(kind)}
    for key in row:
        if key not in known:
            owner = where.rstrip(".: ")
            raise OnnxqError(f"{owner} has no field {key!r}{suggest(key, known)}")
    return {key: coerce(value, hints[key], where + key) for key, value in row.items()}


@cache
def _types(kind: object) -> dict[str, Any]:
    """By field. Python compiles each annotation anew whenever it is asked."""
    return typing.get_type_hints(kind)


def coerce(value: Any, wanted: Any, where: str) -> Any:
    """A TOML value as the type of a dataclass field; a class with a `parse` takes its text."""
    if wanted is Any:
        return value
    origin = get_origin(wanted)
    if origin is Literal:
        for choice in get_args(wanted):
            if type(value) is type(choice) and value == choice:
                return choice
        choices = ", ".join(map(str, get_args(wanted)))
        raise OnnxqError(f"{where} is one of {choices}; not {value!r}")
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(coerce(item, get_args(wanted)[0], where) for item in items)
    if origin is list:
        if not isinstance(value, list):
            raise OnnxqError(f"{where} is a list, not {value!r}")
        return [coerce(item, get_args(wanted)[0], where) for item in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise OnnxqError(f"{where} is a table, not {value!r}")
        return {key: coerce(v, get_args(wanted)[1], f"{where}.{key}") for key, v in value.items()}
    if origin in (types.UnionType, typing.Union):
        for option in get_args(wanted):
            try:
                return coerce(value, option, where)
            except OnnxqError as error:
                if hasattr(option, "parse") and isinstance(value, str):
                    raise error from None
    elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise OnnxqError(f"{where} is too large") from None
    elif hasattr(wanted, "parse") and isinstance(value, str):
        try:
            return wanted.parse(value)
        except ValueError as error:
            raise OnnxqError(f"{where}: {error}") from None
    elif isinstance(wanted, type) and type(value) is wanted:
        if isinstance(value, float) and not math.isfinite(value):
            raise OnnxqError(f"{where} is not finite: {value!r}")
        return value
    raise OnnxqError(f"{where} wants {getattr(wanted, '__name__', wanted)}, not {value!r}")


def dump(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # JSON's escapes are TOML's, which wants one more
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(map(dump, value)) + "]"
    return repr(value)
