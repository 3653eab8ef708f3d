"""Points and lines in a plane as plain numbers; the page's template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitwright.table import Column, Table

#: The drawing, in units of the SVG; the plane lies inside the margins.
WIDTH, HEIGHT = 640.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 78.0, 14.0, 12.0, 46.0
#: About so many numbers along an axis.
_TICKS = 6


@dataclass(frozen=True)
class Curve:
    """Which columns of a table are drawn. *x*: key of the horizontal axis; *series*: keys of the vertical one; *mark*: (key, cell) of
    the row that is emphasised; *level*: a horizontal line; *log*: both axes are logarithmic; *lines*: points are joined in the order
    of rows; *diagonal*: the line where both axes are equal. *backdrop*: key of one more series, of another unit: it is drawn as high
    as the highest of the others, and only its shape means something.
    """

    x: str
    series: tuple[str, ...]
    mark: tuple[str, object] | None = None
    level: float | None = None
    log: bool = False
    lines: bool = True
    diagonal: bool = False
    backdrop: str | None = None


@dataclass(frozen=True)
class Tick:
    """A number along an axis: *at* its place, *label* how it reads."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A point. *says*: the row's cells, for whoever points at it."""

    x: float
    y: float
    says: str
    marked: bool


@dataclass(frozen=True)
class Series:
    """One row of points. *path*: the line through them, empty if there is none."""

    title: str
    dots: tuple[Dot, ...]
    path: str


@dataclass(frozen=True)
class Plot:
    """A drawing in `WIDTH` × `HEIGHT` units. *level*: height of the horizontal line; *diagonal*: its ends; *omitted*: points that an
    axis cannot show (zero on a logarithmic one)."""

    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    level: float | None
    diagonal: tuple[float, float, float, float] | None
    omitted: int
    summary: str


class _Axis:
    """Numbers to places. *low*, *high*: what it spans; *start*, *stop*: where."""

    def __init__(self, numbers: Sequence[float], start: float, stop: float, *, log: bool) -> None:
        self.log, self.start, self.stop = log, start, stop
        low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
        #: Epochs, counts: nothing lies between them.
        self.whole = low < high and all(float(n).is_integer() for n in numbers)
        if log:
            low, high = math.log10(low), math.log10(high)
        room = (high - low) * 0.05 or (abs(high) * 0.1 if high and not log else 0.5)
        self.low, self.high = low - room, high + room

    def at(self, number: float) -> float:
        found = math.log10(number) if self.log else number
        share = (found - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)

    def ticks(self) -> tuple[Tick, ...]:
        if self.log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            numbers = [10.0**p for p in powers] or [10.0 ** ((self.low + self.high) / 2)]
            return tuple(Tick(self.at(n), f"{n:.3g}") for n in numbers)
        step = max(_nice_step((self.high - self.low) / _TICKS), 1.0 if self.whole else 0.0)
        digits = max(0, -math.floor(math.log10(step)))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return tuple(Tick(self.at(i * step), f"{i * step + 0.0:.{digits}f}") for i in range(first, last + 1))


def _nice_step(least: float) -> float:
    """The smallest of 1, 2, 5 × 10^k that is at least *least*."""
    scale = 10.0 ** math.floor(math.log10(least))
    return next(scale * f for f in (1, 2, 5, 10) if scale * f >= least * (1 - 1e-9))


def plot(table: Table, curve: Curve) -> Plot:
    """The drawing of *curve* from the rows of *table*; cells that are no finite number are left out of their series."""
    columns = {c.key: c for c in table.columns}
    points = {key: _points(table, curve, key) for key in curve.series}
    every = [p for found in points.values() for p in found]
    shown = [(x, y, row) for x, y, row in every if not curve.log or min(x, y) > 0]
    ys = [y for _, y, _ in shown] + ([] if curve.level is None else [curve.level])
    xs = [x for x, _, _ in shown]
    if curve.diagonal:
        xs = ys = [*xs, *ys]
    across = _Axis(xs, LEFT, WIDTH - RIGHT, log=curve.log)
    up = _Axis(ys, HEIGHT - BOTTOM, TOP, log=curve.log)
    series = tuple(_series(columns[k], columns, points[k], curve, across, up) for k in curve.series)
    if curve.backdrop is not None:
        behind = _as_high(_points(table, curve, curve.backdrop), max(ys, default=1.0))
        series += (_series(columns[curve.backdrop], columns, behind, curve, across, up),)
    x_title = _title(columns[curve.x])
    y_title = ", ".join(_title(columns[k]) for k in curve.series)
    ends = (LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, TOP) if curve.diagonal else None
    level = None if curve.level is None or (curve.log and curve.level <= 0) else up.at(curve.level)
    summary = f"{y_title} against {x_title}, {len(shown)} {'point' if len(shown) == 1 else 'points'}"
    return Plot(
        x_title, y_title, across.ticks(), up.ticks(), series, level, ends, len(every) - len(shown), summary
    )


def _points(table: Table, curve: Curve, key: str) -> list[tuple[float, float, Mapping[str, Any]]]:
    return [
        (float(row[curve.x]), float(row[key]), row)
        for row in table.rows
        if _is_number(row.get(curve.x)) and _is_number(row.get(key))
    ]


def _as_high(
    points: Sequence[tuple[float, float, Mapping[str, Any]]], height: float
) -> list[tuple[float, float, Mapping[str, Any]]]:
    """*points*, the highest at *height*."""
    highest = max((y for _, y, _ in points), default=0.0) or 1.0
    return [(x, y / highest * height, row) for x, y, row in points]


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell)


def _series(
    column: Column,
    columns: Mapping[str, Column],
    points: Sequence[tuple[float, float, Mapping[str, Any]]],
    curve: Curve,
    across: _Axis,
    up: _Axis,
) -> Series:
    dots = tuple(
        Dot(across.at(x), up.at(y), _says(columns, row), _is_marked(curve, row))
        for x, y, row in points
        if not curve.log or min(x, y) > 0
    )
    path = " ".join(f"{'L' if i else 'M'}{d.x} {d.y}" for i, d in enumerate(dots))
    return Series(_title(column), dots, path if curve.lines and len(dots) > 1 else "")


def _is_marked(curve: Curve, row: Mapping[str, Any]) -> bool:
    return curve.mark is not None and row.get(curve.mark[0]) == curve.mark[1]


def _title(column: Column) -> str:
    return f"{column.title} [{column.unit}]" if column.unit else column.title


def _says(columns: Mapping[str, Column], row: Mapping[str, Any]) -> str:
    cells = [(c.title, c.show(row.get(k))) for k, c in columns.items()]
    return "; ".join(f"{title}: {cell[:120]}" for title, cell in cells if cell)
