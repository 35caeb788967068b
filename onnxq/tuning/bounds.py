"""What a tuned model must keep to, as users write it: `0.5%`, `0.7x`, `12ms`, `3MB`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from onnxq.errors import OnnxqError

_NUMBER = re.compile(r"\s*(?P<number>[0-9.]+(?:e-?[0-9]+)?)\s*(?P<unit>[a-zA-Z%×]*)\s*")
_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limit:
    """An upper bound: of the value itself, or (`relative`) of its ratio to the float model's."""

    value: float
    relative: bool = False

    def holds(self, value: float, of_float: float) -> bool:
        return value <= self.value * (of_float if self.relative else 1)


@dataclass(frozen=True)
class Bounds:
    """`drop` and `cosine` are of the outputs, `latency` in ms, `size` in bytes."""

    drop: float | None = None
    cosine: float | None = None
    latency: Limit | None = None
    size: Limit | None = None

    def __str__(self) -> str:
        parts = [
            f"drop ≤ {self.drop:.3%}" if self.drop is not None else "",
            f"cosine ≥ {self.cosine}" if self.cosine is not None else "",
            _text("latency", self.latency, 1, "ms"),
            _text("size", self.size, 1e6, "MB"),
        ]
        return ", ".join(part for part in parts if part)


def _text(what: str, limit: Limit | None, unit: float, name: str) -> str:
    if limit is None:
        return ""
    if limit.relative:
        return f"{what} ≤ {limit.value:g} × float"
    return f"{what} ≤ {limit.value / unit:g} {name}"


def parse_bounds(
    drop: str | float | None,
    cosine: float | None,
    latency: str | float | None,
    size: str | float | None,
) -> Bounds:
    """Raises OnnxqError for what is no bound, and where there is none."""
    if drop is None and cosine is None and latency is None and size is None:
        raise OnnxqError(
            "nothing to tune for: give a bound, such as --max-drop 0.5%, --min-cosine 0.99, "
            "--max-latency 0.7x or --max-size 0.3x"
        )
    if cosine is not None and not -1 <= cosine <= 1:
        raise OnnxqError(f"--min-cosine is between -1 and 1, not {cosine}")
    return Bounds(
        None if drop is None else _share(drop),
        cosine,
        None if latency is None else _limit("--max-latency", latency, {"ms": 1, "s": 1e3}, "12ms"),
        None if size is None else _limit("--max-size", size, _BYTES, "3MB"),
    )


def _split(option: str, text: str | float, example: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(str(text))
    try:
        number = float(match["number"]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise OnnxqError(f"{option} {text}: write for example {example}")
    return number, match["unit"].lower()


def _share(text: str | float) -> float:
    number, unit = _split("--max-drop", text, "0.5% or 0.005")
    if unit not in ("", "%"):
        raise OnnxqError(f"--max-drop {text}: write for example 0.5% or 0.005")
    share = number / 100 if unit else number
    if not 0 <= share < 1:
        raise OnnxqError(f"--max-drop {text}: a share from 0 to 1, or a percentage below 100%")
    return share


def _limit(option: str, text: str | float, units: dict[str, float], example: str) -> Limit:
    number, unit = _split(option, text, f"0.7x or {example}")
    if number <= 0:
        raise OnnxqError(f"{option} {text}: give more than 0")
    if unit in ("x", "×"):
        return Limit(number, relative=True)
    if unit and unit not in units:
        raise OnnxqError(f"{option} {text}: write for example 0.7x or {example}")
    return Limit(number * (units[unit] if unit else 1))
