"""Rounding a real number of steps to an integer code (docs/numerics.md §2)."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class Rounding(str, Enum):
    """How ties (fraction exactly one half) are broken."""

    HALF_EVEN = "half_even"
    HALF_UP = "half_up"
    HALF_AWAY = "half_away"


def round_(x: Tensor, rounding: Rounding) -> Tensor:
    """Round *x* in place.

    *x*: any shape, float, in steps. *returns*: *x*, with integral values.
    """
    if rounding is Rounding.HALF_EVEN:
        return x.round_()
    floor = torch.floor(x)
    # x - floor(x) is exact in binary floating point, so ties are recognised exactly,
    # which floor(x + 0.5) would not do near 2^23.
    fraction = x - floor
    up = fraction >= 0.5
    if rounding is Rounding.HALF_AWAY:
        up &= ~((fraction == 0.5) & (x < 0))
    return x.copy_(floor).add_(up.to(x.dtype))
