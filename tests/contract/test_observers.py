"""What every threshold method must do, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.calibrate import observers
from bitwright.calibrate.observers import METHODS, method_name, parse_method
from bitwright.calibrate.statistics import ValueStatistics
from bitwright.errors import NumericsError, UnknownName
from bitwright.numerics.affine import qparams_from_range
from bitwright.numerics.dtype import INT4, INT8, INT16, UINT8, DType
from bitwright.numerics.spec import QuantSpec

#: Every method in the registry, as it is spelled without a parameter, and the spellings that have one.
SPELLINGS = [*METHODS, "percentile(99.9)", "percentile(100)", "aciq(gauss)", "aciq(laplace)"]
DTYPES = [INT4, INT8, UINT8, INT16]
every_method = pytest.mark.parametrize("method", SPELLINGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
every_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def seen(x: object) -> ValueStatistics:
    """Statistics of one batch."""
    statistics = ValueStatistics("x")
    statistics.update(torch.as_tensor(x, dtype=torch.float32))
    return statistics


def test_every_file_registers_the_method_of_its_name_and_nothing_else() -> None:
    files = {path.stem for path in Path(observers.__path__[0]).glob("*.py")} - {"__init__"}

    assert files == set(METHODS)


@every_method
def test_a_method_is_written_as_it_is_read(method: str) -> None:
    parsed = parse_method(method)

    assert parse_method(method_name(parsed)) == parsed


@every_method
@every_dtype
@every_symmetry
@settings(max_examples=15, deadline=None)
@given(data=st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=80))
def test_a_range_lies_within_the_data_and_can_be_quantized(
    method: str, dtype: DType, symmetric: bool, data: list[float]
) -> None:
    statistics, spec = seen(data), QuantSpec(dtype, symmetric)
    lo, hi = parse_method(method).range(statistics, spec)
    largest = statistics.largest

    assert isinstance(lo, float)
    assert isinstance(hi, float)
    assert lo <= hi
    if symmetric:
        assert -largest <= lo
        assert hi <= largest
    else:
        assert min(statistics.lo, 0.0) <= lo
        assert hi <= max(statistics.hi, 0.0)
    qparams_from_range(spec, [lo], [hi])


@every_method
@every_dtype
@every_symmetry
def test_all_zeros_give_an_empty_range(method: str, dtype: DType, symmetric: bool) -> None:
    assert parse_method(method).range(seen([0.0, 0.0]), QuantSpec(dtype, symmetric)) == (0.0, 0.0)


@every_method
@every_symmetry
@pytest.mark.parametrize("value", [2.5, -2.5])
def test_constant_data_stay_representable(method: str, symmetric: bool, value: float) -> None:
    lo, hi = parse_method(method).range(seen([value] * 20), QuantSpec(INT8, symmetric))

    # The search of the asymmetric least error may give up half a step.
    assert max(-lo, hi) == pytest.approx(abs(value), rel=0.5 / 255)


@every_method
@every_dtype
@every_symmetry
def test_a_range_scales_with_the_data(method: str, dtype: DType, symmetric: bool) -> None:
    x = np.random.default_rng(2).standard_t(4, 5000).astype(np.float32)
    spec, scale = QuantSpec(dtype, symmetric), 3.7
    small, large = seen(x), seen(scale * x)
    expected = np.array(parse_method(method).range(small, spec)) * scale
    tolerance = (
        small.largest * scale / 2047
        if method == "kl"
        else large.histogram.width + scale * small.histogram.width
    )

    assert np.abs(np.array(parse_method(method).range(large, spec)) - expected).max() <= tolerance


@every_method
@every_symmetry
def test_sixteen_bits_hardly_clip_normal_data(method: str, symmetric: bool) -> None:
    if method.startswith("percentile("):
        pytest.skip("a percentile does not look at the number of bits")
    x = np.random.default_rng(2).standard_normal(3000).astype(np.float32)
    lo, hi = parse_method(method).range(seen(x), QuantSpec(INT16, symmetric))

    assert max(-lo, hi) >= 0.9 * np.abs(x).max()


@every_method
def test_a_method_does_not_change_the_statistics(method: str) -> None:
    statistics = seen(torch.linspace(-2, 5, 1000))
    before = statistics.state()
    parse_method(method).range(statistics, QuantSpec(INT8, symmetric=False))
    after = statistics.state()

    assert torch.equal(before.pop("counts"), after.pop("counts"))
    assert before == after


def test_unsigned_symmetric_codes_start_at_zero() -> None:
    assert parse_method("max").range(seen([0.0, 3.0]), QuantSpec(UINT8, symmetric=True)) == (0.0, 3.0)


def test_max_covers_both_sides_and_min_max_tells_them_apart() -> None:
    symmetric, asymmetric = QuantSpec(INT8, symmetric=True), QuantSpec(INT8, symmetric=False)
    statistics = seen([-1.0, 3.0])

    assert parse_method("max").range(statistics, symmetric) == (-3.0, 3.0)
    assert parse_method("max").range(statistics, asymmetric) == (-1.0, 3.0)
    assert parse_method("min_max").range(statistics, symmetric) == (-1.0, 3.0)


def test_thresholds_of_an_asymmetric_range_clip_only_the_longer_side() -> None:
    x = np.concatenate([np.random.default_rng(0).laplace(0, 1, 5000), [60.0]])
    statistics = seen(x)
    lo, hi = parse_method("octav").range(statistics, QuantSpec(INT4, symmetric=False))

    assert lo == statistics.lo
    assert hi < 10.0


def test_one_sided_data_use_all_codes_of_an_asymmetric_format() -> None:
    statistics = seen(np.abs(np.random.default_rng(0).laplace(0, 1, 5000)))
    _, one_sided = parse_method("octav").range(statistics, QuantSpec(INT4, symmetric=False))
    _, both_signs = parse_method("octav").range(statistics, QuantSpec(INT4, symmetric=True))

    assert one_sided > 1.1 * both_signs


@pytest.mark.parametrize(
    "text, percent",
    [("percentile", 99.99), ("percentile(99.9)", 99.9), ("percentile9999", 99.99), ("percentile99", 99.0)],
)
def test_a_percentile_can_be_spelled_in_several_ways(text: str, percent: float) -> None:
    assert parse_method(text) == parse_method(f"percentile({percent})")


@pytest.mark.parametrize("text", ["percentile(0)", "percentile(101)", "percentile(nan)", "percentile(-5)"])
def test_an_impossible_percentage_is_refused(text: str) -> None:
    with pytest.raises(NumericsError, match="0 < p <= 100"):
        parse_method(text)


@pytest.mark.parametrize(
    "text", ["percentile(abc)", "percentile()", "kl(3)", "max()", "aciq(cauchy)", "mse99"]
)
def test_a_parameter_that_a_method_does_not_take_is_refused(text: str) -> None:
    with pytest.raises(NumericsError, match="expected"):
        parse_method(text)


@pytest.mark.parametrize("text", ["", "kll", "percentile9", "percentile(", "k l", "KL(", "__init__"])
def test_an_unknown_method_is_explained(text: str) -> None:
    with pytest.raises(UnknownName, match="threshold method"):
        parse_method(text)
