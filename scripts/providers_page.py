"""The matrix of docs/providers.md, of the rows that `scripts/benchmark verdicts --json` keeps.

python scripts/providers_page.py ROWS.jsonl [PAGE.md]
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accuracy import markdown_table

PLACES = {
    "cpu": "CPU",
    "openvino": "OpenVINO",
    "qnn": "HTP",
    "web": "WebAssembly",
    "arm64": "ARM64",
}
PAGE = Path(__file__).resolve().parent.parent / "docs/providers.md"
CLOSE = 0.999  # cosine to the CPU below which a model is named
Row = dict[str, Any]


def cell(rows: list[Row]) -> str:
    """How many models run whole, in part, or not; the least cosine to the CPU of those that run."""
    if not rows:
        return ""
    kinds = Counter(row["happened"] for row in rows)
    counts = f"{kinds['whole']} of {len(rows)}"
    if kinds["in part"]:
        counts += f", {kinds['in part']} in part"
    near = [row["cosine_to_cpu"] for row in rows if row["cosine_to_cpu"] is not None]
    return counts + (f"; {truncated(min(near))}" if near else "")


def truncated(cosine: float) -> str:
    """Never rounded up to 1."""
    return "1" if cosine > 1 - 1e-9 else f"{int(cosine * 1e4) / 1e4:.4f}"


def matrix(rows: list[Row]) -> str:
    presets = sorted({row["preset"] for row in rows}, key=lambda p: (p != "float", p))
    table = [
        [f"`{preset}`" if preset != "float" else preset]
        + [cell([r for r in rows if (r["preset"], r["place"]) == (preset, p)]) for p in PLACES]
        for preset in presets
    ]
    return markdown_table(["preset", *PLACES.values()], table)


def verdicts(rows: list[Row]) -> str:
    """What `check` had said, beside what happened."""
    table = []
    for place, name in PLACES.items():
        here = [row for row in rows if row["place"] == place]
        right = sum(row["said"] == row["happened"] for row in here)
        nodes = [sum(row["agree"][i] for row in here if row["agree"]) for i in (0, 1)]
        shares = [f"{100 * a / b:.2f} %" if b else "" for a, b in ((right, len(here)), nodes)]
        table.append(
            [name, f"{right} of {len(here)}", shares[0], f"{nodes[0]} of {nodes[1]}", shares[1]]
        )
    return markdown_table(["place", "models", "", "nodes", ""], table)


def named(rows: Iterable[Row]) -> str:
    """Presets that share a model, a place and a fate on a line."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        key = row["model"], PLACES[row["place"]], fate(row)
        found.setdefault(key, []).append(row["preset"])
    lines = [
        f"- {model} on {place}, {what}: {', '.join(presets)}"
        for (model, place, what), presets in found.items()
    ]
    return "\n".join(lines) or "None."


def fate(row: Row) -> str:
    if row["happened"] == "does not run":
        return "does not load" + (
            "" if row["said"] == row["happened"] else f", said to run {row['said']}"
        )
    return f"cosine {truncated(row['cosine_to_cpu'])}"


def main(path: str, page: str = str(PAGE)) -> None:
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    lost = [row for row in rows if row["happened"] == "does not run"]
    far = [r for r in rows if r["cosine_to_cpu"] is not None and r["cosine_to_cpu"] < CLOSE]
    parts = [
        f"{len({row['model'] for row in rows})} models.",
        matrix(rows),
        "What does not load:",
        named(lost),
        f"What runs with a cosine below {CLOSE} to the CPU:",
        named(far),
        "What `onnxq check` says of each model (whole, in part, or not at all), and had said of "
        "each node when it was asked, and how often it was right:",
        verdicts(rows),
    ]
    text = Path(page).read_text("utf-8")
    between = re.compile(r"(<!-- matrix -->\n).*(<!-- /matrix -->)", re.DOTALL)
    body = "\n\n".join(parts)
    Path(page).write_text(between.sub(lambda m: f"{m[1]}{body}\n\n{m[2]}", text), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
