"""Affine quantization: ranges to parameters, real values to codes and back (docs/numerics.md §1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bitwright.numerics.rounding import round_
from bitwright.numerics.spec import QParams, QuantSpec

#: Thresholds below this are raised to it, so that a constant-zero value still has a scale.
THRESHOLD_FLOOR = 1e-5


def qparams_from_range(spec: QuantSpec, lo: Sequence[float], hi: Sequence[float]) -> QParams:
    """Parameters that cover [lo, hi], one pair per channel (or one in all). docs/numerics.md §1.1.

    Symmetric: scale = max(|lo|, |hi|) / qmax, zero point 0. Asymmetric: the range is widened to hold 0,
    scale = (hi - lo) / (qmax - qmin), zero point = round(qmin - lo / scale). Scales are float32 numbers,
    because that is what files carry.
    """
    scales, zeros = [], []
    d = spec.dtype
    for low, high in zip(lo, hi, strict=True):
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if spec.symmetric:
            scale = max(-low, high, THRESHOLD_FLOOR) / d.qmax
        else:
            scale = max(high - low, THRESHOLD_FLOOR) / (d.qmax - d.qmin)
        if spec.power_of_two:
            scale = float(2.0 ** np.ceil(np.log2(scale)))
        zero = 0 if spec.symmetric else int(np.clip(np.rint(d.qmin - low / scale), d.qmin, d.qmax))
        scales.append(float(np.float32(scale)))
        zeros.append(zero)
    return QParams(spec, tuple(scales), tuple(zeros))


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


@lru_cache(maxsize=4096)
def _divisor(scale: float, device: torch.device) -> Tensor:
    """A float32 tensor of one element: dividing by it keeps the division in float32, as engines do it."""
    return torch.tensor(scale, dtype=torch.float32, device=device)
