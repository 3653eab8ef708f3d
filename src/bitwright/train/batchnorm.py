"""Batch normalisation while a network is trained with quantized weights (docs/numerics.md §8.4)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bitwright.errors import UnknownName
from bitwright.ops.norm import BatchNorm

#: `trained`: statistics follow the batches. `frozen`: they stay. `folded`: there is none, it is part of the weights.
BatchNormMode = Literal["trained", "frozen", "folded"]


def check_mode(mode: str) -> BatchNormMode:
    """*mode*, if it is one. *raises* `UnknownName`."""
    if mode not in get_args(BatchNormMode):
        raise UnknownName("batchnorm", kind="mode", name=mode, known=get_args(BatchNormMode))
    return mode  # type: ignore[return-value]


def freeze_batchnorm(model: nn.Module, frozen: bool = True) -> None:
    """Stop (or let go on) the statistics of every batch normalisation of a prepared model, also in training mode.

    Its gains and biases are trained on.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.frozen = frozen


def fold_factor(gain: Tensor | None, variance: Tensor, epsilon: float) -> Tensor:
    """What folding multiplies each output channel by, `[c]`: gain / sqrt(variance + epsilon), kept away from 0."""
    factor = torch.rsqrt(variance.detach() + epsilon)
    if gain is not None:
        factor = factor * gain
    tiny = torch.where(factor < 0, -_LEAST, _LEAST)
    return torch.where(factor.abs() < _LEAST, tiny.to(factor.dtype), factor)


_LEAST = 1e-6


def times_channels(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """*weight* with output channel c multiplied by factor[c]. *axis*: of the channels; *groups*: > 1 only where the channels of
    a transposed convolution lie on axis 1, group by group along axis 0.
    """
    if axis == 1 and groups > 1:
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        shape = [groups, 1, weight.shape[1], *[1] * (weight.dim() - 2)]
        return (grouped * factor.reshape(shape)).reshape(weight.shape)
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * factor.reshape(shape)


def over_channels(weight: Tensor, factor: Tensor, axis: int, groups: int) -> Tensor:
    """Inverse of `times_channels`."""
    return times_channels(weight, 1.0 / factor, axis, groups)
