"""Pooling: maxima of codes, and sums over windows with the division in the rescale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bitwright.exporters.integer.arithmetic import centred
from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import NO_ZERO, Integer
from bitwright.exporters.integer.rescale import finish
from bitwright.graph.op import Op
from bitwright.ops.pool import AveragePool, MaxPool
from bitwright.ops.sizes import FAR


@LOWERINGS.register("MaxPool")
def _max_pool(low: Lowering, op: Op) -> None:
    assert isinstance(op, MaxPool)
    x = low.integer(op, 0)
    if x.carrier == "int32":
        name = _slide(low, op, x, "Max", x.lo)
    else:
        name = low.node("MaxPool", x.name, **op.windows.onnx_attributes())
    finish(low, op, replace(x, name=name))


@LOWERINGS.register("AveragePool")
def _average_pool(low: Lowering, op: Op) -> None:
    assert isinstance(op, AveragePool)
    w = op.windows
    n = len(w.kernel)
    x = centred(low, low.integer(op, 0), "int32")
    peak = x.peak * int(np.prod(w.kernel))
    low.prove(op, peak, 32, 1)
    name = _slide(low, op, x, "Add", 0)
    lengths = low.fixed_lengths(op, range(2, 2 + n))
    shares = np.ones([1] * n)
    for axis, (length, margin) in enumerate(zip(lengths, w.margins(lengths), strict=True)):
        counts = _counts(length, margin, w.kernel[axis], w.stride[axis], padding=op.count_padding)
        shares = shares / counts.reshape([-1 if a == axis else 1 for a in range(n)])
    if np.ptp(shares) == 0:
        shares = np.array(shares.reshape(-1)[0])
    finish(low, op, Integer(name, "int32", np.asarray(x.scale * shares), NO_ZERO, -peak, peak))


@LOWERINGS.register("GlobalMaxPool")
def _global_max_pool(low: Lowering, op: Op) -> None:
    x = low.integer(op, 0)
    axes = np.arange(2, len(low.shape_of(op)), dtype=np.int64)
    finish(low, op, replace(x, name=low.node("ReduceMax", x.name, low.constant(axes), keepdims=1)))


def _counts(
    length: int, margin: tuple[int, int, int], kernel: int, stride: int, *, padding: bool
) -> np.ndarray:  # type: ignore[type-arg]
    """How many elements each window along one axis averages over."""
    begin, end, extra = margin
    counted = np.concatenate(
        [np.full(begin, padding), np.full(length, True), np.full(end, padding), np.full(extra, False)]
    )
    starts = range(0, len(counted) - kernel + 1, stride)
    return np.array([counted[i : i + kernel].sum() for i in starts], np.float64)


def _slide(low: Lowering, op: MaxPool | AveragePool, x: Integer, combine: str, outside: int) -> str:
    """Windows of int32 codes, combined axis by axis: the elements of a window are slices of the whole."""
    w = op.windows
    n = len(w.kernel)
    lengths = low.fixed_lengths(op, range(2, 2 + n))
    margins = w.margins(lengths)
    name = x.name
    if any(any(m) for m in margins):
        pads = [0, 0, *(b for b, _, _ in margins), 0, 0, *(e + extra for _, e, extra in margins)]
        name = low.node(
            "Pad", name, low.constant(np.array(pads, np.int64)), low.constant(np.array(outside, np.int32))
        )
    for axis, (length, (b, e, extra)) in enumerate(zip(lengths, margins, strict=True), start=2):
        name = _along(
            low,
            name,
            axis,
            length + b + e + extra,
            (w.kernel[axis - 2], w.stride[axis - 2], w.dilation[axis - 2]),
            combine,
        )
    return name


def _along(low: Lowering, name: str, axis: int, length: int, window: Sequence[int], combine: str) -> str:
    kernel, stride, dilation = window
    count = (length - ((kernel - 1) * dilation + 1)) // stride + 1
    joined = ""
    for i in range(kernel):
        start = i * dilation
        end = start + (count - 1) * stride + 1
        bounds = [start, end if end < length else FAR, axis, stride]
        part = low.node("Slice", name, *(low.constant(np.array([v], np.int64)) for v in bounds))
        joined = low.node(combine, joined, part) if joined else part
    return joined
