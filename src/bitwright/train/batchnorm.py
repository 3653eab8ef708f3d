"""Batch normalisation while a network is trained with quantized weights (docs/numerics.md §8.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from bitwright.errors import DataError, UnknownName
from bitwright.ops.batchnorm import BatchNorm
from bitwright.train.control import evaluating
from bitwright.train.prepared import PreparedModel, prepared_in
from bitwright.train.states import FakeQuantState

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


def update_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Take the running statistics of a trained *model* anew: their means over *batches*, with weights and ranges as they are.

    Running averages are of the last few batches, and of weights that still hopped between codes (Nagel et al. 2022, "Overcoming
    Oscillations in Quantization-Aware Training", arXiv:2203.11086). *batches*: training inputs, augmented as in training: a tensor, a
    tuple, or a mapping from names each; fifty to a hundred are enough. Frozen batch normalisations stay as they are.

    *returns*: how many batch normalisations were updated. *raises* `ModelError` for a model that is not prepared, `DataError` for no batch,
    or for batches that give NaN or infinity; then nothing is changed.
    """
    prepared = prepared_in(model)
    norms = [m for m in prepared.modules() if isinstance(m, BatchNorm) and not m.frozen]
    momenta, statistics = [m.momentum for m in norms], _statistics(prepared)
    before = [x.clone() for x in statistics]
    count = 0
    try:
        with evaluating(prepared, FakeQuantState.VALIDATION):
            for count, batch in enumerate(batches, start=1):
                for norm in norms:
                    norm.training, norm.momentum = True, 1.0 / count
                _call(prepared, batch)
        _check(statistics, count)
    except BaseException:
        for new, old in zip(statistics, before, strict=True):
            new.copy_(old)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(norms)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))


def _statistics(model: PreparedModel) -> list[Tensor]:
    """The buffers of *model* that are no quantizer's."""
    quantizers = {id(b) for _, q in model.quantizers for b in q.buffers()}
    return [b for b in model.buffers() if id(b) not in quantizers]


def _check(statistics: list[Tensor], count: int) -> None:
    if not count or not all(bool(x.isfinite().all()) for x in statistics):
        raise DataError(
            "update_batchnorm",
            expected="batches of finite numbers",
            found="statistics that are NaN or infinite" if count else "none",
            remedy="Give fifty batches of training inputs, as the model takes them.",
        )
