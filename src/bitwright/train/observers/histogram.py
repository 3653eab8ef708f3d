"""A histogram of everything since calibration began, from which ranges can be taken again without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.errors import ModelError, NumericsError
from bitwright.numerics.spec import QuantSpec
from bitwright.train.bins import Bins
from bitwright.train.checkpoint import as_tensor, text_of
from bitwright.train.observers import OBSERVERS, Ends, Observer
from bitwright.train.thresholds import METHODS, extremes


@OBSERVERS.register("histogram")
class Histogram(Observer):
    """The range of all elements seen so far by a *method*: `percentile`, `mse`, `kl` or `min_max`.

    *percentile*: of that method. *bins*: each side of zero. *update_interval*: steps between two looks at the histogram.
    """

    def __init__(
        self,
        spec: QuantSpec,
        groups: int,
        *,
        method: str = "percentile",
        percentile: float = 99.99,
        bins: int = 2048,
        update_interval: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(spec, groups, **{"averaging_constant": 1.0, **options})
        if update_interval < 1:
            raise NumericsError(
                "observer 'histogram'",
                expected="an update_interval of 1 step or more",
                found=str(update_interval),
                remedy="1 is the most accurate.",
            )
        METHODS.get(method, where="observer 'histogram'")
        self.method, self.percentile, self.update_interval = method, percentile, update_interval
        self._asked = method, percentile
        self.seen = Bins(groups, bins)
        self.register_buffer("lowest", torch.zeros(groups))
        self.register_buffer("highest", torch.zeros(groups))

    lowest: Tensor
    highest: Tensor

    def batch_range(self, x: Tensor) -> Ends:
        self.seen.add(x)
        lo, hi = extremes(x)
        self.lowest.copy_(torch.minimum(self.lowest, lo))
        self.highest.copy_(torch.maximum(self.highest, hi))
        if self.has_range and int(self.steps) % self.update_interval:
            return self.lo, self.hi
        return self.range_by(self.method, self.percentile)

    def forget(self) -> None:
        super().forget()
        self.seen.clear()
        self.lowest.zero_()
        self.highest.zero_()

    def reset(self, method: str, percentile: float) -> None:
        """Take the range again, now and in later steps, by *method*. *raises* `UnknownName`, `NumericsError`."""
        self.set_range(*self.range_by(method, percentile))
        self.method, self.percentile = method, float(percentile)

    def get_extra_state(self) -> Tensor:
        """The method, where it was reset."""
        now = (self.method, self.percentile)
        return as_tensor("" if now == self._asked else f"{self.method} {self.percentile!r}")

    def set_extra_state(self, state: Any) -> None:
        """Go on with the method that was reset, or with the one that was asked for."""
        method, _, percentile = (text_of(state) or "").partition(" ")
        if not method:
            self.method, self.percentile = self._asked
            return
        METHODS.get(method, where="checkpoint, observer 'histogram'")
        try:
            self.method, self.percentile = method, float(percentile)
        except ValueError as e:
            raise ModelError(
                "checkpoint, observer 'histogram'",
                expected="a method and its percentile",
                found=f"{method} {percentile}",
                remedy="Load a checkpoint that was saved by this version.",
            ) from e

    def range_by(self, method: str, percentile: float) -> Ends:
        """The range of everything seen, by *method*. *raises* `UnknownName`, `NumericsError`."""
        compute = METHODS.get(method, where="observer 'histogram'")
        return compute(self.seen, (self.lowest, self.highest), self.spec, percentile)
