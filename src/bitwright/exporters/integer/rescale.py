"""The rescale: from an accumulator to codes, by multiplier and shift, with one rounding (docs/numerics.md §10.1, §10.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from bitwright.errors import NumericsError
from bitwright.exporters.integer.arithmetic import ROOM, centred, held, in_carrier
from bitwright.exporters.integer.lowering import Lowering
from bitwright.exporters.integer.number import Carrier, Integer, codes_of, same_parameters
from bitwright.graph.op import Op
from bitwright.numerics.affine import quantize
from bitwright.numerics.fixed_point import MAX_SHIFT, Integers, Reals, multipliers_and_shifts, nearest_powers
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QParams

#: As many channels are worth constants that engines compute from fewer bytes.
_MANY = 16
#: Bits of a multiplier beyond those of the codes: its rounding is worth a quarter of a step at most.
_SPARE = 2
#: The least shift behind a zero that is no integer: the zero is exact to 2^-13 output steps then, if there is room.
_ZERO_BITS = 12


def requantize(low: Lowering, op: Op, x: Integer, q: QParams) -> Integer:
    """The codes of *x* under *q*: one rounding, by multiplier and shift as the target says, then clipping."""
    lowest, highest = _limits(x, q)
    if x.q is not None and same_parameters(x.q, q):
        return _clipped(low, x, q, lowest, highest)
    m, s = multiplier_of(low, x, q)
    factors = _stored(low, x, m, s, q)
    with low.function("Rescale"):
        result = _shifted(low, x, factors, q)
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
    if (lowest, highest) != (d.qmin, d.qmax):
        name = low.node("Clip", x.name, *(low.constant(np.array(v, x.carrier)) for v in (lowest, highest)))
    else:
        name = x.name if low.writer.is_new(x.name) else low.node("Identity", x.name)
    return codes_of(name, q)


def multiplier_of(low: Lowering, x: Integer, q: QParams) -> tuple[Integers, Integers]:
    """Multiplier and shift from *x* to codes under *q*. *raises* `NumericsError` where *x* leaves a multiplier too few bits."""
    ratio: Reals = np.asarray(x.scale / q.scale[0])
    rule = low.target.rescale
    powers = nearest_powers(ratio) if rule.form == "shift" else None
    bits = rule.multiplier_bits if rule.form == "multiplier_shift" else 31
    room = ROOM[64] - x.bound.bit_length()
    needed = min(bits, q.spec.dtype.bits + _SPARE)
    m, s = multipliers_and_shifts(ratio if powers is None else powers, max(2, min(bits, room)))
    is_exact = powers is not None or bool((m * 2.0**-s == ratio).all())
    fits = x.bound * int(np.abs(m).max()) < 1 << ROOM[64]
    if not fits or (room < needed and not is_exact):
        raise NumericsError(
            x.name,
            expected=f"a sum that leaves {needed} of 61 bits for the multiplier of its rescale",
            found=f"one of magnitude {x.bound}, which leaves {max(room, 0)}",
            remedy="Leave this operator float.",
        )
    return m, s


@dataclass(frozen=True)
class _Factors:
    """What a rescale multiplies by, adds and shifts by: arrays, and the names of the constants. *k*: 2^k is above every result."""

    m: Integers
    s: Integers
    k: Integers
    carrier: Carrier
    multiplier: str
    offset: str
    shift: str

    @property
    def unsigned(self) -> str:
        return f"u{self.carrier}"


def shifted_right(low: Lowering, x: Integer, m: Integers, s: Integers, q: QParams) -> Integer:
    """(x - zero) · m / 2^s, rounded, plus the zero point of *q*."""
    factors = _stored(low, x, m, s, q)
    with low.function("Rescale"):
        return _shifted(low, x, factors, q)


def _stored(low: Lowering, x: Integer, m: Integers, s: Integers, q: QParams) -> _Factors:
    """The constants of a rescale.

    An offset of 2^(s + k) makes the product unsigned, because ONNX shifts nothing else; 2^k, above any result, is what it becomes.
    """
    m, s = _fine_enough(x, m, s)
    k = np.frexp(((x.peak * np.abs(m)) >> s) + 1)[1].astype(np.int64)  # bit lengths of the largest results
    narrow = x.bound * int(np.abs(m).max()) < 1 << ROOM[32] and int((s + k).max()) <= 30
    if int((s + k.max()).max()) <= (30 if narrow else ROOM[64]):
        k = np.asarray(k.max())  # one for all channels: then what is subtracted is one number
    carrier: Carrier = "int32" if narrow else "int64"
    s, m = np.broadcast_arrays(s, m) if s.shape != m.shape else (s, m)
    many = max(m.size, x.zero.size) >= _MANY
    if many and k.size == 1 and (fraction := _fraction_bits(x, m, s, narrow=narrow)) is not None:
        return _of_channels(low, x, m, s, k, carrier, fraction, q.spec.rounding)
    offset = low.constant(_offset(x, m, s, k, q.spec.rounding).astype(carrier), "offset")
    multiplier = low.constant(m.astype(carrier), "multiplier")
    return _Factors(m, s, k, carrier, multiplier, offset, low.constant(s.astype(f"u{carrier}"), "shift"))


def _offset(x: Integer, m: Integers, s: Integers, k: Integers, rounding: Rounding) -> Integers:
    """2^(s + k) - zero · m, and what rounding adds before the shift."""
    whole = np.floor(x.zero)  # split, because a float64 holds no product of 61 bits
    exact = np.left_shift(np.int64(1), s + k) - whole.astype(np.int64) * m
    exact = exact - np.rint((x.zero - whole) * m).astype(np.int64)
    if rounding is Rounding.HALF_UP:
        exact += _half(s)
    if rounding is Rounding.HALF_EVEN:
        exact += np.maximum(_half(s) - 1, 0)
    return np.asarray(exact)


def _half(s: Integers) -> Integers:
    return np.asarray(np.where(s > 0, np.left_shift(np.int64(1), np.maximum(s - 1, 0)), 0))


def _fraction_bits(x: Integer, m: Integers, s: Integers, *, narrow: bool) -> int | None:
    """How many bits behind the point the zeros of *x* can have, if they and *m* are int32 numbers. None if that is too coarse."""
    if np.abs(m).max() >= 1 << 31:
        return None
    if (x.zero == np.rint(x.zero)).all() and np.abs(x.zero).max() < 1 << 31:
        return 0
    if s.min() < _ZERO_BITS:  # division would drop up to a whole 2^-s steps
        return None
    largest, product = float(np.abs(x.zero).max()), float((np.abs(x.zero) * np.abs(m)).max())
    bits = min(30 - math.frexp(largest)[1], (29 if narrow else ROOM[64]) - math.frexp(product)[1])
    error = float((np.abs(m) * 2.0**-s).max()) * 2.0 ** -(bits + 1)
    return bits if bits >= 0 and error <= 2.0 ** -(_ZERO_BITS + 1) else None


def _of_channels(
    low: Lowering,
    x: Integer,
    m: Integers,
    s: Integers,
    k: Integers,
    carrier: Carrier,
    fraction: int,
    rounding: Rounding,
) -> _Factors:
    """The constants of many channels from nine bytes each, which engines compute when they load."""
    zero = np.rint(np.ldexp(x.zero, fraction)).astype(np.int32)
    with low.function("RescaleOf"):
        multiplier = low.cast(low.constant(m.astype(np.int32), "multiplier"), carrier)
        shift = low.cast(low.constant(s.astype(np.uint8), "shift"), f"u{carrier}")
        power = low.node("BitShift", low.literal(1, f"u{carrier}"), shift, direction="LEFT")
        power = low.cast(power, carrier)
        offset = low.node("Mul", power, low.constant(np.array(1 << int(k), carrier), "room"))
        if zero.any():
            zeros = low.node("Mul", low.cast(low.constant(zero, "zero"), carrier), multiplier)
            if fraction:
                zeros = low.node("Div", zeros, low.constant(np.array(1 << fraction, carrier), "unit"))
            offset = low.node("Sub", offset, zeros)
        if rounding in (Rounding.HALF_UP, Rounding.HALF_EVEN):
            half = low.node("Div", power, low.literal(2, carrier))
            offset = low.node("Add", offset, half)
            if rounding is Rounding.HALF_EVEN:
                offset = low.node("Sub", offset, low.cast(low.cast(half, "bool"), carrier))
    for name, role in ((multiplier, "multiplier"), (offset, "offset"), (shift, "shift")):
        low.writer.roles[name] = role
    return _Factors(m, s, k, carrier, multiplier, offset, shift)


def _shifted(low: Lowering, x: Integer, f: _Factors, q: QParams) -> Integer:
    """(x · m + offset) / 2^s, rounded, minus the offset's share, plus the zero point of *q*."""
    name = in_carrier(low, x, f.carrier)
    if (f.m != 1).any():
        name = low.node("Mul", name, f.multiplier)
    name = low.cast(low.node("Add", name, f.offset), f.unsigned)
    if f.s.any():
        name = low.node("BitShift", _rounded(low, name, f, q.spec.rounding), f.shift, direction="RIGHT")
    to: Carrier = "int32" if int(f.k.max()) <= 29 else "int64"
    back = np.left_shift(np.int64(1), f.k) - q.zero_point[0]
    result = low.node("Sub", low.cast(name, to), low.constant(back.astype(to), "zero"))
    return replace(x, name=result, carrier=to, q=None)


