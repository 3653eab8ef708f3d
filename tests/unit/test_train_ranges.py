"""Scales that are known exactly, histograms that grow, and ranges that are taken again without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.qat_cases import calibrate, everywhere, pixels, small, validated

from bitwright import get_default_qconfig, prepare, reset_scale
from bitwright.errors import PlanError, UnknownName
from bitwright.numerics.dtype import INT4, INT8, INT16, UINT8
from bitwright.numerics.spec import QuantSpec
from bitwright.train.bins import Bins
from bitwright.train.fake_quants import FAKE_QUANTS, Quantizer
from bitwright.train.observers import make_observer
from bitwright.train.thresholds import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

# --- a scale that is known -----------------------------------------------------------------------------------------


def with_fixed_scale(spec: QuantSpec, groups: int, **options: Any) -> Quantizer:
    shape = (groups, 3)
    made = make_observer("fixed_scale", spec, groups, options)
    return FAKE_QUANTS.get("fake_quant", where="")("x", spec, shape, made, is_weight=False)


@settings(max_examples=200, deadline=None)
@given(scale=st.floats(2.0**-20, 100.0, width=32))
@pytest.mark.parametrize("dtype", [INT4, INT8, UINT8, INT16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fixed_scale_is_used_exactly(dtype: Any, symmetric: bool, scale: float) -> None:
    # Scales below 1e-5 / qmax are raised to that.
    quantizer = with_fixed_scale(QuantSpec(dtype, symmetric), 1, scale=scale)
    quantizer(torch.randn(4))

    assert quantizer.qparams().scale == (scale,)


def test_a_fixed_scale_may_differ_by_channel_and_have_a_zero_point() -> None:
    scales = torch.tensor([0.1, 0.25, 1.0])
    per_channel = with_fixed_scale(QuantSpec(INT8, True, 0), 3, scale=scales)
    shifted = with_fixed_scale(QuantSpec(UINT8, False), 1, scale=0.5, zero_point=7)

    assert torch.equal(per_channel.step(), scales)
    assert (shifted.qparams().scale, shifted.qparams().zero_point) == ((0.5,), (7,))


@pytest.mark.parametrize("dtype, scale", [(INT8, 1 / 128), (INT16, 1 / 32768), (UINT8, 1 / 255)])
def test_a_threshold_is_reached_by_the_lowest_code(dtype: Any, scale: float) -> None:
    quantizer = with_fixed_scale(QuantSpec(dtype, True), 1, threshold=1.0)

    assert quantizer.qparams().scale[0] == pytest.approx(scale, rel=1e-7)


# --- bins --------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    batches=st.lists(
        st.lists(
            st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=30
        ),
        min_size=1,
        max_size=5,
    ),
    groups=st.sampled_from([1, 2]),
)
def test_growing_bins_lose_no_count_and_move_none_over_zero(batches: list[list[float]], groups: int) -> None:
    bins = Bins(groups, 16)
    for batch in batches:
        bins.add(torch.tensor([batch] * groups))
    data = torch.tensor([v for batch in batches for v in batch])
    negative = int((data < 0).sum())
    near = int(((data < 0) & (data > -1e-6 * bins.limit[0])).sum())  # in float32 these may be taken for 0
    beyond = (bins.centres()[0].abs() <= float(data.abs().max()) + float(bins.width[0])).double()

    assert float(bins.limit.min()) >= float(data.abs().max())
    assert bins.counts.sum(1).tolist() == [float(len(data))] * groups
    assert all(negative - near <= n <= negative for n in bins.counts[:, :16].sum(1).tolist())
    assert float((bins.counts[0] * beyond).sum()) == float(len(data))
    assert torch.equal(bins.magnitudes().sum(1), bins.counts.sum(1))


@pytest.mark.parametrize("grow", [2.0, 3.0, 100.0])
def test_bins_that_grew_count_as_bins_that_were_wide_at_once(grow: float) -> None:
    x = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    x /= x.abs().amax(1, keepdim=True)
    grown, wide = Bins(2, 64), Bins(2, 64)
    grown.add(x)
    grown.add(grow * x)
    wide.limit.copy_(grown.limit)
    wide.add(x)
    wide.add(grow * x)

    # Numbers on the edge of a bin may be a bin away.
    assert float((grown.counts.cumsum(1) - wide.counts.cumsum(1)).abs().max()) <= 2


# --- ranges taken again without data -------------------------------------------------------------------------------


def histogram_model(method: str) -> Any:
    options = {"method": method, "percentile": 99.0}
    wish = get_default_qconfig(activation_observer="histogram", activation_qkwargs=options)
    return calibrate(prepare(small(), pixels(2), everywhere(wish)), pixels(), 2.0 * pixels(seed=2))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_scale_can_be_reset_without_data(method: str) -> None:
    model, expected = histogram_model("min_max"), histogram_model(method)
    reset_scale(model, method, percentile=99.0)

    assert torch.equal(validated(model, pixels()), validated(expected, pixels()))


def test_a_scale_is_reset_where_the_name_begins_as_asked() -> None:
    model = histogram_model("min_max")
    before = {path: q.step().clone() for path, q in model.quantizers}
    reset_scale(model, "percentile", percentile=90.0, prefix="head")
    moved = {path for path, q in model.quantizers if not torch.equal(q.step(), before[path])}

    assert moved
    assert all(path.startswith("head") for path in moved)


def test_a_reset_without_histograms_or_data_says_what_to_do() -> None:
    model = calibrate(prepare(small(), pixels(2)), pixels())

    with pytest.raises(PlanError, match='activation_observer="histogram"'):
        reset_scale(model)
    with pytest.raises(UnknownName, match="method of a histogram"):
        reset_scale(histogram_model("min_max"), "mean")
