"""Sensitivity and tuning as the terminal shows them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from onnxq.tables import (
    Column,
    bar,
    draws_bars,
    milliseconds,
    percent,
    print_table,
    print_warnings,
    quantity,
)
from onnxq.tables import cosine as cosine_text
from onnxq.tuning.candidates import Candidate
from onnxq.tuning.result import Tuning
from onnxq.tuning.sensitivity import LayerEffect, Sensitivity

BAR = 12  # columns of the longest bar
SPAN_DB = 40.0  # of a bar, where effects are in dB


def show_sensitivity(found: Sensitivity, console: Console) -> None:
    """The layers, the one that does most by itself first."""
    console.print(f"{found.title}: distance to the float model, on {found.measured_on} samples")
    console.print(f"all layers quantized ({found.preset}): {_distance(found.all_quantized, found)}")
    print_warnings(console, found.warnings)
    console.print()
    ranked = found.ranked
    alone = [layer.alone or 0.0 for layer in ranked]
    drawn_bars = bars(alone, found.unit) if draws_bars(console) else [""] * len(ranked)
    columns = [
        Column("layer", fit="cut"), Column("operator", fit="drop"),
        Column("it alone quantized", "right"), Column("", fit="drop"),
        Column("all but it", "right"),
    ]  # fmt: skip
    rows = [
        [layer.name, layer.op, _distance(layer.alone, found), drawn, _distance(layer.spared, found)]
        for layer, drawn in zip(ranked, drawn_bars, strict=True)
    ]
    print_table(console, columns, rows)
    _show_unmeasured([layer for layer in found.layers if layer.alone is None], console)
    if found.evaluations:
        console.print()
        console.print(
            f"{found.evaluations} variants in {found.seconds:.1f} s, {found.ratio:.2f} × as many "
            "runs of the float model"
        )


def _show_unmeasured(layers: Sequence[LayerEffect], console: Console) -> None:
    if not layers:
        return
    console.print()
    console.print("left float, so not measured:")
    rows = [[layer.name, layer.op, layer.reason] for layer in layers]
    print_table(console, [Column("", fit="cut"), Column(""), Column("", fit="wrap")], rows)


def _distance(value: float | None, found: Sensitivity) -> str:
    if value is None:
        return "–"
    if found.unit == "dB":
        return f"{value:.1f} dB"
    return f"{value:.3g}{' ' + found.unit if found.unit else ''}"


def bars(values: Sequence[float], unit: str) -> list[str]:
    """A bar for each value, the largest full; of decibels, `SPAN_DB` below it is nothing.

    >>> bars([2.0, 1.0, 0.0], "")
    ['████████████', '██████', '']
    """
    most = max(values, default=0.0)
    if unit == "dB":
        shares = [1 - (most - value) / SPAN_DB for value in values]
    else:
        shares = [value / most if most > 0 else 0.0 for value in values]
    return [bar(share, BAR) for share in shares]


def show_tuning(found: Tuning, console: Console) -> None:
    """What was taken and why, and all that was measured."""
    chosen = found.chosen
    console.print(f"wrote {found.output}", soft_wrap=True)
    console.print(
        f"{chosen.name}: {chosen.ratio or 0:.2f} × the latency and "
        f"{chosen.bytes / found.float_bytes:.2f} × the size of float, a drop of "
        f"{percent(chosen.drop)}"
    )
    console.print(f"bounds: {found.bounds}; drop: of {found.drop_title}")
    console.print(
        f"{found.calibrated_on} samples calibrated, {found.held_out} others judged "
        f"({found.samples})"
    )
    for name, reason in found.refused.items():
        console.print(f"not possible: {name}: {reason}")
    print_warnings(console, [*found.warnings, *found.report.warnings])
    console.print()
    front = {id(candidate) for candidate in found.front}
    columns = [
        Column(""), Column("candidate", fit="cut"), Column("drop", "right"),
        Column("agreement", "right", "drop"), Column("cosine", "right"),
        Column("latency", "right", "drop"),
        Column("÷ float", "right"), Column("size", "right"), Column("bounds"),
    ]  # fmt: skip
    order = sorted(found.candidates, key=lambda c: (c.ratio is None, c.ratio or 0.0, c.drop))
    rows = [_row(candidate, found, id(candidate) in front) for candidate in order]
    nothing = ["", "float", "0 %", "100 %" if chosen.agreement is not None else "–", "1.0000"]
    latency = milliseconds(found.float_latency.median_ms)
    rows.append([*nothing, latency, "1.00", quantity(found.float_bytes, "B"), ""])
    print_table(console, columns, rows)
    console.print()
    console.print("→ taken; * no other is better in drop, latency and size")
    if chosen.layers:
        console.print(f"layers: {', '.join(f'{n}={f}' for n, f in chosen.layers.items())}")
    console.print(f"the same again: {found.replay}", soft_wrap=True)


def _row(candidate: Candidate, found: Tuning, on_front: bool) -> list[str]:
    mark = "→" if candidate is found.chosen else "*" if on_front else ""
    return [
        mark,
        candidate.name,
        percent(candidate.drop),
        percent(candidate.agreement),
        cosine_text(candidate.cosine),
        milliseconds(candidate.latency.median_ms) if candidate.latency else "–",
        f"{candidate.ratio:.2f}" if candidate.ratio else "–",
        quantity(candidate.bytes, "B"),
        "" if found.holds(candidate) else "not held",
    ]
