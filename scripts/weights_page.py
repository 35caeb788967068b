"""docs/weights.md: a table of every row, and a plot of size against loss for each model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import onnxruntime as ort
from accuracy import CALIBRATION, NOTES, TEXTS, markdown_table

SENTENCES = 400  # of the dev split; the last of it calibrate
COLUMNS = ["tool", "recipe", "block", "size, MB", "÷ float", "seconds"]
LOSS = {"stories260K": "KL to float", "all-MiniLM-L6-v2": "1 − cosine"}
LEAST = 1e-7  # loss on the plot: below is rounding
OURS, FRONT, THEIRS = "#5b6b82", "#0b4fa3", "#c2410c"
# Where the middle of a label's near end may go around its point, in pixels, nearest first.
PLACES = [
    (radius * math.cos(angle), radius * math.sin(angle))
    for radius in (12, 16, *range(24, 240, 12))
    for angle in (k * math.pi / 12 for k in (0, 12, 1, 13, 23, 11, 3, 9, 15, 21, 5, 7, 17, 19))
]

PAGE = """# Weights alone: quality against size

Every preset that quantizes weights alone, at its own block size and at 32 and 128, on two models,
on {calibration} calibration samples, beside onnxruntime's own tool (`MatMulNBitsQuantizer`,
accuracy level 4) in the same run; seed 0, {cores} cores, onnxruntime {onnxruntime}, onnxq {onnxq}:

    scripts/benchmark weights models --shared DIR --markdown docs/weights.md

- `stories260K`, a decoder of 0.26 M parameters with widths of 64 and 172: perplexity, and the mean
  KL divergence of its answers from float's per token, on {texts} texts of the dev split.
- `all-MiniLM-L6-v2`, an encoder of 22.7 M parameters, half of them embeddings: 1 − the mean cosine
  of sentence embeddings to float's, on the first {sentences} sentences of STS-B dev; the last ones
  calibrate.

Sizes are of the model with its data. Seconds are for the whole quantization without verification.
onnxruntime's tool leaves embeddings float unless told ("embeddings too").

![Loss against size of every preset, a panel for each model]({plot})

{tables}
"""


@dataclass(frozen=True)
class Row:
    """One model as one recipe makes it; `reason` says why there is none.

    `loss` is the KL of logits to float per token, in nats, or 1 − the cosine of embeddings.
    """

    model: str
    tool: str
    recipe: str
    block: int | None
    bytes: int = 0
    loss: float = math.nan
    perplexity: float = math.nan
    seconds: float = math.nan
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str, int | None]:
        return self.model, self.tool, self.recipe, self.block

    @property
    def label(self) -> str:
        return f"{self.recipe} {self.block}" if self.block else self.recipe


def write(page: Path, rows: Sequence[Row]) -> None:
    """The page and the plot beside it anew; what stands under NOTES in the page is kept."""
    models = list(dict.fromkeys(row.model for row in rows))
    of_model = {name: [row for row in rows if row.model == name] for name in models}
    plot = page.with_suffix(".svg")
    text = PAGE.format(
        calibration=CALIBRATION, texts=TEXTS, sentences=SENTENCES, cores=os.cpu_count(),
        onnxruntime=ort.__version__, onnxq=metadata.version("onnxq"), plot=plot.name,
        tables="\n\n".join(f"## {name}\n\n{table(name, some)}" for name, some in of_model.items()),
    )  # fmt: skip
    old = page.read_text("utf-8") if page.exists() else ""
    _, heading, notes = old.partition(NOTES)
    page.write_text(text + (f"\n{heading}{notes}" if heading else ""), "utf-8")
    draw(plot, {name: some for name, some in of_model.items() if drawn(some)})


def table(name: str, rows: Sequence[Row]) -> str:
    perplexity = name == "stories260K"
    whole = next(row.bytes for row in rows if row.tool == "float32")
    lines = []
    for row in rows:
        size = [f"{row.bytes / 1e6:.3f}", f"{row.bytes / whole:.3f}"] if row.bytes else ["", ""]
        seconds = "" if math.isnan(row.seconds) else f"{row.seconds:.1f}"
        said = row.reason or f"{row.loss:.5f}"
        line = [row.tool, row.recipe, str(row.block or ""), *size, seconds, said]
        shown = "" if math.isnan(row.perplexity) else f"{row.perplexity:.3f}"
        lines.append([*line, shown] if perplexity else line)
    return markdown_table([*COLUMNS, LOSS[name], *(["perplexity"] if perplexity else [])], lines)


def front(rows: Sequence[Row]) -> list[Row]:
    """Those than which none is better that is as small, within 1 %, by size."""
    best = [
        row for row in rows
        if not any(other.loss < row.loss and other.bytes <= 1.01 * row.bytes for other in rows)
    ]  # fmt: skip
    return sorted(best, key=lambda row: row.bytes)


def draw(path: Path, of_model: dict[str, list[Row]]) -> None:
    """Nothing without matplotlib, of the extra dev."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: install matplotlib")
        return
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "onnxq", "font.size": 11}
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(of_model), 1, figsize=(12, 9 * len(of_model)), squeeze=False, layout="constrained"
    )
    for panel, (name, rows) in zip(panels[:, 0], of_model.items(), strict=True):
        draw_panel(panel, name, rows)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def drawn(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.bytes and row.tool != "float32"]


