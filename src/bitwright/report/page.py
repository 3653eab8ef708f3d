"""`Page`: tables and charts as one HTML file that needs nothing else, neither a network nor another file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bitwright.files import write_text
from bitwright.report import curves
from bitwright.report.curves import Curve, Plot
from bitwright.report.plots import BarChart, bar_chart
from bitwright.table import Column, Table
from bitwright.version import __version__

_TEMPLATES = Environment(
    loader=PackageLoader("bitwright.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

_MARGINS = {
    "width": curves.WIDTH,
    "height": curves.HEIGHT,
    "left": curves.LEFT,
    "right": curves.RIGHT,
    "top": curves.TOP,
    "bottom": curves.BOTTOM,
}


@dataclass(frozen=True)
class Section:
    """A table, with *bar* = (label column, value column) also a chart of it, with *curve* a plot, and a *note* above it."""

    table: Table
    bar: tuple[str, str] | None = None
    note: str = ""
    curve: Curve | None = None


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class _Cell:
    """*shown*: text. *sort*: the full number that sorts it, or the text. *numeric*: aligned to the right."""

    shown: str
    sort: str
    numeric: bool


@dataclass(frozen=True)
class _Block:
    """A section as the template wants it."""

    title: str
    note: str
    chart: BarChart | None
    plot: Plot | None
    headers: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[_Cell, ...], ...]


def render_page(page: Page) -> str:
    """The page as HTML. All text is escaped."""
    blocks = [_block(s) for s in page.sections]
    template = _TEMPLATES.get_template("page.html.j2")
    return template.render(page=page, blocks=blocks, version=__version__, **_MARGINS)


def write_page(path: Path, page: Page) -> None:
    """Write *page* whole or not at all. *raises* `OutputError`."""
    write_text(path, render_page(page))


def _block(section: Section) -> _Block:
    table = section.table
    numeric = {c.key: _is_numeric(table, c) for c in table.columns}
    headers = tuple((title, numeric[c.key]) for title, c in zip(table.headers(), table.columns, strict=True))
    rows = tuple(tuple(_cell(row, c, numeric[c.key]) for c in table.columns) for row in table.rows)
    chart = None if section.bar is None or not table.rows else bar_chart(table, *section.bar)
    drawn = None if section.curve is None or not table.rows else curves.plot(table, section.curve)
    return _Block(table.title, section.note, chart, drawn, headers, rows)


def _cell(row: Mapping[str, Any], column: Column, numeric: bool) -> _Cell:
    value = row.get(column.key)
    return _Cell(column.show(value), "" if value is None else str(value), numeric)


def _is_numeric(table: Table, column: Column) -> bool:
    """Whether all cells that a column has are numbers."""
    cells = [v for row in table.rows if (v := row.get(column.key)) is not None]
    return bool(cells) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in cells)
