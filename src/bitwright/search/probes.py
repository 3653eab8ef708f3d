"""Random probes of an output: orthogonal directions, the same for every unit of error of an image."""

from __future__ import annotations

import torch
from torch import Tensor

#: Seeds of outputs, and of users' seeds, lie this far apart: images of one never share those of the next.
_OUTPUT_STRIDE, _SEED_STRIDE = 10_000_019, 1_000_000_007


def draw_probes(reference: Tensor, count: int, seed: int, first_image: int, *, output: int = 0) -> Tensor:
    """*count* probes for each image: `[count, n, ...]`, like *reference* `[n, ...]`.

    Of an image with m elements they are orthogonal, each of squared length m, uniform in direction: the mean over probes of
    <probe, e>^2 is |e|^2 in expectation, and exactly with count = m (docs/error-sketch.md §3). The first probes do not depend
    on *count*. *output*: number of the output; each has probes of its own.
    """
    first = seed * _SEED_STRIDE + output * _OUTPUT_STRIDE + first_image
    rows = [_orthogonal(reference[0].numel(), count, first + i) for i in range(len(reference))]
    stacked = torch.stack(rows, 1)  # [count, n, m]
    return stacked.to(reference.device, torch.float32).reshape(count, *reference.shape)


def _orthogonal(size: int, count: int, seed: int) -> Tensor:
    """`[count, size]` float64."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    z = torch.stack([torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)])
    q, r = torch.linalg.qr(z.T)
    # The signs make the draw uniform: QR alone fixes those of R's diagonal.
    made: Tensor = (q * torch.sign(torch.diagonal(r))).T * size**0.5
    return made
