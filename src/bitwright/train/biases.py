"""Biases as the chip adds them: rounded to the accumulator's codes (docs/numerics.md §8.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitwright.ops.batchnorm import fold_factor
from bitwright.train.fake_quants import Quantizer

#: Gain, shift, mean and variance of a batch normalisation.
Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor]


class BiasRounding(nn.Module):
    """Rounds a bias to multiples of input scale x weight scale, of which there are 2^*bits*; the gradient passes.

    *x*, *weight*: the quantizers of the operator's operands; it rounds while they do. *epsilons*: of the batch normalisations that
    are folded into the operator. *folded*: the weight's scale is already that of the folded weight.
    """

    def __init__(
        self, x: Quantizer, weight: Quantizer, *, bits: int, epsilons: Sequence[float], folded: bool
    ) -> None:
        super().__init__()
        self.operands = [x, weight]  # in a list: they are no submodules of this one
        self.bits, self.epsilons, self.folded = bits, tuple(epsilons), folded

    def forward(self, bias: Tensor | None, norms: Sequence[Norm] = ()) -> Tensor | None:
        """*bias* `[c]` or None. *returns*: the rounded bias; with *norms*, the last one's shift, moved so that the folded bias is."""
        shift = norms[-1][1] if norms else bias
        x, weight = self.operands
        if not (weight.state.quantizes and x.state.quantizes and weight.has_range and x.has_range):
            return shift
        with torch.no_grad():
            effective, factor = self._folded(bias, norms)
            step = x.step() * self._weight_step(weight, factor, effective)
            most = float((1 << (self.bits - 1)) - 1)
            codes = (effective.float() / step).round()
            fits = codes.abs().max() < most if self.bits == 32 else torch.ones((), dtype=torch.bool)
            rounded = torch.where(fits.to(codes.device), codes.clamp(-most - 1, most) * step, effective)
            moved = (rounded - effective).to(effective.dtype)
        return moved if shift is None else shift + moved

    def _folded(self, bias: Tensor | None, norms: Sequence[Norm]) -> tuple[Tensor, Tensor | None]:
        """The bias and the weights' factor after folding *norms*."""
        if not norms:
            assert bias is not None
            return bias, None
        effective = torch.zeros_like(norms[0][2]) if bias is None else bias
        factor = torch.ones_like(norms[0][2])
        for (gain, shift, mean, variance), epsilon in zip(norms, self.epsilons, strict=True):
            one = fold_factor(gain, variance, epsilon)
            effective = (effective - mean) * one + (0.0 if shift is None else shift)
            factor = factor * one
        return effective, factor

    def _weight_step(self, weight: Quantizer, factor: Tensor | None, effective: Tensor) -> Tensor:
        step = weight.step()
        if factor is not None and not self.folded:
            step = step * factor.abs()
        return step if step.numel() in (1, effective.numel()) else step.max()
