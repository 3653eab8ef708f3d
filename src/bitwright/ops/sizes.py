"""Integer lists of which some entries, or all, are only known at run time: shapes, starts, ends, repeats.

`Sizes` is a tuple of integers in which None stands for "the next integer among the operator's further inputs", or None
altogether: one input holds the whole list as an int64 vector. The first form comes from PyTorch, the second from ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx

from bitwright.graph.op import Emitter

Sizes = tuple[int | None, ...] | None

#: What ONNX and torch use for "to the end".
FAR = 2**63 - 1


def input_count(sizes: Sizes) -> int:
    """How many inputs *sizes* takes."""
    return 1 if sizes is None else sizes.count(None)


def resolve(sizes: Sizes, given: Sequence[Any]) -> tuple[int, ...]:
    """The integers that *sizes* stands for. *given*: its inputs, Python integers or one int64 vector."""
    if sizes is None:
        return tuple(int(v) for v in given[0].reshape(-1).tolist())
    rest = iter(given)
    return tuple(int(next(rest)) if s is None else s for s in sizes)


def split_sizes(values: Sequence[Any]) -> tuple[tuple[int | None, ...], tuple[fx.Node, ...]]:
    """ATen's list of integers and nodes as `Sizes` and its inputs."""
    sizes = tuple(None if isinstance(v, fx.Node) else int(v) for v in values)
    return sizes, tuple(v for v in values if isinstance(v, fx.Node))


def static_ints(values: Sequence[Any]) -> tuple[int, ...] | None:
    """*values* as integers, None if one of them is only known at run time."""
    return None if any(isinstance(v, fx.Node) for v in values) else tuple(int(v) for v in values)


def int_constant(emit: Emitter, values: Sequence[int], hint: str) -> str:
    """A constant int64 vector's name."""
    return emit.constant(np.array(values, dtype=np.int64), hint)


def emit_sizes(emit: Emitter, sizes: Sizes, inputs: Sequence[str | None], hint: str) -> str:
    """The name of an int64 vector with the integers of *sizes*. *inputs*: names of its inputs."""
    if sizes is None:
        assert inputs[0] is not None
        return inputs[0]
    if None not in sizes:
        return int_constant(emit, [s for s in sizes if s is not None], hint)
    rest = iter(inputs)
    parts = []
    for i, size in enumerate(sizes):
        if size is not None:
            parts.append(int_constant(emit, [size], f"{hint}_{i}"))
            continue
        part = emit.temporary(f"{hint}_{i}")
        emit.node("Reshape", [next(rest), int_constant(emit, [1], f"{hint}_one_{i}")], [part])
        parts.append(part)
    vector = emit.temporary(hint)
    emit.node("Concat", parts, [vector], axis=0)
    return vector


def as_vector(array: npt.NDArray[Any] | None) -> tuple[int, ...] | None:
    """A constant's integers, None if it is not constant."""
    return None if array is None else tuple(int(v) for v in array.reshape(-1))
