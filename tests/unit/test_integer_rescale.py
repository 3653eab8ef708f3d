"""Rescales of the integer model: exact against the reference, refused where they would be coarse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.integer_cases import bare, codes, computed, lowered
from torch import Tensor, nn

from bitwright.errors import NumericsError
from bitwright.exporters.integer.number import Integer
from bitwright.exporters.integer.rescale import multiplier_of, requantize
from bitwright.numerics.dtype import INT8, INT16, UINT8, UINT16, DType
from bitwright.numerics.fixed_point import rescale
from bitwright.numerics.rounding import Rounding


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("form, bits", [("float", 31), ("multiplier_shift", 15), ("shift", 31)])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), size=st.sampled_from([8, 20, 31, 42]), dtype=st.sampled_from([INT8, UINT8, INT16, UINT16]),
    exponents=st.lists(st.integers(-40, 3), min_size=4, max_size=4), power=st.booleans(), channels=st.sampled_from([4, 20]),
)  # fmt: skip
def test_onnx_runtime_rescales_as_the_reference(
    rounding: Rounding,
    form: str,
    bits: int,
    seed: int,
    size: int,
    dtype: DType,
    exponents: list[int],
    power: bool,
    channels: int,
) -> None:
    """The constants of few channels are stored; those of many are computed in the file."""
    random = np.random.default_rng(seed)
    low, op = bare(form, bits)
    mantissa = (
        np.ones(channels) if power else random.uniform(0.5, 1.0, channels) * random.choice([-1, 1], channels)
    )
    q = codes(dtype, 0.37, int(random.integers(dtype.qmin, dtype.qmax + 1)), rounding)
    units = 2.0 ** np.tile(exponents, channels // 4)
    scale = q.scale[0] * mantissa * units
    zero = random.integers(-(2**7), 2**7, channels).astype(np.float64)
    top = 1 << (size - 1)
    n = random.integers(-top, top, (50, channels))
    n[:8] = np.rint(zero + (np.arange(8)[:, None] - 4) / 2 / units).clip(-top, top - 1)  # ties
    carrier = "int32" if size <= 31 else "int64"
    x = Integer(low.constant(n.astype(carrier)), carrier, scale, zero, -top, top - 1)  # type: ignore[arg-type]

    result = requantize(low, op, x, q)
    m, s = (torch.from_numpy(a) for a in multiplier_of(low, x, q))
    expected = rescale(torch.from_numpy(n) - torch.from_numpy(zero).long(), m, s, rounding) + q.zero_point[0]

    assert (computed(low, result.name) == expected.clamp(dtype.qmin, dtype.qmax).numpy()).all()


def test_a_sum_so_large_that_its_rescale_would_be_coarse_is_refused() -> None:
    """A multiplier of 12 bits beside a sum of 49: up to 8 steps of 16-bit codes wrong."""
    low, _ = bare()
    x = Integer("sum", "int64", np.array(3e-12), np.zeros(()), -(1 << 48), 1 << 48)

    with pytest.raises(NumericsError, match=r"leaves 18 of 61 bits for the multiplier .* which leaves 12"):
        multiplier_of(low, x, codes(INT16, 0.01))
    assert multiplier_of(low, x, codes(INT8, 0.01))[1] > 0
    power = replace(x, scale=np.array(codes(INT16, 0.01).scale[0] * 2.0**-30))
    assert tuple(int(v) for v in multiplier_of(low, power, codes(INT16, 0.01))) == (1, 30)


@pytest.mark.parametrize("top, ratio", [(1 << 60, 0.75), (1 << 61, 0.5), (1 << 66, 0.5)])
def test_an_exact_ratio_is_refused_too_where_the_product_does_not_fit(top: int, ratio: float) -> None:
    """3 · 2^60 is above the 2^61 that the offset takes for granted."""
    low, _ = bare()
    q = codes(INT8, 0.37)
    x = Integer("sum", "int64", np.array(q.scale[0] * ratio), np.zeros(()), -top, top)

    with pytest.raises(NumericsError, match="which leaves 0"):
        multiplier_of(low, x, q)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0])
def test_a_constant_between_two_codes_counts_where_scales_are_powers_of_two(ratio: float) -> None:
    """x + 1.3 codes with the multiplier 1: the constant was once rounded to 1 code, half of a step too little."""
    low, op = bare()
    q = codes(INT8, 0.37, 3)
    n = np.arange(-60, 60)
    x = Integer(
        low.constant(n.astype(np.int32)), "int32", np.array(q.scale[0] * ratio), np.array(-1.3), -60, 59
    )

    expected = np.rint((n + 1.3) * ratio) + 3
    assert (computed(low, requantize(low, op, x, q).name) == expected.clip(-128, 127)).all()


@pytest.mark.parametrize("channels", [3, 16])
def test_a_constant_counts_beside_a_channel_that_is_nearly_dead(channels: int) -> None:
    """The longest shift of all once left no bits for constants between two codes, which then were rounded to one."""
    low, op = bare()
    q = codes(INT16, 0.37, 3)
    n = np.arange(-60, 60)[:, None].repeat(channels, 1)
    ratio, zero = np.full(channels, 0.25), np.linspace(-1.7, 1.7, channels)
    ratio[0] = 2.0**-61
    x = Integer(low.constant(n.astype(np.int32)), "int32", q.scale[0] * ratio, zero, -60, 59)

    expected = np.rint((n - zero) * ratio) + 3
    assert (computed(low, requantize(low, op, x, q).name) == expected).all()


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("zero, bound, error", [(-1.9, 1 << 60, 2.0**-3), (2.0**28 + 0.9, 1 << 29, 2.0**-12)])
def test_constants_of_many_channels_are_stored_where_computing_them_is_coarse(
    zero: float, bound: int, error: float, channels: int
) -> None:
    """No room left for bits behind the point: in the accumulator, which leaves a rounding at s = 2, and in 32 bits of a zero."""
    low, op = bare()
    q = codes(INT8, 0.37)
    n = np.arange(-60, 60)[:, None].repeat(channels, 1) + np.int64(zero)
    scale, zeros = np.full(channels, q.scale[0] * 0.25), np.full(channels, zero)
    x = Integer(low.constant(n), "int64", scale, zeros, -bound, bound - 1)

    apart = computed(low, requantize(low, op, x, q).name) - (n - zero) * 0.25
    assert np.abs(apart).max() <= 0.5 + error


class Level(nn.Module):
    """A constant without axes, computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.level.sigmoid()


