"""A histogram of everything since calibration began, from which ranges can be taken again without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.spec import QuantSpec
from bitwright.train.bins import Bins
from bitwright.train.checkpoint import METHOD, as_tensor, text_at
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
        self._was_reset = False
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
        self.method, self.percentile, self._was_reset = method, percentile, True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._was_reset:
            destination[prefix + METHOD] = as_tensor(f"{self.method} {self.percentile!r}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        said = text_at(state_dict, prefix + METHOD)
        state_dict.pop(prefix + METHOD, None)
        if said is not None:
            method, _, percentile = said.partition(" ")
            self.method, self.percentile, self._was_reset = method, float(percentile), True
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def range_by(self, method: str, percentile: float) -> Ends:
        """The range of everything seen, by *method*. *raises* `UnknownName`, `NumericsError`."""
        compute = METHODS.get(method, where="observer 'histogram'")
        return compute(self.seen, (self.lowest, self.highest), self.spec, percentile)
