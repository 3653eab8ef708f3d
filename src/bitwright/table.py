"""`Table`: evidence with named columns and units; prints, saves as CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column: *key* in rows and files, *title* for people, *unit* (empty if none), *digits* shown after the point."""

    key: str
    title: str
    unit: str = ""
    digits: int = 4

    def show(self, cell: Any) -> str:
        """A cell as people read it; an absent one is `–`."""
        if cell is None:
            return "–"
        if isinstance(cell, float):
            tiny = cell != 0 and abs(cell) < 10.0**-self.digits
            return f"{cell:.2e}" if tiny else f"{cell:.{self.digits}f}"
        return str(cell)


@dataclass(frozen=True)
class Table:
    """Rows of named cells under a title."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]

    def without_empty(self) -> Table:
        """This table without columns in which no row has anything."""
        full = tuple(c for c in self.columns if any(row.get(c.key) not in (None, "") for row in self.rows))
        return replace(self, columns=full)

    def cells(self) -> list[list[str]]:
        """The rows as text, in column order."""
        return [[c.show(row.get(c.key)) for c in self.columns] for row in self.rows]

    def headers(self) -> list[str]:
        """Column titles with their units."""
        return [f"{c.title} [{c.unit}]" if c.unit else c.title for c in self.columns]

    def to_csv(self) -> str:
        """Comma-separated values with a header of column keys; numbers in full precision."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([c.key for c in self.columns])
        for row in self.rows:
            writer.writerow(["" if row.get(c.key) is None else row[c.key] for c in self.columns])
        return buffer.getvalue()

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [{c.key: row.get(c.key) for c in self.columns} for row in self.rows]

    def __str__(self) -> str:
        lines: Sequence[Sequence[str]] = [self.headers(), *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([self.title, *text])
