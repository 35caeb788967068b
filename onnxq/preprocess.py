"""How images are prepared for a model: the settings, and their file `preprocess.toml`.

An image is resized, cropped at the centre and scaled, a channel at a time:

    value = (pixel · scale - mean) / std,    pixel = 0 … 255

The settings are a TOML file, `preprocess.toml` in the folder or one named apart:

    resize = 256                      # the shorter side; or [height, width]
    crop = 224                        # or [height, width]
    scale = 0.00392156862745098       # 1/255, the default
    mean = [0.485, 0.456, 0.406]      # default 0
    std = [0.229, 0.224, 0.225]       # default 1
    color = "RGB"                     # or "BGR", "L"
    layout = "NCHW"                   # or "NHWC"; default: as the model's input has it
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from onnxq.errors import OnnxqError, one_line, suggest

SETTINGS = "preprocess.toml"

Color = Literal["RGB", "BGR", "L"]
Layout = Literal["NCHW", "NHWC"]
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Preprocess:
    """The settings above. A number for `mean` or `std` holds for every channel.

    `scale` None is 1/255 for a float input and 1 for an input of bytes, which takes no other.
    """

    resize: int | Size | None = None
    crop: int | Size | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    color: Color | None = None
    layout: Layout | None = None

    @classmethod
    def read(cls, path: Path) -> Preprocess:
        """Raises OnnxqError for a file that cannot be read and for settings that make no sense."""
        try:
            settings = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise OnnxqError(
                f"cannot read the preprocessing {str(path)!r}: {reason}; it is a TOML file with "
                f"{', '.join(_KEYS)}"
            ) from None
        return cls.of(settings, str(path))

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str = "preprocess") -> Preprocess:
        """From the keys and values of the file; `where` names them in messages."""
        for key in settings:
            if key not in _KEYS:
                raise OnnxqError(f"{where}: there is no setting {key!r}{suggest(key, _KEYS)}")
        values: dict[str, Any] = {}
        for key, value in settings.items():
            kind, parse = _PARSERS[key]
            values[key] = parse(value)
            if values[key] is None:
                raise OnnxqError(f"{where}: {key} is {value!r}; give {kind}")
        return cls(**values)


_KEYS = tuple(field.name for field in fields(Preprocess))


def _number(value: object) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def _numbers(value: object) -> tuple[float, ...] | None:
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    numbers = tuple(n for n in map(_number, listed) if n is not None)
    return numbers if numbers and len(numbers) == len(listed) else None


def _size(value: object) -> int | Size | None:
    sides = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    whole = [n for n in sides if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if len(whole) != len(sides):
        return None
    if sides is not value:
        return whole[0]
    return (whole[0], whole[1]) if len(whole) == 2 else None


def _one_of(kind: Any) -> tuple[str, Any]:
    words = get_args(kind)
    text = ", ".join(f'"{word}"' for word in words)
    return f"one of {text}", lambda value: value if value in words else None


_PARSERS: dict[str, tuple[str, Any]] = {
    "resize": ("the shorter side in pixels, or [height, width]", _size),
    "crop": ("the side in pixels, or [height, width]", _size),
    "scale": ("a number other than 0", lambda value: _number(value) or None),
    "mean": ("a number, or one for each channel", _numbers),
    "std": (
        "a number above 0, or one for each channel",
        lambda value: n if (n := _numbers(value)) and min(n) > 0 else None,
    ),
    "color": _one_of(Color),
    "layout": _one_of(Layout),
}
