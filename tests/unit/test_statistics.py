"""Statistics of values: one pass, any order, sampling, refusals, saving; and thresholds against raw samples."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_thresholds import ROWS, Row, samples
from safetensors.torch import save_file

from bitwright.calibrate.observers import parse_method
from bitwright.calibrate.statistics import (
    MAX_SAMPLES,
    RUN,
    SPARSEST,
    Statistics,
    ValueStatistics,
    sampling_step,
)
from bitwright.errors import DataError, OutputError, UnknownName
from bitwright.numerics import thresholds
from bitwright.numerics.dtype import INT8, UINT8
from bitwright.numerics.spec import QuantSpec


def seen(*batches: object) -> ValueStatistics:
    """Statistics of a value that was fed *batches*."""
    statistics = ValueStatistics("conv.0")
    for batch in batches:
        statistics.update(torch.as_tensor(batch))
    return statistics


def in_chunks(x: np.ndarray, *, growing: bool) -> ValueStatistics:
    """Statistics fed with ten parts of *x*, as drawn or in the order of |x| so that every part widens the range."""
    ordered = x[np.argsort(np.abs(x), kind="stable")] if growing else x
    return seen(*(torch.from_numpy(part.copy()) for part in np.array_split(ordered, 10)))


RAW = {
    "max": lambda x: float(np.abs(x).max()),
    "kl": thresholds.kl_of_samples,
    "mse": thresholds.mse_of_samples,
    "octav": thresholds.octav_of_samples,
    "aciq": thresholds.aciq_of_samples,
    "aciq(gauss)": thresholds.aciq_gauss_of_samples,
    "aciq(laplace)": thresholds.aciq_laplace_of_samples,
    "percentile": lambda x: thresholds.percentile_of_samples(x, 99.99),
    "percentile(99)": lambda x: thresholds.percentile_of_samples(x, 99.0),
}


@lru_cache(maxsize=1)
def raw_thresholds(family: str, seed: int) -> dict[str, float]:
    """The thresholds of all methods on the raw samples."""
    x = samples(family, seed)
    return {name: threshold(x) for name, threshold in RAW.items()}


@pytest.mark.parametrize("growing", [False, True], ids=["as drawn", "growing"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.family}-{row.seed}")
def test_streaming_gives_the_threshold_of_the_raw_samples_within_one_bin(row: Row, growing: bool) -> None:
    x = samples(row.family, row.seed)
    statistics = in_chunks(x, growing=growing)
    spec = QuantSpec(UINT8 if row.family == "relu" else INT8, symmetric=True)

    for name, raw in raw_thresholds(row.family, row.seed).items():
        bin_width = row.largest / 2047 if name == "kl" else statistics.histogram.width
        _, threshold = parse_method(name).range(statistics, spec)
        assert abs(threshold - raw) <= bin_width, name


@pytest.mark.parametrize("family", ["gauss", "relu", "t3"])
def test_asymmetric_percentiles_are_those_of_the_samples_within_one_bin(family: str) -> None:
    x = samples(family, 3)
    statistics = in_chunks(x, growing=True)
    lo, hi = parse_method("percentile(99.9)").range(statistics, QuantSpec(INT8, symmetric=False))

    expected = np.percentile(x.astype(np.float64), [0.1, 99.9])
    assert np.abs(np.array([lo, hi]) - expected).max() <= statistics.histogram.width


def test_moments_are_those_of_the_samples() -> None:
    x = samples("laplace", 0).astype(np.float64)
    moments = in_chunks(samples("laplace", 0), growing=False).moments()

    assert moments.mean == pytest.approx(x.mean(), abs=1e-5)
    assert moments.std == pytest.approx(x.std(), rel=1e-5)
    assert moments.deviation == pytest.approx(np.abs(x - x.mean()).mean(), rel=1e-5)
    assert moments.kurtosis == pytest.approx(((x - x.mean()) ** 4).mean() / x.var() ** 2, rel=1e-4)


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 2**32 - 1))
def test_the_order_of_the_batches_does_not_matter(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [3, 50, 70_000, 40_000, 33_333]  # three of them are sampled, with different weights
    batches = [torch.randn(n, generator=generator) * 10.0**k for k, n in enumerate(sizes)]
    one, other = seen(*batches), seen(*(batches[k] for k in order))

    assert (one.lo, one.hi, one.elements, one.zeros) == (other.lo, other.hi, other.elements, other.zeros)
    assert torch.equal(one.histogram.counts, other.histogram.counts)


def test_merging_equals_having_seen_both() -> None:
    first, second = torch.randn(1000), 40 * torch.rand(100_000).sub(0.2).relu()
    merged = seen(first)
    merged.merge(seen(second))
    both = seen(first, second)

    assert (merged.lo, merged.hi, merged.elements, merged.zeros) == (
        both.lo,
        both.hi,
        both.elements,
        both.zeros,
    )
    assert torch.equal(merged.histogram.counts, both.histogram.counts)


def test_merging_nothing_changes_nothing() -> None:
    one = seen([1.0, -2.0])
    one.merge(ValueStatistics("other"))

    assert (one.lo, one.hi, one.elements) == (-2.0, 1.0, 2)


def test_the_sampling_step_is_prime_to_the_runs_and_leaves_few_enough() -> None:
    for elements in (*range(32_000, 36_000), 150_528, 401_408, 1_204_224, 38_535_168):
        step = sampling_step(elements)

        assert np.gcd(step, elements // RUN) == 1
        assert -(-(elements // RUN) // step) * RUN <= max(MAX_SAMPLES, elements / SPARSEST) + RUN
        assert step == 1 or elements > MAX_SAMPLES


def test_a_sampled_batch_keeps_exact_extremes_and_totals() -> None:
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(1)).relu()
    x[123_457] = 77.0
    statistics = seen(x)

    assert (statistics.lo, statistics.hi, statistics.elements) == (0.0, 77.0, 300_000)
    assert float(statistics.histogram.counts.sum()) == pytest.approx(300_000, rel=1e-6)
    assert statistics.zeros == pytest.approx(float((x == 0).sum()), rel=0.02)
    assert statistics.quantile(90.0) == pytest.approx(float(np.percentile(x.numpy(), 90.0)), rel=0.02)


@pytest.mark.parametrize("shape", [(2, 64, 32, 32), (1, 96, 112, 112), (128, 196, 192)])
def test_sampling_leaves_out_no_channel_row_or_column(shape: tuple[int, ...]) -> None:
    for axis, size in enumerate(shape):
        index = torch.arange(size, dtype=torch.float32)
        statistics = seen(
            index.reshape([-1 if k == axis else 1 for k in range(len(shape))]).expand(shape).contiguous()
        )
        reached = np.flatnonzero(statistics.histogram.array())

        assert len(reached) == size


def test_strided_and_overlapping_layouts_count_every_element_once() -> None:
    x = torch.randn(2, 6, 5, 4)
    expected = seen(x).histogram.counts
    layouts = [
        x.to(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2),
        torch.nn.functional.pad(x, (1, 1))[..., 1:-1],
    ]

    for layout in layouts:
        assert torch.equal(seen(layout).histogram.counts, expected)
    assert seen(torch.ones(1, 3).expand(5, 3)).histogram.counts.sum() == 15


def test_the_batch_is_not_changed_and_needs_no_gradient() -> None:
    x = torch.randn(70_000, requires_grad=True)
    before = x.detach().clone()
    statistics = seen(x)

    assert torch.equal(x, before)
    assert not statistics.histogram.counts.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_formats_are_accepted(dtype: torch.dtype) -> None:
    x = torch.tensor([-1.5, 0.0, 2.25], dtype=dtype)

    assert (seen(x).lo, seen(x).hi, seen(x).zeros) == (-1.5, 2.25, 1.0)


def test_double_precision_just_below_a_power_of_two_fits() -> None:
    statistics = seen(torch.tensor([np.nextafter(4.0, 0.0)], dtype=torch.float64))

    assert statistics.hi == 4.0
    assert statistics.histogram.counts.sum() == 1.0


def test_an_empty_batch_is_no_batch() -> None:
    statistics = seen(torch.empty(0, 3))

    assert statistics.elements == 0
    assert statistics.largest == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_name_and_leaves_no_trace(bad: float) -> None:
    statistics = seen([1.0, 2.0])
    with pytest.raises(
        DataError, match=r"'conv\.0' after 2 elements.*1 (NaN and 0|infinite)|0 NaN and 1 infinite"
    ):
        statistics.update(torch.tensor([5.0, bad, 7.0]))

    assert (statistics.lo, statistics.hi, statistics.elements) == (1.0, 2.0, 2)
    assert statistics.histogram.counts.sum() == 2.0


def test_integers_are_refused() -> None:
    with pytest.raises(DataError, match=r"floating-point numbers; found torch\.int64"):
        seen(torch.arange(3))


def full_statistics() -> Statistics:
    """Statistics of three values, one of them sampled, one never seen."""
    statistics = Statistics(samples=7)
    generator = torch.Generator().manual_seed(5)
    statistics.update("x", torch.randn(2, 3, 4, generator=generator))
    statistics.update("features.3/conv:0", torch.randn(90_000, generator=generator).relu() * 1e-3)
    statistics.update("never", torch.empty(0))
    return statistics


def test_saved_statistics_are_read_back_exactly(tmp_path: Path) -> None:
    saved = full_statistics()
    saved.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")

    assert loaded.samples == 7
    assert list(loaded) == list(saved)
    for name, value in saved.items():
        other = loaded[name]
        assert (value.lo, value.hi, value.elements, value.zeros) == (
            other.lo,
            other.hi,
            other.elements,
            other.zeros,
        )
        assert value.histogram.exponent == other.histogram.exponent
        assert torch.equal(value.histogram.counts, other.histogram.counts)


def test_loaded_statistics_can_go_on(tmp_path: Path) -> None:
    full_statistics().save(tmp_path / "s")
    loaded, expected = Statistics.load(tmp_path / "s"), full_statistics()
    for statistics in (loaded, expected):
        statistics.update("x", torch.full((3,), -50.0))

    assert torch.equal(loaded["x"].histogram.counts, expected["x"].histogram.counts)


def test_merging_statistics_joins_values_and_samples() -> None:
    one, other = full_statistics(), full_statistics()
    other.update("new", torch.ones(4))
    one.merge(other)

    assert one.samples == 14
    assert one["x"].elements == 48
    assert one["new"].elements == 4


def test_an_unknown_value_is_explained() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'never'"):
        full_statistics()["neverr"]
    assert full_statistics().find("neverr") is None
    assert "x" in full_statistics()
    assert len(full_statistics()) == 3


def broken_files(folder: Path) -> dict[str, Path]:
    """Paths of files that are no statistics, by what is wrong with them."""
    full_statistics().save(folder / "good")
    content = (folder / "good").read_bytes()
    files = {name: folder / name for name in ("missing", "cut", "text", "other program", "no values")}
    files["cut"].write_bytes(content[: len(content) // 2])
    files["text"].write_text("not a tensor file")
    save_file({"w": torch.ones(2)}, files["other program"])
    save_file({"w": torch.ones(2)}, files["no values"], {"format": "bitwright statistics 1"})
    return files


@pytest.mark.parametrize("what", ["missing", "cut", "text", "other program", "no values"])
def test_a_broken_file_is_refused_with_its_name(what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"statistics file .*{what}.*expected a safetensors file"):
        Statistics.load(broken_files(tmp_path)[what])


@pytest.mark.parametrize(
    "change",
    [
        {"first": -1},
        {"first": 1 << 15},
        {"counts": torch.tensor([-1.0])},
        {"counts": torch.tensor([float("nan")])},
    ],
)
def test_counts_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    state = seen([1.0, 2.0]).state()
    with pytest.raises(DataError, match="counts ≥ 0 within 32768 bins"):
        ValueStatistics.from_state("x", {**state, **change})


def test_an_unwritable_path_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a place that can be written to"):
        full_statistics().save(tmp_path / "file" / "statistics")
