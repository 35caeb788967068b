"""Temporary folders that a killed run does not leave for ever."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what a killed run leaves stays there
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".onnxq-tmp-"


@contextmanager
def scratch(place: str | Path | None = None) -> Iterator[Path]:
    """A new folder in `place` (default: the system's folder for temporary files), then removed.

    Its owner holds a lock on it, which the system drops when the process ends, however it ends:
    folders without a lock are what killed runs left, and go first.
    """
    parent = Path(place or tempfile.gettempdir())
    _remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(_PREFIX + "*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where somebody else does, or none can."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    os.close(descriptor)
    return None
