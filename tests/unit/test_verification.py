"""What `verify` says of look-up tables: how far they may be from their functions, and that it builds those of the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitwright.calibrate.statistics import Statistics
from bitwright.flow.quantize import run_quantize
from bitwright.flow.settings import Settings
from bitwright.flow.tables import build_tables
from bitwright.flow.verification import TableCheck, Verified, exact_table
from bitwright.numerics.dtype import INT8, UINT8, DType
from bitwright.numerics.lut import DirectTable
from bitwright.numerics.rounding import Rounding
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.plan.plan import Plan
from bitwright.runtime.proof import OpDifference

pytestmark = pytest.mark.usefixtures("one_thread")


def qparams(dtype: DType, scale: float, zero: int = 0, rounding: Rounding = Rounding.HALF_EVEN) -> QParams:
    spec = QuantSpec(dtype, symmetric=zero == 0 and dtype is INT8, rounding=rounding)
    return QParams(spec, (scale,), (zero,))


# --- the rule ----------------------------------------------------------------------------------------------------


def check(steps: int, error: float, name: str = "log") -> TableCheck:
    return TableCheck(OpDifference(name, "Log", INT8, steps, int(steps > 0), 100), error)


@pytest.mark.parametrize(
    ("error", "allowed"),
    [
        (0.0, 0),
        (0.49, 0),  # nearer than half a step everywhere: every code is the function's
        (0.5, 1),  # a tie, which may be rounded to either side
        (1.4, 1),  # 1.4 and a rounding of 0.5 are no 2 steps
        (1.5, 2),
        (2.49, 2),
        (2.5 - 1e-9, 3),  # float64 says no more than that it is 2.5
        (1031.0, 1031),
    ],
)
def test_no_table_differs_by_more_than_its_error_explains(error: float, allowed: int) -> None:
    assert check(allowed, error).holds
    assert not check(allowed + 1, error).holds


@given(
    entries=st.lists(st.integers(-128, 127), min_size=256, max_size=256),
    scale=st.floats(0.01, 0.1),
    rounding=st.sampled_from(list(Rounding)),
)
def test_the_rule_is_as_narrow_as_errors_let_it_be(
    entries: list[int], scale: float, rounding: Rounding
) -> None:
    """For any table at all: no code breaks the rule, and one comes within a step of it."""
    q_out = qparams(INT8, scale, rounding=rounding)
    table = DirectTable(qparams(INT8, 0.04), q_out, torch.tensor(entries, dtype=torch.int8))
    steps = (table.results - exact_table(torch.tanh, table).results).abs().max()
    found = check(int(steps), table.error(torch.tanh)[0])

    assert found.holds
    assert found.allowed - int(steps) <= 1


def test_codes_of_a_function_are_those_of_the_check_vectors() -> None:
    """The vectors of docs/numerics.md §9.2."""
    q_in, q_out = qparams(INT8, 8 / 127), qparams(UINT8, 1 / 255, rounding=Rounding.HALF_AWAY)
    table = DirectTable(q_in, q_out, torch.zeros(256, dtype=torch.uint8))
    codes = exact_table(torch.sigmoid, table).results

    assert codes[[0, 64, 127, 128, 129, 192, 255]].tolist() == [0, 4, 123, 128, 132, 251, 255]
    assert codes.sum() == 32513


def test_where_a_function_has_no_value_the_table_has_its_way() -> None:
    table = DirectTable(qparams(INT8, 0.1), qparams(INT8, 0.05), torch.full((256,), 7, dtype=torch.int8))
    codes = exact_table(torch.log, table).results

    assert codes[:129].eq(7).all()  # log of -12.8 to 0
    expected = np.clip(np.rint(np.log(np.arange(1, 128) * 0.1) / 0.05), -128, 127)
    assert np.array_equal(codes[129:].numpy(), expected)


def test_tables_that_break_the_rule_are_named_and_lead() -> None:
    found = Verified({}, (check(9, 9.0, "wide"), check(2, 1.4, "wrong")))

    assert not found.holds
    assert found.broken == ["table of wrong: expected codes within 1 step(s) of the function's; found 2"]
    rows = [(row["name"], row["holds"]) for row in found.table_table().rows]
    assert rows == [("wrong", "no"), ("wide", "yes")]


# --- the tables --------------------------------------------------------------------------------------------------


class Functions(nn.Module):
    """Tables of every kind: softmax, norm, activations, and a sine."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(nn.functional.gelu(self.norm(self.first(x))))
        return torch.softmax(self.last(y), -1)


def test_the_plan_alone_gives_the_tables_of_the_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8) ** 3
    made = run_quantize(
        Functions(),
        {"x": x},
        output=tmp_path,
        settings=Settings(target="journey6", export="integer"),
        example_inputs=x[:2],
    )
    graph, bench = made.bench.graph, made.bench
    exported = build_tables(graph, bench.plan, bench.statistics)
    again = build_tables(graph, Plan.load(tmp_path / "plan.json"), Statistics())
    unsettled = build_tables(graph, bench.plan, Statistics())

    assert {type(t).__name__ for t in exported.values()} >= {"DirectTable", "SegmentTable"}
    assert list(again) == list(exported)
    assert all(torch.equal(again[name].results, t.results) for name, t in exported.items())
    assert not all(torch.equal(unsettled[name].results, t.results) for name, t in exported.items())
