"""Affine quantization and rounding against exact arithmetic (docs/numerics.md §1, §2)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import NumericsError, UnknownName
from bitwright.numerics.affine import dequantize, fake_quantize, qparams_from_range, quantize
from bitwright.numerics.dtype import INT4, INT8, INT16, UINT8, UINT16, DType
from bitwright.numerics.rounding import Rounding, round_
from bitwright.numerics.spec import QParams, QuantSpec

DTYPES = [INT4, INT8, UINT8, INT16, UINT16]
ROUNDINGS = list(Rounding)


def exact_round(x: Fraction, rounding: Rounding) -> int:
    floor = math.floor(x)
    fraction = x - floor
    if fraction != Fraction(1, 2):
        return floor + (fraction > Fraction(1, 2))
    if rounding is Rounding.HALF_UP:
        return floor + 1
    if rounding is Rounding.HALF_AWAY:
        return floor + (x > 0)
    return floor + floor % 2


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bits", [8, 16])
def test_every_tie_and_neighbour_of_every_code_rounds_as_defined(rounding: Rounding, bits: int) -> None:
    codes = np.arange(-(2 ** (bits - 1)) - 1, 2 ** (bits - 1) + 1, dtype=np.float32)
    ties = codes + np.float32(0.5)
    for x in (codes, ties, np.nextafter(ties, np.float32(-1e9)), np.nextafter(ties, np.float32(1e9))):
        expected = [exact_round(Fraction(float(v)), rounding) for v in x]

        actual = round_(torch.from_numpy(x.copy()), rounding).tolist()
        assert actual == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_keeps_large_integers(rounding: Rounding) -> None:
    x = torch.tensor([2.0**23 + 1, 2.0**23 - 0.5, -(2.0**23) + 0.5, 2.0**24])
    expected = [float(exact_round(Fraction(v), rounding)) for v in x.tolist()]

    assert round_(x, rounding).tolist() == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_survives_dequantize_and_quantize(
    dtype: DType, symmetric: bool, rounding: Rounding
) -> None:
    spec = QuantSpec(dtype, symmetric, None, rounding)
    q = qparams_from_range(spec, [-0.7 if dtype.signed or not symmetric else 0.0], [1.9])
    codes = torch.arange(dtype.qmin, dtype.qmax + 1).to(dtype.storage)

    assert torch.equal(quantize(dequantize(codes, q), q), codes)


@given(
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(ROUNDINGS),
    st.floats(-(2**13), 0, width=32),
    st.floats(2**-10, 2**13, width=32),
    st.integers(0, 2**31),
)
def test_fake_quantize_equals_dequantized_codes_bit_for_bit(
    dtype: DType, symmetric: bool, rounding: Rounding, lo: float, hi: float, seed: int
) -> None:
    q = qparams_from_range(QuantSpec(dtype, symmetric, None, rounding), [lo], [hi])
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(257, generator=generator) * 1.4 - 0.2) * (hi - lo) + lo

    assert torch.equal(fake_quantize(x, q), dequantize(quantize(x, q), q))


@given(st.sampled_from(DTYPES), st.floats(-(2**10), 0, width=32), st.floats(2**-10, 2**10, width=32))
def test_error_is_at_most_half_a_step_inside_the_range(dtype: DType, lo: float, hi: float) -> None:
    q = qparams_from_range(QuantSpec(dtype, False), [lo], [hi])
    x = torch.linspace(lo, hi, 1001)
    step = q.scale[0]
    # At 16 bits float32 itself contributes: half a unit in the last place of the operands.
    slack = 4 * torch.finfo(torch.float32).eps * max(-lo, hi)

    assert float((fake_quantize(x, q) - x).abs().max()) <= 0.5 * step * (1 + 1e-3) + slack + step * (
        lo > -1e-3 and lo < 0
    )


@pytest.mark.parametrize("dtype", [INT8, UINT8], ids=lambda d: d.name)
def test_zero_is_always_exact(dtype: DType) -> None:
    for lo, hi in [(-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5), (-1e-3, 7.0)]:
        q = qparams_from_range(QuantSpec(dtype, False), [lo], [hi])

        assert fake_quantize(torch.zeros(1), q).item() == 0.0


def test_per_channel_parameters_apply_along_their_axis() -> None:
    q = qparams_from_range(QuantSpec(INT8, True, axis=1), [-1.0, -10.0], [1.0, 10.0])
    x = torch.tensor([[0.5, 0.5], [3.0, 3.0]])

    y = fake_quantize(x, q)
    assert y[1, 0].item() == pytest.approx(1.0)
    assert y[1, 1].item() == pytest.approx(3.0, abs=0.04)


def test_a_constant_zero_value_still_has_a_scale() -> None:
    q = qparams_from_range(QuantSpec(INT8, True), [0.0], [0.0])

    assert q.scale[0] == pytest.approx(1e-5 / 127)


def test_power_of_two_scale_is_rounded_up() -> None:
    q = qparams_from_range(QuantSpec(INT8, True, power_of_two=True), [-1.0], [1.0])

    assert q.scale == (2.0**-6,)


def test_parameters_refuse_a_scale_that_is_not_positive() -> None:
    with pytest.raises(NumericsError, match="finite scales > 0"):
        QParams(QuantSpec(INT8, True), (float("nan"),), (0,))


def test_parameters_and_specs_survive_json() -> None:
    q = qparams_from_range(QuantSpec(UINT8, False, 0, Rounding.HALF_UP), [-1.0, -2.0], [1.0, 5.0])

    assert QParams.from_json(q.to_json()) == q


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(UnknownName, match="int9"):
        DType.parse("int9")


def test_the_zero_point_belongs_to_the_power_of_two_scale() -> None:
    q = qparams_from_range(QuantSpec(UINT8, False, power_of_two=True), [-1.0], [2.0])

    assert q.scale == (2.0**-6,)
    assert q.zero_point == (64,)
