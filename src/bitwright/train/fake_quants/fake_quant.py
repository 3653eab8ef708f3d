"""Plain fake quantization: the scale follows the observer, the gradient passes straight through inside the range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.numerics.affine import Limits, fake_quantized
from bitwright.numerics.rounding import Rounding
from bitwright.train.fake_quants import FAKE_QUANTS, Quantizer


class StraightThrough(torch.autograd.Function):
    """Rounding to codes whose gradient is that of the clamp (Bengio et al. 2013, arXiv:1308.3432). Keeps one byte per element."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, limits: Limits, rounding: Rounding, rectified: bool
    ) -> Tensor:
        y, exact, held = fake_quantized(x, scale, limits, rounding, rectified=rectified, margin=0.5)
        # As int8: conversions from bool, and choices by it, are several times slower.
        ctx.save_for_backward(exact.eq_(held).to(torch.int8))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return inside.to(gradients[0].dtype).mul_(gradients[0]), None, None, None, None


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
        self.take_range()

    def set_scale(self, scale: Tensor) -> None:
        self.scale.copy_(scale)

    def rounded(self, x: Tensor, rectified: bool) -> Tensor:
        scale = self.shaped(self.scale, x)
        y: Tensor = StraightThrough.apply(x, scale, self.code_limits(x), self.spec.rounding, rectified)  # type: ignore[no-untyped-call]
        return y
