"""What the commands about devices found, as the terminal shows it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from onnxq.deploy import Deployment
from onnxq.tables import Column, print_table, print_text, quantity


def show_deployment(made: Deployment, console: Console) -> None:
    console.print(Text(f"wrote {made.folder}", style="bold"), soft_wrap=True)
    console.print()
    columns = [Column("file", fit="cut"), Column("size", "right")]
    print_table(console, columns, [[name, quantity(n, "B")] for name, n in made.files.items()])
    console.print()
    if made.tested:
        print_text(console, "The smoke test, run here:", 2)
        for line in made.smoke.splitlines():
            print_text(console, line, 4, "dim")
    else:
        print_text(console, f"The smoke test was not run: {made.smoke}", 2, "yellow")
    for note in made.notes:
        print_text(console, note, 2)
