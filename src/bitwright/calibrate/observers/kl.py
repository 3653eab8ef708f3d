"""KL divergence between the clipped data and their quantized form, on a histogram of 2048 magnitudes."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.calibrate.observers import METHODS
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import KL_BINS, kl_threshold


@METHODS.register("kl")
@dataclass(frozen=True)
class Kl:
    """The threshold of least divergence (`numerics.thresholds.kl_threshold`) on |x|.

    Formats with as many magnitudes as the histogram has bins, or more (int16), represent every bin: nothing is clipped.
    """

    def range(self, statistics: ValueStatistics, spec: QuantSpec) -> tuple[float, float]:
        # Unsigned formats are measured with the same number of levels: the method's reference does so.
        levels = 1 << (spec.dtype.bits - 1)
        threshold = statistics.largest
        if levels < KL_BINS:
            counts, width = statistics.magnitudes().rebinned(KL_BINS)
            threshold = min(kl_threshold(counts, width, levels=levels), threshold)
        return statistics.clipped_range(threshold, spec)
