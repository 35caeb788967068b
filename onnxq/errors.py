"""The one exception that onnxq raises on purpose."""

from collections.abc import Iterable
from difflib import get_close_matches


class OnnxqError(Exception):
    """Something the caller can fix. The message is one line: what is wrong, and what to do."""


def one_line(error: Exception) -> str:
    """What somebody else's exception says, without its line breaks."""
    return " ".join(str(error).split())


def suggest(wrong: str, known: Iterable[str], n: int = 3) -> str:
    """`'; nearest: a, b'` for a misspelt name, `'; known: a, b, c'` when nothing is near."""
    names = sorted(set(known))
    near = get_close_matches(wrong, names, n=n, cutoff=0.5)
    near = near or [name for name in names if wrong.strip("*?").lower() in name.lower()][:n]
    if near:
        return "; nearest: " + ", ".join(near)
    return "; known: " + ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
