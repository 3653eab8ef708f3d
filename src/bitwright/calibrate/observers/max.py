"""The largest magnitude: nothing is clipped."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.calibrate.observers import METHODS
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.numerics.spec import QuantSpec


@METHODS.register("max")
@dataclass(frozen=True)
class Max:
    """Symmetric: (-A, A) with A = max |x|. Asymmetric: the exact extremes."""

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        return statistics.clipped_range(statistics.largest, spec)
