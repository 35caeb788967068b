"""What an exporter leaves beside a model: the folders of Hugging Face Optimum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def beside(model: Path, name: str) -> Path | None:
    """A file beside the model, or above the sub-folder that it lies in."""
    places = [folder / name for folder in (model.absolute().parent, model.absolute().parent.parent)]
    return next((place for place in places if place.is_file()), None)


def settings(model: Path, name: str = "config.json") -> dict[str, Any]:
    """What a JSON file beside the model says; nothing where there is none that can be read."""
    file = beside(model, name)
    try:
        known = json.loads(file.read_text("utf-8")) if file else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
