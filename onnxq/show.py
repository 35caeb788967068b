"""Reports as the terminal shows them: what came of it first, the details after."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from onnxq.headline import faster, headline, smaller, title
from onnxq.report import Latency, LayerRecord, MetricRecord, OutputRecord, Report
from onnxq.show_providers import show_providers
from onnxq.show_samples import show_groups, show_ranges
from onnxq.tables import (
    INDENT,
    TOP,
    Column,
    bar,
    cosine,
    decibels,
    draws_bars,
    heading,
    milliseconds,
    percent,
    print_more,
    print_table,
    print_text,
    print_warnings,
    quantity,
)

BAR = 4  # columns of the longest bar: names need the others
ROOMY = 100  # columns for what is nice to know too
PIPED_WIDTH = 100  # columns where there is no terminal and COLUMNS says nothing


def output_console() -> Console:
    """Standard output; plain text where it is no terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in console._environ:
        console.width = PIPED_WIDTH
    return console


# ── a run ────────────────────────────────────────────────────────────────────────────────────────


def show_report(report: Report, console: Console) -> None:
    """The report of `quantize` or `validate`."""
    console.print(Text(title(report), style="bold"), soft_wrap=True)
    console.print(Text(f"  {headline(report)}", style="green" if report.verified else "yellow"))
    print_warnings(console, report.warnings)
    _show_result(report, console)
    show_providers(report, console)
    _show_layers(report, console)
    show_groups(report, console)
    show_ranges(report, console)
    _show_float_operators(report, console)
    _show_float(report, console)
    _show_trials(report, console)
    _show_passes(report, console)
    _show_footer(report, console)


def _show_result(report: Report, console: Console) -> None:
    heading(console, "Result")
    sizes = quantity(report.float_bytes, "B"), quantity(report.quantized_bytes, "B")
    rows = [("size", *sizes, smaller(report.float_bytes, report.quantized_bytes))]
    before, after = report.float_latency, report.quantized_latency
    if before and after:
        medians = milliseconds(before.median_ms), milliseconds(after.median_ms)
        rows.append(("latency, median", *medians, faster(before, after)))
        rows.append(("latency, quartiles", _quartiles(before), _quartiles(after), ""))
    rows += [_metric_row(record) for record in report.metrics]
    titles = Column(""), Column("float", "right"), Column("quantized", "right"), Column("")
    print_table(console, titles, rows)
    if report.outputs:
        console.print()
        _show_outputs(report, console)


def _metric_row(record: MetricRecord) -> tuple[str, str, str, str]:
    """
    >>> _metric_row(MetricRecord("perplexity", "", "nat", 0.01, 4.744, 4.8))
    ('perplexity', '4.744', '4.8', '0.01 nat')
    >>> _metric_row(MetricRecord("kl", "KL divergence of logits", "nat", 0.01234567))
    ('KL divergence of logits', '', '', '0.01235 nat')
    """
    distance = f"{record.distance:.4g} {record.unit}".rstrip()
    if record.float_score is None:
        return record.title, "", "", distance
    return record.name, f"{record.float_score:.4g}", f"{record.quantized_score:.4g}", distance


def _quartiles(latency: Latency) -> str:
    return f"{milliseconds(latency.low_ms)[:-3]}–{milliseconds(latency.high_ms)}"


def _show_outputs(report: Report, console: Console) -> None:
    shown = report.outputs
    if len(shown) > TOP:
        shown = [shown[0], *sorted(shown[1:], key=lambda o: o.cosine)[: TOP - 1]]
    with_agreement = any(o.agreement is not None for o in shown)
    columns = [Column("output", fit="cut"), Column("cosine", "right"), Column("SQNR", "right")]
    if with_agreement:
        columns.append(Column("top-1 agrees", "right"))
    print_table(console, columns, [_output_row(o, with_agreement) for o in shown])
    print_more(console, len(report.outputs) - len(shown), "output", "closer to float")
    console.print(Text("  " + _compared_on(report), style="dim"))
    if report.optimizations_sqnr_db is not None:
        text = f"graph optimizations off and on agree: {decibels(report.optimizations_sqnr_db)}"
        console.print(Text("  " + text, style="dim"))
    if report.float_operators == []:
        text = "no floating-point operator between inputs and outputs"
        console.print(Text("  " + text, style="dim"))
    if report.exact_with:
        text = f"the same bits with {', '.join(report.exact_with)}"
        console.print(Text("  " + text, style="dim"))


