"""Matrix products and convolutions of integers: byte by byte, where an operand has 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.exporters.integer.lowering import Lowering
from bitwright.exporters.integer.number import NO_ZERO, Integer
from bitwright.graph.op import Op
from bitwright.numerics.fixed_point import Integers, Reals


@dataclass(frozen=True)
class Byte:
    """One byte of an integer, uint8: (code - zero) · factor is its part. *peak*: largest magnitude of code - zero.

    Signed codes are lifted by 128: where a processor has no dot products of 8 bits, kernels for mixed signs may saturate sums of
    two products at 16 bits; those for unsigned operands are exact everywhere, and as fast as any.
    """

    name: str
    zero: int
    factor: int
    peak: int


#: Writes the product of two bytes as an int32 node; returns its name.
Multiply = Callable[[Byte, Byte], str]


def in_bytes(low: Lowering, x: Integer) -> list[Byte]:
    """*x* of 8 bits as one byte; of 16 bits as 256 · high + low, each with a zero point of its own."""
    zero = int(x.zero)
    if x.carrier in ("int8", "uint8"):
        if x.carrier == "uint8":
            return [Byte(x.name, zero, 1, x.peak)]
        with low.function("Bytes"):
            lifted = low.node("BitwiseXor", low.cast(x.name, "uint8"), low.literal(128, "uint8"))
        return [Byte(lifted, zero + 128, 1, x.peak)]
    lift = 1 << 15 if x.lo < 0 else 0
    with low.function("Bytes"):
        name = low.node("Add", x.name, low.literal(lift)) if lift else x.name
        high = low.node("BitShift", low.cast(name, "uint32"), low.literal(8, "uint32"), direction="RIGHT")
        names = [low.cast(part, "uint8") for part in (high, low.node("BitwiseAnd", name, low.literal(255)))]
    zero += lift
    return [
        Byte(part, byte, factor, max(byte, 255 - byte))
        for part, byte, factor in zip(names, (zero >> 8, zero & 255), (256, 1), strict=True)
    ]


def weight_byte(low: Lowering, w: Integers) -> Byte:
    """Weight codes of 8 bits or fewer."""
    stored = low.constant((w.astype(np.int16) + 128).astype(np.uint8))
    return Byte(stored, 128, 1, int(np.abs(w.astype(np.int64)).max(initial=0)))


def join(
    low: Lowering,
    op: Op,
    pairs: Sequence[tuple[Byte, Byte]],
    multiply: Multiply,
    sums: Callable[[Byte, Byte], int],
    scale: Reals,
) -> Integer:
    """Σ factor · product over *pairs* of bytes, exact. *sums*: the largest magnitude that a product of two bytes can have.

    One product stays int32. Several are added in int64.
    """
    peak = 0
    for a, b in pairs:
        low.prove(op, sums(a, b), 32, len(pairs))
        peak += a.factor * b.factor * sums(a, b)
    if len(pairs) == 1:
        return Integer(multiply(*pairs[0]), "int32", scale, NO_ZERO, -peak, peak)
    low.prove(op, peak, 62, len(pairs))
    products, name = [multiply(a, b) for a, b in pairs], ""
    with low.function("Joined"):
        for (a, b), product in zip(pairs, products, strict=True):
            part, factor = low.cast(product, "int64"), a.factor * b.factor
            if factor > 1:
                part = low.node("Mul", part, low.literal(factor, "int64"))
            name = low.node("Add", name, part) if name else part
    return Integer(name, "int64", scale, NO_ZERO, -peak, peak)


def zero_points(low: Lowering, *operands: Byte) -> list[str]:
    """The constants that say where the zeros of *operands* are."""
    return [low.constant(np.array(byte.zero, np.uint8)) for byte in operands]
