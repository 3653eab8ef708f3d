"""Operators that put several values together, or constants among codes: concat, where, pad, embedding, resize."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from bitwright.exporters.integer.arithmetic import centred, in_carrier
from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.move import move
from bitwright.exporters.integer.number import NO_ZERO, Integer, codes_of
from bitwright.exporters.integer.rescale import finish, requantize, shifted_right
from bitwright.exporters.writer import to_numpy
from bitwright.graph.op import Op
from bitwright.numerics.affine import quantize
from bitwright.numerics.spec import QParams
from bitwright.ops.pad import Pad
from bitwright.ops.resize import Resize
from bitwright.ops.where import Where

#: Weights of linear and cubic resizing in units of 2^-20.
_RESIZE_BITS = 20


@LOWERINGS.register("Concat", "Stack")
def _concat(low: Lowering, op: Op) -> None:
    q = low.output_q(op)
    count = len(low.graph.op_inputs(op.name))
    codes = {i: requantize(low, op, low.integer(op, i), q).name for i in range(count)}
    (name,) = low.write_itself(op, codes)
    low.finish(op, codes_of(name, q))


@LOWERINGS.register("Where")
def _where(low: Lowering, op: Op) -> None:
    assert isinstance(op, Where)
    q = low.output_q(op)
    names, place = [], 1
    for scalar in (op.a, op.b):
        if scalar is None:
            names.append(requantize(low, op, low.integer(op, place), q).name)
            place += 1
        else:
            names.append(low.constant(_code(scalar, q)))
    condition = low.side(op, 0)
    low.finish(op, codes_of(low.node("Where", condition, *names), q))


@LOWERINGS.register("Pad")
def _pad(low: Lowering, op: Op) -> None:
    assert isinstance(op, Pad)
    if op.mode != "constant":
        move(low, op)
        return
    if op.pads is None or None in op.pads:
        raise low.refusal(op, "constant pads")
    rank, q = len(low.shape_of(op)), low.output_q(op)
    pads = op.pads_of_all_axes(rank) if op.axes is not None else op.pads
    x = requantize(low, op, low.integer(op, 0), q)
    name = low.node("Pad", x.name, low.constant(np.array(pads, np.int64)), low.constant(_code(op.value, q)))
    low.finish(op, codes_of(name, q))


@LOWERINGS.register("Embedding")
def _embedding(low: Lowering, op: Op) -> None:
    """The rows as codes of the output: rescaled once, offline."""
    q = low.output_q(op)
    rows = torch.from_numpy(low.real_constant(op, 0).astype(np.float32))
    stored = low.constant_codes(quantize(rows, q), q)
    low.finish(op, codes_of(low.node("Gather", stored.name, low.side(op, 1), axis=0), q))


def _code(value: float, q: QParams) -> np.ndarray:  # type: ignore[type-arg]
    """The code of a number, in the type that codes have in the file."""
    return to_numpy(quantize(torch.tensor(value, dtype=torch.float32), q)).astype(codes_of("", q).carrier)


@LOWERINGS.register("Resize")
def _resize(low: Lowering, op: Op) -> None:
    """Nearest neighbours move codes; otherwise each axis is a sum of a few elements, weighted in units of a power of two."""
    assert isinstance(op, Resize)
    if op.mode == "nearest":
        move(low, op)
        return
    q = low.output_q(op)
    x = centred(low, low.integer(op, 0), "int64")
    shape = low.shape_of(op)
    taps = op.taps(shape)
    low.fixed_lengths(op, [axis for axis, _, _ in taps])
    # The weights of the last axis lead to the output's scale, so that nothing but a shift is left.
    factors = [*[1.0] * (len(taps) - 1), float(x.scale / q.scale[0])][: len(taps)]
    name, peak, unit = x.name, x.peak, 0
    for (axis, indices, weights), factor in zip(taps, factors, strict=True):
        if unit > _RESIZE_BITS:
            name, peak = _coarser(low, name, peak, q)
            unit -= _RESIZE_BITS
        whole = np.rint(weights.astype(np.float64) * factor * 2.0**_RESIZE_BITS).astype(np.int64)
        column = [-1 if a == axis else 1 for a in range(len(shape))]
        joined = ""
        for tap in range(indices.shape[1]):
            part = low.node("Gather", name, low.constant(np.ascontiguousarray(indices[:, tap])), axis=axis)
            part = low.node("Mul", part, low.constant(whole[:, tap].reshape(column)))
            joined = low.node("Add", joined, part) if joined else part
        name, peak, unit = joined, peak * int(np.abs(whole).sum(1).max()), unit + _RESIZE_BITS
        low.prove(op, peak, 62, 1)
    scale = np.array(q.scale[0] * 2.0**-unit)
    finish(low, op, Integer(name, "int64", scale if taps else x.scale, NO_ZERO, -peak, peak))


def _coarser(low: Lowering, name: str, peak: int, q: QParams) -> tuple[str, int]:
    """*name* in units 2^20 times as large, so that there is room for the weights of a third axis."""
    x = Integer(name, "int64", np.ones(()), NO_ZERO, -peak, peak)
    shifted = shifted_right(
        low, x, np.array(1), np.array(_RESIZE_BITS), replace(q, zero_point=(0,) * len(q.zero_point))
    )
    return in_carrier(low, shifted, "int64"), (peak >> _RESIZE_BITS) + 1
