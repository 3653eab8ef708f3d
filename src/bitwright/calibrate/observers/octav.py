"""Least mean squared error (OCTAV, Sakr et al. 2022): zeros, which quantize exactly, do not count."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.calibrate.observers import METHODS
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import mse_of_magnitudes


@METHODS.register("octav")
@dataclass(frozen=True)
class Octav:
    """The threshold of `numerics.thresholds.octav_of_samples`."""

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        one_sign = statistics.codes_serve_one_sign(spec)
        threshold = mse_of_magnitudes(
            statistics.magnitudes(), bits=spec.dtype.bits, unsigned=one_sign, octav=True
        )
        return statistics.clipped_range(threshold, spec)
