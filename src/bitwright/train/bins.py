"""`Bins`: a histogram that grows with what it sees, as a module whose counts travel in checkpoints (docs/numerics.md §8.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitwright.errors import NumericsError

#: histc counts in float32, which is exact up to here.
_EXACT = 1 << 24


class Bins(nn.Module):
    """Counts over [-limit, limit] in 2 · *bins* equal bins for each of so many *groups*; the limit doubles when it must."""

    counts: Tensor
    limit: Tensor

    def __init__(self, groups: int, bins: int) -> None:
        super().__init__()
        self.bins = check_bins(bins)
        self.register_buffer("counts", torch.zeros(groups, 2 * bins, dtype=torch.float64))
        self.register_buffer("limit", torch.zeros(groups))

    def add(self, x: Tensor) -> None:
        """Count *x* `[groups, n]`, float32, finite."""
        self._grow(x.abs().amax(1))
        groups, total = self.counts.shape
        if groups == 1:  # three times as fast
            reach = float(self.limit)
            for part in torch.split(x.float().reshape(-1), _EXACT):
                counts = torch.histc(part, total, -reach, reach) if reach else _in_the_middle(part, total)
                self.counts += counts
            return
        place = (x / self.limit.clamp(min=torch.finfo(torch.float32).tiny)[:, None] + 1.0) * self.bins
        place = place.floor_().clamp_(0, total - 1).long()
        place += torch.arange(groups, device=x.device)[:, None] * total
        self.counts += torch.bincount(place.flatten(), minlength=groups * total).view(groups, total)

    def _grow(self, top: Tensor) -> None:
        empty = self.limit == 0
        self.limit[empty] = top[empty]
        while bool((narrow := top > self.limit).any()):
            fresh = narrow & (self.limit == 0)
            self.limit[fresh] = top[fresh]
            half = self.counts.shape[1] // 4
            merged = self.counts.reshape(len(self.counts), -1, 2).sum(2)
            wide = torch.zeros_like(self.counts)
            wide[:, half : half + merged.shape[1]] = merged
            old = narrow & ~fresh
            self.counts[old] = wide[old]
            self.limit[old] *= 2.0

    @property
    def width(self) -> Tensor:
        """Width of a bin, `[groups]`, real units."""
        return self.limit / self.bins

    def centres(self) -> Tensor:
        """Middle of each bin, `[groups, 2 · bins]`, real units."""
        steps = torch.arange(-self.bins, self.bins, device=self.limit.device) + 0.5
        return steps * self.width[:, None]

    def magnitudes(self) -> Tensor:
        """Counts of |x|, `[groups, bins]`."""
        return self.counts[:, : self.bins].flip(1) + self.counts[:, self.bins :]

    def quantile(self, share: float, *, of_magnitudes: bool) -> Tensor:
        """The value (or magnitude) that *share* (0..1) of the elements do not exceed, linear within its bin; `[groups]`."""
        counts = self.magnitudes() if of_magnitudes else self.counts
        total = counts.cumsum(1)
        wanted = share * total[:, -1:]
        index = torch.searchsorted(total, wanted).clamp(max=counts.shape[1] - 1)
        before = total.gather(1, index) - counts.gather(1, index)
        inside = ((wanted - before) / counts.gather(1, index).clamp(min=1.0)).clamp(0.0, 1.0)
        place = (index + inside).squeeze(1) - (0 if of_magnitudes else self.bins)
        return (place * self.width).float()

    def clear(self) -> None:
        """Forget everything."""
        self.counts.zero_()
        self.limit.zero_()


def check_bins(bins: int) -> int:
    """*bins*, if a histogram can have so many on each side. *raises* `NumericsError`."""
    if bins < 2 or bins % 2:
        raise NumericsError(
            "bins",
            expected="an even number of bins, 2 or more: two become one when the range doubles",
            found=str(bins),
            remedy="2048 is usual.",
        )
    return bins


def _in_the_middle(x: Tensor, bins: int) -> Tensor:
    """The counts of zeros."""
    counts = x.new_zeros(bins)
    counts[bins // 2] = x.numel()
    return counts
