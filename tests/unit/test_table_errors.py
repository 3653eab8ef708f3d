"""Errors of look-up tables that are compared: in one unit, at the same real inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.progress import Silence
from bitwright.flow.settings import Settings
from bitwright.flow.table_errors import error_table
from bitwright.flow.table_remedies import Repair
from bitwright.flow.table_scores import TableScores
from bitwright.flow.tables import error_on_data
from bitwright.numerics.dtype import INT8, INT16
from bitwright.numerics.lut import LookupTable, TableSettings, build_table
from bitwright.numerics.spec import QParams, QuantSpec

SETTINGS = Settings(target="journey6", tables=True)


@pytest.fixture(scope="module")
def sigmoid() -> Bench:
    """A sigmoid behind a linear layer: operators `0` and `1`."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 4)).eval()
    samples = [5 * torch.randn(4, 8) for _ in range(16)]
    return open_bench(network, samples, SETTINGS, Silence(), example_inputs=samples[0])


def _table(
    q_in: QParams, q_out: QParams, function=torch.sigmoid, settings: TableSettings | None = None
) -> LookupTable:
    return build_table(function, q_in, q_out, settings)


def _q(dtype, reach: float) -> QParams:
    return QParams(QuantSpec(dtype, symmetric=True), (reach / dtype.qmax,), (0,))


def test_a_wider_output_is_judged_in_the_steps_of_the_narrow_one(sigmoid: Bench) -> None:
    """It was in its own, 256 times smaller ones: a better table seemed many times worse."""
    plan = sigmoid.solver.solve(sigmoid.plan.with_precision([sigmoid.plan.ops["0"].group], "int16", ""))
    plan = plan.with_tables({"1": TableSettings(strategy="evenly", num_tables=1)})
    repair = Repair(TableScores(sigmoid, SETTINGS), plan, lambda _: None)
    repair.run("1")
    (wider,) = (r for r in repair.tried if r.remedy == "int16 output")
    before, after = wider.error

    assert before == pytest.approx(
        error_on_data(sigmoid.graph, sigmoid.statistics, "1", repair.scores.tables(plan)["1"])
    )
    assert after[0] < before[0] / 2
    assert after[1] < before[1] / 2


def test_errors_are_in_the_steps_that_are_asked_for(sigmoid: Bench) -> None:
    q_in = _q(INT16, 8.0)
    table = _table(q_in, _q(INT16, 1.0))
    own = error_on_data(sigmoid.graph, sigmoid.statistics, "1", table)
    asked = error_on_data(sigmoid.graph, sigmoid.statistics, "1", table, unit=_q(INT8, 1.0))

    assert asked == pytest.approx([e * 127 / 32767 for e in own])


@pytest.mark.parametrize("repaired", [INT8, INT16], ids=["same codes", "finer codes"])
@pytest.mark.parametrize("out", [INT8, INT16], ids=["same steps", "finer steps"])
def test_the_drawing_shows_both_errors_at_the_same_real_inputs_in_one_unit(
    sigmoid: Bench, repaired, out
) -> None:
    def wrong_above_one(x: Tensor) -> Tensor:
        return torch.sigmoid(x) + 0.25 * (x > 1)

    before = _table(_q(INT8, 8.0), _q(INT8, 1.5))
    after = _table(_q(repaired, 8.0), _q(out, 1.5), wrong_above_one, TableSettings(num_tables=96))
    rows = error_table(sigmoid, "1", before, after).rows
    step = 8.0 / 127

    assert min(r["input"] for r in rows) < -2
    assert max(r["input"] for r in rows) > 2
    assert all(r["error"] <= 0.5 for r in rows)
    below = [r["repaired"] for r in rows if r["input"] < 1 - 4 * step]
    above = [r["repaired"] for r in rows if r["input"] > 1 + 4 * step]
    assert max(below) <= 0.51
    assert above == pytest.approx([0.25 * 127 / 1.5] * len(above), abs=0.51)
    assert max(r["inputs"] for r in rows) == 1


def test_a_part_in_which_a_table_has_no_code_is_left_out(sigmoid: Bench) -> None:
    fine, coarse = _table(_q(INT16, 8.0), _q(INT16, 1.0)), _table(_q(INT8, 400.0), _q(INT16, 1.0))
    rows = error_table(sigmoid, "1", fine, coarse).rows

    assert all(math.isfinite(r["error"]) for r in rows)
    known = [r for r in rows if r["repaired"] is not None]
    assert 0 < len(known) < len(rows)
