"""A model on several execution providers, as the terminal shows it."""

from __future__ import annotations

from rich.console import Console

from onnxq.report import DisagreementRecord, OutputRecord, ProviderRecord, Report
from onnxq.tables import (
    Column,
    cosine,
    decibels,
    heading,
    milliseconds,
    percent,
    print_table,
    print_text,
)


def show_providers(report: Report, console: Console) -> None:
    """A row per provider, and below what there is to say of each."""
    if not report.providers:
        return
    heading(console, "Execution providers")
    columns = [
        Column("", fit="cut"),
        *(Column(title, "right") for title in ("nodes", "elsewhere", "cosine")),
        Column("SQNR", "right", "drop"), Column("top-1 agrees", "right"),
        Column("to the CPU", "right"), Column("median", "right", "drop"),
        Column("÷ float", "right"),
    ]  # fmt: skip
    names = labels(report.providers)
    rows = [[name, *_row(r)] for name, r in zip(names, report.providers, strict=True)]
    print_table(console, columns, rows)
    note = "cosine, SQNR, top-1: to the float model on the CPU; to the CPU: SQNR to the same model"
    print_text(console, note, 2, "dim")
    for name, record in zip(names, report.providers, strict=True):
        for line in lines(record):
            print_text(console, f"{name}: {line}", 2)


def labels(records: list[ProviderRecord]) -> list[str]:
    """What users gave, without the command where nothing is lost.

    >>> labels([ProviderRecord("cpu"), ProviderRecord("qnn@venv/bin/python")])
    ['cpu', 'qnn']
    >>> labels([ProviderRecord("cpu"), ProviderRecord("cpu@arm/python")])
    ['cpu', 'cpu@arm/python']
    """
    short = [record.name.partition("@")[0] for record in records]
    return [s if short.count(s) == 1 else r.name for s, r in zip(short, records, strict=True)]


def _row(record: ProviderRecord) -> list[str]:
    if record.error:
        return ["–"] * 8
    worst = min(record.outputs, key=lambda o: o.cosine, default=None)
    return [
        str(record.nodes),
        str(record.elsewhere),
        cosine(worst.cosine) if worst else "–",
        decibels(worst.sqnr_db) if worst else "–",
        percent(worst.agreement) if worst else "–",
        "same bits" if record.same_bits else _farthest(record.against_cpu),
        milliseconds(record.latency.median_ms) if record.latency else "–",
        f"{record.ratio:.2f}" if record.ratio else "–",
    ]


def _farthest(outputs: list[OutputRecord]) -> str:
    return decibels(min(o.sqnr_db for o in outputs)) if outputs else "–"


def lines(record: ProviderRecord) -> list[str]:
    """What there is to say of a provider beside its row."""
    said = [record.problem()]
    if record.steps:
        said.append(f"outputs differ from the CPU's by up to {_steps(record.steps)}")
    if record.disagreement:
        said.append(f"first differs at {sentence(record.disagreement)}")
    elif not record.error and not record.same_bits:
        said.append("each layer by itself says what it says on the CPU, but for last bits")
    if record.emulated:
        said.append("not timed: what answered emulates the device")
    return [line for line in said if line]


def sentence(found: DisagreementRecord) -> str:
    """
    >>> sentence(DisagreementRecord("conv1", ["Conv"], "step", 0.0291, 1, "rounds down", 1.0))
    'conv1 (Conv): 2.9 % of its codes are off by 1 step: it rounds down'
    >>> sentence(DisagreementRecord("fc", ["Gemm"], "of the largest value", 0.9, 0.004))
    'fc (Gemm): 90.0 % of its values are off by up to 0.4 % of the largest: no known cause'
    >>> sentence(DisagreementRecord("a", ["Conv", "Relu"], "step", 0.5, 3, "rounds down", 0.66))
    'a (Conv, Relu): 50.0 % of its codes are off by up to 3 steps: it rounds down, as 66.0 % show'
    """
    ops = ", ".join(found.operators[:4]) + ", …" * (len(found.operators) > 4)
    codes = found.unit == "step"
    far = _steps(found.largest) if codes else f"{percent(found.largest)} of the largest"
    most = "by" if codes and found.largest == 1 else "by up to"
    what = f"{percent(found.share)} of its {'codes' if codes else 'values'} are off {most} {far}"
    why = f"it {found.why}" if found.why else "no known cause"
    partly = f", as {percent(found.explained)} show" if 0 < found.explained < 0.99 else ""
    return f"{found.layer} ({ops}): {what}: {why}{partly}"


def _steps(count: float) -> str:
    """
    >>> _steps(1.0), _steps(2.999)
    ('1 step', '3 steps')
    """
    return f"{count:.0f} step{'s' * (round(count) != 1)}"
