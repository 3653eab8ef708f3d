"""Division into segments against brute force, and what is refused (docs/numerics.md §9.5, §9.6)."""

from __future__ import annotations

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from table_cases import TURN, qparams

from bitwright.errors import NumericsError, UnknownName
from bitwright.numerics.dtype import INT8, INT16
from bitwright.numerics.lut import SegmentTable, TableSettings, build_table, usable_range
from bitwright.numerics.segments import SLACK, WIDEST, CellErrors, by_density, curvature, optimal, spacing
from bitwright.numerics.spec import QParams, QuantSpec

WIDE = qparams(INT16, -4, 4)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("seed", range(5))
def test_optimal_finds_what_trying_all_divisions_finds(seed: int, start: int) -> None:
    rng = np.random.default_rng(seed)
    # Errors grow with the spacing, in each cell by its own law.
    squared = (
        rng.lognormal(0, 2, (1, 12)) * 4.0 ** np.arange(WIDEST + 1)[:, None] * rng.random((WIDEST + 1, 12))
    )
    largest = np.sqrt(squared) * rng.uniform(1, 3, squared.shape)
    errors = CellErrors(squared, largest, start)
    for count in range(1, 7):
        tried = []
        for fewer in range(count):
            for inner in combinations(range(1, 12), fewer):
                ends = (0, *inner, 12)
                parts = [(a, b, spacing(a + start, b + start)) for a, b in pairwise(ends)]
                total = sum(squared[k, a:b].sum() for a, b, k in parts)
                tried.append((total, max(largest[k, a:b].max() for a, b, k in parts)))
        least = min(t for t, _ in tried)

        total, top = errors.of(optimal(errors, count))
        assert total <= least * (1 + SLACK) * (1 + 1e-12)
        first_of_least = min(m for t, m in tried if t <= least * (1 + 1e-12))
        assert top <= first_of_least * (1 + 1e-12)
        rivals = (by_density(np.ones(12), start, count),)
        assert errors.of(optimal(errors, count, rivals))[0] <= errors.of(rivals[0])[0] * (1 + 1e-12)


def test_a_spacing_is_the_least_with_64_intervals_on_the_global_grid() -> None:
    assert spacing(0, 1) == 0
    assert spacing(5, 6) == 0
    assert spacing(0, 2) == 1
    assert spacing(1, 4) == 2
    # 64 cells in a row, but not from a multiple of 64 on: 65 intervals of 64 codes would be needed.
    assert spacing(0, 64) == 6
    assert spacing(1, 65) == 6
    assert spacing(1, 1024) == 10
    assert spacing(0, 1024) == 10


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_a_density_is_cut_into_equal_parts_of_one_cell_at_least(count: int) -> None:
    assert by_density(np.ones(40), 100, count)[:: max(count, 1)] == (100, 140)
    spike = np.zeros(40)
    spike[39] = 1.0
    cut = by_density(spike, 0, count)
    assert len(cut) == count + 1
    assert all(a < b for a, b in pairwise(cut))
    assert by_density(np.arange(40.0), 0, 2)[1] == 28


def test_curvature_of_a_parabola_is_even() -> None:
    assert np.ptp(curvature(np.arange(9.0) ** 2)) == 0
    assert np.array_equal(curvature(np.arange(4.0)), np.zeros(3))
    assert np.array_equal(curvature(np.arange(2.0)), np.ones(1))


def test_manual_points_are_the_last_inputs_of_segments() -> None:
    made = TableSettings(strategy="manual", dividing_points=(-2.0, 0.0, 0.001, 3.0, 9.0))
    table = build_table(torch.tanh, WIDE, qparams(INT16, -1, 1), made)

    assert isinstance(table, SegmentTable)
    assert table.boundaries == (0, 256, 512, 896, 1024)


def test_a_range_of_few_cells_has_no_more_segments_than_cells() -> None:
    made = TableSettings(input_range=(0.0, 0.02), num_tables=50)
    table = build_table(torch.tanh, WIDE, qparams(INT16, -1, 1), made)

    assert isinstance(table, SegmentTable)
    assert 2 <= len(table.boundaries) <= 4
    assert (table.first, table.last) == (32768, 32768 + int(0.02 / WIDE.scale[0]))


