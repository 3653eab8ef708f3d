"""LSQ: the scale is learned (Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.numerics.affine import THRESHOLD_FLOOR, Limits, fake_quantized
from bitwright.numerics.rounding import Rounding
from bitwright.train.fake_quants import FAKE_QUANTS, Quantizer, inner
from bitwright.train.observers import over_processes
from bitwright.train.states import FakeQuantState


class _Lsq(torch.autograd.Function):
    """Equation 3 of the paper for the scale, the clamp's gradient for the data; *factor*: its gradient scale g."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        limits: Limits,
        rounding: Rounding,
        factor: float,
        rectified: bool,
    ) -> Tensor:
        y, _, _ = fake_quantized(x, scale, limits, rounding, rectified=rectified)
        ctx.save_for_backward(x, scale, *(t for t in limits if isinstance(t, Tensor)))
        ctx.limits = None if isinstance(limits[0], Tensor) else limits
        ctx.rounding, ctx.factor, ctx.rectified = rounding, factor, rectified
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *limits = ctx.saved_tensors
        # Computed again: of the values that nothing else keeps, x alone stays in memory.
        held_within = tuple(limits) or ctx.limits
        y, exact, held = fake_quantized(x, scale, held_within, ctx.rounding, rectified=ctx.rectified)
        inside = exact.eq_(held)
        # code - x / scale inside, code outside; y = code * scale.
        by_scale = inner(gradients[0], y.addcmul_(inside, x, value=-1.0), scale) / scale
        return inside.mul_(gradients[0]), by_scale * ctx.factor, None, None, None, None


@FAKE_QUANTS.register("lsq")
class Lsq(Quantizer):
    """The scale is a parameter. It starts at what calibration found or what was loaded, else at 2 · mean|x| / √qmax of the
    first batch (section 2.1).

    Its gradient is scaled by 1 / √(n · qmax), n elements per sample that share it (section 2.2).
    """

    adopts_data = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scale = nn.Parameter(torch.ones(self.groups))
        if self.observer.has_range:
            self.set_scale(self.range_scales()[0])

    @property
    def settled(self) -> bool:
        return self.has_range

    def step(self) -> Tensor:
        scale = self.scale.detach().abs().clamp(min=THRESHOLD_FLOOR / self.qmax)
        return torch.exp2(torch.ceil(torch.log2(scale))) if self.spec.power_of_two else scale

    def adopt(self, x: Tensor) -> None:
        scale, zero = self.range_scales()
        if self.spec.symmetric and self.state is not FakeQuantState.CALIBRATION:
            mean = x.abs().mean(1)
            mean = over_processes(mean, "mean") if self.training else mean
            scale = torch.minimum(scale, 2.0 * mean / math.sqrt(self.qmax))
        self.zero_point.copy_(zero)
        self.set_scale(scale.clamp(min=THRESHOLD_FLOOR / self.qmax))

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        if self.spec.power_of_two:  # in the middle of what rounds up to it, not where a nudge doubles it
            scale = torch.exp2(torch.ceil(torch.log2(scale)) - 0.5)
        self.scale.copy_(scale)

    def rounded(self, x: Tensor, rectified: bool) -> Tensor:
        sample = x.shape if self.is_weight or x.dim() < 2 else x.shape[1:]
        factor = 1.0 / math.sqrt(max(math.prod(sample) / self.groups, 1.0) * self.qmax)
        # The value of `step`, the gradient of the parameter's magnitude.
        scale = self.scale.abs()
        scale = scale + (self.step() - scale).detach()
        y: Tensor = _Lsq.apply(
            x, self.shaped(scale, x), self.code_limits(x), self.spec.rounding, factor, rectified
        )  # type: ignore[no-untyped-call]
        return y
