"""Least squared error, for each batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.spec import QuantSpec
from bitwright.train.observers import OBSERVERS, Ends, Observer
from bitwright.train.thresholds import by_mse, extremes, points_of

#: Bins each side of zero.
BINS = 2048


@OBSERVERS.register("mse")
class Mse(Observer):
    """The one of the fractions 1/100, 2/100, …, 1 of the range (every *stride*-th) with the least squared error."""

    def __init__(self, spec: QuantSpec, groups: int, *, stride: int = 1, **options: Any) -> None:
        super().__init__(spec, groups, **options)
        if not 1 <= stride <= 50:
            raise NumericsError(
                "observer 'mse'", expected="a stride from 1 to 50", found=str(stride), remedy="1 is exact."
            )
        self.stride = stride

    def batch_range(self, x: Tensor) -> Ends:
        return by_mse(points_of(x, BINS), extremes(x), self.spec, self.stride)
