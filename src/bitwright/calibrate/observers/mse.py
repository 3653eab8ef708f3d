"""Least mean squared error, in the form that vendor tools use: exact zeros count among the elements."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.calibrate.observers import METHODS
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import mse_of_magnitudes, mse_range


@METHODS.register("mse")
@dataclass(frozen=True)
class Mse:
    """Symmetric: the threshold of `numerics.thresholds.mse_of_samples` (`octav` is the same without the zeros).

    Asymmetric: the range of least error (`numerics.thresholds.mse_range`), each end chosen for itself.
    """

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        bits = spec.dtype.bits
        if not spec.symmetric:
            x, counts = statistics.distribution()
            return mse_range(x, counts, lo=statistics.lo, hi=statistics.hi, bits=bits)
        one_sign = statistics.codes_serve_one_sign(spec)
        threshold = mse_of_magnitudes(statistics.magnitudes(), bits=bits, unsigned=one_sign)
        return statistics.clipped_range(threshold, spec)
