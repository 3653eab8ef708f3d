"""Look-up tables: every code of every function against the formulas of docs/numerics.md §9, written down again here."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.test_affine import exact_round
from tests.unit.table_cases import FUNCTIONS, TURN, output_range, qparams
from torch import Tensor

from bitwright.numerics.dtype import INT8, INT16, UINT8, UINT16, DType
from bitwright.numerics.lut import (
    DirectTable,
    LookupTable,
    PeriodicTable,
    RegularTable,
    SegmentTable,
    TableSettings,
    build_table,
)
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QParams, QuantSpec

Codes = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]
ROUNDINGS = list(Rounding)


def rounded(y: Reals, rounding: Rounding) -> Codes:
    """Reals to integers; ties as defined."""
    down = np.floor(y)
    tie = y - down == 0.5
    up = {
        Rounding.HALF_EVEN: down % 2 == 1,
        Rounding.HALF_UP: np.ones_like(tie),
        Rounding.HALF_AWAY: y > 0,
    }[rounding]
    return np.asarray(np.where(tie, down + up, np.floor(y + 0.5)), dtype=np.int64)


def rounded_quotient(y: Codes, shift: int, rounding: Rounding) -> Codes:
    """y / 2^shift: exact in float64 here, because abs(y) < 2^53."""
    assert np.abs(y).max() < 2**53
    return rounded(y / 2.0**shift, rounding)


def real_inputs(q: QParams) -> Reals:
    d = q.spec.dtype
    return (np.arange(d.qmin, d.qmax + 2) - q.zero_point[0]) * q.scale[0]


def held_outputs(name: str, q_in: QParams, q_out: QParams) -> Reals:
    """The function in output codes minus the zero point at all codes and one beyond; where it is not finite, the nearest finite one."""
    y = FUNCTIONS[name][0](torch.from_numpy(real_inputs(q_in))).numpy() / q_out.scale[0]
    u, finite = np.arange(len(y)), np.isfinite(y)
    before = np.maximum.accumulate(np.where(finite, u, -(10**6)))
    after = np.minimum.accumulate(np.where(finite, u, 10**6)[::-1])[::-1]
    return np.asarray(y[np.where(after - u <= u - before, after, before)])


def all_codes(table: LookupTable) -> Codes:
    d = table.q_in.spec.dtype
    codes = torch.arange(d.qmin, d.qmax + 1).to(d.storage)
    found = table.lookup(codes)
    assert found.dtype is table.q_out.spec.dtype.storage
    return found.to(torch.int64).numpy()


def clamped(codes: Codes, q: QParams) -> Codes:
    return np.clip(codes, q.spec.dtype.qmin, q.spec.dtype.qmax)


def pairs(
    name: str, dtypes: tuple[DType, DType], rounding: Rounding, *, symmetric: bool = True
) -> tuple[QParams, QParams]:
    _, lo, hi = FUNCTIONS[name]
    q_in = qparams(dtypes[0], lo, hi, symmetric=symmetric)
    return q_in, qparams(dtypes[1], *output_range(name), symmetric=symmetric, rounding=rounding)


@pytest.mark.parametrize("dtypes", [(INT8, INT8), (UINT8, UINT8), (INT8, INT16)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_direct_table_is_the_rounded_function(
    name: str, symmetric: bool, dtypes: tuple[DType, DType]
) -> None:
    for rounding in ROUNDINGS if len(name) < 5 else ROUNDINGS[:1]:
        q_in, q_out = pairs(name, dtypes, rounding, symmetric=symmetric)
        y = held_outputs(name, q_in, q_out)[:-1]
        expected = clamped(rounded(np.clip(y, -1e6, 1e6), rounding) + q_out.zero_point[0], q_out)

        table = build_table(FUNCTIONS[name][0], q_in, q_out)
        assert isinstance(table, DirectTable)
        assert (all_codes(table) == expected).all()


def entry_bits(q_out: QParams) -> tuple[int, int]:
    """(fraction bits, code of entry 0) as §9.3 tells them."""
    d, z = q_out.spec.dtype, q_out.zero_point[0]
    fits = [e for e in range(17 - d.bits) if (d.qmin - z) * 2**e >= -32768 and (d.qmax - z) * 2**e <= 32767]
    return (max(fits), z) if fits else (0, d.qmin + 32768)


def entries_at(nodes: Codes, values: Reals, q_out: QParams) -> Codes:
    bits, offset = entry_bits(q_out)
    exact = (values[nodes] + (q_out.zero_point[0] - offset)) * 2.0**bits
    return np.clip(rounded(np.clip(exact, -1e9, 1e9), q_out.spec.rounding), -32768, 32767)


def interpolated(u: Codes, step: Codes, values: Reals, q_out: QParams) -> Codes:
    """Output codes at offset codes u, the entries at the multiples of step around them."""
    bits, offset = entry_bits(q_out)
    low = u // step * step
    a, b = entries_at(low, values, q_out), entries_at(low + step, values, q_out)
    y = a * 1024 + (b - a) * (u - low) * (1024 // step)
    assert np.abs(y).max() < 2**31
    return clamped(rounded_quotient(y, 10 + bits, q_out.spec.rounding) + offset, q_out)


#: int16 both, and one of four other pairs for each function.
OTHERS = [(INT16, INT8), (INT16, UINT8), (UINT16, UINT16), (UINT16, INT8)]
WIDE = [(name, dtypes) for i, name in enumerate(FUNCTIONS) for dtypes in ((INT16, INT16), OTHERS[i % 4])]


@pytest.mark.parametrize("name, dtypes", WIDE, ids=str)
def test_a_regular_table_has_513_entries_and_lines_between(name: str, dtypes: tuple[DType, DType]) -> None:
    rounding = ROUNDINGS[len(name) % 3]
    q_in, q_out = pairs(name, dtypes, rounding, symmetric=len(name) % 2 == 0)
    values = held_outputs(name, q_in, q_out)
    u = np.arange(65536)
    expected = interpolated(u, np.full_like(u, 128), values, q_out)

    table = build_table(FUNCTIONS[name][0], q_in, q_out, TableSettings(form="regular"))
    assert isinstance(table, RegularTable)
    assert table.entries.shape == (513,)
    assert (all_codes(table) == expected).all()


def steps_of(table: SegmentTable) -> Codes:
    """Entry spacing, in codes, at every offset code, from the boundaries alone."""
    steps = np.zeros(65536, np.int64)
    for a, b in zip(table.boundaries, table.boundaries[1:], strict=False):
        first, last = a * 64, b * 64 - 1
        steps[first : last + 1] = next(2**k for k in range(11) if last // 2**k - first // 2**k + 1 <= 64)
    return steps


@pytest.mark.parametrize("name, dtypes", WIDE, ids=str)
def test_a_segment_table_interpolates_at_its_own_spacings(name: str, dtypes: tuple[DType, DType]) -> None:
    rounding = ROUNDINGS[(len(name) + 1) % 3]
    q_in, q_out = pairs(name, dtypes, rounding, symmetric=len(name) % 2 == 0)
    values = held_outputs(name, q_in, q_out)
    finite = np.flatnonzero(np.isfinite(FUNCTIONS[name][0](torch.from_numpy(real_inputs(q_in)[:-1])).numpy()))

    for strategy, count in (("evenly", 1), ("curvature", 6), ("mix", 25)):
        made = TableSettings(strategy=strategy, num_tables=count)
        table = build_table(FUNCTIONS[name][0], q_in, q_out, made)
        assert isinstance(table, SegmentTable)
        assert len(table.boundaries) == count + 1
        # Beyond where the function is finite, the last value is held.
        u = np.clip(np.arange(65536), finite[0], finite[-1])
        expected = interpolated(u, steps_of(table)[u], values, q_out)
        assert (all_codes(table) == expected).all()


@pytest.mark.parametrize("name", ["sigmoid", "exp", "reciprocal", "decode"])
def test_outside_the_range_run_straight_lines(name: str) -> None:
    q_in, q_out = pairs(name, (INT16, INT16), Rounding.HALF_UP)
    _, lo, hi = FUNCTIONS[name]
    inner = (lo + 0.3 * (hi - lo), lo + 0.6 * (hi - lo))
    gradients = (0.25 * output_range(name)[1] / hi if hi else 0.1, -0.003)
    made = TableSettings(input_range=inner, gradients=gradients, num_tables=5, strategy="curvature")
    table = build_table(FUNCTIONS[name][0], q_in, q_out, made)
    assert isinstance(table, SegmentTable)

    found, x = all_codes(table), real_inputs(q_in)[:-1]
    inside = np.flatnonzero((x >= inner[0]) & (x <= inner[1]))
    ends = inside[[0, -1]]
    for u, end, gradient in (
        (np.arange(ends[0]), ends[0], gradients[0]),
        (np.arange(ends[1] + 1, 65536), ends[1], gradients[1]),
    ):
        line = found[end] + (x[u] - x[end]) * gradient / q_out.scale[0]
        assert np.abs(found[u] - np.clip(line, -32768, 32767)).max() <= 1.01
    assert np.abs(found[inside] - held_outputs(name, q_in, q_out)[inside]).max() <= 3
    assert (found[ends[0] :] != found[ends[0]]).any()


@pytest.mark.parametrize("form, q_in", [("direct", qparams(INT8, -4, 4)), ("regular", qparams(INT16, -4, 4))])
def test_tables_without_segments_hold_the_lines_themselves(form: str, q_in: QParams) -> None:
    q_out = qparams(INT16, -1, 1)
    made = TableSettings(form=form, input_range=(-1.0, 1.0), gradients=(0.0, 0.05))
    table, x = build_table(torch.tanh, q_in, q_out, made), real_inputs(q_in)[:-1]
    inside = np.flatnonzero((x >= -1.0) & (x <= 1.0))[[0, -1]]
    line = np.tanh(x[inside[1]]) + (x - x[inside[1]]) * 0.05
    margin = 0.0 if form == "direct" else 128 * q_in.scale[0]
    right = x > x[inside[1]] + margin

    assert np.abs(all_codes(table)[right] - line[right] / q_out.scale[0]).max() <= 1.5
    assert len(set(all_codes(table)[x < x[inside[0]] - margin])) == 1


def test_without_gradients_the_lines_go_on_as_the_function_ends() -> None:
    q_in, q_out = pairs("exp", (INT16, INT16), Rounding.HALF_EVEN)
    table = build_table(torch.exp, q_in, q_out, TableSettings(input_range=(-2.0, -1.0)))
    x = real_inputs(q_in)[:-1]
    outside = (x > -1.0) & (x < -0.9)
    line = np.exp(-1.0) * (1 + (x[outside] + 1)) / q_out.scale[0]

    assert np.abs(all_codes(table)[outside] - line).max() < 0.01 / q_out.scale[0] * 0.1


@pytest.mark.parametrize(
    "name, mode",
    [("tanh", "odd"), ("sin", "odd"), ("erf", "odd"), ("atan", "odd"), ("cosh", "even"), ("cos", "even")],
)
def test_half_a_table_serves_both_signs(name: str, mode: str) -> None:
    for rounding in ROUNDINGS:
        q_in, q_out = pairs(name, (INT16, INT16), rounding)
        made = TableSettings(symmetric_mode=mode, strategy="mix")
        table = build_table(FUNCTIONS[name][0], q_in, q_out, made)
        assert isinstance(table, SegmentTable)
        u = np.arange(32768, 65536)
        values = held_outputs(name, q_in, q_out)
        bits, _ = entry_bits(q_out)
        found = all_codes(table)

        assert table.boundaries[0] == 512
        assert (found[32768:] == interpolated(u, steps_of(table)[u], values, q_out)).all()
        if mode == "even":
            assert (found[1:32768] == found[:32768:-1]).all()
        else:
            step = steps_of(table)[u]
            low = u // step * step
            a, b = entries_at(low, values, q_out), entries_at(low + step, values, q_out)
            y = -(a * 1024 + (b - a) * (u - low) * (1024 // step))
            expected = clamped(rounded_quotient(y, 10 + bits, rounding), q_out)
            assert (found[1:32768] == expected[:0:-1]).all()
        assert found[0] == found[1]
        plain = build_table(FUNCTIONS[name][0], q_in, q_out, replace(made, symmetric_mode="none"))
        assert table.error(FUNCTIONS[name][0])[1] <= plain.error(FUNCTIONS[name][0])[1] * 1.05


@pytest.mark.parametrize("name", ["sin", "cos"])
@pytest.mark.parametrize("reach", [0.5, 40.0, 3000.0])
def test_one_period_serves_all_inputs(name: str, reach: float) -> None:
    function = FUNCTIONS[name][0]
    q_in, q_out = qparams(INT16, -reach, reach), qparams(INT16, -1, 1)
    table = build_table(function, q_in, q_out, TableSettings(period=TURN, num_tables=16))
    assert isinstance(table, PeriodicTable)
    multiplier = round(q_in.scale[0] / TURN * 2**44) % 2**44
    assert abs(table.multiplier - multiplier) <= 1
    entries = [int(t) for t in table.entries]
    assert len(entries) == 1025

    expected = []
    for code in range(-32768, 32768, 37):
        phase = (code * table.multiplier % 2**44) // 2**18
        i, rest = divmod(phase, 2**16)
        y = entries[i] * 2**16 + (entries[i + 1] - entries[i]) * rest
        expected.append(max(-32768, min(32767, round(y / 2**16))))
    assert all_codes(table)[::37].tolist() == expected
    assert table.error(function)[0] < 1.3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["direct", "regular", "segment"])
def test_finite_values_beyond_float64_in_steps_are_finite_values(form: str) -> None:
    """exp(655) / 1e-30 overflows: that was a RuntimeWarning, and an error that the function is not finite there."""
    q_in = qparams(INT8 if form == "direct" else INT16, -655, 655)
    q_out = QParams(QuantSpec(INT8, True), (1e-30,), (0,))
    settings_ = TableSettings(form=form, num_tables=252, input_range=(-655, 654), gradients=(0.0, 1e300))
    n = 1 << q_in.spec.dtype.bits

    table = build_table(torch.exp, q_in, q_out, settings_, weights=np.eye(1, n, n - 1)[0])

    codes = torch.tensor([q_in.spec.dtype.qmin, -n // 4, -1, 0, 1, n // 4, q_in.spec.dtype.qmax])
    assert table.lookup(codes).tolist() == [0, 0, 127, 127, 127, 127, 127]
    assert np.isfinite(table.error(torch.exp)).all()


def test_published_check_vectors_of_sigmoid_and_silu() -> None:
    spec = QuantSpec(INT8, True, rounding=Rounding.HALF_AWAY)
    unsigned = QuantSpec(UINT8, True, rounding=Rounding.HALF_AWAY)
    sigmoid = build_table(torch.sigmoid, QParams(spec, (8 / 127,), (0,)), QParams(unsigned, (1 / 255,), (0,)))
    six = QParams(spec, (6 / 127,), (0,))
    silu = build_table(torch.nn.functional.silu, six, six)

    codes = torch.tensor([-128, -64, -20, -1, 0, 1, 64, 127])
    assert sigmoid.lookup(codes[[0, 1, 3, 4, 5, 6, 7]]).tolist() == [0, 4, 123, 128, 132, 251, 255]
    assert int(sigmoid.results.sum()) == 32513
    assert silu.lookup(codes).tolist() == [0, -3, -6, 0, 0, 1, 61, 127]
    assert int(silu.results.sum()) == 7400
    assert int(silu.results.min()) == -6


def test_lookup_takes_any_shape_and_integer_type() -> None:
    q_in, q_out = pairs("tanh", (INT16, INT8), Rounding.HALF_EVEN)
    table = build_table(torch.tanh, q_in, q_out)
    codes = torch.randint(-32768, 32768, (3, 1, 5, 2), generator=torch.Generator().manual_seed(0))

    for dtype in (torch.int16, torch.int32, torch.int64):
        found = table.lookup(codes.to(dtype))
        assert found.shape == codes.shape
        assert (found == table.compute(codes)).all()
    assert table.lookup(torch.empty(0, dtype=torch.int16)).shape == (0,)


def test_interpolation_between_the_extreme_entries_fits_int32() -> None:
    extremes = np.array([-32768, 32767])
    for k in range(11):
        r = np.arange(2**k)
        for a in extremes:
            for b in extremes:
                wide = a * 1024 + (b - a) * (r << (10 - k)) + 2**21
                narrow = (
                    np.int32(a) * np.int32(1024)
                    + np.int32(b - a) * (r << (10 - k)).astype(np.int32)
                    + np.int32(2**21)
                )
                assert narrow.dtype == np.int32
                assert (wide == narrow).all()


def objective_weights(seen: Reals | None) -> Reals:
    uniform = np.full(65536, 1 / 65536)
    return uniform if seen is None else seen / seen.sum() * 0.999 + uniform * 0.001


def rms(name: str, q: tuple[QParams, QParams], made: TableSettings, seen: Reals | None) -> float:
    table = build_table(FUNCTIONS[name][0], *q, made, weights=seen)
    return table.error(FUNCTIONS[name][0], weights=objective_weights(seen))[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_optimal_is_never_worse_in_its_own_objective(name: str) -> None:
    q = pairs(name, (INT16, INT16), Rounding.HALF_EVEN)
    known = np.isfinite(FUNCTIONS[name][0](torch.from_numpy(real_inputs(q[0])[:-1])).numpy())
    x = real_inputs(q[0])[:-1]
    _, lo, hi = FUNCTIONS[name]
    bell = np.exp(-(((x - (lo + hi) / 2) / (hi - lo) * 6) ** 2)) * known
    for seen, count in ((None, 6), (bell, 6)) if len(name) % 2 else ((bell, 4), (None, 13)):
        # All codes count in the uniform floor but those where there is no function.
        best = rms(name, q, TableSettings(num_tables=count), seen)
        for strategy in ("evenly", "curvature", "mix"):
            other = rms(name, q, TableSettings(strategy=strategy, num_tables=count), seen)
            assert best <= other * (1 + 1e-9)


@pytest.mark.parametrize("count", [1, 2, 24, 126])
@pytest.mark.parametrize("name", ["exp", "reciprocal"])
def test_more_segments_are_never_worse_than_any_strategy(name: str, count: int) -> None:
    q = pairs(name, (INT16, INT16), Rounding.HALF_EVEN)
    best = rms(name, q, TableSettings(num_tables=count), None)

    for strategy in ("evenly", "curvature", "mix"):
        assert best <= rms(name, q, TableSettings(strategy=strategy, num_tables=count), None) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.0, 3.0), min_size=3, max_size=6),
    st.floats(1e-4, 10.0),
    st.integers(-32768, 32767),
    st.sampled_from([INT8, UINT8, INT16]),
    st.integers(1, 12),
    st.sampled_from(ROUNDINGS),
)
def test_any_rising_function_stays_rising_in_a_segment_and_within_its_bound(
    slopes: list[float], scale: float, zero: int, out: DType, count: int, rounding: Rounding
) -> None:
    """Piecewise linear, random."""
    knots = torch.linspace(-1, 1, len(slopes) + 1, dtype=torch.float64)
    kinks = torch.tensor(slopes, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        t = x / (65536 * scale) - knots[0]
        return (
            sum((t - (knot + 1)).clamp(min=0) * rise for knot, rise in zip(knots, kinks, strict=False))
            + t * 0.0
        )

    q_in = QParams(QuantSpec(INT16, False), (scale,), (zero,))
    reals = function(torch.from_numpy(real_inputs(q_in)))
    q_out = qparams(out, 0.0, max(float(reals.max()), 1e-4), symmetric=out is INT16, rounding=rounding)
    table = build_table(function, q_in, q_out, TableSettings(strategy="mix", num_tables=count))
    codes = all_codes(table)

    # Where two spacings meet, a code may step back by what the wider one errs.
    inside = np.diff(np.concatenate([[-1], steps_of(table)]))[1:] == 0
    assert (np.diff(codes)[inside] >= 0).all()
    # Kinks in the middle of the widest interval: h · (sum of rises) / 4, in output steps, and the roundings of entry and output.
    widest = steps_of(table).max() / 65536
    bound = widest * sum(slopes) / 4 / q_out.scale[0] + 1.01
    assert table.error(function)[0] <= bound


def test_the_rounding_of_this_file_is_that_of_exact_fractions() -> None:
    y = np.arange(-40, 41) / 8.0
    for rounding in ROUNDINGS:
        assert rounded(y, rounding).tolist() == [exact_round(Fraction(v), rounding) for v in y]