def _output_row(output: OutputRecord, with_agreement: bool) -> list[str]:
    row = [output.name, cosine(output.cosine), decibels(output.sqnr_db)]
    return [*row, percent(output.agreement)] if with_agreement else row


def _compared_on(report: Report) -> str:
    count = report.verification_samples
    if not report.preset:
        return f"compared on {report.samples}"
    text = f"compared on {count} sample{'s' * (count != 1)}"
    seen = "did not see" if report.verification_unseen else "saw too"
    return f"{text} that calibration {seen}"


def _show_layers(report: Report, console: Console) -> None:
    quantized = [layer for layer in report.layers if layer.form != "float"]
    ranked = report.ranked
    if not ranked:
        if report.preset:
            heading(console, "Quantized", _shares(report, len(quantized)))
        return
    heading(console, "Quantized layers, worst first", _shares(report, len(quantized)))
    shown = report.error_shares[:TOP]
    bars = draws_bars(console)
    optional: list[tuple[Column, Callable[[LayerRecord], str]]] = [
        (Column("form"), lambda layer: form_text(layer.form, brief=True)),
        (Column("params", "right"), lambda layer: percent(_part(report, layer, "parameters"))),
        (Column("MACs", "right"), lambda layer: percent(_part(report, layer, "macs"))),
    ]
    used = [
        bool(report.preset) and len({layer.form for layer in ranked}) > 1,
        any(layer.parameters for layer in report.layers) and console.width >= ROOMY,
        any(layer.macs for layer in report.layers),
    ]
    middle = [pair for pair, wanted in zip(optional, used, strict=True) if wanted]
    columns = [Column("layer", fit="cut"), Column("type"), *(column for column, _ in middle)]
    columns += [Column("SQNR", "right"), Column("error", "right")]
    rows = [
        [
            layer.name,
            layer.op,
            *(cell(layer) for _, cell in middle),
            decibels(layer.sqnr_db),
            f"{bar(share / (shown[0][1] or 1), BAR):{BAR}} {percent(share):>6}"
            if bars
            else percent(share),
        ]
        for layer, share in shown
    ]
    print_table(console, columns, rows)
    print_more(console, len(ranked) - len(shown), "layer", "--report FILE.json has them all")
    note = "error: each layer's share of what all of them, one by one, do to the outputs"
    console.print(Text(f"  {note}", style="dim"))
    if not used[0] and report.preset:
        console.print(Text(f"  form of all: {form_text(ranked[0].form)}", style="dim"))


def _shares(report: Report, layers: int) -> str:
    """What the quantized layers amount to, as far as it was counted."""
    if not report.preset and not any(layer.parameters for layer in report.layers):
        return ""
    parts = [
        f"{percent(share)} of {word}"
        for what, word in (("parameters", "parameters"), ("macs", "MACs"))
        if (share := report.share(what)) is not None
    ]
    return f"{layers} node{'s' * (layers != 1)}: {', '.join(parts)}" if parts else ""


def _part(report: Report, layer: LayerRecord, what: str) -> float | None:
    total = _total(report, what)
    return getattr(layer, what) / total if total else None


def _total(report: Report, what: str) -> int:
    """Parameters or MACs of the model: weights that belong to no layer count too."""
    total: int = sum(getattr(layer, what) for layer in report.layers)
    return max(total, report.parameters) if what == "parameters" else total


def form_text(form: str, brief: bool = False) -> str:
    """A layer's number formats in words; `brief` without what they are counted by.

    >>> form_text("w s8:channel, a u8a"), form_text("a u8a"), form_text("w s8:channel")
    ('int8/channel × uint8', 'uint8', 'int8/channel weights')
    >>> form_text("w s8:channel, a u8a", brief=True), form_text("w s8:channel", brief=True)
    ('int8 × uint8', 'int8')
    >>> form_text("w s4p:channel, a s8p")
    'int4/channel 2ⁿ × int8 2ⁿ'
    """
    formats = dict(part.split(" ", 1) for part in form.split(", ") if " " in part)
    weight, activation = (_format_text(formats.get(key, "")) for key in ("w", "a"))
    if brief:
        weight, activation = weight.split("/")[0], activation.split("/")[0]
    if weight and activation:
        return f"{weight} × {activation}"
    return activation or (f"{weight}{' weights' * (not brief)}" if weight else form)


