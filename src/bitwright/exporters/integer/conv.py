"""Convolutions as ConvInteger; transposed ones by zeros between the elements and flipped weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import Integer
from bitwright.exporters.integer.products import Byte, in_bytes, join, weight_byte, zero_points
from bitwright.exporters.integer.rescale import finish
from bitwright.graph.op import Op
from bitwright.numerics.fixed_point import Integers, Reals
from bitwright.ops.conv import Conv, ConvTranspose


@LOWERINGS.register("Conv")
def _conv(low: Lowering, op: Op) -> None:
    assert isinstance(op, Conv)
    w, scale = low.weight(op, 1)
    padding: dict[str, Any] = (
        {"auto_pad": op.pads.upper()} if isinstance(op.pads, str) else {"pads": list(op.pads)}
    )
    attributes = {"strides": list(op.stride), "dilations": list(op.dilation), "group": op.groups, **padding}
    x = low.integer(op, 0)
    finish(
        low,
        op,
        _with_bias(low, op, _convolved(low, op, x, in_bytes(low, x), w, scale.reshape(-1), attributes)),
    )


@LOWERINGS.register("ConvTranspose")
def _conv_transpose(low: Lowering, op: Op) -> None:
    assert isinstance(op, ConvTranspose)
    n = len(op.kernel)
    w, scale = low.weight(op, 1)
    scale = scale.reshape(-1)
    x = low.integer(op, 0)
    lengths = low.fixed_lengths(op, [1, *range(2, 2 + n)])
    reach = [(k - 1) * d for k, d in zip(op.kernel, op.dilation, strict=True)]
    begins = [r - p for r, p in zip(reach, op.pads[:n], strict=True)]
    # Stretched elements end with s - 1 zeros too many.
    ends = [
        r - p + extra - (s - 1)
        for r, p, extra, s in zip(reach, op.pads[n:], op.output_padding, op.stride, strict=True)
    ]
    stretched = [_stretched(low, byte, lengths, op.stride, begins, ends) for byte in in_bytes(low, x)]
    attributes = {"dilations": list(op.dilation), "group": op.groups}
    per_channel = scale if scale.size == 1 else np.tile(scale, op.groups)
    acc = _convolved(low, op, x, stretched, _flipped(w, op.groups), per_channel, attributes)
    finish(low, op, _with_bias(low, op, acc))


def _convolved(
    low: Lowering, op: Op, x: Integer, xs: list[Byte], w: Integers, scale: Reals, attributes: dict[str, Any]
) -> Integer:
    """x * w: the accumulator. *w*: `[o, c/groups, *k]` codes; *scale*: `[o]` or `[1]`."""
    stored = weight_byte(low, w)
    reach = int(np.abs(w.astype(np.int64)).reshape(w.shape[0], -1).sum(1).max(initial=0))

    def multiply(a: Byte, b: Byte) -> str:
        return low.node(
            "ConvInteger",
            a.name,
            b.name,
            *zero_points(low, a, b),
            kernel_shape=list(w.shape[2:]),
            **attributes,
        )

    shape = () if scale.size == 1 else (-1, *[1] * (w.ndim - 2))
    return join(
        low,
        op,
        [(a, stored) for a in xs],
        multiply,
        lambda a, b: a.peak * reach,
        (x.scale * scale).reshape(shape),
    )


def _with_bias(low: Lowering, op: Op, acc: Integer) -> Integer:
    if not low.has_input(op, 2):
        return acc
    bias = low.real_constant(op, 2)
    rank = len(low.shape_of(op))
    return acc.shifted(bias.reshape(-1, *[1] * (rank - 2)))


def _flipped(w: Integers, groups: int) -> Integers:
    """`[c, o/groups, *k]` as the weight `[o, c/groups, *k]` of the convolution that does the same to stretched elements."""
    c, o, *k = w.shape
    grouped = w.reshape(groups, c // groups, o, *k).swapaxes(1, 2).reshape(groups * o, c // groups, *k)
    return np.ascontiguousarray(np.flip(grouped, tuple(range(2, grouped.ndim))))


def _stretched(
    low: Lowering, x: Byte, lengths: list[int], strides: tuple[int, ...], begins: list[int], ends: list[int]
) -> Byte:
    """*x* with stride - 1 zeros behind every element, then padded (or, where negative, cut)."""
    channels, *sizes = lengths
    zero = low.constant(np.array(x.zero, np.uint8))
    name = x.name
    if any(s > 1 for s in strides):
        apart = [d for size in sizes for d in (size, 1)]
        name = low.node("Reshape", name, low.constant(np.array([-1, channels, *apart], np.int64)))
        behind = [0, 0, *[p for s in strides for p in (0, s - 1)]]
        name = low.node("Pad", name, low.constant(np.array([0] * len(behind) + behind, np.int64)), zero)
        together = [size * s for size, s in zip(sizes, strides, strict=True)]
        name = low.node("Reshape", name, low.constant(np.array([-1, channels, *together], np.int64)))
    if any(begins) or any(ends):
        pads = np.array([0, 0, *begins, 0, 0, *ends], np.int64)
        name = low.node("Pad", name, low.constant(pads), zero)
    return Byte(name, x.zero, x.factor, x.peak)
