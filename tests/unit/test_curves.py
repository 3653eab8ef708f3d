"""Plots: where points and ticks lie, and what cannot be shown."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from bitwright.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, plot
from bitwright.report.page import Page, Section, write_page
from bitwright.table import Column, Table

COLUMNS = (Column("x", "cost"), Column("y", "loss", "dB"), Column("z", "other"), Column("name", "name"))


def table(*points: tuple[object, object], z: object = None) -> Table:
    rows = tuple({"x": x, "y": y, "z": z, "name": f"p{i}"} for i, (x, y) in enumerate(points))
    return Table("t", COLUMNS, rows)


def test_points_keep_their_order_and_stay_inside_the_margins() -> None:
    made = plot(table((0, 5), (1, 3), (10, 2)), Curve("x", ("y",)))
    dots = made.series[0].dots
    assert [d.x for d in dots] == sorted(d.x for d in dots)
    assert [d.y for d in dots] == sorted(d.y for d in dots)  # downwards: less loss is lower
    assert all(LEFT <= d.x <= WIDTH - RIGHT and TOP <= d.y <= HEIGHT - BOTTOM for d in dots)
    assert made.series[0].path.count("L") == 2
    assert (made.x_title, made.y_title) == ("cost", "loss [dB]")


def test_ticks_are_round_numbers_at_their_places() -> None:
    made = plot(table((0, 0), (10, 0.01)), Curve("x", ("y",)))
    numbers = [float(t.label) for t in made.x_ticks]
    assert numbers == [0, 2, 4, 6, 8, 10]
    steps = {round(b.at - a.at, 1) for a, b in zip(made.x_ticks, made.x_ticks[1:], strict=False)}
    assert len(steps) == 1
    assert [t.label for t in made.y_ticks][:2] == ["0.000", "0.002"]


def test_whole_numbers_have_whole_ticks() -> None:
    """Two epochs had ticks at 1.2, 1.4, …"""
    made = plot(table((1, 0.5), (2, 0.4)), Curve("x", ("y",)))
    assert [t.label for t in made.x_ticks] == ["1", "2"]
    assert len(made.y_ticks) > 2


def test_logarithmic_axes_leave_out_what_is_not_positive_and_count_it() -> None:
    made = plot(table((1, 1), (100, 0.01), (0, 1), (1, -1)), Curve("x", ("y",), log=True, lines=False))
    assert len(made.series[0].dots) == 2
    assert made.omitted == 2
    assert made.series[0].path == ""
    assert {t.label for t in made.x_ticks} == {"1", "10", "100"}


def test_equal_axes_have_a_diagonal_and_the_same_span() -> None:
    made = plot(table((1, 2), (4, 3)), Curve("x", ("y",), diagonal=True))
    assert made.diagonal == (LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, TOP)
    assert [t.label for t in made.x_ticks] == [t.label for t in made.y_ticks]


def test_a_backdrop_is_as_high_as_the_others_whatever_its_unit() -> None:
    t = table((0, 5), (1, 3))
    rows = tuple({**row, "z": z} for row, z in zip(t.rows, (100, 1000), strict=True))
    plain = plot(t, Curve("x", ("y",)))
    made = plot(replace(t, rows=rows), Curve("x", ("y",), backdrop="z"))

    assert made.y_ticks == plain.y_ticks
    assert made.series[0] == replace(plain.series[0], dots=made.series[0].dots)
    assert made.series[1].dots[1].y == made.series[0].dots[0].y
    assert "other: 1000" in made.series[1].dots[1].says


@pytest.mark.parametrize("points", [[], [(None, 1)], [(1, math.nan)], [(1, 2)], [(3, 3), (3, 3)]])
def test_few_or_no_points_are_drawn_without_an_error(points) -> None:
    made = plot(table(*points), Curve("x", ("y", "z"), level=2.5))
    assert len(made.series) == 2
    assert math.isfinite(made.level or 0)


def test_the_marked_row_and_what_it_says(tmp_path: Path) -> None:
    t = table((0, 5), (1, 3))
    made = plot(t, Curve("x", ("y",), mark=("name", "p1")))
    assert [d.marked for d in made.series[0].dots] == [False, True]
    assert "cost: 1" in made.series[0].dots[1].says

    write_page(tmp_path / "r.html", Page("T", "s", (Section(t, curve=Curve("x", ("y",))),)))
    html = (tmp_path / "r.html").read_text()
    assert html.count("<circle") >= 2
    assert "http" not in html.replace("http://www.w3.org", "")