def draw_panel(panel: Any, name: str, rows: Sequence[Row]) -> None:
    there = drawn(rows)
    ours = [row for row in there if row.tool == "onnxq"]
    best = front(ours)
    styles = (
        ([r for r in ours if r not in best], {"color": OURS, "marker": "o", "s": 40}, "onnxq"),
        (best, {"color": FRONT, "marker": "o", "s": 64}, "onnxq, best at its size"),
        ([r for r in there if r.tool != "onnxq"],
         {"color": THEIRS, "marker": "X", "s": 64}, "onnxruntime"),
    )  # fmt: skip
    if best:
        panel.plot(*zip(*map(point, best), strict=True), color=FRONT, linewidth=1.5, zorder=1)
    panel.set(xscale="log", yscale="log", xlabel="size, MB", ylabel=LOSS[name], title=name)
    for group, style, label in styles:
        if group:
            panel.scatter(*zip(*map(point, group), strict=True), label=label, zorder=2, **style)
    panel.margins(x=0.12, y=0.06)
    panel.grid(True, which="both", color="#e4e7ec", linewidth=0.6)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("{x:g}")
    legend = panel.legend(loc="lower left")  # small and good is where nothing is
    panel.figure.canvas.draw()  # places are known from here on
    taken = [legend.get_window_extent(), *(mark(panel, row) for row in there)]
    for group, style, _ in reversed(styles):
        for row in sorted(group, key=lambda r: r.bytes):
            taken.append(put_label(panel, row, style["color"], taken))


def point(row: Row) -> tuple[float, float]:
    return row.bytes / 1e6, max(row.loss, LEAST)


def mark(panel: Any, row: Row) -> Any:
    """The box of a point in pixels."""
    from matplotlib.transforms import Bbox

    x, y = panel.transData.transform(point(row))
    return Bbox.from_bounds(x - 6, y - 6, 12, 12)


def put_label(panel: Any, row: Row, color: str, taken: Sequence[Any]) -> Any:
    """A label at the nearest place that is free, or covers least. Returns its box in pixels."""
    from matplotlib.transforms import Bbox

    text = panel.annotate(row.label, point(row), fontsize=9, color=color, va="center")
    own = text.get_window_extent()
    text.remove()
    x, y = panel.transData.transform(point(row))
    tried = []
    for dx, dy in PLACES:
        left = x + dx if dx > 0 else x + dx - own.width
        box = Bbox.from_bounds(left, y + dy - own.height / 2, own.width, own.height)
        outside = own.width * own.height - covered(box, panel.bbox)
        tried.append((outside + sum(covered(box, other) for other in taken), len(tried), box))
        if tried[-1][0] < 1:
            break
    _, place, box = min(tried)
    dx, dy = (72 / panel.figure.dpi * shift for shift in PLACES[place])
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    panel.annotate(
        row.label, point(row), (dx, dy), textcoords="offset points", fontsize=9, color=color,
        ha="left" if dx > 0 else "right", va="center",
        arrowprops=line if math.hypot(dx, dy) > 14 else None,
    )  # fmt: skip
    return box


def covered(a: Any, b: Any) -> float:
    """Area that two boxes have in common, in pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
