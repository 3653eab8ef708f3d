"""The extremes of each batch, within limits that the user knows."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.spec import QuantSpec
from bitwright.train.observers import OBSERVERS, Ends, Observer
from bitwright.train.thresholds import extremes


@OBSERVERS.register("clip")
class Clip(Observer):
    """Smallest and largest element, but never beyond [*low*, *high*], real units, low <= 0 <= high."""

    agreement: Literal["widest", "mean"] = "widest"
    copes_with_nan = True

    def __init__(
        self, spec: QuantSpec, groups: int, *, low: float = -math.inf, high: float = math.inf, **options: Any
    ) -> None:
        super().__init__(spec, groups, **options)
        if not low <= 0.0 <= high or low == high or (math.isinf(low) and math.isinf(high)):
            raise NumericsError(
                "observer 'clip'",
                expected="limits low <= 0 <= high, at least one of them finite",
                found=f"low {low}, high {high}",
                remedy="Give the range that the value cannot leave, e.g. low=-8, high=8, or use min_max.",
            )
        self.low, self.high = low, high

    def batch_range(self, x: Tensor) -> Ends:
        lo, hi = extremes(x)
        return lo.clamp(self.low, self.high), hi.clamp(self.low, self.high)
