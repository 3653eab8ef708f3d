"""Rectifiers, clipping and the other functions of one value that integers compute without a table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.exporters.integer.arithmetic import carrier_for, centred, in_carrier, product
from bitwright.exporters.integer.lowering import LOWERINGS, Lowering
from bitwright.exporters.integer.number import codes_of
from bitwright.exporters.integer.rescale import finish, requantize
from bitwright.graph.op import Op
from bitwright.numerics.fixed_point import Reals
from bitwright.ops.clip import Clip
from bitwright.ops.prelu import PRelu
from bitwright.ops.unary import Unary


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
    """x where it is positive, else slope · x: the code of each, and one of them chosen.

    Each has a multiplier of its own: a common unit for 1 and *slope* would be coarse where all that counts is slope · x.
    """
    x, q = low.integer(op, 0), low.output_q(op)
    if not (x.scale > 0).all():
        raise low.refusal(op, "an input with a positive scale")
    straight, bent = (requantize(low, op, y, q) for y in (replace(x, q=None), x.scaled(slope)))
    to = carrier_for(x.bound)
    zero = low.constant(np.ceil(x.zero).astype(to))
    negative = low.node("Less", in_carrier(low, x, to), zero)
    finish(low, op, codes_of(low.node("Where", negative, bent.name, straight.name), q))
