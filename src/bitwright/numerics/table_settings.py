"""How a look-up table is to be made: what a plan says of it (docs/numerics.md §9)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from bitwright.errors import NumericsError, UnknownName

FORMS = ("auto", "direct", "regular", "segment")
STRATEGIES = ("evenly", "curvature", "mix", "optimal", "manual")
SYMMETRIC_MODES = ("none", "odd", "even")
#: So that the number of a segment fits 8 bits; a multiple of 6.
MOST_SEGMENTS = 252


@dataclass(frozen=True)
class TableSettings:
    """The wish for one table. All but *form*, *input_range* and *gradients* concern segment tables.

    *form*: "auto" is direct for 8-bit inputs, segment for 16-bit ones. *num_tables*: segments, at most. *dividing_points*: of strategy
    "manual", the largest input of each segment, real units, ascending. *input_range*: what the table covers, real units; None: all codes.
    *gradients*: real output per real input, left and right of that. *symmetric_mode*: half the table serves both signs. *period*: real
    units; the table holds one period of a function that repeats (sine: 2π) in entries as far apart; takes no strategy, range or symmetry.
    *raises* `NumericsError`, `UnknownName`.
    """

    form: str = "auto"
    strategy: str = "optimal"
    num_tables: int = 6
    dividing_points: tuple[float, ...] | None = None
    input_range: tuple[float, float] | None = None
    gradients: tuple[float, float] | None = None
    symmetric_mode: str = "none"
    period: float | None = None

    def __post_init__(self) -> None:
        self._check_types()
        for kind, name, known in (
            ("form", self.form, FORMS),
            ("strategy", self.strategy, STRATEGIES),
            ("symmetric_mode", self.symmetric_mode, SYMMETRIC_MODES),
        ):
            if name not in known:
                raise UnknownName("table settings", kind=kind, name=str(name), known=known)
        if not 1 <= self.num_tables <= MOST_SEGMENTS:
            raise _wrong(
                f"num_tables from 1 to {MOST_SEGMENTS}", str(self.num_tables), "6 is customary, 126 plenty."
            )
        self._check_points()
        if self.input_range is not None:
            lo, hi = self.input_range
            if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
                raise _wrong(
                    "an input_range (lo, hi), finite, lo < hi",
                    f"({lo:g}, {hi:g})",
                    "Give the range the table is to cover.",
                )
        if self.gradients is not None and not all(math.isfinite(g) for g in self.gradients):
            raise _wrong(
                "finite gradients (left, right)", str(self.gradients), "Use 0 to hold the last value."
            )
        self._check_period()

    def _check_types(self) -> None:
        """A plan may be written by hand."""
        if not isinstance(self.num_tables, int):
            raise _wrong("an integer num_tables", repr(self.num_tables), "6 is customary, 126 plenty.")
        if self.period is not None and not _are_numbers([self.period]):
            raise _wrong("a number as period", repr(self.period), "For sine and cosine it is 2π.")
        for name in ("input_range", "gradients", "dividing_points"):
            wish = getattr(self, name)
            pair = name != "dividing_points"
            right = wish is None or (
                isinstance(wish, tuple) and _are_numbers(wish) and (len(wish) == 2 or not pair)
            )
            if not right:
                what = "two numbers" if pair else "numbers"
                raise _wrong(f"{what} as {name}", repr(wish), f"Give a tuple of {what}, or None.")

    def _check_period(self) -> None:
        if self.period is None:
            return
        if not (math.isfinite(self.period) and self.period > 0):
            raise _wrong("a period > 0", f"{self.period:g}", "For sine and cosine it is 2π.")
        if self.input_range or self.gradients or self.symmetric_mode != "none" or self.form == "regular":
            raise _wrong(
                "no input_range, gradients or symmetric_mode beside a period, and not form regular",
                f"{self}",
                "A table of one period serves all inputs: leave the others out.",
            )

    def _check_points(self) -> None:
        points = self.dividing_points
        if (self.strategy == "manual") != (points is not None):
            raise _wrong(
                'dividing_points with strategy "manual", and only with it',
                f"strategy {self.strategy!r}, dividing_points {points}",
                "Set both, or neither.",
            )
        if points is not None:
            rising = all(a < b for a, b in pairwise(points))
            few = 0 < len(points) < MOST_SEGMENTS
            if not few or not rising or not all(math.isfinite(p) for p in points):
                raise _wrong(
                    f"1 to {MOST_SEGMENTS - 1} finite dividing_points, ascending",
                    str(points),
                    "Give the largest input of each segment.",
                )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `from_json` reads it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TableSettings:
        """Inverse of `to_json`; what is left out has its default. *raises* `UnknownName`."""
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise UnknownName("table settings", kind="setting", name=name, known=known)
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**settings)


def _are_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(v, (int, float)) for v in values)


def _wrong(expected: str, found: str, remedy: str) -> NumericsError:
    return NumericsError("table settings", expected=expected, found=found, remedy=remedy)
