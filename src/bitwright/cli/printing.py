"""Results on standard output: tables for people, one JSON document for programs."""

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

#: Files of results by the end of their name, in the order in which they are listed.
_FILES = {
    "report.html": "tables and a chart of the losses",
    "_qdq.onnx": "the quantized model, for ONNX Runtime",
    "_qtable": "precision of every operator",
    "_cali_table": "thresholds of every value",
    "sensitivity.csv": "loss of every operator by every method",
    "layers.csv": "similarity of every operator's output",
    "ranges.csv": "range, threshold and scale of every value",
    "search.log": "what the search did",
    "plan.json": "every decision and its reason",
    "summary.json": "all figures",
}


def print_table(table: Table, *, limit: int | None = None, more: str = "") -> None:
    """*table* to standard output: drawn on a terminal, plain columns elsewhere. *limit*: rows shown; *more*: where the rest is."""
    shown = table if limit is None else Table(table.title, table.columns, table.rows[:limit])
    if sys.stdout.isatty():
        Console().print(_drawn(shown))
    else:
        print(shown)
    hidden = len(table.rows) - len(shown.rows)
    if hidden:
        print(f"… and {hidden} more rows{f' in {more}' if more else ''}")


def print_json(data: Any) -> None:
    """*data* as one JSON document."""
    print(json.dumps(data, indent=1))


def print_files(folder: Path) -> None:
    """The result files of *folder*, each with what it holds."""
    found = [(f.name, says) for end, says in _FILES.items() for f in sorted(folder.glob(f"*{end}"))]
    width = max((len(name) for name, _ in found), default=0)
    print(f"\nResults in {folder}:")
    for name, says in found:
        print(f"  {name.ljust(width)}  {says}")


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, header in zip(table.columns, table.headers(), strict=True):
        cells = [row.get(column.key) for row in table.rows]
        numeric = any(isinstance(c, int | float) for c in cells)
        drawn.add_column(Text(header), justify="right" if numeric else "left", overflow="fold")
    for row in table.cells():
        drawn.add_row(*map(Text, row))
    return drawn
