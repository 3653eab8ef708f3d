"""What a checkpoint says in words: a state dict holds tensors only, and numbers mean little without their format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitwright.errors import ModelError
from bitwright.numerics.spec import QuantSpec

#: Where torch keeps what a module has to say besides its tensors.
EXTRA = "_extra_state"


def format_of(spec: QuantSpec) -> str:
    """What decides the meaning of a scale: `int8, symmetric, per tensor`."""
    parts = [
        spec.dtype.name,
        "symmetric" if spec.symmetric else "asymmetric",
        "per tensor" if spec.axis is None else "per channel",
        f"groups of {spec.group}" if spec.group else "",
        "powers of two" if spec.power_of_two else "",
    ]
    return ", ".join(p for p in parts if p)


def as_tensor(text: str) -> Tensor:
    """*text* in UTF-8: `[bytes]` uint8."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def text_of(found: Any) -> str | None:
    """The text that *found* holds; None if there is none, or if someone averaged it with others as if it were numbers."""
    if not isinstance(found, Tensor) or found.dtype != torch.uint8:
        return None
    try:
        return bytes(found.cpu().tolist()).decode()
    except UnicodeDecodeError:
        return None


def check_format(where: str, spec: QuantSpec, found: Any) -> None:
    """*raises* `ModelError` if *found*, the extra state of a quantizer of *spec*, names another format."""
    own, text = format_of(spec), text_of(found)
    if text is not None and text != own:
        raise ModelError(
            where,
            expected=f"a scale of {own}",
            found=f"one of {text}",
            remedy="Load it into a model that was prepared alike, then load_observer_params, which converts ranges.",
        )
