"""What models return, as tensors with stable names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import chain, count
from typing import Any

from torch import Tensor

from bitwright.errors import ModelError


def named_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in *output*, nested as it may be. A key or index per level, joined by `-`; a lone tensor is `0`."""
    if isinstance(output, Tensor):
        return {name or "0": output}
    if isinstance(output, Mapping):
        parts = [(str(key), part) for key, part in output.items()]
    elif isinstance(output, (tuple, list)):
        parts = [(str(i), part) for i, part in enumerate(output)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, part in parts:
        found.update(named_tensors(part, f"{name}-{key}" if name else key))
    return found


def paired(baseline: Any, analysed: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors of two models' outputs by name, side by side. *raises* `ModelError` if there are none, or they differ."""
    ours, theirs = named_tensors(baseline), named_tensors(analysed)
    a, b = ({name: tuple(x.shape) for name, x in xs.items()} for xs in (ours, theirs))
    if not a or a != b:
        raise ModelError(
            "outputs of the two models",
            expected="tensors of the same names and shapes" if a else "tensors",
            found=f"{a} and {b}",
            remedy="Analyse two states of one network; give what makes outputs comparable as post_process.",
        )
    return {name: (x, theirs[name].to(x.device)) for name, x in ours.items()}


def file_parts(names: Iterable[str]) -> dict[str, str]:
    """Each of *names* as a part of a file name, no two alike. Names that can stand in one stay as they are."""
    safe = {name: re.sub(r"[^\w.\-]", "_", name) for name in names}
    parts = {name: part for name, part in safe.items() if part == name}
    for name, part in safe.items():
        if name not in parts:
            numbered = (f"{part}_{n}" for n in count(2))
            parts[name] = next(p for p in chain((part,), numbered) if p not in parts.values())
    return parts
