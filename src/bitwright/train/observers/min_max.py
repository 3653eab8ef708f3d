"""The extremes of each batch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from bitwright.train.observers import OBSERVERS, Ends, Observer
from bitwright.train.thresholds import extremes


@OBSERVERS.register("min_max")
class MinMax(Observer):
    """Smallest and largest element."""

    agreement: Literal["widest", "mean"] = "widest"
    copes_with_nan = True

    def batch_range(self, x: Tensor) -> Ends:
        return extremes(x)
