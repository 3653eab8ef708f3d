"""Plain fake quantization: the scale follows the observer, the gradient passes straight through inside the range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.numerics.affine import Limit, fake_quantized
from bitwright.numerics.rounding import Rounding
from bitwright.train.fake_quants import FAKE_QUANTS, Quantizer


class StraightThrough(torch.autograd.Function):
    """Rounding to codes whose gradient is that of the clamp (Bengio et al. 2013, arXiv:1308.3432). Keeps one byte per element."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, lo: Limit, hi: Limit, rounding: Rounding, rectified: bool
    ) -> Tensor:
        y, inside = fake_quantized(x, scale, lo, hi, rounding, rectified=rectified)
        ctx.save_for_backward(inside)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, gradients[0], 0.0), None, None, None, None, None


@FAKE_QUANTS.register("fake_quant")
class FakeQuant(Quantizer):
    """Scale and zero point are those of the observed range."""

    scale: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("scale", torch.ones(self.groups))
        if self.observer.has_range:
            self.adopt(torch.empty(0))

    def step(self) -> Tensor:
        return self.scale

    def adopt(self, x: Tensor) -> None:
        scale, zero = self.range_scales()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)

    def set_scale(self, scale: Tensor) -> None:
        self.scale.copy_(scale)

    def rounded(self, x: Tensor, rectified: bool) -> Tensor:
        lo, hi = self.code_limits(x)
        scale = self.shaped(self.scale, x)
        return StraightThrough.apply(x, scale, lo, hi, self.spec.rounding, rectified)  # type: ignore[no-any-return, no-untyped-call]
