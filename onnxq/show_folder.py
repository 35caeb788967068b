"""What came of a folder, as the terminal shows it: a line for each of its models."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from onnxq.folder import FolderResult
from onnxq.headline import faster, smaller
from onnxq.report import Report
from onnxq.tables import Column, cosine, print_table, print_text, print_warnings, quantity


def show_folder(result: FolderResult, console: Console) -> None:
    console.print(Text(f"wrote {result.output}", style="bold"), soft_wrap=True)
    print_warnings(console, result.warnings)
    console.print()
    columns = [Column("model", fit="cut"), Column("size", "right"), Column(""), Column("")]
    columns += [Column("cosine", "right"), Column("perplexity", "right")]
    print_table(console, columns, [_row(*pair) for pair in result.reports.items()])
    console.print()
    files = len(result.copied)
    print_text(console, f"{files} other file{'s' * (files != 1)} copied", 2, "dim")


def _row(name: str, report: Report) -> list[str]:
    before, after = report.float_latency, report.quantized_latency
    scored = [m for m in report.metrics if m.name == "perplexity"]
    return [
        name,
        quantity(report.quantized_bytes, "B"),
        smaller(report.float_bytes, report.quantized_bytes),
        faster(before, after) if before and after else "",
        cosine(min(o.cosine for o in report.outputs)) if report.outputs else "",
        *(f"{m.float_score:.4g} → {m.quantized_score:.4g}" for m in scored[:1]),
        *([""] * (not scored)),
    ]
