"""Rectifiers, clipping and the other functions of one value that integers compute without a table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.exporters.integer.arithmetic import centred, finish, product
from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import NO_ZERO, Integer
from bitwright.graph.op import Op
from bitwright.numerics.fixed_point import Reals
from bitwright.ops.clip import Clip
from bitwright.ops.prelu import PRelu
from bitwright.ops.unary import Unary

#: Slopes of a rectifier in units of 2^-16: the product of a 16-bit code and a slope stays far below 2^61.
_SLOPE_BITS = 16


@LOWERINGS.register("Relu")
def _relu(low: Lowering, op: Op) -> None:
    x = low.integer(op, 0)
    finish(low, op, replace(x, floor=max(0.0, x.floor or 0.0)))


@LOWERINGS.register("Clip")
def _clip(low: Lowering, op: Op) -> None:
    assert isinstance(op, Clip)
    if op.lo_is_input or op.hi_is_input:
        raise low.refusal(op, "constant bounds")
    x = low.integer(op, 0)
    if x.floor is not None or x.ceiling is not None:
        x = centred(low, x)
    finish(low, op, replace(x, floor=op.lo, ceiling=op.hi))


@LOWERINGS.register("Neg")
def _neg(low: Lowering, op: Op) -> None:
    finish(low, op, low.integer(op, 0).scaled(-1.0))


@LOWERINGS.register("Abs")
def _abs(low: Lowering, op: Op) -> None:
    x = centred(low, low.integer(op, 0))
    finish(low, op, replace(x, name=low.node("Abs", x.name), lo=0, hi=x.peak))


@LOWERINGS.register("Square")
def _square(low: Lowering, op: Op) -> None:
    x = low.integer(op, 0)
    finish(low, op, product(low, x, x))


@LOWERINGS.register("LeakyRelu")
def _leaky_relu(low: Lowering, op: Op) -> None:
    assert isinstance(op, Unary)
    _rectified(low, op, np.array(float(op.parameters_of_kind["alpha"])))


@LOWERINGS.register("PRelu")
def _prelu(low: Lowering, op: Op) -> None:
    assert isinstance(op, PRelu)
    slope = low.real_constant(op, 1)
    if op.channelwise and slope.size > 1:
        slope = slope.reshape(-1, *[1] * (len(low.shape_of(op)) - 2))
    _rectified(low, op, slope)


def _rectified(low: Lowering, op: Op, slope: Reals) -> None:
    """x where it is positive, else slope · x: multiplied by 2^16 or by the slope in that unit."""
    x = centred(low, low.integer(op, 0))
    unit = 2.0**-_SLOPE_BITS
    factors = np.round(slope / unit)
    top = max(1 << _SLOPE_BITS, int(np.abs(factors).max()))
    peak = x.peak * top
    negative = low.node("Less", x.name, low.constant(np.array(0, x.carrier)))
    chosen = low.node(
        "Where",
        negative,
        low.constant(factors.astype(np.int64)),
        low.constant(np.array(1 << _SLOPE_BITS, np.int64)),
    )
    name = low.node("Mul", low.cast(x.name, "int64"), chosen)
    low.prove(op, peak, 62, 1)
    finish(low, op, Integer(name, "int64", np.asarray(x.scale * unit), NO_ZERO, -peak, peak))
