"""`Integer`: what is known of an integer tensor in the model that is being written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bitwright.errors import NumericsError
from bitwright.numerics.fixed_point import Reals
from bitwright.numerics.spec import QParams

#: Types that integers have in the file. Codes of 16 bits travel as int32, because few kernels know int16.
Carrier = Literal["int8", "uint8", "int32", "int64"]

NO_ZERO: Reals = np.zeros(())


@dataclass(frozen=True)
class Integer:
    """Integers *name* that stand for the real numbers (integer - zero) · scale, held between *floor* and *ceiling*.

    *scale*, *zero*: broadcast to the tensor. A scale may be negative; a zero need not be an integer: it joins the rescale, which is finer
    than the integers (a bias added to an accumulator is exact). *lo*, *hi*: bounds of the integers, proven. *floor*, *ceiling*:
    real units; whoever reads the integers applies them (a ReLU costs nothing: the codes that follow are clipped anyway).
    *q*: the parameters, if the integers are the codes of a value.
    """

    name: str
    carrier: Carrier
    scale: Reals
    zero: Reals
    lo: int
    hi: int
    floor: float | None = None
    ceiling: float | None = None
    q: QParams | None = None

    @property
    def peak(self) -> int:
        """The largest magnitude of integer - zero, rounded up."""
        return int(max(abs(math.floor(self.lo - self.zero.max())), abs(math.ceil(self.hi - self.zero.min()))))

    @property
    def bound(self) -> int:
        """The largest magnitude of anything that occurs: the integer, its zero, their difference."""
        return int(max(self.peak, abs(self.lo), abs(self.hi), math.ceil(np.abs(self.zero).max())))

    def scaled(self, factor: Reals | float) -> Integer:
        """The same integers as *factor* times as much."""
        assert self.floor is None
        assert self.ceiling is None
        return replace(self, scale=np.asarray(self.scale * factor), q=None)

    def shifted(self, real: Reals | float) -> Integer:
        """The same integers, with *real* added to what they stand for."""
        assert self.floor is None
        assert self.ceiling is None
        steps = np.asarray(real, np.float64) / self.scale
        if not bool((np.abs(steps) < 2.0**52).all()):
            raise NumericsError(
                self.name,
                expected="a constant that fits into 52 bits at the accumulator's scale",
                found=f"{float(np.abs(steps).max()):g} steps",
                remedy="Leave this operator float.",
            )
        return replace(self, zero=np.asarray(self.zero - steps), q=None)


def codes_of(name: str, q: QParams) -> Integer:
    """The codes *name* of a value with parameters *q* (one scale for all)."""
    d = q.spec.dtype
    carrier: Carrier = "int32" if d.bits > 8 else "int8" if d.signed else "uint8"
    return Integer(
        name,
        carrier,
        np.array(q.scale[0], np.float64),
        np.array(q.zero_point[0], np.float64),
        d.qmin,
        d.qmax,
        q=q,
    )


def same_parameters(a: QParams, b: QParams) -> bool:
    """Whether codes under *a* mean the same as under *b*."""
    return (a.scale, a.zero_point, a.spec.dtype) == (b.scale, b.zero_point, b.spec.dtype)
