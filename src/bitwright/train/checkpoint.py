"""What a checkpoint says in words: a state dict holds tensors only, and numbers mean little without their format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.numerics.spec import QuantSpec

#: Keys beside the parameters and buffers of a quantizer, and of an observer whose method was changed.
FORMAT, METHOD = "format", "method"


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


def text_at(state_dict: Mapping[str, Any], key: str) -> str | None:
    """The text under *key*; None if there is none, or if someone averaged it with others as if it were numbers."""
    found = state_dict.get(key)
    if not isinstance(found, Tensor) or found.dtype != torch.uint8:
        return None
    try:
        return bytes(found.cpu().tolist()).decode()
    except UnicodeDecodeError:
        return None