def _format_text(text: str) -> str:
    found = re.fullmatch(r"([su])(\d+)(a?)(p?)(?::(\w+))?", text)
    if not found:
        return text
    sign, bits, asymmetric, power, group = found.groups()
    lopsided = " asymmetric" if sign == "s" and asymmetric else ""
    scales = " 2ⁿ" if power else ""
    kind = "int" if sign == "s" else "uint"
    return f"{kind}{bits}{f'/{group}' if group else ''}{lopsided}{scales}"


def _show_float(report: Report, console: Console, title: str = "Left float, and why") -> None:
    reasons: dict[str, list[LayerRecord]] = {}
    for layer in report.layers:
        if layer.form == "float":
            reasons.setdefault(layer.reason or "no reason given", []).append(layer)
    total = _total(report, "parameters")
    rows = [
        (_parameters(group), str(len(group)), f"{_operators(group)}: {reason}")
        for reason, group in reasons.items()
    ]
    rows.sort(key=lambda row: (-row[0], -int(row[1])))
    rest = total - _parameters(report.layers)
    listed = report.float_operators != [] and any(layer.parameters for layer in report.layers)
    if listed and rest > 0.001 * total:
        rows.append((rest, "–", "weights that belong to no node listed here"))
    if not rows:
        return
    heading(console, title)
    columns = [Column("nodes", "right"), Column("params", "right"), Column("", fit="wrap")]
    shares = [percent(count / total if total else None) for count, _, _ in rows]
    cells = [(nodes, share, text) for (_, nodes, text), share in zip(rows, shares, strict=True)]
    print_table(console, columns, cells)


def _show_float_operators(report: Report, console: Console) -> None:
    """Of an integer model, what still computes with floats."""
    left = report.float_operators
    if not left:
        return
    heading(console, "Float operators between inputs and outputs", str(len(left)))
    columns = [Column("operator", fit="cut"), Column("type"), Column("", fit="wrap")]
    print_table(console, columns, [(r.name, r.op, r.reason) for r in left[:TOP]])
    print_more(console, len(left) - TOP, "operator", "--report FILE.json has them all")


def _parameters(layers: Iterable[LayerRecord]) -> int:
    return sum(layer.parameters for layer in layers)


def _operators(layers: Iterable[LayerRecord]) -> str:
    counts = Counter(layer.op for layer in layers).most_common()
    names = [op for op, _ in counts]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _show_passes(report: Report, console: Console) -> None:
    if not report.passes:
        return
    heading(console, "Passes")
    rows = [(p.name, str(p.changes), f"{p.seconds:.2f} s") for p in report.passes]
    columns = [Column("", fit="cut"), Column("changes", "right"), Column("time", "right")]
    print_table(console, columns, rows)


def _show_trials(report: Report, console: Console) -> None:
    if not report.trials:
        return
    heading(console, "Optional passes, by what they do to the outputs' SQNR")
    rows = [
        (
            t.name,
            f"{t.without_db:.1f} dB",
            t.reason if t.with_db is None else f"{t.with_db:.1f} dB",
            "kept" if t.kept else "left out",
        )
        for t in report.trials
    ]
    columns = [
        Column("", fit="cut"), Column("without", "right"), Column("with", "right"), Column(""),
    ]  # fmt: skip
    print_table(console, columns, rows)


def _show_footer(report: Report, console: Console) -> None:
    """How to get the same again."""
    facts = [
        f"preset {report.preset}" if report.preset else "",
        f"target {report.target}" if report.target else "",
        report.samples if report.preset else "",
        f"seed {report.environment['seed']}" if "seed" in report.environment else "",
        f"onnxruntime {report.environment.get('onnxruntime', '?')}",
        report.environment.get("cpu", ""),
    ]
    console.print()
    print_text(console, ", ".join(fact for fact in facts if fact), style="dim")


# ── a model ──────────────────────────────────────────────────────────────────────────────────────


