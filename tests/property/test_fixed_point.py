"""Multipliers, shifts and rounding in integers, against exact fractions; docs/numerics.md §10."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import NumericsError
from bitwright.numerics.fixed_point import (
    MAX_SHIFT,
    multiplier_and_shift,
    multipliers_and_shifts,
    nearest_powers,
    rescale,
    shift_right,
)
from bitwright.numerics.rounding import Rounding

ROUNDINGS = list(Rounding)


def rounded(x: Fraction, rounding: Rounding) -> int:
    """The definition, in exact arithmetic."""
    below = math.floor(x)
    rest = x - below
    if rest != Fraction(1, 2):
        return below + (rest > Fraction(1, 2))
    if rounding is Rounding.HALF_UP:
        return below + 1
    if rounding is Rounding.HALF_EVEN:
        return below + below % 2
    return below + 1 if x > 0 else below


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_small_number_is_shifted_exactly(rounding: Rounding) -> None:
    y = torch.arange(-1100, 1101)
    for s in range(9):
        expected = [rounded(Fraction(int(v), 1 << s), rounding) for v in y]

        assert shift_right(y, s, rounding).tolist() == expected


@given(y=st.integers(-(2**62) + 1, 2**62 - 1), s=st.integers(0, 62), rounding=st.sampled_from(ROUNDINGS))
def test_large_numbers_are_shifted_exactly(y: int, s: int, rounding: Rounding) -> None:
    found = shift_right(torch.tensor([y]), torch.tensor([s]), rounding)

    assert int(found) == rounded(Fraction(y, 1 << s), rounding)


@given(k=st.integers(-(2**20), 2**20), s=st.integers(1, 40), rounding=st.sampled_from(ROUNDINGS))
def test_ties_are_broken_as_named(k: int, s: int, rounding: Rounding) -> None:
    y = (2 * k + 1) << (s - 1)

    assert int(shift_right(torch.tensor(y), s, rounding)) == rounded(Fraction(2 * k + 1, 2), rounding)


@given(
    n=st.integers(-(2**30), 2**30), m=st.integers(-(2**31) + 1, 2**31 - 1), s=st.integers(0, 61),
    rounding=st.sampled_from(ROUNDINGS),
)  # fmt: skip
def test_rescale_is_the_rounded_product(n: int, m: int, s: int, rounding: Rounding) -> None:
    found = rescale(torch.tensor(n), torch.tensor(m), torch.tensor(s), rounding)

    assert int(found) == rounded(Fraction(n * m, 1 << s), rounding)


@given(st.floats(2.0**-25, 2.0**29).flatmap(lambda x: st.sampled_from([x, -x])), st.integers(7, 31))
def test_a_ratio_is_met_to_half_a_unit_of_its_bits(ratio: float, bits: int) -> None:
    if abs(ratio) >= 2.0 ** (bits - 1):
        return
    m, s = multiplier_and_shift(ratio, bits)

    assert abs(m) < 1 << bits
    assert 0 <= s <= MAX_SHIFT
    assert m % 2 or s == 0
    assert abs(Fraction(m, 1 << s) - Fraction(ratio)) <= abs(Fraction(ratio)) / (1 << bits)


def test_tiny_ratios_end_at_the_longest_shift() -> None:
    assert multiplier_and_shift(1.5 * 2.0**-60) == (3, 61)
    assert multiplier_and_shift(1.25 * 2.0**-60) == (1, 60)
    assert multiplier_and_shift(1e-30) == (0, 0)
    assert multiplier_and_shift(0.0) == (0, 0)


#: `get_scale_and_shift` of a vendor toolchain: ratio (float32), bits, multiplier, shift; of those that need no shift beyond its longest, 30.
VENDOR = [
    (0.1234, 31, 4140617, 25), (0.1234, 7, 63, 9),
    (0.00731, 7, 15, 11),
    (0.9871, 31, 8280395, 23), (0.9871, 7, 63, 6),
    (1.7, 31, 7130317, 22), (1.7, 7, 109, 6),
    (2.13e-5, 7, 89, 22),
]  # fmt: skip


@pytest.mark.parametrize("ratio, bits, m, s", VENDOR)
def test_multipliers_are_those_of_a_vendor_toolchain(ratio: float, bits: int, m: int, s: int) -> None:
    assert multiplier_and_shift(float(np.float32(ratio)), bits) == (m, s)


def test_arrays_keep_their_shape() -> None:
    ratios = np.array([[0.5, 0.3], [2.0, -0.75]])
    m, s = multipliers_and_shifts(ratios)

    assert m.shape == s.shape == (2, 2)
    assert (m[0, 0], s[0, 0], m[1, 0], s[1, 0], m[1, 1], s[1, 1]) == (1, 1, 2, 0, -3, 2)


def test_powers_of_two_are_recognised_but_not_forced() -> None:
    close = np.array([0.25 * (1 + 1e-7), 4.0])

    assert nearest_powers(close) is not None
    assert nearest_powers(close).tolist() == [0.25, 4.0]  # type: ignore[union-attr]
    assert nearest_powers(np.array([0.3])) is None
    assert nearest_powers(np.array([-0.5])) is None


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), 2.0**30])
def test_ratios_beyond_the_multiplier_are_refused(ratio: float) -> None:
    with pytest.raises(NumericsError, match="a ratio of scales below 2\\^30"):
        multiplier_and_shift(ratio)
