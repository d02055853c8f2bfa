"""What commands print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def print_json(content: Any) -> None:
    """Prints one JSON document."""
    print(json.dumps(content, indent=1))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, wrap: int = -1) -> None:
    """Prints columns: as a table in a terminal, else as aligned text that other tools can cut.

    Args:
        wrap: index of the column that takes several lines where the terminal is narrow.
    """
    console = Console()
    if not console.is_terminal:
        lines = [list(header), *map(list, rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        for line in lines:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
        return
    table = Table(*header, box=None, pad_edge=False)
    for number, column in enumerate(table.columns):
        column.no_wrap = number != wrap % len(header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