def test_lines_are_there_only_where_a_code_may_lie_on_a_sloped_one() -> None:
    q_out = qparams(INT16, -10, 10)
    half = TableSettings(input_range=(-1.0, 1.0))
    held = TableSettings(input_range=(-1.0, 1.0), gradients=(0.0, 0.0))
    tables = [build_table(torch.tanh, WIDE, q_out, made) for made in (TableSettings(), half, held)]
    # The logarithm is held at the codes that are not positive.
    tables.append(build_table(torch.log, WIDE, q_out))

    assert [t.has_lines for t in tables if isinstance(t, SegmentTable)] == [False, True, False, False]
    assert len(set(tables[3].results[:32769].tolist())) == 1


def test_weights_decide_where_entries_are_dense() -> None:
    q_out = qparams(INT16, 0, 10)
    low, high = np.zeros(65536), np.zeros(65536)
    low[33000:36000], high[50000:65536] = 1, 1
    tables = [build_table(torch.sqrt, WIDE, q_out, weights=w) for w in (low, high)]

    for weights, mine, other in ((low, *tables), (high, *reversed(tables))):
        assert mine.error(torch.sqrt, weights=weights)[1] < other.error(torch.sqrt, weights=weights)[1]


def test_settings_survive_json() -> None:
    for made in (
        TableSettings(),
        TableSettings(
            strategy="manual", dividing_points=(0.5, 2.0), input_range=(-1.0, 2.0), gradients=(0.0, 1.5)
        ),
        TableSettings(period=TURN, num_tables=12),
        TableSettings(form="regular", strategy="mix"),
    ):
        assert TableSettings.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert TableSettings.from_json({"num_tables": 24}) == TableSettings(num_tables=24)


def test_the_usable_range_of_a_falling_function_follows_from_its_outputs() -> None:
    q_in, q_out = qparams(INT16, -8, 8), qparams(INT16, -2, 2)
    lo, hi = usable_range(torch.reciprocal, torch.reciprocal, q_in, q_out, input_range=(0.001, 8.0))
    assert lo == pytest.approx(0.5)
    assert hi == pytest.approx(8.0)
    lo, hi = usable_range(lambda x: torch.exp(-x), lambda y: -torch.log(y), q_in, q_out)
    assert lo == pytest.approx(-np.log(2), rel=1e-4)
    assert hi == pytest.approx(8.0)


