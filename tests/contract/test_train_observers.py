"""What every observer of training must do, whoever wrote it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import NumericsError, UnknownName
from bitwright.numerics.affine import fake_quantize, qparams_from_range
from bitwright.numerics.dtype import INT4, INT8, UINT8
from bitwright.numerics.spec import QuantSpec
from bitwright.numerics.thresholds import kl_of_samples, octav_of_samples, percentile_of_samples
from bitwright.train import fake_quants, observers
from bitwright.train.fake_quants import FAKE_QUANTS
from bitwright.train.observers import OBSERVERS, Observer, make_observer, observer_options

#: What cannot be left out.
NEEDED: dict[str, dict[str, Any]] = {"fixed_scale": {"scale": 0.03}, "clip": {"high": 2.0, "low": -1.5}}
#: Those whose range is that of all data, of constants, or of one batch.
CUMULATIVE, CONSTANT = ("histogram", "kl"), ("fixed_scale",)
PER_BATCH = sorted(set(OBSERVERS) - {*CUMULATIVE, *CONSTANT})
SYMMETRIC, ASYMMETRIC = QuantSpec(INT8, True), QuantSpec(UINT8, False)
every_observer = pytest.mark.parametrize("name", sorted(OBSERVERS))
every_batch_observer = pytest.mark.parametrize("name", PER_BATCH)
every_spec = pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])


def observer(name: str, spec: QuantSpec = SYMMETRIC, groups: int = 1, **options: Any) -> Observer:
    return make_observer(name, spec, groups, {**NEEDED.get(name, {}), **options})


def normal(groups: int = 1, n: int = 5000, seed: int = 0) -> Tensor:
    """`[groups, n]`, each group twice as wide as the one before."""
    x = torch.randn(groups, n, generator=torch.Generator().manual_seed(seed))
    return x * 2.0 ** torch.arange(groups)[:, None]


def laplace() -> Tensor:
    """`[1, 20_000]`."""
    return torch.from_numpy(np.random.default_rng(0).laplace(0, 1, (1, 20_000)).astype(np.float32))


def ends(found: Observer) -> Tensor:
    """`[2, groups]`."""
    return torch.stack([found.lo, found.hi])


@pytest.mark.parametrize("package, registry", [(observers, OBSERVERS), (fake_quants, FAKE_QUANTS)])
def test_every_file_registers_what_its_name_says_and_nothing_else(package: Any, registry: Any) -> None:
    files = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__"}

    assert files == set(registry)


# --- ranges ------------------------------------------------------------------------------------------------------


@every_batch_observer
@every_spec
@settings(max_examples=40, deadline=None)
@given(data=st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=60))
def test_a_range_lies_within_the_data_and_zero(name: str, spec: QuantSpec, data: list[float]) -> None:
    found = observer(name, spec)
    found(torch.tensor([data]))
    lo, hi = ends(found).flatten().tolist()

    assert min(*data, 0.0) <= lo <= max(*data, 0.0)
    assert min(*data, 0.0) <= hi <= max(*data, 0.0)


@every_observer
@every_spec
def test_all_zeros_are_a_range(name: str, spec: QuantSpec) -> None:
    found = observer(name, spec)
    found(torch.zeros(1, 20))

    assert found.has_range
    assert name in CONSTANT or torch.equal(ends(found), torch.zeros(2, 1))


@every_observer
def test_an_empty_batch_tells_nothing(name: str) -> None:
    found = observer(name)
    found(torch.zeros(1, 0))

    assert found.has_range is (name in CONSTANT)


@every_observer
@every_spec
def test_groups_do_not_see_each_other(name: str, spec: QuantSpec) -> None:
    x = normal(3)
    together = observer(name, spec, 3)
    together(x)
    for i in range(3):
        alone = observer(name, spec)
        alone(x[i : i + 1])
        # One group is counted by another function than several: numbers on the edge of a bin may change sides.
        width = float(x[i].abs().max()) / (512 if name == "kl" else 2048)

        assert float((ends(together)[:, i] - ends(alone)[:, 0]).abs().max()) <= width


@every_observer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_batch_that_is_not_finite_tells_nothing(name: str, bad: float) -> None:
    found, other = observer(name), observer(name)
    for x in (normal(), normal(seed=1)):
        found(x)
        other(x)
        spoiled = x.clone()
        spoiled[0, 0] = bad
        found(spoiled)
    only_bad = observer(name)
    only_bad(torch.full((1, 4), bad))
    only_bad(normal())

    assert bool(ends(found).isfinite().all())
    assert bool(ends(only_bad).isfinite().all())


# --- steps -------------------------------------------------------------------------------------------------------


@every_batch_observer
def test_the_first_steps_are_averaged(name: str) -> None:
    batches, found = [normal(seed=i) * (i + 1) for i in range(3)], observer(name, averaging_constant=0.01)
    for x in batches:
        found(x)
    alone = []
    for x in batches:
        alone.append(observer(name))
        alone[-1](x)
    expected = torch.stack([ends(o) for o in alone]).mean(0)

    assert int(found.steps) == 3
    torch.testing.assert_close(ends(found), expected)


@every_batch_observer
def test_later_steps_count_with_the_averaging_constant(name: str) -> None:
    found = observer(name, averaging_constant=0.5)
    for _ in range(4):
        found(normal())
    before = ends(found).clone()
    found(0.5 * normal())
    alone = observer(name)
    alone(0.5 * normal())

    torch.testing.assert_close(ends(found), 0.5 * (before + ends(alone)))


@every_batch_observer
def test_a_constant_of_one_follows_the_last_batch(name: str) -> None:
    found, last = observer(name, averaging_constant=1.0), observer(name)
    for x in (3.0 * normal(), normal(seed=1)):
        found(x)
    last(normal(seed=1))

    torch.testing.assert_close(ends(found), ends(last))


@every_observer
def test_a_constant_of_zero_keeps_the_first_range(name: str) -> None:
    found = observer(name, averaging_constant=0.0)
    found(normal())
    before = copy.deepcopy(found.state_dict())
    found(5.0 * normal(seed=1))

    assert all(torch.equal(t, before[key]) for key, t in found.state_dict().items())


@every_observer
def test_a_checkpoint_brings_everything_back(name: str) -> None:
    found, resumed = observer(name), observer(name)
    found(normal())
    resumed.load_state_dict(copy.deepcopy(found.state_dict()))
    for o in (found, resumed):
        o(normal(seed=1) * 1.5)

    assert resumed.state_dict().keys() == found.state_dict().keys()
    assert all(torch.equal(t, resumed.state_dict()[key]) for key, t in found.state_dict().items())


@every_observer
@every_spec
def test_half_precision_is_seen_as_float32(name: str, spec: QuantSpec) -> None:
    found, expected = observer(name, spec), observer(name, spec)
    found(normal().bfloat16())
    expected(normal().bfloat16().float())

    assert torch.equal(ends(found), ends(expected))


# --- options -----------------------------------------------------------------------------------------------------


@every_observer
def test_an_unknown_option_names_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownName, match=rf"observer '{name}'.*averaging_constant.*found 'percentil'"):
        observer(name, percentil=99.0)
    assert "averaging_constant" in observer_options(name)


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {"averaging_constant": c}) for name in PER_BATCH for c in (-0.1, 1.5, float("nan"))),
        *(("percentile", {"percentile": p}) for p in (0.0, 101.0, float("nan"))),
        *(("percentile", {"bins": n}) for n in (0, -4, 7)),
        *(("histogram", options) for options in ({"update_interval": 0}, {"bins": 3})),
        *(("clip", options) for options in ({"low": 1.0}, {"high": -1.0}, {"low": 0.0, "high": 0.0})),
        *(("clip_std", {"std_scale": s}) for s in (0.0, -1.0, float("nan"))),
        *(("mse", {"stride": s}) for s in (0, 51)),
        ("mix", {"percentiles": (99.0, 0.0)}),
        *(("fixed_scale", {"scale": s}) for s in (0.0, -1.0, float("inf"), float("nan"))),
        ("fixed_scale", {"threshold": 1.0}),
        ("fixed_scale", {"zero_point": 3}),
    ],
)
def test_an_impossible_parameter_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(NumericsError, match="expected"):
        observer(name, **options)


def test_a_clip_without_limits_and_a_scale_without_a_number_are_refused() -> None:
    for name in ("clip", "fixed_scale"):
        with pytest.raises(NumericsError, match=f"observer '{name}'"):
            make_observer(name, SYMMETRIC, 1, {})


def test_an_unknown_method_of_a_histogram_is_explained() -> None:
    with pytest.raises(UnknownName, match="kl, min_max, mse, percentile"):
        observer("histogram", method="mean")


# --- against the definitions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_a_percentile_is_that_of_the_samples(percent: float) -> None:
    x = normal(n=20_000)
    found = observer("percentile", percentile=percent)
    found(x)
    ordered = x.abs().flatten().sort().values
    k = int(percent / 100.0 * len(ordered))
    # Within a bin the distribution is taken for uniform: off by one bin, and the gap to the neighbouring samples.
    tolerance = float(ordered[-1]) / 2048 + float(ordered[k + 1] - ordered[k - 2])

    assert float(found.hi) == pytest.approx(percentile_of_samples(x.numpy(), percent), abs=tolerance)


def squared_error(x: Tensor, spec: QuantSpec, lo: float, hi: float) -> float:
    return float((fake_quantize(x, qparams_from_range(spec, [lo], [hi])) - x).square().mean())


@pytest.mark.parametrize("dtype", [INT4, INT8])
def test_the_least_squared_error_is_nearly_that_of_octav(dtype: Any) -> None:
    spec, x = QuantSpec(dtype, True), laplace()
    found = observer("mse", spec)
    found(x)
    best = octav_of_samples(x.numpy(), dtype.bits)

    # The minimum is flat: a hundredth of the range beside it costs a few percent.
    assert squared_error(x, spec, float(found.lo), float(found.hi)) <= 1.05 * squared_error(
        x, spec, -best, best
    )


@pytest.mark.parametrize("dtype", [INT4, INT8])
def test_mix_takes_the_percentile_of_least_squared_error(dtype: Any) -> None:
    spec, x, percentiles = QuantSpec(dtype, True), laplace(), (90.0, 97.0, 99.0, 99.9, 100.0)
    found, errors = observer("mix", spec, percentiles=percentiles), []
    found(x)
    for percent in percentiles:
        alone = observer("percentile", spec, percentile=percent)
        alone(x)
        errors.append(squared_error(x, spec, float(alone.lo), float(alone.hi)))

    # It goes by the expected error of rounding, step² / 12.
    assert squared_error(x, spec, float(found.lo), float(found.hi)) <= 1.05 * min(errors)


def test_the_kl_threshold_is_that_of_the_samples() -> None:
    x = laplace()
    found = observer("kl", bins=2048)
    found(x)
    # The definition centres its bins on multiples of a width; ours begin there. Candidates lie 128 bins apart.
    width = float(x.abs().max()) / 2047

    assert float(found.hi) == pytest.approx(kl_of_samples(x.numpy()), abs=128.5 * width)


def test_a_clip_keeps_to_its_limits_and_clip_std_to_its_deviations() -> None:
    clip, std = observer("clip", low=-1.0, high=2.0), observer("clip_std", std_scale=2.0)
    x = normal()
    for o in (clip, std):
        o(x)

    assert ends(clip).flatten().tolist() == [-1.0, 2.0]
    expected = torch.stack([x.mean() - 2 * x.std(correction=0), x.mean() + 2 * x.std(correction=0)])
    torch.testing.assert_close(ends(std).flatten(), expected)
