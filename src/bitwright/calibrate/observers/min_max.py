"""The exact extremes, whatever the spec."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.calibrate.observers import METHODS
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.numerics.spec import QuantSpec


@METHODS.register("min_max")
@dataclass(frozen=True)
class MinMax:
    """(min, max), also for a symmetric spec: for tables that show both."""

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        return statistics.lo, statistics.hi
