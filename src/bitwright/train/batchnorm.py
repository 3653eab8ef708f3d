"""Batch normalisation while a network is trained with quantized weights (docs/numerics.md §8.4)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from bitwright.errors import UnknownName
from bitwright.ops.batchnorm import BatchNorm

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
