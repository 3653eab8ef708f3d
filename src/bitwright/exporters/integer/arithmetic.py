"""Arithmetic that operators share: centring, products, sums in a common unit (docs/numerics.md §10)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bitwright.exporters.integer.lowering import Lowering
from bitwright.exporters.integer.number import NO_ZERO, Carrier, Integer
from bitwright.graph.op import Op
from bitwright.numerics.fixed_point import Integers, Reals
from bitwright.numerics.spec import QParams

#: Magnitudes below these leave room for the offset that makes them unsigned, and for half a step.
ROOM = {32: 29, 64: 61}
#: What the rounded multipliers of a sum may be off by, in output steps.
_SUM_ERROR = 2.0**-8


def carrier_for(bound: int) -> Carrier:
    """The narrowest type of arithmetic that holds magnitudes up to *bound*."""
    return "int32" if bound < 1 << 31 else "int64"


def centred(low: Lowering, x: Integer, carrier: Carrier | None = None) -> Integer:
    """*x* without its zero (to the nearest integer), wide enough to compute with. Floors and ceilings are applied."""
    to = carrier or carrier_for(x.bound)
    with low.function("Centre"):
        name = in_carrier(low, x, to)
        if x.zero.any():
            name = low.node("Sub", name, low.constant(np.rint(x.zero).astype(to), "zero"))
        for limit, is_floor in ((x.floor, True), (x.ceiling, False)):
            if limit is not None:
                steps = np.clip(np.rint(limit / x.scale), -x.peak, x.peak).astype(np.int64)
                # A negative scale turns the order round.
                name = held(low, name, to, steps, is_floor=is_floor == bool(x.scale.max() > 0))
    return Integer(name, to, x.scale, NO_ZERO, -x.peak, x.peak)


def held(low: Lowering, name: str, carrier: Carrier, limit: Integers, *, is_floor: bool) -> str:
    """*name*, nowhere below (above) *limit*.

    As comparison and choice in int64: ONNX Runtime's Clip, Max and Min are wrong there for magnitudes of 32 bits and more on x86
    (github.com/microsoft/onnxruntime, pull request 32475).
    """
    bound = low.constant(limit.astype(carrier), "low" if is_floor else "high")
    if carrier == "int32":
        return low.node("Max" if is_floor else "Min", name, bound)
    beyond = low.node("Less" if is_floor else "Greater", name, bound)
    return low.node("Where", beyond, bound, name)


def product(low: Lowering, a: Integer, b: Integer) -> Integer:
    """a · b, exact."""
    peak = a.peak * b.peak
    to = carrier_for(peak)
    with low.function("Product"):
        a, b = centred(low, a, to), centred(low, b, to)
        name = low.node("Mul", a.name, b.name)
    return Integer(name, to, np.asarray(a.scale * b.scale), NO_ZERO, -peak, peak)


def total(low: Lowering, op: Op, terms: Sequence[Integer], constant: Reals, q: QParams) -> Integer:
    """The sum of *terms* and a real *constant*, in a unit of the scale of *q* times a power of two: rounded once, to codes.

    The unit is so fine that the rounded multipliers of the terms are worth at most 2^-12 output steps, or in 32 bits 2^-8.
    """
    ratios = [np.asarray(t.scale / q.scale[0]) for t in terms]
    bounds = sum(t.bound for t in terms)
    size = sum(t.bound * float(np.abs(r).max()) for t, r in zip(terms, ratios, strict=True))
    size += float(np.abs(constant).max()) / q.scale[0]
    wanted = bounds.bit_length() + 11
    for bits in (32, 64):
        shift = min(wanted, math.floor(ROOM[bits] - 1 - math.log2(max(size, 1.0))))
        if bounds * 2.0 ** -(shift + 1) <= _SUM_ERROR:
            break
    else:
        raise low.refusal(op, "inputs whose scales can be added in 61 bits")
    to: Carrier = "int32" if bits == 32 else "int64"
    name, zero, peak = "", NO_ZERO, 0
    with low.function("Sum"):
        for term, ratio in zip(terms, ratios, strict=True):
            m = np.rint(ratio * 2.0**shift).astype(np.int64)
            scaled = low.node("Mul", in_carrier(low, term, to), low.constant(m.astype(to), "multiplier"))
            name = low.node("Add", name, scaled) if name else scaled
            zero = np.asarray(zero + term.zero * m)
            peak += term.bound * int(np.abs(m).max())
    low.prove(op, peak, ROOM[bits] + 1, len(terms))
    summed = Integer(name, to, np.array(q.scale[0] * 2.0**-shift), zero, -peak, peak)
    return summed.shifted(constant)


def in_carrier(low: Lowering, x: Integer, to: Carrier) -> str:
    """The name of *x* as integers of type *to*."""
    return x.name if x.carrier == to else low.cast(x.name, to)
