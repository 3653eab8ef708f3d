"""Least mean squared error, in the form that vendor tools use: exact zeros count among the elements."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.calibrate.observers import METHODS
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import mse_of_magnitudes


@METHODS.register("mse")
@dataclass(frozen=True)
class Mse:
    """The threshold of `numerics.thresholds.mse_of_samples`; `octav` is the same without the zeros."""

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        one_sign = statistics.codes_serve_one_sign(spec)
        threshold = mse_of_magnitudes(statistics.magnitudes(), bits=spec.dtype.bits, unsigned=one_sign)
        return statistics.clipped_range(threshold, spec)
