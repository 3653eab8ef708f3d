"""Rounding a real number of steps to an integer code (docs/numerics.md §2)."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class Rounding(StrEnum):
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
    whole = torch.trunc(x)
    # x - trunc(x) is exact in binary floating point (x - floor(x) and floor(x + 0.5) are not), so ties are ties.
    fraction = x - whole
    down = fraction < -0.5 if rounding is Rounding.HALF_UP else fraction <= -0.5
    return x.copy_(whole).add_((fraction >= 0.5).to(x.dtype)).sub_(down.to(x.dtype))
