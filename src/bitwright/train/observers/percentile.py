"""Percentiles of each batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import check_percent
from bitwright.train.bins import Bins, check_bins
from bitwright.train.observers import OBSERVERS, Ends, Observer
from bitwright.train.thresholds import by_percentile, extremes


@OBSERVERS.register("percentile")
class Percentile(Observer):
    """The *percentile* (0 < p <= 100) of |x|, or of x on both sides for asymmetric codes, from *bins* bins each side."""

    def __init__(
        self, spec: QuantSpec, groups: int, *, percentile: float = 99.99, bins: int = 2048, **options: Any
    ) -> None:
        super().__init__(spec, groups, **options)
        check_percent(percentile)
        self.percentile, self.bins = percentile, check_bins(bins)

    def batch_range(self, x: Tensor) -> Ends:
        bins = Bins(len(x), self.bins).to(x.device)
        bins.add(x)
        return by_percentile(bins, extremes(x), self.spec, self.percentile)
