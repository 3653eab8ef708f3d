"""Arithmetic that operators share: centring, sums in a common unit, products, and the rescale to codes (docs/numerics.md §10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bitwright.errors import NumericsError
from bitwright.exporters.integer.lowering import Lowering
from bitwright.exporters.integer.number import NO_ZERO, Carrier, Integer, codes_of, same_parameters
from bitwright.graph.op import Op
from bitwright.numerics.affine import quantize
from bitwright.numerics.fixed_point import MAX_SHIFT, Integers, Reals, multipliers_and_shifts, nearest_powers
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QParams

#: Magnitudes below these leave room for the offset that makes them unsigned, and for half a step.
_ROOM = {32: 29, 64: 61}
#: As many values are worth a node that widens them.
_MANY = 16
#: Bits of a multiplier beyond those of the codes: its rounding is worth a quarter of a step at most.
_SPARE = 2
#: The least shift behind a zero that is no integer: the zero is exact to 2^-13 output steps then, if there is room.
_ZERO_BITS = 12
#: What the rounded multipliers of a sum may be off by, in output steps.
_SUM_ERROR = 2.0**-8


def carrier_for(bound: int) -> Carrier:
    """The narrowest type of arithmetic that holds magnitudes up to *bound*."""
    return "int32" if bound < 1 << 31 else "int64"


def centred(low: Lowering, x: Integer, carrier: Carrier | None = None) -> Integer:
    """*x* without its zero (to the nearest integer), wide enough to compute with. Floors and ceilings are applied."""
    to = carrier or carrier_for(x.bound)
    name = in_carrier(low, x, to)
    if x.zero.any():
        name = low.node("Sub", name, low.constant(np.rint(x.zero).astype(to)))
    for limit, is_floor in ((x.floor, True), (x.ceiling, False)):
        if limit is not None:
            steps = np.clip(np.rint(limit / x.scale), -x.peak, x.peak).astype(np.int64)
            # A negative scale turns the order round.
            name = _held(low, name, to, steps, is_floor=is_floor == bool(x.scale.max() > 0))
    return Integer(name, to, x.scale, NO_ZERO, -x.peak, x.peak)


def _held(low: Lowering, name: str, carrier: Carrier, limit: Integers, *, is_floor: bool) -> str:
    """*name*, nowhere below (above) *limit*.

    As comparison and choice in int64: ONNX Runtime's Clip, Max and Min are wrong there for magnitudes of 32 bits and more on x86
    (github.com/microsoft/onnxruntime, pull request 32475).
    """
    bound = low.constant(limit.astype(carrier))
    if carrier == "int32":
        return low.node("Max" if is_floor else "Min", name, bound)
    beyond = low.node("Less" if is_floor else "Greater", name, bound)
    return low.node("Where", beyond, bound, name)


def product(low: Lowering, a: Integer, b: Integer) -> Integer:
    """a · b, exact."""
    peak = a.peak * b.peak
    to = carrier_for(peak)
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
        shift = min(wanted, math.floor(_ROOM[bits] - 1 - math.log2(max(size, 1.0))))
        if bounds * 2.0 ** -(shift + 1) <= _SUM_ERROR:
            break
    else:
        raise low.refusal(op, "inputs whose scales can be added in 61 bits")
    to: Carrier = "int32" if bits == 32 else "int64"
    name, zero, peak = "", NO_ZERO, 0
    for term, ratio in zip(terms, ratios, strict=True):
        m = np.rint(ratio * 2.0**shift).astype(np.int64)
        scaled = low.node("Mul", in_carrier(low, term, to), low.constant(m.astype(to)))
        name = low.node("Add", name, scaled) if name else scaled
        zero = np.asarray(zero + term.zero * m)
        peak += term.bound * int(np.abs(m).max())
    low.prove(op, peak, _ROOM[bits] + 1, len(terms))
    summed = Integer(name, to, np.array(q.scale[0] * 2.0**-shift), zero, -peak, peak)
    return summed.shifted(constant)


def in_carrier(low: Lowering, x: Integer, to: Carrier) -> str:
    """The name of *x* as integers of type *to*."""
    return x.name if x.carrier == to else low.cast(x.name, to)


# --- codes -------------------------------------------------------------------------------------------------------


def requantize(low: Lowering, op: Op, x: Integer, q: QParams) -> Integer:
    """The codes of *x* under *q*: one rounding, by multiplier and shift as the target says, then clipping."""
    lowest, highest = _limits(x, q)
    if x.q is not None and same_parameters(x.q, q):
        return _clipped(low, x, q, lowest, highest)
    m, s = multiplier_of(low, x, q)
    result = shifted_right(low, x, m, s, q)
    return _narrowed(low, result, q, lowest, highest)


def _limits(x: Integer, q: QParams) -> tuple[int, int]:
    """The codes between which *x* lies: rounding never swaps two numbers, so clipping afterwards is the same."""
    d = q.spec.dtype

    def code(limit: float) -> int:
        return int(quantize(torch.tensor(limit, dtype=torch.float32), q))

    return (
        d.qmin if x.floor is None else code(x.floor),
        d.qmax if x.ceiling is None else code(x.ceiling),
    )


def _clipped(low: Lowering, x: Integer, q: QParams, lowest: int, highest: int) -> Integer:
    d = q.spec.dtype
    if (lowest, highest) == (d.qmin, d.qmax):
        name = low.node("Identity", x.name)
    else:
        name = low.node("Clip", x.name, *(low.constant(np.array(v, x.carrier)) for v in (lowest, highest)))
    return codes_of(name, q)


def multiplier_of(low: Lowering, x: Integer, q: QParams) -> tuple[Integers, Integers]:
    """Multiplier and shift from *x* to codes under *q*. *raises* `NumericsError` where *x* leaves a multiplier too few bits."""
    ratio: Reals = np.asarray(x.scale / q.scale[0])
    rule = low.target.rescale
    powers = nearest_powers(ratio) if rule.form == "shift" else None
    bits = rule.multiplier_bits if rule.form == "multiplier_shift" else 31
    room = _ROOM[64] - x.bound.bit_length()
    needed = min(bits, q.spec.dtype.bits + _SPARE)
    m, s = multipliers_and_shifts(ratio if powers is None else powers, max(2, min(bits, room)))
    if room < needed and powers is None and (m * 2.0**-s != ratio).any():
        raise NumericsError(
            x.name,
            expected=f"a sum that leaves {needed} of 61 bits for the multiplier of its rescale",
            found=f"one of magnitude {x.bound}, which leaves {max(room, 0)}",
            remedy="Leave this operator float.",
        )
    return m, s


def shifted_right(low: Lowering, x: Integer, m: Integers, s: Integers, q: QParams) -> Integer:
    """(x - zero) · m / 2^s, rounded, plus the zero point of *q*.

    An offset of 2^(s + k) makes the product unsigned, because ONNX shifts nothing else; 2^k, above any result, is what it becomes.
    """
    m, s = _fine_enough(x, m, s)
    magnitude = x.bound * int(np.abs(m).max())
    k = np.frexp(((x.peak * np.abs(m)) >> s) + 1)[1].astype(np.int64)  # bit lengths of the largest results
    narrow = magnitude < 1 << _ROOM[32] and int((s + k).max()) <= 30
    signed, unsigned = (np.int32, np.uint32) if narrow else (np.int64, np.uint64)
    s, m = np.broadcast_arrays(s, m) if s.shape != m.shape else (s, m)
    half = np.where(s > 0, np.left_shift(np.int64(1), np.maximum(s - 1, 0)), 0)
    whole = np.floor(x.zero)  # split, because a float64 holds no product of 61 bits
    exact = np.left_shift(np.int64(1), s + k) - whole.astype(np.int64) * m
    exact = exact - np.rint((x.zero - whole) * m).astype(np.int64)
    rounding = q.spec.rounding
    early = exact + (half if rounding is Rounding.HALF_UP else 0)
    if rounding is Rounding.HALF_EVEN:
        early = exact + np.maximum(half - 1, 0)
    name = in_carrier(low, x, "int32" if narrow else "int64")
    if (m != 1).any():
        name = low.node("Mul", name, _stored(low, m, "int32", np.dtype(signed).name))
    name = low.cast(low.node("Add", name, low.constant(early.astype(signed))), np.dtype(unsigned).name)
    shift = _stored(low, s, "uint8", np.dtype(unsigned).name)
    if rounding is Rounding.HALF_EVEN and s.any():
        # An odd floor goes up at a tie: adding its last bit carries only if everything below it is ones.
        odd = low.node(
            "BitwiseAnd",
            low.node("BitShift", name, shift, direction="RIGHT"),
            low.constant((s > 0).astype(unsigned)),
        )
        name = low.node("Add", name, odd)
    if rounding is Rounding.HALF_AWAY and s.any():
        # Bit s + k says that the product is not negative: only then a tie goes up.
        sign = low.constant(np.where(s > 0, s + k, 8 * np.dtype(unsigned).itemsize - 1).astype(unsigned))
        up = low.node("BitShift", name, sign, direction="RIGHT")
        name = low.node(
            "Add", low.node("Add", name, low.constant(np.maximum(half - 1, 0).astype(unsigned))), up
        )
    name = low.node("BitShift", name, shift, direction="RIGHT") if s.any() else name
    to: Carrier = "int32" if int(k.max()) <= 29 else "int64"
    offset = np.left_shift(np.int64(1), k) - q.zero_point[0]
    result = low.node("Sub", low.cast(name, to), low.constant(offset.astype(to)))
    return replace(x, name=result, carrier=to, q=None)


def _fine_enough(x: Integer, m: Integers, s: Integers) -> tuple[Integers, Integers]:
    """The same ratios in units that hold zero · m, which becomes an integer: after a shift by s it errs by up to 2^-(s + 1) steps."""
    if (x.zero == np.rint(x.zero)).all():
        return m, s
    room = min(_ROOM[64] - (x.bound * int(np.abs(m).max())).bit_length(), MAX_SHIFT - int(s.max()))
    more = max(0, min(_ZERO_BITS - int(s.min()), room))
    return m << more, s + more


def _stored(low: Lowering, values: Integers, narrow: str, wanted: str) -> str:
    """A constant of type *wanted*; many values are stored in the *narrow* type that holds them, which engines widen when they load."""
    if values.size < _MANY or wanted == narrow:
        return low.constant(values.astype(wanted))
    return low.cast(low.constant(values.astype(narrow)), wanted)


def _narrowed(low: Lowering, x: Integer, q: QParams, lowest: int, highest: int) -> Integer:
    name = x.name
    if x.carrier == "int64":
        name = _held(low, name, "int64", np.array(lowest), is_floor=True)
        name = _held(low, name, "int64", np.array(highest), is_floor=False)
    else:
        name = low.node("Clip", name, *(low.constant(np.array(v, np.int32)) for v in (lowest, highest)))
    codes = codes_of(name, q)
    return codes if codes.carrier == x.carrier else replace(codes, name=low.cast(name, codes.carrier))


def finish(low: Lowering, op: Op, x: Integer, index: int = 0) -> None:
    """Make *x* output *index* of *op*: rescaled to the output's codes, or left in the accumulator."""
    q = low.plan.qparams(op.outputs[index])
    if q is not None:
        low.finish(op, requantize(low, op, x, q), index)
    else:
        low.finish(op, x if (x.floor, x.ceiling) == (None, None) else centred(low, x), index)