@pytest.mark.parametrize("target", ["generic-int8", "journey6"])
def test_a_constant_without_axes_may_be_computed(target: str) -> None:
    """NumPy's number in place of an array once ended the whole export."""
    _, _, model, proof = lowered(Level(), ((2, 3),), target, "int8")

    assert not model.islands
    assert [d.steps for d in proof.per_op] == [0] * len(proof.per_op)
    assert proof.per_op


class Gram(nn.Module):
    """A product whose sums run over the batch: as long as whoever calls it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 8).t() @ x.reshape(-1, 8)


def test_a_sum_over_the_batch_has_no_proof_and_stays_float() -> None:
    graph, _, model, _ = lowered(Gram(), ((3, 4, 8),), "generic-int8", "int8")
    (name,) = model.islands

    assert graph.op(name).kind == "MatMul"
    assert "axes of fixed length" in model.islands[name]


class Dead(nn.Module):
    """A convolution with a channel whose weights are nearly 0: its bias is 10^5 steps of its accumulator."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        weight[1] *= 1e-6
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.tensor([0.1, -0.6, 0.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias)


def test_a_channel_that_is_nearly_dead_is_right_too() -> None:
    _, _, model, proof = lowered(Dead(), ((2, 3, 4, 4),), "generic-int8", "int8")

    assert not model.islands
    assert [d.steps for d in proof.per_op] == [0]
