"""What was measured once, kept on disk: calibrations and trials that need not run again.

The folder is `$ONNXQ_CACHE`, or `onnxq` in `$XDG_CACHE_HOME` or `~/.cache`. `ONNXQ_CACHE=off` and
`disabled()` keep nothing. An entry is one .npz file: the arrays of a value, and the JSON of how
they make it up; nothing in it can run. It appears in one rename and never changes, so that
processes share the folder. What cannot be read or written counts as not there. Beyond `LIMIT`
bytes what was used least recently goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

LIMIT = 2 << 30  # bytes in the folder
LARGEST = 64 << 20  # bytes of an entry: more takes as long to read as to measure
_SUFFIX = ".npz"
_NARROW = {  # kept as the bytes that they are
    name: getattr(ml_dtypes, name)
    for name in ("int2", "uint2", "int4", "uint4", "float8_e4m3fn", "float8_e5m2")
}
_enabled: ContextVar[bool] = ContextVar("cache", default=True)


@contextlib.contextmanager
def disabled(really: bool = True) -> Iterator[None]:
    """Nothing is read or kept inside the `with`."""
    before = _enabled.set(_enabled.get() and not really)
    try:
        yield
    finally:
        _enabled.reset(before)


def folder() -> Path | None:
    """Where entries are; None where nothing is to be kept."""
    given = os.environ.get("ONNXQ_CACHE", "")
    if not _enabled.get() or given == "off":
        return None
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # a user without a home
        return (Path(base) if base else Path.home() / ".cache") / "onnxq"
    return None


def key(*parts: object) -> str:
    """Of all that a value depends on; the versions of what measures are among it.

    Raises TypeError for a part that could not be kept either.
    """
    arrays: dict[str, NDArray[Any]] = {}
    sha = hashlib.sha256(json.dumps([*_versions(), _encode(parts, arrays)]).encode())
    for array in arrays.values():
        sha.update(repr((array.dtype.str, array.shape)).encode() + array.tobytes())
    return sha.hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    """Of onnxq the source itself: a checkout changes without its version."""
    sha = hashlib.sha256()
    for root in sorted({Path(__file__).parent, *map(Path, _passes())}):
        for path in sorted(root.rglob("*.py")):
            sha.update(path.read_bytes())
    return sha.hexdigest(), *(metadata.version(name) for name in ("onnxruntime", "numpy"))


def _passes() -> list[str]:
    found = importlib.util.find_spec("onnxq.passes")
    return list(found.submodule_search_locations or ()) if found else []


def get(name: str) -> Any:
    """The value that was put under this key, or None."""
    place = folder()
    return None if place is None else read(place / (name + _SUFFIX))


def read(path: Path) -> Any:
    """The value that `write` wrote, or None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            value = _decode(json.loads(str(file["tree"])), file)
        os.utime(path)
    except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError,
            zipfile.BadZipFile):  # fmt: skip
        return None
    return value


def put(name: str, value: Any) -> None:
    """Keep a value: numbers, texts, arrays, and lists, dicts, tuples and dataclasses of them.

    Raises TypeError for anything else. A value that finds no place is not kept.
    """
    place = folder()
    if place is not None:
        with contextlib.suppress(OSError):
            write(place / (name + _SUFFIX), value, LARGEST)


def write(path: Path, value: Any, limit: int | None = None) -> None:
    """Write a value to a file whole, or, beyond `limit` bytes, not at all.

    Raises TypeError for what cannot be kept and OSError where there is no place.
    """
    arrays: dict[str, NDArray[Any]] = {}
    tree = _encode(value, arrays)
    if limit is not None and sum(array.nbytes for array in arrays.values()) > limit:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, staged = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, tree=json.dumps(tree), **arrays)  # type: ignore[arg-type]
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


def prune() -> None:
    """Remove what was used least recently until the folder holds `LIMIT` bytes at most."""
    place = folder()
    if place is None:
        return
    with contextlib.suppress(OSError):
        found = [
            (path.stat(), path) for path in place.rglob("*") if path.suffix in (_SUFFIX, ".tmp")
        ]
        excess = sum(status.st_size for status, _ in found) - LIMIT
        for status, path in sorted(found, key=lambda pair: pair[0].st_mtime):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= status.st_size


# ── values as arrays and JSON ────────────────────────────────────────────────────────────────────


def _encode(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and not isinstance(value, np.generic):
        return {"float": value.hex()}
    if isinstance(value, np.ndarray | np.generic):
        array, narrow = np.asarray(value), ""
        if array.dtype.name in _NARROW:
            array, narrow = array.view(np.uint8), array.dtype.name
        if array.dtype.kind not in "biufc":
            raise TypeError(f"no array of {array.dtype} can be kept")
        arrays[f"a{len(arrays)}"] = array
        place = f"a{len(arrays) - 1}"
        return {"array": place, "scalar": isinstance(value, np.generic), "narrow": narrow}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, arrays), _encode(v, arrays)] for k, v in value.items()]}
    kind = type(value)
    if kind in (list, tuple):
        return {kind.__name__: [_encode(item, arrays) for item in value]}
    home = f"{kind.__module__}:{kind.__qualname__}"
    attributes = {k: _encode(v, arrays) for k, v in getattr(value, "__dict__", {}).items()}
    if isinstance(value, tuple):  # a named one; what hangs on it beside its items comes along
        return {"class": home, "items": [_encode(i, arrays) for i in value], "more": attributes}
    if is_dataclass(value):
        attributes = {f.name: _encode(getattr(value, f.name), arrays) for f in fields(value)}
        return {"class": home, "more": attributes}
    raise TypeError(f"no {kind.__name__} can be kept")


def _decode(tree: Any, arrays: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "float" in tree:
        return float.fromhex(tree["float"])
    if "array" in tree:
        array = arrays[tree["array"]]
        array = array.view(_NARROW[tree["narrow"]]) if tree["narrow"] else array
        return array[()] if tree["scalar"] else array
    if "dict" in tree:
        return {_decode(k, arrays): _decode(v, arrays) for k, v in tree["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in tree:
            return kind(_decode(item, arrays) for item in tree[kind.__name__])
    made = _class(tree["class"])
    more = {k: _decode(v, arrays) for k, v in tree["more"].items()}
    if "items" not in tree:
        return made(**more)
    value = made(*(_decode(item, arrays) for item in tree["items"]))
    vars(value).update(more) if more else None
    return value


def _class(home: str) -> Any:
    """A dataclass or named tuple of a module that is loaded: a file can make nothing else."""
    module, _, name = home.partition(":")
    found = getattr(sys.modules[module], name)
    named = isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")
    if not (named or (isinstance(found, type) and is_dataclass(found))):
        raise TypeError(f"{home} is no plain record")
    return found
