"""The zero-anchored histogram: exact under growth, in any order, under merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.numerics.histogram import (
    MIN_EXPONENT,
    SLOTS,
    Histogram,
    Magnitudes,
    Moments,
    exponent_for,
    quantile,
)

#: Steps of subnormal numbers are as large as they: no bin is fine enough, and engines take them for 0.
floats32 = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
batches = st.lists(st.lists(floats32, min_size=1, max_size=30), min_size=1, max_size=6)


def histogram_of(*parts: list[float]) -> Histogram:
    """A histogram that meets *parts* one after the other and grows as needed."""
    histogram = Histogram()
    for part in parts:
        x = torch.tensor(part, dtype=torch.float32)
        histogram.cover(float(x.abs().max()))
        histogram.add(x.unsqueeze(1))
    return histogram


@pytest.mark.parametrize("magnitude", [1e-20, 0.1, 0.5, 0.9999999, 1.0, 1.5, 6.0, 3e38])
def test_the_larger_side_uses_more_than_half_of_its_bins(magnitude: float) -> None:
    bins = magnitude / 2.0 ** exponent_for(magnitude)

    assert SLOTS / 2 <= bins < SLOTS


def test_the_width_of_nothing_is_the_smallest() -> None:
    assert exponent_for(0.0) == exponent_for(1e-40) == MIN_EXPONENT


def test_a_bin_holds_its_lower_but_not_its_upper_edge() -> None:
    histogram = Histogram(exponent=0)
    histogram.add(torch.tensor([[-1.5, -1.0, -0.5, 0.0, 0.5, 1.0]]))

    assert histogram.array()[SLOTS - 2 : SLOTS + 2].tolist() == [1.0, 2.0, 2.0, 1.0]


@given(batches)
@settings(max_examples=100, deadline=None)
def test_growing_gives_the_counts_of_a_histogram_wide_from_the_start(parts: list[list[float]]) -> None:
    together = [x for part in parts for x in part]
    grown, wide = histogram_of(*parts), histogram_of(together)

    assert grown.exponent == wide.exponent
    assert torch.equal(grown.counts, wide.counts)
    assert grown.zeros == wide.zeros == together.count(0.0)
    assert grown.counts.sum() == len(together)


@given(batches, st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_batches_does_not_matter(parts: list[list[float]], random: object) -> None:
    shuffled = parts.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert torch.equal(histogram_of(*parts).counts, histogram_of(*shuffled).counts)


@given(batches, batches)
@settings(max_examples=50, deadline=None)
def test_merging_equals_having_seen_both(first: list[list[float]], second: list[list[float]]) -> None:
    merged, other = histogram_of(*first), histogram_of(*second)
    before = other.counts.clone()
    merged.merge(other)
    both = histogram_of(*first, *second)

    assert (merged.exponent, merged.zeros) == (both.exponent, both.zeros)
    assert torch.equal(merged.counts, both.counts)
    assert torch.equal(other.counts, before)


def test_growth_beyond_the_number_of_bins_leaves_the_two_bins_around_zero() -> None:
    histogram = histogram_of([1e-12, -1e-12, 2e-12], [1e12])

    assert histogram.array()[SLOTS - 1 : SLOTS + 1].tolist() == [1.0, 2.0]


def test_widening_to_a_smaller_width_changes_nothing() -> None:
    histogram = histogram_of([1.0, 2.0])
    before = histogram.counts.clone()
    histogram.widen(histogram.exponent - 3)

    assert torch.equal(histogram.counts, before)


def test_elements_count_with_their_weight() -> None:
    histogram = Histogram(exponent=0)
    histogram.add(torch.tensor([[0.0, 3.0]]), weight=2.5)

    assert histogram.zeros == 2.5
    assert histogram.counts.sum() == 5.0


def test_long_data_are_binned_in_parts_without_loss() -> None:
    x = torch.linspace(-4.0, 4.0, 200_001)
    histogram = Histogram(exponent=exponent_for(4.0))
    histogram.add(x.unsqueeze(1))
    expected = np.bincount(
        np.floor(x.double().numpy() / histogram.width).astype(int) + SLOTS, minlength=2 * SLOTS
    )

    assert np.array_equal(histogram.array(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_binned_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    half, single = Histogram(exponent=-8), Histogram(exponent=-8)
    half.add(x)
    single.add(x.float())

    assert torch.equal(half.counts, single.counts)


def test_magnitudes_fold_both_sides_and_leave_zeros_out() -> None:
    histogram = Histogram(exponent=0)
    histogram.add(torch.tensor([[0.0, 0.5, -0.5, 2.5, -2.5, -3.5]]))
    folded = histogram.magnitudes(3.5)

    assert folded.counts[:5].tolist() == [2.0, 0.0, 2.0, 1.0, 0.0]
    assert folded.zeros == 1.0
    assert folded.counts.sum() == 5.0


@given(st.lists(floats32, min_size=1, max_size=50), st.floats(0.0, 100.0))
@settings(max_examples=200, deadline=None)
def test_a_percentile_is_within_one_bin_of_the_percentile_of_the_data(
    data: list[float], percent: float
) -> None:
    histogram = histogram_of(data)
    x = np.array(data, dtype=np.float64)
    width, largest = histogram.width, float(np.abs(x).max())
    signed = quantile(
        histogram.array(), percent, origin=-SLOTS * width, width=width, lo=float(x.min()), hi=float(x.max())
    )

    assert abs(signed - np.percentile(x, percent)) <= width
    assert abs(histogram.magnitudes(largest).quantile(percent) - np.percentile(np.abs(x), percent)) <= width


@given(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_rebinning_keeps_the_total_and_moves_no_element_further_than_a_bin(data: list[float]) -> None:
    magnitudes = histogram_of(data).magnitudes(float(np.abs(np.array(data, np.float32)).max()))
    counts, width = magnitudes.rebinned(64)
    exact = np.bincount(np.floor(np.abs(np.array(data)) / width + 0.5).astype(int), minlength=64)

    assert counts.sum() == len(data)
    # Cumulative counts may differ only by elements within one fine bin of an edge: they are back one bin further.
    late, early = np.cumsum(counts)[1:], np.cumsum(exact)
    assert (late >= early[:-1]).all()
    assert (np.cumsum(counts)[:-1] <= early[1:]).all()


def test_rebinning_counts_weighted_samples_whole() -> None:
    counts = np.zeros(SLOTS)
    counts[5000:12000:700] = 7.25
    rebinned, _ = Magnitudes(counts, 1.0, 0.0, 12000.0, grain=7.25).rebinned(2048)

    assert set(rebinned.tolist()) == {0.0, 7.25}
    assert rebinned.sum() == counts.sum()


def test_moments_are_those_of_the_weighted_numbers() -> None:
    x = np.array([-1.0, 0.0, 2.0])
    moments = Moments.of(x, np.array([1.0, 2.0, 1.0]))
    repeated = np.array([-1.0, 0.0, 0.0, 2.0])

    assert moments.mean == pytest.approx(repeated.mean())
    assert moments.std == pytest.approx(repeated.std())
    assert moments.deviation == pytest.approx(np.abs(repeated - repeated.mean()).mean())
    assert moments.kurtosis == pytest.approx(((repeated - repeated.mean()) ** 4).mean() / repeated.var() ** 2)


def test_data_without_spread_have_no_kurtosis() -> None:
    assert Moments.of(np.array([2.0]), np.array([3.0])) == Moments(2.0, 0.0, 0.0, 0.0)


def test_rebinned_counts_are_never_negative() -> None:
    """Symptom: a NaN divergence in `kl` where rounding to whole elements passed the total before the last bin."""
    counts = np.zeros(SLOTS)
    counts[:1000] = 7.3
    magnitudes = Magnitudes(counts=counts, width=1e-3, zeros=0.0, largest=0.98, grain=5.0)

    assert magnitudes.rebinned(2048)[0].min() >= 0
