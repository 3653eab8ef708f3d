"""Fixed point: a ratio of scales as an integer multiplier and a right shift with rounding (docs/numerics.md §10).

These functions are the reference that the integer model in ONNX is compared with, bit for bit.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.rounding import Rounding

#: The longest shift that is chosen: beyond it, no accumulator of 61 bits would leave anything.
MAX_SHIFT = 61
#: A ratio within this share of a power of two is one, where a target can only shift: scales are float32 numbers.
NEARLY = 2.0**-20

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]


def multiplier_and_shift(ratio: float, bits: int = 31) -> tuple[int, int]:
    """The integers m and s whose m · 2^-s is nearest to *ratio*: m odd or 0 where s > 0, abs(m) < 2^bits, 0 <= s <= 61.

    *raises* `NumericsError` for a ratio that is not finite, or too large for *bits*.
    """
    if not math.isfinite(ratio) or abs(ratio) >= 2.0 ** (bits - 1):
        raise NumericsError(
            "rescale",
            expected=f"a ratio of scales below 2^{bits - 1}",
            found=f"{ratio:g}",
            remedy="Check the calibration data: two scales lie too far apart.",
        )
    _, exponent = math.frexp(ratio)
    shift = min(bits - exponent, MAX_SHIFT)
    multiplier = round(math.ldexp(ratio, shift))
    if abs(multiplier) == 1 << bits:  # rounded up to the next power of two
        multiplier, shift = multiplier // 2, shift - 1
    while shift > 0 and multiplier % 2 == 0:
        multiplier, shift = multiplier // 2, shift - 1
    return multiplier, shift


def multipliers_and_shifts(ratios: Reals, bits: int = 31) -> tuple[Integers, Integers]:
    """As `multiplier_and_shift`, for each element of *ratios*. *returns*: two arrays of its shape."""
    pairs = [multiplier_and_shift(float(r), bits) for r in ratios.reshape(-1)]
    m, s = (np.array(column, np.int64).reshape(ratios.shape) for column in zip(*pairs, strict=True))
    return m, s


def nearest_powers(ratios: Reals) -> Reals | None:
    """*ratios* as exact powers of two, or None if one of them is none."""
    if not bool((ratios > 0).all()):
        return None
    powers: Reals = np.exp2(np.round(np.log2(ratios)))
    return powers if bool((np.abs(ratios / powers - 1) <= NEARLY).all()) else None


def shift_right(y: Tensor, s: Tensor | int, rounding: Rounding) -> Tensor:
    """y / 2^s, rounded to an integer. *y*: int64; *s*: 0 … 62, broadcast to *y*. *returns*: int64."""
    s = torch.as_tensor(s, dtype=torch.int64, device=y.device)
    whole = y >> s
    rest = y - (whole << s)  # 0 … 2^s - 1
    # half of 2^s is not an integer at s = 0, and twice the rest may need 63 bits: compare rest with what is missing.
    missing = (torch.ones_like(s) << s) - rest
    if rounding is Rounding.HALF_UP:
        tie_up = torch.ones_like(y, dtype=torch.bool)
    else:
        tie_up = whole % 2 == 1 if rounding is Rounding.HALF_EVEN else whole >= 0
    return whole + ((rest > missing) | ((rest == missing) & tie_up)).long()


def rescale(n: Tensor, m: Tensor, s: Tensor, rounding: Rounding) -> Tensor:
    """n · m / 2^s, rounded to an integer. *n*, *m*: int64 with abs(n · m) < 2^63; *s*: 0 … 62. *returns*: int64, broadcast."""
    return shift_right(n * m, s, rounding)
