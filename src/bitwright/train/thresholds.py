"""Ranges worth representing, from `Bins` (docs/numerics.md §8.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import check_percent, kl_threshold
from bitwright.registry import Registry
from bitwright.train.bins import Bins

Ends = tuple[Tensor, Tensor]
#: (bins, exact extremes, spec, percentile) -> lo, hi `[groups]`.
Method = Callable[[Bins, Ends, QuantSpec, float], Ends]
METHODS: Registry[Method] = Registry("method of a histogram")

#: Fractions of the range that the least squared error is searched among.
FRACTIONS = 100


def extremes(x: Tensor) -> Ends:
    """Smallest and largest element of each group of *x* `[groups, n]`."""
    # Without an axis the reduction is several times faster.
    lo, hi = torch.aminmax(x) if len(x) == 1 else torch.aminmax(x, dim=1)
    return lo.reshape(-1), hi.reshape(-1)


def by_percentile(bins: Bins, seen: Ends, spec: QuantSpec, percent: float) -> Ends:
    """The *percent* (0 < p <= 100) percentile of |x|, or for asymmetric codes of x on both sides."""
    check_percent(percent)
    if percent == 100.0:
        return seen
    if spec.symmetric:
        return _within(bins.quantile(percent / 100.0, of_magnitudes=True), seen)
    lo, hi = (bins.quantile(p / 100.0, of_magnitudes=False) for p in (100.0 - percent, percent))
    return torch.maximum(torch.minimum(lo, hi), seen[0]), torch.minimum(torch.maximum(lo, hi), seen[1])


def _within(threshold: Tensor, seen: Ends) -> Ends:
    """[-threshold, threshold], cut to what was seen."""
    return torch.maximum(-threshold, seen[0]), torch.minimum(threshold, seen[1])


@dataclass(frozen=True)
class Points:
    """Numbers `[groups, m]` and how often each was seen, `[groups, m]` or one number for all."""

    x: Tensor
    counts: Tensor | float

    @classmethod
    def of(cls, seen: Bins) -> Points:
        """The middles of the bins."""
        return cls(seen.centres().double(), seen.counts)


def points_of(x: Tensor, bins: int) -> Points:
    """*x* `[groups, n]`, binned where that makes it fewer."""
    if x.shape[1] <= 2 * bins:
        return Points(x.double(), 1.0)
    seen = Bins(len(x), bins).to(x.device)
    seen.add(x)
    return Points.of(seen)


def by_mse(points: Points, seen: Ends, spec: QuantSpec, stride: int = 1) -> Ends:
    """The fraction k/100 of the range with the least squared error, k = 100, 100 - *stride*, …"""
    fractions = torch.arange(FRACTIONS, 0, -stride, device=points.x.device) / FRACTIONS
    lo, hi = (end[:, None] * fractions for end in seen)
    best = squared_error(points, lo, hi, spec).argmin(1, keepdim=True)
    return lo.gather(1, best).squeeze(1), hi.gather(1, best).squeeze(1)


def squared_error(points: Points, lo: Tensor, hi: Tensor, spec: QuantSpec) -> Tensor:
    """Expected squared error of each candidate range *lo*, *hi* `[groups, k]`: step² / 12 inside, the squared distance outside."""
    d = spec.dtype
    if spec.symmetric:
        top = torch.maximum(-lo, hi)
        step = top / d.qmax
        lo, hi = (-top if d.signed else torch.zeros_like(top)), top
    else:
        step = (hi - lo) / (d.qmax - d.qmin)
    errors = []
    for k in range(lo.shape[1]):  # one candidate at a time: [groups, m] is enough to hold
        below, above = lo[:, k : k + 1], hi[:, k : k + 1]
        beyond = (points.x - points.x.clamp(below, above)) ** 2
        inside = (beyond == 0).double() * step[:, k : k + 1] ** 2 / 12.0
        errors.append((points.counts * (beyond + inside)).sum(1))
    return torch.stack(errors, 1)


@METHODS.register("min_max")
def _min_max(bins: Bins, seen: Ends, spec: QuantSpec, percent: float) -> Ends:
    return seen


@METHODS.register("percentile")
def _percentile(bins: Bins, seen: Ends, spec: QuantSpec, percent: float) -> Ends:
    return by_percentile(bins, seen, spec, percent)


@METHODS.register("mse")
def _mse(bins: Bins, seen: Ends, spec: QuantSpec, percent: float) -> Ends:
    return by_mse(Points.of(bins), seen, spec)


@METHODS.register("kl")
def _kl(bins: Bins, seen: Ends, spec: QuantSpec, percent: float) -> Ends:
    levels = min(1 << (spec.dtype.bits - 1), bins.bins)
    counts, widths = bins.magnitudes().cpu().numpy(), bins.width.tolist()
    found = [kl_threshold(c, w, levels=levels) for c, w in zip(counts, widths, strict=True)]
    return _within(torch.tensor(found, device=bins.limit.device), seen)
