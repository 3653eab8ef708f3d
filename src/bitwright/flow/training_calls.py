"""Calls of what is the user's in a training job: the model and the loss. Whatever they raise says where it happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import DataError, ModelError, explained
from bitwright.flow.training_data import Batch
from bitwright.train.control import called


def moved(batch: Batch, device: torch.device) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """The inputs of *batch* on *device*: in order, or by name."""
    if batch.named:
        return {name: x.to(device) for name, x in batch.named.items()}
    return tuple(x.to(device) for x in batch.inputs)


def logits_of(model: nn.Module, batch: Batch, device: torch.device, where: str) -> Tensor:
    """The first output of *model* for *batch*, `[n, classes]`. *raises* `ModelError` for whatever the model raises or else returns."""
    remedy = "Check the shapes and types of its inputs."
    with explained(ModelError, where, expected="a model that takes this batch", remedy=remedy):
        output = called(model, moved(batch, device))
    if isinstance(output, (tuple, list)):
        output = next(iter(output), None)
    if isinstance(output, dict):
        output = next(iter(output.values()), None)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ModelError(
            where,
            expected="logits [n, classes] as the first output of the model",
            found=_kind(output),
            remedy="`bitwright train` is for classification; use the Python API in a loop of your own otherwise.",
        )
    return output


def loss_of(function: Callable[..., Any], logits: Tensor, labels: Tensor, where: str) -> Tensor:
    """What *function* makes of *logits* and *labels*, a scalar to train by. *raises* `ModelError` for whatever it raises or else returns."""
    remedy = "Check the labels, and the loss."
    with explained(ModelError, where, expected="a loss that takes these outputs and labels", remedy=remedy):
        loss = function(logits, labels)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ModelError(
            where,
            expected="a loss that is one number",
            found=_kind(loss),
            remedy="Return the mean over the batch.",
        )
    if not loss.is_floating_point() or not loss.requires_grad:
        raise ModelError(
            where,
            expected="a loss that has a gradient",
            found=f"a tensor of {loss.dtype} without one",
            remedy="Compute it from the outputs in floating point, without detach(), argmax or torch.no_grad().",
        )
    return loss.reshape(())


def right_answers(logits: Tensor, labels: Tensor, where: str) -> int:
    """How many of *logits* `[n, classes]` are largest at their label `[n]`. *raises* `DataError` for other labels."""
    if labels.shape != logits.shape[:1]:
        raise DataError(
            where,
            expected=f"one class index for each of {len(logits)} samples",
            found=f"labels {list(labels.shape)}",
            remedy="Return labels [n] as validation data; soft or one-hot labels serve training alone.",
        )
    return int((logits.argmax(1).cpu() == labels.cpu()).sum())


def _kind(x: Any) -> str:
    return f"{type(x).__name__} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
