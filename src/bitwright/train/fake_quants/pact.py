"""PACT: the threshold is learned (Choi et al. 2018, "PACT: Parameterized Clipping Activation", arXiv:1805.06085)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.numerics.affine import Limits, fake_quantized, scales_from_range
from bitwright.numerics.rounding import Rounding
from bitwright.train.fake_quants import FAKE_QUANTS, Quantizer, inner


class _Pact(torch.autograd.Function):
    """The threshold's gradient is 1 for data clipped above and -1 below (equation 3, on both sides), 0 inside."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        scale: Tensor,
        limits: Limits,
        rounding: Rounding,
        rectified: bool,
    ) -> Tensor:
        y, exact, held = fake_quantized(x, scale, limits, rounding, rectified=rectified)
        # 1 above, -1 below, 0 inside: one byte per element.
        ctx.save_for_backward(exact.sub_(held).sign_().to(torch.int8), alpha)
        ctx.rectified = rectified
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (side, alpha) = gradients, ctx.saved_tensors
        clipped = side.to(g.dtype)
        # What a ReLU holds back lies below, and no threshold changes that.
        by_alpha = inner(g, clipped.clamp(min=0.0) if ctx.rectified else clipped, alpha)
        by_x = clipped.abs_().neg_().add_(1.0).mul_(g)
        return by_x, by_alpha, None, None, None, None


@FAKE_QUANTS.register("pact")
class Pact(Quantizer):
    """The threshold `alpha` is a parameter, real units; it starts at the observed range. Give it a weight decay, as the paper does.

    The range is [-alpha, alpha], or [0, alpha] where nothing negative was observed at the start.
    """

    one_sided: Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alpha = nn.Parameter(torch.ones(self.groups))
        self.register_buffer("one_sided", torch.zeros(self.groups, dtype=torch.bool))
        if self.observer.has_range:
            self._start()

    def _scales(self) -> tuple[Tensor, Tensor]:
        alpha = self.alpha.detach().abs()
        return scales_from_range(self.spec, torch.where(self.one_sided, 0.0, -alpha), alpha)

    def step(self) -> Tensor:
        return self._scales()[0]

    @property
    def settled(self) -> bool:
        return self.has_range

    def adopt(self, x: Tensor) -> None:
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        lo, hi = self.observer.lo, self.observer.hi
        self.alpha.copy_(torch.maximum(-lo, hi))
        self.one_sided.copy_(lo >= 0)
        self.zero_point.copy_(self._scales()[1])

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        d, zero = self.spec.dtype, self.zero_point
        self.one_sided.copy_(self.observer.lo >= 0 if self.spec.symmetric else zero <= d.qmin)
        steps = (
            torch.full_like(zero, d.qmax)
            if self.spec.symmetric
            else torch.maximum(zero - d.qmin, d.qmax - zero)
        )
        self.alpha.copy_(scale * steps)
        self.zero_point.copy_(self._scales()[1])

    def rounded(self, x: Tensor, rectified: bool) -> Tensor:
        scale, alpha = self.shaped(self.step(), x), self.shaped(self.alpha.abs(), x)
        y: Tensor = _Pact.apply(x, alpha, scale, self.code_limits(x), self.spec.rounding, rectified)  # type: ignore[no-untyped-call]
        return y
