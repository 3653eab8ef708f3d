"""Threshold methods on raw samples: an established tool's figures, brute force, and general properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference_thresholds import ROWS, Row, samples

from bitwright.errors import NumericsError
from bitwright.numerics import thresholds
from bitwright.numerics.thresholds import (
    aciq_gauss_of_samples,
    aciq_gauss_ratio,
    aciq_laplace_of_samples,
    aciq_laplace_ratio,
    aciq_of_samples,
    check_percent,
    histogram_of_magnitudes,
    kl_of_samples,
    kl_threshold,
    mse_of_samples,
    mse_range,
    octav_of_samples,
    percentile_of_samples,
    signed_percentile_of_samples,
)

#: The reference computes in float32 and prints seven decimals.
REFERENCE = 1e-6

METHODS = {
    "kl": kl_of_samples,
    "mse": mse_of_samples,
    "octav": octav_of_samples,
    "aciq_gauss": aciq_gauss_of_samples,
    "aciq_laplace": aciq_laplace_of_samples,
    "aciq": aciq_of_samples,
    "percentile": lambda x: percentile_of_samples(x, 99.9),
    "signed_percentile": lambda x: signed_percentile_of_samples(x, 99.9),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.family}-{row.seed}")
def test_every_method_gives_the_reference_threshold(row: Row) -> None:
    x = samples(row.family, row.seed)
    counts, width = histogram_of_magnitudes(x)
    kl = kl_threshold(counts, width)

    assert float(x.astype(np.float64).sum()) == pytest.approx(row.sum, abs=1e-5)
    assert float(np.abs(x).max()) == pytest.approx(row.largest, rel=REFERENCE)
    assert round(kl / width) == row.kl_bins
    assert kl == pytest.approx(row.kl, rel=REFERENCE)
    assert kl_threshold(counts, width, levels=8) == pytest.approx(row.kl_int4, rel=REFERENCE)
    assert mse_of_samples(x) == pytest.approx(row.mse, rel=REFERENCE)
    assert aciq_gauss_of_samples(x) == pytest.approx(row.aciq_gauss, rel=REFERENCE)
    assert aciq_laplace_of_samples(x) == pytest.approx(row.aciq_laplace, rel=REFERENCE)
    assert percentile_of_samples(x, 99.99) == pytest.approx(row.percentile, rel=REFERENCE)
    assert signed_percentile_of_samples(x, 99.99) == pytest.approx(row.signed_percentile, rel=REFERENCE)


def test_magnitudes_are_binned_around_multiples_of_the_width_and_zeros_are_left_out() -> None:
    counts, width = histogram_of_magnitudes(np.array([0.0, 0.4, -0.6, 1.4, -3.0]), bins=4)

    assert width == 1.0
    assert counts.tolist() == [1.0, 2.0, 0.0, 1.0]


def test_kl_keeps_a_uniform_histogram_whole() -> None:
    assert kl_threshold(np.ones(16), 1.0, levels=4) == 16.0


def test_kl_clips_a_far_outlier() -> None:
    counts = np.zeros(64)
    counts[:8] = 1000.0 * np.arange(8, 0, -1)
    counts[63] = 1.0

    assert kl_threshold(counts, 0.5, levels=8) == 4.0


def test_kl_pads_a_histogram_to_a_multiple_of_the_levels() -> None:
    counts = np.ones(13)

    assert kl_threshold(counts, 1.0, levels=4) == kl_threshold(np.append(counts, np.zeros(3)), 1.0, levels=4)


def test_kl_skips_candidates_that_hold_no_data() -> None:
    counts = np.zeros(2048)
    counts[-1] = 5.0

    assert kl_threshold(counts, 1.0) == 2048.0


def quantization_error(x: np.ndarray, threshold: float, bits: int, *, unsigned: bool) -> float:
    """Mean squared error of symmetric codes, by doing it; the grid has 2^bits - 1 steps."""
    lo, hi = (0.0, threshold) if unsigned else (-threshold, threshold)
    step = (hi - lo) / (2**bits - 1)
    return float(np.mean((np.clip(np.round((x - lo) / step), 0, 2**bits - 1) * step + lo - x) ** 2))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("family", ["gauss", "laplace", "t3"])
def test_octav_is_close_to_the_best_threshold_of_a_brute_force_search(family: str, bits: int) -> None:
    x = samples(family, 0).astype(np.float64)[:20_000]
    grid = np.linspace(0.01, 1.0, 400) * np.abs(x).max()
    best = min(quantization_error(x, t, bits, unsigned=False) for t in grid)

    assert quantization_error(x, octav_of_samples(x, bits), bits, unsigned=False) <= 1.03 * best


def test_zeros_do_not_move_octav_but_lower_mse() -> None:
    positive = np.abs(samples("gauss", 0)[:10_000])
    with_zeros = np.append(positive, np.zeros(10_000))

    assert octav_of_samples(with_zeros) == pytest.approx(octav_of_samples(positive), rel=1e-9)
    assert mse_of_samples(with_zeros) < 0.99 * mse_of_samples(positive)


def test_octav_of_a_rectified_normal_array_is_near_the_known_optimum() -> None:
    # 4.44 is the brute-force optimum of this array, 4.198 what counting the zeros gives.
    assert octav_of_samples(samples("relu", 0)) == pytest.approx(4.44, rel=0.005)


def test_codes_of_one_sign_clip_less() -> None:
    x = np.abs(samples("laplace", 0))

    assert octav_of_samples(x, 4, unsigned=True) > octav_of_samples(x, 4, unsigned=False)


@pytest.mark.parametrize("bits, gauss, laplace", [(2, 1.71063517, 2.83068299), (4, 2.55913642, 5.02864014)])
def test_aciq_ratios_are_those_of_the_paper(bits: int, gauss: float, laplace: float) -> None:
    assert aciq_gauss_ratio(bits) == pytest.approx(gauss, rel=1e-6)
    assert aciq_laplace_ratio(bits) == pytest.approx(laplace, rel=1e-8)


@pytest.mark.parametrize(
    "family, ratio", [("gauss", aciq_gauss_ratio(4)), ("laplace", aciq_laplace_ratio(4))]
)
def test_aciq_tells_normal_from_laplace_data(family: str, ratio: float) -> None:
    # Both distributions are drawn with a scale parameter of 1.
    assert aciq_of_samples(samples(family, 1), 4) == pytest.approx(ratio, rel=0.01)


def test_aciq_takes_rectified_data_for_half_a_distribution() -> None:
    assert aciq_of_samples(samples("relu", 0), 4) == pytest.approx(aciq_gauss_ratio(4), rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["gauss", "skewed", "rectified"])
def test_the_asymmetric_search_is_close_to_brute_force(family: str, bits: int) -> None:
    rng = np.random.default_rng(3)
    normal = rng.standard_normal(4000)
    x = {"gauss": normal, "skewed": np.exp(normal) - 0.5, "rectified": np.maximum(normal, 0.0)}[family]
    found = mse_range(np.sort(x[x != 0.0]), np.ones((x != 0.0).sum()), lo=x.min(), hi=x.max(), bits=bits)

    def error(lo: float, hi: float) -> float:
        step = (hi - lo) / (2**bits - 1)
        zero = np.round(-lo / step)
        return float(np.mean(((np.clip(np.round(x / step) + zero, 0, 2**bits - 1) - zero) * step - x) ** 2))

    lows = np.linspace(0.05, 1, 30) * min(x.min(), 0.0)
    highs = np.linspace(0.05, 1, 30) * x.max()
    best = min(error(lo, hi) for lo in lows for hi in highs)
    # The model of uniform noise inside the range is a little off for few levels.
    assert error(*found) <= 1.05 * best


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_all_zeros_have_the_threshold_zero(method: object) -> None:
    assert method(np.zeros(10, np.float32)) == 0.0  # type: ignore[operator]


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-8, 1e8])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_constant_data_are_not_clipped(method: object, value: float) -> None:
    assert method(np.full(50, value)) == pytest.approx(abs(value))  # type: ignore[operator]
    assert method(np.array([value])) == pytest.approx(abs(value))  # type: ignore[operator]


numbers = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.floats(-1e3, -1e-3))
some_data = arrays(np.float64, st.integers(1, 60), elements=numbers).filter(lambda x: np.any(x != 0.0))


@settings(max_examples=60, deadline=None)
@given(some_data)
@pytest.mark.parametrize("name", [n for n in METHODS if "percentile" not in n])
def test_a_threshold_is_positive_and_at_most_the_largest_magnitude(name: str, x: np.ndarray) -> None:
    # Percentiles of data that are mostly zero may be zero.
    assert 0.0 < METHODS[name](x) <= np.abs(x).max()


@settings(max_examples=60, deadline=None)
@given(some_data, st.integers(-20, 20))
@pytest.mark.parametrize("name", METHODS)
def test_a_threshold_scales_with_the_data(name: str, x: np.ndarray, exponent: int) -> None:
    scale = 2.0**exponent

    assert METHODS[name](scale * x) == pytest.approx(scale * METHODS[name](x), rel=1e-6)


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.001, math.nan])
def test_an_impossible_percentage_is_refused(percent: float) -> None:
    with pytest.raises(NumericsError, match="0 < p <= 100"):
        check_percent(percent)


def test_the_iteration_stops_where_nothing_lies_above_the_threshold() -> None:
    def nothing_above(s: float) -> thresholds.Tail:
        return thresholds.Tail(below=5.0, above=0.0, sum_above=0.0)

    assert thresholds.fixed_point(nothing_above, 2.0, bits=8, unsigned=False, steps=20, tolerance=1e-8) == 2.0
