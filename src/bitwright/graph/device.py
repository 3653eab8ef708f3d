"""Where torch computes."""

from __future__ import annotations

import torch
from torch import nn

from bitwright.errors import ModelError


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters and buffers of *module* are; the CPU if it has none."""
    return next((t.device for t in module.state_dict().values()), torch.device("cpu"))


def usable_device(name: str, where: str = "--device") -> torch.device:
    """The device called *name*. *raises* `ModelError`, naming *where* it was asked for, if torch cannot use it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ModelError(
            where,
            expected="a device that torch can use",
            found=f"{name!r}: {str(e).splitlines()[0]}",
            remedy="Use cpu, or install torch for that device.",
        ) from e
    return device
