"""Sums and means along axes, running sums, and batch normalisation that could not be folded."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from bitwright.exporters.integer.arithmetic import carrier_for, centred, product
from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import NO_ZERO, Integer
from bitwright.exporters.integer.rescale import finish
from bitwright.graph.op import Op
from bitwright.ops.batchnorm import BatchNorm
from bitwright.ops.order import CumSum
from bitwright.ops.reduce import Reduce


@LOWERINGS.register("ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1")
def _reduce(low: Lowering, op: Op) -> None:
    assert isinstance(op, Reduce)
    rank = len(low.shape_of(op))
    axes = range(rank) if op.axes is None else [a % rank for a in op.axes]
    x = low.integer(op, 0)
    if op.kind == "ReduceSumSquare":
        x = product(low, x, x)
    elif op.kind == "ReduceL1":
        x = centred(low, x)
        x = replace(x, name=low.node("Abs", x.name), lo=0, hi=x.peak)
    _summed(low, op, x, list(axes), keep=op.keep, mean=op.kind == "ReduceMean")


@LOWERINGS.register("GlobalAveragePool")
def _global_average_pool(low: Lowering, op: Op) -> None:
    axes = list(range(2, len(low.shape_of(op))))
    _summed(low, op, low.integer(op, 0), axes, keep=True, mean=True)


def _summed(low: Lowering, op: Op, x: Integer, axes: list[int], *, keep: bool, mean: bool) -> None:
    count = math.prod(low.fixed_lengths(op, axes))
    peak = count * x.peak
    to = carrier_for(max(peak, x.bound))
    low.prove(op, peak, 32 if to == "int32" else 62, 1)
    x = centred(low, x, to)
    name = x.name
    if axes:
        name = low.node("ReduceSum", name, low.constant(np.array(axes, np.int64)), keepdims=int(keep))
    scale = np.asarray(x.scale / count) if mean else x.scale
    finish(low, op, Integer(name, to, scale, NO_ZERO, -peak, peak))


@LOWERINGS.register("CumSum")
def _cumsum(low: Lowering, op: Op) -> None:
    assert isinstance(op, CumSum)
    x = low.integer(op, 0)
    (length,) = low.fixed_lengths(op, [op.axis % len(low.shape_of(op))])
    peak = length * x.peak
    to = carrier_for(max(peak, x.bound))
    low.prove(op, peak, 32 if to == "int32" else 62, 1)
    (name,) = low.write_itself(op, {0: centred(low, x, to).name})
    finish(low, op, Integer(name, to, x.scale, NO_ZERO, -peak, peak))


@LOWERINGS.register("BatchNorm")
def _batch_norm(low: Lowering, op: Op) -> None:
    assert isinstance(op, BatchNorm)
    weight, bias = (
        low.real_constant(op, i) if low.has_input(op, i) else default for i, default in ((1, 1.0), (2, 0.0))
    )
    mean, var = low.real_constant(op, 3), low.real_constant(op, 4)
    gain = weight / np.sqrt(var + op.epsilon)
    columns = (-1, *[1] * (len(low.shape_of(op)) - 2))
    if not gain.all():
        raise low.refusal(op, "gains other than 0")
    x = replace(low.integer(op, 0), q=None).scaled(gain.reshape(columns))
    finish(low, op, x.shifted((bias - mean * gain).reshape(columns)))
