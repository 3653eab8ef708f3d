"""Batch normalisation while a network is trained with quantized weights (docs/numerics.md §8.4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bitwright.errors import DataError, UnknownName, explained
from bitwright.ops.batchnorm import BatchNorm
from bitwright.train.control import called, evaluating
from bitwright.train.fake_quants.fake_quant import FakeQuant
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
    tuple, or a mapping from names each, of two samples at least; fifty to a hundred are enough. What is frozen (`freeze_batchnorm`, or
    in evaluation mode in a model that is in training mode) stays as it is. Where statistics are a part of quantized weights (one scale for
    several channels), plain quantizers then take the range of these weights anew; learned
    scales stay.

    *returns*: how many batch normalisations were updated. *raises* `ModelError` for a model that is not prepared, `DataError` for no batch,
    for one that the model does not take, and for NaN or infinity; then nothing is changed. Every process of a distributed job sees its own
    batches alone: give all the same, or let those of the first be broadcast, as DDP does.
    """
    prepared = prepared_in(model)
    taken: dict[int, _Taken] = {}
    norms = _moving(prepared)
    hooks = [norm.register_forward_pre_hook(partial(_see, taken)) for norm in norms]
    batch = None
    try:
        with evaluating(prepared, FakeQuantState.VALIDATION):
            for batch in batches:
                _call(prepared, batch)
        _store(list(taken.values()), has_data=batch is not None)
    finally:
        for hook in hooks:
            hook.remove()
    if taken:
        _take_folded(prepared, batch)
    return len(taken)


@dataclass
class _Taken:
    """Statistics of one normalisation, perhaps of several calls. *mean*, *var*: their sums over *count* batches, `[c]` each."""

    running: tuple[Tensor, Tensor]
    mean: Tensor
    var: Tensor
    count: int = 0


def _moving(model: PreparedModel) -> list[BatchNorm]:
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and not m.frozen]
    return [m for m in norms if m.training or not model.training]


def _see(taken: dict[int, _Taken], norm: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Count the statistics of the normalisation's input, and let it use them, as training would."""
    x, weight, bias, mean, var = inputs
    axes = [0, *range(2, x.dim())]
    known = taken.setdefault(id(mean), _Taken((mean, var), torch.zeros_like(mean), torch.zeros_like(var)))
    batch_var, batch_mean = torch.var_mean(x.float(), axes)  # unbiased, as running variances are
    known.mean += batch_mean
    known.var += batch_var
    known.count += 1
    biased = torch.var(x.float(), axes, correction=0)
    return x, weight, bias, batch_mean.to(mean.dtype), biased.to(var.dtype)


def _store(taken: list[_Taken], *, has_data: bool) -> None:
    finite = all(bool(t.isfinite().all()) for known in taken for t in (known.mean, known.var))
    if not has_data or not finite:
        raise DataError(
            "update_batchnorm",
            expected="batches of finite numbers, of two samples or more",
            found="statistics that are NaN or infinite" if has_data else "none",
            remedy="Give fifty batches of training inputs, as the model takes them.",
        )
    for known in taken:
        for running, total in zip(known.running, (known.mean, known.var), strict=True):
            running.copy_(total / known.count)


def _take_folded(model: PreparedModel, batch: Any) -> None:
    """Weights that are quantized times what the statistics make of them have another range now."""
    folded = [q for _, q in model.quantizers if q.is_weight and q.is_folded and isinstance(q, FakeQuant)]
    following = [q for q in folded if q.observer.averaging_constant and not q.observer.is_given]
    if following:
        with evaluating(model, FakeQuantState.FLOAT):
            for quantizer in following:
                quantizer.forget()
                quantizer.state = FakeQuantState.CALIBRATION
            _call(model, batch)


def _call(model: nn.Module, batch: Any) -> None:
    with explained(
        DataError,
        "update_batchnorm",
        expected="inputs that the model takes",
        remedy="Give inputs alone, without labels: (x for x, _ in loader).",
    ):
        called(model, batch)
