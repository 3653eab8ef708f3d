"""The best of several percentiles, for each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import check_percent
from bitwright.train.bins import Bins
from bitwright.train.observers import OBSERVERS, Ends, Observer
from bitwright.train.thresholds import Points, by_percentile, extremes, squared_error

#: Bins each side of zero.
BINS = 2048


@OBSERVERS.register("mix")
class Mix(Observer):
    """The one of *percentiles* with the least squared error."""

    def __init__(
        self,
        spec: QuantSpec,
        groups: int,
        *,
        percentiles: tuple[float, ...] = (99.9, 99.99, 99.995, 99.999, 100.0),
        **options: Any,
    ) -> None:
        super().__init__(spec, groups, **options)
        for percent in percentiles:
            check_percent(percent)
        self.percentiles = tuple(percentiles)

    def batch_range(self, x: Tensor) -> Ends:
        bins = Bins(len(x), BINS).to(x.device)
        bins.add(x)
        ends = [by_percentile(bins, extremes(x), self.spec, p) for p in self.percentiles]
        lo, hi = (torch.stack([e[i] for e in ends], 1) for i in (0, 1))
        best = squared_error(Points.of(bins), lo, hi, self.spec).argmin(1, keepdim=True)
        return lo.gather(1, best).squeeze(1), hi.gather(1, best).squeeze(1)
