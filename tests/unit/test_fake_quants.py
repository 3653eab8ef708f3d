"""Fake quantizers: what they compute is `numerics.affine.fake_quantize`; their gradients are those of the papers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bitwright import FakeQuantState
from bitwright.numerics.affine import THRESHOLD_FLOOR, fake_quantize
from bitwright.numerics.dtype import INT4, INT8, INT16, UINT8, UINT16
from bitwright.numerics.rounding import Rounding, round_
from bitwright.numerics.spec import QuantSpec
from bitwright.train.fake_quants import FAKE_QUANTS, Quantizer
from bitwright.train.fake_quants.fake_quant import FakeQuant
from bitwright.train.observers import make_observer

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 5, 4, 2)
FORMATS = [
    (INT4, True),
    (INT8, True),
    (UINT8, True),
    (INT16, True),
    (INT8, False),
    (UINT8, False),
    (UINT16, False),
]
STYLES = [*((rounding, False) for rounding in Rounding), (Rounding.HALF_EVEN, True)]
SPECS = [
    QuantSpec(dtype, symmetric, axis, rounding, power_of_two)
    for (dtype, symmetric), axis, (rounding, power_of_two) in itertools.product(FORMATS, (None, 1), STYLES)
]


def described(spec: QuantSpec) -> str:
    parts = [
        spec.dtype.name,
        "symmetric" if spec.symmetric else "asymmetric",
        str(spec.axis),
        spec.rounding.value,
    ]
    return " ".join(parts + ["power of two"] * spec.power_of_two)


every_kind = pytest.mark.parametrize("kind", sorted(FAKE_QUANTS))
every_spec = pytest.mark.parametrize("spec", SPECS, ids=described)


def numbers(spec: QuantSpec, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """Normal numbers, of one sign where the codes are symmetric without one; the channels differ in size."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x * torch.arange(1.0, 6.0).reshape(1, 5, *[1] * (len(shape) - 2))
    return x.abs() if spec.symmetric and not spec.dtype.signed else x


def made(kind: str, spec: QuantSpec, x: Tensor, *, is_weight: bool = False, clip: float = 1.0) -> Quantizer:
    """A quantizer in state VALIDATION with the range of *x* times *clip*."""
    groups = 1 if spec.axis is None else x.shape[spec.axis]
    observer = make_observer("min_max", spec, groups, {"averaging_constant": 1.0})
    quantizer = FAKE_QUANTS.get(kind, where="")("x", spec, tuple(x.shape), observer, is_weight=is_weight)
    quantizer.eval().state = FakeQuantState.CALIBRATION
    quantizer(x * clip)
    quantizer.state = FakeQuantState.VALIDATION
    return quantizer


# --- forward -----------------------------------------------------------------------------------------------------


@every_kind
@every_spec
@pytest.mark.parametrize("clip", [1.0, 0.5])
def test_values_are_those_of_the_definition(kind: str, spec: QuantSpec, clip: float) -> None:
    x = numbers(spec)
    quantizer = made(kind, spec, x, clip=clip)

    assert torch.equal(quantizer(x), fake_quantize(x, quantizer.qparams()))
    assert torch.equal(quantizer(x, rectified=True), fake_quantize(x.relu(), quantizer.qparams()))


@every_kind
@pytest.mark.parametrize("rounding", Rounding)
def test_ties_are_rounded_as_the_target_does(kind: str, rounding: Rounding) -> None:
    spec = QuantSpec(INT8, True, rounding=rounding, power_of_two=True)
    x = torch.arange(-128, 128) / 2.0
    quantizer = made(kind, spec, x * 2.0 * 127 / 128)
    steps = x / quantizer.step()

    assert float(quantizer.step()) == 1.0
    assert torch.equal(quantizer(x), round_(steps, rounding))


@every_kind
@pytest.mark.parametrize("dtype", [INT4, INT8])
def test_weights_use_as_many_codes_below_zero_as_above(kind: str, dtype: type) -> None:
    spec = QuantSpec(dtype, True, 0)  # type: ignore[arg-type]
    weight = torch.randn(4, 3, 2, 2)
    quantizer = made(kind, spec, weight, is_weight=True, clip=0.3)

    assert torch.equal(quantizer(-weight), -quantizer(weight))


@every_kind
@every_spec
def test_a_value_that_is_always_zero_has_a_scale_and_stays_zero(kind: str, spec: QuantSpec) -> None:
    zeros = torch.zeros(SHAPE)
    quantizer = made(kind, spec, zeros)

    assert bool((quantizer.step() > 0).all())
    assert torch.equal(quantizer(zeros), zeros)


@every_kind
def test_an_empty_batch_passes(kind: str) -> None:
    quantizer = made(kind, QuantSpec(INT8, True), numbers(QuantSpec(INT8, True)))
    quantizer.state = FakeQuantState.QAT

    assert quantizer(torch.zeros(0, 5)).shape == (0, 5)


@every_kind
def test_the_scale_covers_what_was_seen(kind: str) -> None:
    for spec in SPECS:
        x = numbers(spec)
        quantizer = made(kind, spec, x)
        most = float(quantizer.step().max())

        assert float((quantizer(x).detach() - x).abs().max()) <= most * 1.001, spec


# --- gradients -----------------------------------------------------------------------------------------------------


def gradients(quantizer: Quantizer, x: Tensor, g: Tensor, **options: bool) -> tuple[Tensor, Tensor | None]:
    """Of the data and of the quantizer's parameter, for the gradient *g* of the result."""
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    quantizer(x, **options).backward(g)
    assert x.grad is not None
    parameter = next(iter(quantizer.parameters()), None)
    return x.grad, None if parameter is None else parameter.grad


