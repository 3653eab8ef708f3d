"""What jobs make of a choice of precisions: within its budget, from its own base plan, each run listed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.networks import Residual, pictures, randomised
from torch import Tensor, nn

from bitwright.errors import DataError, TargetError
from bitwright.flow.bench import open_bench
from bitwright.flow.joint import JointSearch, pareto_table, run_joint
from bitwright.flow.progress import Silence
from bitwright.flow.refining import Refining
from bitwright.flow.result import Chosen, Stage
from bitwright.flow.settings import Settings
from bitwright.plan.cost import measure_costs
from bitwright.search import joint_precision
from bitwright.search.choose import Choice
from bitwright.search.true_runs import TrueRuns

SETTINGS = Settings(expected_cos=0.99, inference_num=16, precisions=("w4a8", "int8", "float"))


class _Uneven(nn.Module):
    """A small first layer with one column of huge weights, which int8 cannot hold; two large layers that int4 can."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def searched(folder: Path, **settings: object) -> JointSearch:
    torch.manual_seed(0)
    module = _Uneven().eval()
    with torch.no_grad():
        module.a.weight[:, 0] *= 200
    x = torch.randn(40, 16)
    x[:, 0] *= 0.002
    asked = replace(SETTINGS, **settings)  # type: ignore[arg-type]
    return run_joint(module, list(x.split(1)), output=folder, settings=asked, example_inputs=x[:2])


@pytest.mark.parametrize("target", [0.98, 0.99, 0.9999])
def test_int4_that_pays_for_float_is_not_given_back(tmp_path: Path, target: float) -> None:
    """Narrowed operators were widened again as needless, past a budget of nothing, and the job said that all was well."""
    found = searched(tmp_path, expected_cos=target, cost="bytes", budget=0.0)

    assert found.chosen.costs is not None
    assert found.chosen.costs.total(found.choice.groups) <= 1e-9
    assert found.chosen.reached == (found.choice.similarity >= target)
    enough = [t for t in found.choice.tried if t.similarity >= target]
    if enough:
        cheapest = min(enough, key=lambda t: t.cost or 0.0)
        assert cheapest.plan is found.choice.plan


def test_one_row_of_the_front_is_chosen_and_none_is_a_repetition(tmp_path: Path) -> None:
    """The same run was listed once by each stage that made it, and all of these rows were marked."""
    found = searched(tmp_path, expected_cos=0.5, precisions=("int8", "float"))
    rows = pareto_table(found).rows

    assert [r["chosen"] for r in rows].count("yes") == 1
    assert len({t.plan.fingerprint for t in found.choice.tried}) == len(rows)


def test_costs_count_from_the_base_plan_that_was_chosen_in_the_end(tmp_path: Path) -> None:
    """Singles on other thresholds brought a base plan of their own, whose int16 operators then cost what int8 had cost."""
    settings = Settings(target="generic", inference_num=6)
    bench = open_bench(randomised(Residual()), pictures(), settings, Silence(), example_inputs=pictures(2))
    first, *_ = bench.plan.groups
    base = bench.solver.solve(bench.plan.with_precision([first], "int16", "another base"))
    stale = measure_costs(bench.graph, bench.plan, bench.target, "ops")
    chosen = Chosen(Stage(base, 0.9), True, Choice(base, 0.9, {}, ()), False, costs=stale)
    found = Refining(bench, TrueRuns(bench.evaluator), settings, Silence(), 0.99, 3.0).refined(chosen)

    assert found.costs is not None
    assert found.costs.of[first]["int16"] == 0
    assert found.costs.of[first]["float"] == 1


# --- what is said before any work ------------------------------------------------------------------------------


class _NoRun(Silence):
    """Fails as soon as a plan is run."""

    def stage(self, title: str, total: int | None = None) -> None:
        assert title != "comparing int8 with float"


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"budget": 2.0, "max_float_ops": 3}, DataError, "one limit"),
        ({"cost": "macs", "budget": 0.1, "search_method": "exact"}, DataError, "are not sketched"),
        ({"cost": "macs", "budget": 0.1, "post_process": dict}, DataError, "are not sketched"),
        ({"cost": "latency", "budget": 0.1, "target": "generic-int8"}, TargetError, "estimate latency"),
        ({"operators": ("a", "absent*")}, DataError, "'?absent"),
    ],
)
def test_what_no_search_can_do_is_said_before_the_first_run(
    tmp_path: Path, settings: dict[str, object], error: type[Exception], says: str
) -> None:
    """It was said after the ranking, which may take hours, or never where int8 met the target."""
    asked = replace(SETTINGS, **settings)  # type: ignore[arg-type]
    with pytest.raises(error, match=says):
        run_joint(
            _Uneven(), torch.randn(8, 16), output=tmp_path, settings=asked, watcher=_NoRun(),
            example_inputs=torch.randn(2, 16),
        )  # fmt: skip


# --- a metric of the user's ------------------------------------------------------------------------------------


def test_a_metric_is_measured_of_few_plans_whatever_the_stages_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run of the last stages was a run of the metric too, which may take minutes."""
    monkeypatch.setattr(joint_precision, "FRONT", 3)
    metric = tmp_path / "metric.py"
    metric.write_text("def outputs(model):\n    return 1.0\n")
    found = searched(
        tmp_path / "out", expected_cos=0.99999, precisions=("int8", "float"), evaluate=f"{metric}:outputs"
    )
    measured = [t for i, t in enumerate(found.choice.tried) if str(i) in found.metrics]

    assert {"float", "int8"} <= found.metrics.keys()
    assert len(measured) <= 4 < len(found.choice.tried)
    assert any(t.plan is found.choice.plan for t in measured)
    for t in (t for t in measured if t.plan is not found.choice.plan):
        cheaper = [o for o in found.choice.tried if (o.cost or 0.0) < (t.cost or 0.0)]
        assert all(o.similarity < t.similarity for o in cheaper)
    rows = pareto_table(found).rows
    assert [r["metric"] for r in rows].count(None) == len(rows) - len(measured)
