"""Charts as plain numbers; the page's template draws them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from bitwright.table import Table

#: More bars than this are a wall; the table below the chart has all rows.
MAX_BARS = 40
#: Characters that fit beside a bar.
MAX_LABEL = 42
#: A logarithmic axis shows at most so many decades below the longest bar.
DECADES = 6
#: The column that colours bars, where a table has it.
COLOUR_KEY = "precision"


@dataclass(frozen=True)
class Bar:
    """One bar. *short*: the label as it fits beside the bar. *linear*, *logarithmic*: lengths in percent of the chart's width. *colour*: the row's precision, or empty."""

    label: str
    short: str
    shown: str
    linear: float
    logarithmic: float
    colour: str


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, longest first. *omitted*: rows that are not drawn. *colours*: those in use, in order of appearance."""

    title: str
    bars: tuple[Bar, ...]
    omitted: int
    colours: tuple[str, ...]


def bar_chart(table: Table, label: str, value: str) -> BarChart:
    """The chart of column *value* against column *label* (keys). Rows without a finite number are omitted.

    A bar starts at 0: negative numbers have no length. On the logarithmic axis a bar starts at the decade of the smallest
    drawn number, or `DECADES` below the largest, whichever is higher.
    """
    column = next(c for c in table.columns if c.key == value)
    rows = [r for r in table.rows if _is_number(r.get(value))]
    rows = sorted(rows, key=lambda r: -float(r[value]))[:MAX_BARS]
    numbers = [max(0.0, float(r[value])) for r in rows]
    names = [str(r.get(label, "")) for r in rows]
    bars = tuple(
        Bar(name, short, column.show(r[value]), linear, logarithmic, str(r.get(COLOUR_KEY) or ""))
        for r, name, short, linear, logarithmic in zip(
            rows, names, shortened(names), _linear(numbers), _logarithmic(numbers), strict=True
        )
    )
    colours = tuple(dict.fromkeys(b.colour for b in bars if b.colour))
    return BarChart(column.title, bars, len(table.rows) - len(bars), colours)


def shortened(names: list[str]) -> list[str]:
    """*names* in at most `MAX_LABEL` characters, without a part in the middle; those that differ and would look alike are left whole."""
    for kept in (14, 21, 28, 33):  # characters of the beginning
        found = [n if len(n) <= MAX_LABEL else f"{n[:kept]}…{n[kept + 1 - MAX_LABEL :]}" for n in names]
        if len(set(found)) == len(set(names)):
            return found
    shared = Counter(short for short, _ in set(zip(found, names, strict=True)))
    return [n if shared[short] > 1 else short for short, n in zip(found, names, strict=True)]


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell)


def _linear(numbers: list[float]) -> list[float]:
    """Percent of the largest."""
    top = max(numbers, default=0.0)
    return [100 * (x / top) if top > 0 else 0.0 for x in numbers]


def _logarithmic(numbers: list[float]) -> list[float]:
    """Percent of the decades between the axis' lower end and the largest."""
    positive = [x for x in numbers if x > 0]
    if not positive:
        return [0.0] * len(numbers)
    top = math.log10(max(positive))
    low = max(math.floor(math.log10(min(positive))), top - DECADES)
    if low >= top:  # the only decade begins with the largest number itself
        low = top - 1
    return [100 * (max(0.0, math.log10(x) - low) / (top - low)) if x > 0 else 0.0 for x in numbers]
