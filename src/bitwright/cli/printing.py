"""Tables and JSON on standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bitwright.table import Table


def print_table(table: Table, *, limit: int | None = None, more: str = "") -> None:
    """*table* to standard output: drawn on a terminal, plain columns elsewhere. *limit*: rows shown; *more*: where the rest is."""
    shown = table if limit is None else Table(table.title, table.columns, table.rows[:limit])
    if sys.stdout.isatty():
        Console().print("", _drawn(shown))
    else:
        print(shown)
    hidden = len(table.rows) - len(shown.rows)
    if hidden:
        print(f"… and {hidden} more rows{f' in {more}' if more else ''}")


def print_json(data: Any) -> None:
    """*data* as one JSON document."""
    print(json.dumps(data, indent=1))


def print_file(path: Path) -> None:
    """A text file of results, as it was written."""
    print(path.read_text(encoding="utf-8").rstrip("\n"))


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, header in zip(table.columns, table.headers(), strict=True):
        cells = [row.get(column.key) for row in table.rows]
        numeric = any(isinstance(c, int | float) for c in cells)
        drawn.add_column(
            Text(header), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold"
        )
    for row in table.cells():
        drawn.add_row(*map(Text, row))
    return drawn
