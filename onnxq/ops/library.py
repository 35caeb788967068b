"""The library of kernels, where one was built when onnxq was installed."""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from onnxq.errors import OnnxqError, one_line

FILE = {"darwin": "libonnxq_ops.dylib", "win32": "libonnxq_ops.dll"}.get(
    sys.platform, "libonnxq_ops.so"
)
MISSING = (
    "no library of kernels was built when onnxq was installed: with a C++ compiler (g++ or clang), "
    "install it again; without, its operators run by functions of standard operators, slowly"
)


@dataclass(frozen=True)
class Build:
    """What the library says of itself: the compiler, the instruction sets that it has kernels for,
    and the one that this CPU uses."""

    compiler: str
    built: tuple[str, ...]
    used: str


def library_path() -> str:
    """The library that exports RegisterCustomOps: for a session of your own,
    `options.register_custom_ops_library(onnxq.ops.library_path())`.

    Raises OnnxqError where none was built.
    """
    path = find_library()
    if path is None:
        raise OnnxqError(MISSING)
    return str(path)


@cache
def find_library() -> Path | None:
    """Where the library is; None where none was built."""
    import onnxq.ops

    places = (Path(folder) / FILE for folder in onnxq.ops.__path__)  # editable installs have two
    return next((place for place in places if place.is_file()), None)


@cache
def build() -> Build:
    """Raises OnnxqError where no library was built, and for one that does not load."""
    path = library_path()
    try:
        describe = ctypes.CDLL(path).onnxq_ops_build
    except (OSError, AttributeError) as error:
        raise OnnxqError(f"{path} cannot be used: {one_line(error)}; install onnxq again") from None
    describe.restype = ctypes.c_char_p
    said = json.loads(describe())
    return Build(said["compiler"], tuple(said["built"]), said["used"])
