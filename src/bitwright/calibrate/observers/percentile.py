"""Percentiles: a fixed share of the elements is clipped."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.calibrate.observers import METHODS
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import check_percent


@METHODS.register("percentile")
@dataclass(frozen=True)
class Percentile:
    """Symmetric: the *percent* percentile of |x|. Asymmetric: the (100 - *percent*) and *percent* percentiles of x.

    *percent*: 0 < p <= 100; *raises* `NumericsError` otherwise.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        check_percent(self.percent)

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        if spec.symmetric:
            return statistics.clipped_range(statistics.magnitudes().quantile(self.percent), spec)
        lo, hi = statistics.quantile(100.0 - self.percent), statistics.quantile(self.percent)
        return min(lo, hi), max(lo, hi)  # a percentage below 50 names the same pair