def _rounded(low: Lowering, name: str, f: _Factors, rounding: Rounding) -> str:
    """The product *name* with what rounding adds, where that depends on the product."""
    if rounding is Rounding.HALF_EVEN:
        # An odd floor goes up at a tie: adding its last bit carries only if everything below it is ones.
        shifts = (
            low.literal(1, f.unsigned)
            if f.s.all()
            else low.constant((f.s > 0).astype(f.unsigned), "last_bit")
        )
        floor = low.node("BitShift", name, f.shift, direction="RIGHT")
        return low.node("Add", name, low.node("BitwiseAnd", floor, shifts))
    if rounding is Rounding.HALF_AWAY:
        # Bit s + k says that the product is not negative: only then a tie goes up.
        sign = np.where(f.s > 0, f.s + f.k, (32 if f.carrier == "int32" else 64) - 1)
        up = low.node("BitShift", name, low.constant(sign.astype(f.unsigned), "sign_bit"), direction="RIGHT")
        below = low.constant(np.maximum(_half(f.s) - 1, 0).astype(f.unsigned), "half")
        return low.node("Add", low.node("Add", name, below), up)
    return name


def _fine_enough(x: Integer, m: Integers, s: Integers) -> tuple[Integers, Integers]:
    """The same ratios in units that hold zero · m, which becomes an integer: after a shift by s it errs by up to 2^-(s + 1) steps."""
    if (x.zero == np.rint(x.zero)).all():
        return m, s
    # By channel: one that is nearly dead has the longest shift, and would leave the others no room.
    room = np.minimum(ROOM[64] - np.frexp(x.bound * np.abs(m))[1], MAX_SHIFT - s)
    more = np.maximum(np.minimum(_ZERO_BITS - s, room), 0)
    return np.asarray(m << more), np.asarray(s + more)


def _narrowed(low: Lowering, x: Integer, q: QParams, lowest: int, highest: int) -> Integer:
    name = x.name
    if x.carrier == "int64":
        name = held(low, name, "int64", np.array(lowest), is_floor=True)
        name = held(low, name, "int64", np.array(highest), is_floor=False)
    else:
        limits = ((lowest, "low"), (highest, "high"))
        name = low.node("Clip", name, *(low.constant(np.array(v, np.int32), role) for v, role in limits))
    codes = codes_of(name, q)
    return codes if codes.carrier == x.carrier else replace(codes, name=low.cast(name, codes.carrier))


def finish(low: Lowering, op: Op, x: Integer, index: int = 0) -> None:
    """Make *x* output *index* of *op*: rescaled to the output's codes, or left in the accumulator."""
    q = low.plan.qparams(op.outputs[index])
    if q is not None:
        low.finish(op, requantize(low, op, x, q), index)
    else:
        low.finish(op, x if (x.floor, x.ceiling) == (None, None) else centred(low, x), index)
