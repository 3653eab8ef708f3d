"""Calls of what is the user's in a training job: the model and the loss. Whatever they raise says where it happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, DataError, ModelError
from bitwright.flow.training_data import Batch


def moved(batch: Batch, device: torch.device) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """The inputs of *batch* on *device*: in order, or by name."""
    if batch.named:
        return {name: x.to(device) for name, x in batch.named.items()}
    return tuple(x.to(device) for x in batch.inputs)


def logits_of(model: nn.Module, batch: Batch, device: torch.device, where: str) -> Tensor:
    """The first output of *model* for *batch*, `[n, classes]`. *raises* `ModelError` for whatever the model raises or else returns."""
    with _explained(where, "a model that takes this batch", "Check the shapes and types of its inputs."):
        inputs = moved(batch, device)
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    if isinstance(output, (tuple, list)):
        output = output[0]
    if isinstance(output, dict):
        output = next(iter(output.values()))
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ModelError(
            where,
            expected="logits [n, classes] as the first output of the model",
            found=_kind(output),
            remedy="`bitwright train` is for classification; use the Python API in a loop of your own otherwise.",
        )
    return output


def loss_of(function: Callable[..., Any], logits: Tensor, labels: Tensor, where: str) -> Tensor:
    """What *function* makes of *logits* and *labels*, a scalar. *raises* `ModelError` for whatever it raises or else returns."""
    with _explained(where, "a loss that takes these outputs and labels", "Check the labels, and the loss."):
        loss = function(logits, labels)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ModelError(
            where,
            expected="a loss that is one number",
            found=_kind(loss),
            remedy="Return the mean over the batch.",
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


@contextmanager
def _explained(where: str, expected: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except BitwrightError:
        raise
    except Exception as e:  # the model and the loss are the user's
        found = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise ModelError(where, expected=expected, found=found, remedy=remedy) from e


def _kind(x: Any) -> str:
    return f"{type(x).__name__} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