def show_inspection(report: Report, form: str, console: Console) -> None:
    """The report of `inspect`."""
    parameters, macs = _total(report, "parameters"), _total(report, "macs")
    console.print(Text(report.model, style="bold"), soft_wrap=True)
    facts = [quantity(report.float_bytes, "B"), f"{quantity(parameters)} parameters"]
    facts += [f"{quantity(macs)} MACs per inference"] if macs else []
    console.print(f"  {', '.join(facts)}")
    print_warnings(console, report.warnings)
    _show_operators(report, console)
    _show_quantizable(report, form, console)
    _show_float(report, console, "The rest stays float")


def _show_operators(report: Report, console: Console) -> None:
    heading(console, "Operators", f"{sum(report.operators.values())} nodes")
    by_op: dict[str, list[LayerRecord]] = {}
    for layer in report.layers:
        by_op.setdefault(layer.op, []).append(layer)
    weighed = {
        op: (sum(r.parameters for r in group), sum(r.macs for r in group))
        for op, group in by_op.items()
    }
    heavy = sorted((op for op, w in weighed.items() if any(w)), key=lambda op: weighed[op][::-1])
    bars, most = draws_bars(console), _most(weighed.values())
    rows = [
        [
            op,
            str(len(by_op[op])),
            *(
                cell
                for value, whole in zip(weighed[op], most, strict=True)
                for cell in (quantity(value) if value else "–", *[bar(value / whole, BAR)] * bars)
            ),
        ]
        for op in reversed(heavy)
    ]
    columns = [Column(""), Column("nodes", "right")]
    for name in ("parameters", "MACs"):
        columns += [Column(name, "right"), *[Column("")] * bars]
    if rows:
        print_table(console, columns, rows)
    light = [
        f"{count} {op}" for op, count in Counter(report.operators).most_common() if op not in heavy
    ]
    if light:
        text = ("and " if rows else "") + ", ".join(light)
        print_text(console, text, INDENT, "dim")


def _most(weighed: Iterable[tuple[int, int]]) -> list[int]:
    """The largest of each kind, at least 1."""
    return [max(1, *of_kind) for of_kind in zip(*weighed, strict=True)]


def _show_quantizable(report: Report, form: str, console: Console) -> None:
    groups: Counter[tuple[str, str]] = Counter()
    for layer in report.layers:
        if layer.form != "float":
            groups[layer.op, form_text(layer.form)] += 1
    heading(
        console, f"Target {report.target} can quantize, {form}", _shares(report, groups.total())
    )
    if not groups:
        console.print("  nothing")
        return
    rows = [(op, str(count), text) for (op, text), count in groups.most_common()]
    print_table(console, [Column(""), Column("nodes", "right"), Column("form")], rows)


# ── benchmark, catalogues ────────────────────────────────────────────────────────────────────────


def show_bench(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Latencies beside each other, the first model's as the measure."""
    columns = [
        Column("model", fit="cut"),
        *(Column(t, "right") for t in ("median", "quartiles", "ratio", "size", "peak memory")),
    ]
    cells = [
        (
            row["model"],
            milliseconds(row["median_ms"]),
            _quartiles(Latency(row["median_ms"], row["low_ms"], row["high_ms"])),
            f"{row['ratio']:.2f}",
            quantity(row["bytes"], "B"),
            f"{row['peak_mb']:.0f} MiB" if row["peak_mb"] >= 0.5 else "<1 MiB",
        )
        for row in rows
    ]
    print_table(console, columns, cells, indent=0)


def show_names(rows: Sequence[tuple[str, str]], console: Console) -> None:
    """Names and what they stand for."""
    print_table(console, [Column(""), Column("", fit="wrap")], rows, indent=0)


def show_pass(
    name: str, text: str, settings: Sequence[tuple[str, str, str]], console: Console
) -> None:
    """A pass: what it does, and its fields with types and defaults."""
    console.print(Text(name, style="bold"))
    console.print(text, soft_wrap=True)
    if not settings:
        console.print("\nno fields")
        return
    heading(console, "Fields", f"--set {name}.FIELD=VALUE")
    columns = [Column("field"), Column("values", fit="wrap"), Column("default")]
    print_table(console, columns, settings)


# ── progress ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function to report progress to, drawn on stderr where that is a terminal."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("load", total=None, count="")

        def report(what: str, done: int, total: int) -> None:
            known = total > 1  # one step in all says nothing of how far it is: the bar pulses
            bar.tasks[0].total = total if known else None
            count = f"{done}/{total}" if known else ""
            bar.update(task, description=what, completed=done, count=count)

        yield report
