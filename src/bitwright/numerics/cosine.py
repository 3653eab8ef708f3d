"""The cosine of two sets of outputs (docs/numerics.md §6)."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """True cosine of each row. *a*, *b*: `[n, m]`. *returns*: `[n]` float64.

    Two rows of zeros give 1, one row of zeros gives 0; so does NaN.
    """
    a, b = a.double(), b.double()
    dot, na, nb = (a * b).sum(1), a.norm(dim=1), b.norm(dim=1)
    both_zero = (na == 0) & (nb == 0)
    value = dot / (na * nb).clamp_min(torch.finfo(torch.float64).tiny)
    value = torch.where(torch.isfinite(value), value, torch.zeros_like(value))
    return torch.where(both_zero, torch.ones_like(value), value).clamp(-1, 1)
