"""Affine quantization: ranges to parameters, real values to codes and back (docs/numerics.md §1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitwright.numerics.rounding import Rounding, round_
from bitwright.numerics.spec import QParams, QuantSpec

#: A number of codes, or a tensor of such that broadcasts (torch has a type for each, none for both).
Limit = Any
Limits = tuple[Limit, Limit]

#: More than 0, and no part of a step.
_NOTHING = 1e-30

#: Thresholds below this are raised to it, so that a constant-zero value still has a scale.
THRESHOLD_FLOOR = 1e-5


def qparams_from_range(spec: QuantSpec, lo: Sequence[float], hi: Sequence[float]) -> QParams:
    """Parameters that cover [lo, hi], one pair per channel (or one in all). docs/numerics.md §1.1.

    Symmetric: scale = max(|lo|, |hi|) / qmax, zero point 0. Asymmetric: the range is widened to hold 0,
    scale = (hi - lo) / (qmax - qmin), zero point = round(qmin - lo / scale). Scales are float32 numbers,
    because that is what files carry.
    """
    low, high = (torch.tensor(list(ends), dtype=torch.float64) for ends in (lo, hi))
    scale, zero = scales_from_range(spec, low, high)
    return QParams(spec, tuple(scale.tolist()), tuple(int(z) for z in zero.tolist()))


def scales_from_range(spec: QuantSpec, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """As `qparams_from_range`, where the range already is. *lo*, *hi*: `[c]`, real units.

    *returns*: scale and zero point, `[c]` float32. A range of NaN gives a scale of NaN.
    """
    d = spec.dtype
    if spec.symmetric and not spec.power_of_two and lo.dtype is torch.float32:
        # Float32 rounds this quotient as float64 and then float32 would.
        return torch.maximum(-lo, hi).clamp(min=THRESHOLD_FLOOR) / d.qmax, torch.zeros_like(lo)
    low, high = lo.double().clamp(max=0.0), hi.double().clamp(min=0.0)
    if spec.symmetric:
        scale = torch.maximum(-low, high).clamp(min=THRESHOLD_FLOOR) / d.qmax
    else:
        scale = (high - low).clamp(min=THRESHOLD_FLOOR) / (d.qmax - d.qmin)
    if spec.power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    zero = torch.zeros_like(scale) if spec.symmetric else (d.qmin - low / scale).round().clamp(d.qmin, d.qmax)
    return scale.float(), zero.float()


def quantize(x: Tensor, q: QParams) -> Tensor:
    """Codes of *x*: clamp(round(x / scale) + zero_point, qmin, qmax).

    *x*: float. *returns*: same shape, the storage dtype of the spec.
    """
    steps = round_(x / q.scale_tensor(x), q.spec.rounding)
    codes = steps.add_(q.zero_point_tensor(x)).clamp_(q.spec.dtype.qmin, q.spec.dtype.qmax)
    return codes.to(q.spec.dtype.storage)


def dequantize(codes: Tensor, q: QParams) -> Tensor:
    """Real values of *codes*: (code - zero_point) * scale, float32, same shape."""
    x = codes.to(torch.float32)
    return x.sub_(q.zero_point_tensor(x)).mul_(q.scale_tensor(x))


def fake_quantize(x: Tensor, q: QParams) -> Tensor:
    """`dequantize(quantize(x))` without leaving floating point; *x* is not changed."""
    d = q.spec.dtype
    if q.spec.axis is None:
        scale, zero = q.scale[0], q.zero_point[0]
        divisor = _divisor(scale, x.device)
        return round_(x / divisor, q.spec.rounding).clamp_(d.qmin - zero, d.qmax - zero).mul_(divisor)
    scale_t, zero_t = q.scale_tensor(x), q.zero_point_tensor(x)
    steps = round_(x / scale_t, q.spec.rounding)
    return steps.clamp_(d.qmin - zero_t, d.qmax - zero_t).mul_(scale_t)


def fake_quantized(
    x: Tensor,
    scale: Tensor,
    limits: Limits,
    rounding: Rounding,
    *,
    rectified: bool = False,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fake_quantize`, with parameters in tensors. *scale*, and *limits* (codes minus the zero point): broadcast to *x*.

    *rectified*: of relu(x), without computing that. *returns*: the result; x in steps; the same held within the limits and
    *margin* steps around them: where both are equal, the gradient passes. All of *x*'s shape, float32.
    """
    lo, hi = limits
    if rectified:
        lo = lo.clamp(min=0) if isinstance(lo, Tensor) else max(lo, 0)
    exact = x / scale
    # A ReLU lets no gradient through at 0: what is held above nothing differs there.
    held = exact.clamp(lo + _NOTHING if rectified else lo - margin, hi + margin)
    return round_(held.clone(), rounding).clamp_(lo, hi).mul_(scale), exact, held


@lru_cache(maxsize=4096)
def _divisor(scale: float, device: torch.device) -> Tensor:
    """A float32 tensor of one element: dividing by it keeps the division in float32, as engines do it."""
    return torch.tensor(scale, dtype=torch.float32, device=device)
