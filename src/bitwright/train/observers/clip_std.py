"""Mean and standard deviation of each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.spec import QuantSpec
from bitwright.train.observers import OBSERVERS, Ends, Observer
from bitwright.train.thresholds import extremes


@OBSERVERS.register("clip_std")
class ClipStd(Observer):
    """mean ± *std_scale* · standard deviation, never beyond the extremes.

    Some implementations of this name take the *wider* of both ranges; that clips nothing.
    """

    copes_with_nan = True

    def __init__(self, spec: QuantSpec, groups: int, *, std_scale: float = 2.6, **options: Any) -> None:
        super().__init__(spec, groups, **options)
        if not std_scale > 0.0:
            raise NumericsError(
                "observer 'clip_std'",
                expected="std_scale > 0",
                found=str(std_scale),
                remedy="2.6 is usual.",
            )
        self.std_scale = std_scale

    def batch_range(self, x: Tensor) -> Ends:
        lo, hi = extremes(x)
        std, mean = torch.std_mean(x, dim=1, correction=0)
        reach = self.std_scale * std
        return torch.maximum(lo, mean - reach), torch.minimum(hi, mean + reach)