TANH = qparams(INT16, -1, 1)
CHANNELS = QParams(QuantSpec(INT16, True, axis=0), (0.1, 0.2), (0, 0))
REFUSED = [
    (
        lambda: build_table(torch.log, WIDE, TANH, TableSettings(input_range=(-1.0, 1.0)), where="head.log"),
        "head.log: expected a function that is finite on the inputs of its table; found NaN or infinity at -0.999908. "
        "Narrow input_range to where the function is finite, or keep its input there (clip, epsilon).",
    ),
    (
        lambda: build_table(lambda x: x * torch.nan, WIDE, TANH, where="head.f"),
        "head.f: expected a function that is finite on the inputs of its table; found NaN or infinity at -4.00012. "
        "Narrow input_range to where the function is finite, or keep its input there (clip, epsilon).",
    ),
    (
        lambda: build_table(torch.log, WIDE, TANH, weights=np.ones(65536), where="head.log"),
        "head.log: expected a function that is finite on the inputs of its table; found NaN or infinity at -4.00012. "
        "Narrow input_range to where the function is finite, or keep its input there (clip, epsilon).",
    ),
    (
        lambda: build_table(torch.tanh, WIDE, TANH, TableSettings(input_range=(0.00001, 0.00002)), where="a"),
        "a: expected an input_range that holds at least two input codes; found [1e-05, 2e-05] with codes from -4.00012 to 4 "
        "in steps of 0.000122074. Widen input_range, or leave it out to cover all codes.",
    ),
    (
        lambda: TableSettings(input_range=(1.0, 1.0)),
        "table settings: expected an input_range (lo, hi), finite, lo < hi; found (1, 1). Give the range the table is to cover.",
    ),
    (
        lambda: build_table(torch.tanh, qparams(INT8, -4, 4), TANH, TableSettings(form="segment"), where="a"),
        "a: expected a 16-bit input for a table of form 'segment'; found int8. "
        "Use form \"auto\" (here 'direct'), or another precision of the input.",
    ),
    (
        lambda: build_table(torch.tanh, WIDE, TANH, TableSettings(form="direct"), where="a"),
        "a: expected an 8-bit input for a table of form 'direct'; found int16. "
        "Use form \"auto\" (here 'segment'), or another precision of the input.",
    ),
    (
        lambda: build_table(torch.tanh, CHANNELS, TANH, where="a"),
        "a: expected one scale for the whole input and one for the whole output; found 2 scales. "
        "Quantize what a table reads and writes per tensor.",
    ),
    (
        lambda: build_table(torch.sum, WIDE, TANH, where="a"),
        "a: expected a function of one number, applied to each element; found shape [] for an input of shape [65537]. "
        "A table can only hold a function that works element by element.",
    ),
    (
        lambda: build_table(torch.sigmoid, WIDE, TANH, TableSettings(symmetric_mode="odd"), where="a"),
        "a: expected an odd function; found values of both signs that differ by up to 3.28e+04 output steps. "
        'Use symmetric_mode "none".',
    ),
    (
        lambda: build_table(torch.tanh, WIDE, TANH, TableSettings(symmetric_mode="odd", input_range=(-1.0, 2.0)), where="a"),
        "a: expected zero point 0 and an input_range (-r, r) for a symmetric table; found zero point 0, input_range (-1.0, 2.0). "
        'Use symmetric_mode "none", or a symmetric range.',
    ),
    (
        lambda: build_table(torch.sin, WIDE, TANH, TableSettings(period=3.0), where="a"),
        "a: expected a function that repeats every 3; found values that differ by up to 6.54e+04 output steps. "
        "Leave period out, or give the function's own.",
    ),
    (
        lambda: usable_range(torch.exp, torch.log, WIDE, TANH, where="a"),
        "a: expected a function that falls over the whole input range, as inverse_func is for such; found one that rises or is constant. "
        "Leave inverse_func out, or narrow input_range to where the function falls (1/x: to one sign).",
    ),
    (
        lambda: usable_range(lambda x: torch.exp(-x), torch.sin, WIDE, TANH, where="a"),
        "a: expected an inverse_func that is finite and falls over the function's values; found a rise or a value that is not finite "
        "between 0.0183156 and 1. inverse_func must undo the function: x = inverse_func(function(x)).",
    ),
    (
        lambda: TableSettings(dividing_points=(1.0,)),
        "table settings: expected dividing_points with strategy \"manual\", and only with it; found strategy 'optimal', "
        "dividing_points (1.0,). Set both, or neither.",
    ),
    (
        lambda: TableSettings(strategy="manual", dividing_points=(1.0, 1.0)),
        "table settings: expected 1 to 251 finite dividing_points, ascending; found (1.0, 1.0). Give the largest input of each segment.",
    ),
    (
        lambda: TableSettings(num_tables=0),
        "table settings: expected num_tables from 1 to 252; found 0. 6 is customary, 126 plenty.",
    ),
]  # fmt: skip


@pytest.mark.parametrize("make, text", REFUSED)
def test_what_is_refused_says_why(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NumericsError) as caught:
        make()

    assert str(caught.value) == text


def test_unknown_words_in_settings_are_named() -> None:
    with pytest.raises(UnknownName, match=r"known strategy .*'optimum'.*Did you mean 'optimal'"):
        TableSettings(strategy="optimum")
    with pytest.raises(UnknownName, match=r"known setting .*'numtables'.*Did you mean 'num_tables'"):
        TableSettings.from_json({"numtables": 6})