def side(quantizer: Quantizer, x: Tensor, *, rectified: bool = False) -> Tensor:
    """1 above the limits of the codes, -1 below, 0 within. Plain fake quantization passes what is rounded to the last codes, too."""
    lo, hi = (torch.as_tensor(limit) for limit in quantizer.code_limits(x))
    margin = 0.5 if type(quantizer) is FakeQuant else 0.0
    lo = lo.clamp(min=0) if rectified else lo - margin
    v = x / quantizer.shaped(quantizer.step(), x)
    return (v > hi + margin).float() - (v < lo).float()


@every_kind
@every_spec
def test_the_gradient_of_the_data_is_that_of_the_clamp(kind: str, spec: QuantSpec) -> None:
    x, g = numbers(spec), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    quantizer = made(kind, spec, x, clip=0.5)
    inside, above_zero = side(quantizer, x) == 0, side(quantizer, x, rectified=True) == 0

    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(gradients(quantizer, x, g)[0], torch.where(inside, g, 0.0))
    assert torch.equal(gradients(quantizer, x, g, rectified=True)[0], torch.where(above_zero, g, 0.0))


def lsq_reference(quantizer: Quantizer, x: Tensor, g: Tensor, n: float) -> Tensor:
    """The gradient of the scale by automatic differentiation of the paper's equations 1 and 2 in float64, with its gradient scale."""
    scale = quantizer.step().double().requires_grad_()
    factor = 1.0 / math.sqrt(n * quantizer.qmax)
    scaled = scale * factor + (scale - scale * factor).detach()
    shaped, data = quantizer.shaped(scaled, x), x.double()
    lo, hi = (torch.as_tensor(limit, dtype=torch.float64) for limit in quantizer.code_limits(x))
    v = data / shaped
    clamped = torch.minimum(torch.maximum(v, lo), hi)
    code = round_(clamped.detach().clone(), quantizer.spec.rounding)
    code = torch.minimum(torch.maximum(code, lo), hi)
    ((clamped + (code - clamped).detach()) * shaped).backward(g.double())
    assert scale.grad is not None
    return scale.grad


@pytest.mark.parametrize("is_weight", [False, True])
@every_spec
def test_the_gradient_of_lsq_is_that_of_the_paper(spec: QuantSpec, is_weight: bool) -> None:
    x, g = numbers(spec), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    quantizer = made("lsq", spec, x, is_weight=is_weight, clip=0.7)
    # Elements of a weight, or of one sample, that share a scale.
    n = x.numel() / quantizer.groups / (1 if is_weight else len(x))
    expected = lsq_reference(quantizer, x, g, n)
    found = gradients(quantizer, x, g)[1]

    assert found is not None
    # In float32, codes of 16 bits leave two to three digits of code - x / scale.
    tolerance = 2e-2 if spec.dtype.bits == 16 else 1e-3
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


def test_lsq_starts_at_twice_the_mean_magnitude_over_the_root_of_the_largest_code() -> None:
    x = torch.randn(64, 16)
    x[0, 0] = 100.0
    observer = make_observer("min_max", QuantSpec(INT4, True), 1, {})
    quantizer = FAKE_QUANTS.get("lsq", where="")("x", QuantSpec(INT4, True), (), observer, is_weight=False)
    quantizer(x)

    torch.testing.assert_close(quantizer.step(), 2.0 * x.abs().mean().reshape(1) / math.sqrt(7.0))


def test_lsq_follows_no_range_once_it_has_one() -> None:
    quantizer = made("lsq", QuantSpec(INT8, True), torch.ones(4, 4))
    quantizer.train().state = FakeQuantState.QAT
    before = quantizer.step().clone()
    quantizer(100.0 * torch.ones(4, 4))

    assert torch.equal(quantizer.step(), before)


def test_a_learned_scale_of_zero_or_below_still_is_a_scale() -> None:
    quantizer = made("lsq", QuantSpec(INT8, True), torch.ones(4, 4))
    parameter = next(quantizer.parameters())
    parameter.data.zero_()

    assert float(quantizer.step()) == pytest.approx(THRESHOLD_FLOOR / 127)
    parameter.data.fill_(-0.5)
    assert float(quantizer.step()) == 0.5


@every_spec
def test_the_gradient_of_pact_is_the_sum_over_what_is_clipped(spec: QuantSpec) -> None:
    x, g = numbers(spec), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    quantizer = made("pact", spec, x, clip=0.5)
    axes = [0, 2, 3] if spec.axis == 1 else [0, 1, 2, 3]
    found = gradients(quantizer, x, g)[1]

    assert found is not None
    torch.testing.assert_close(
        found.double(), (side(quantizer, x).double() * g).sum(axes).reshape(-1), rtol=1e-5, atol=1e-5
    )


def test_pact_starts_one_sided_where_nothing_is_negative() -> None:
    spec = QuantSpec(UINT8, False)
    one, both = (made("pact", spec, x) for x in (torch.rand(50), torch.randn(50)))

    assert one.qparams().zero_point == (0,)
    assert both.qparams().zero_point[0] in (127, 128)  # 0 lies between two codes


# --- half precision ------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32_and_given_back_as_it_came(
    kind: str, dtype: torch.dtype
) -> None:
    spec = QuantSpec(INT8, True)
    x = numbers(spec).to(dtype)
    quantizer = made(kind, spec, x.float())

    assert quantizer(x).dtype is dtype
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))
    found, _ = gradients(quantizer, x, torch.ones_like(x))
    assert found.dtype is dtype
