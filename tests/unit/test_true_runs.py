"""True runs that are made once: kept, resumed, and made wherever there is room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests import networks
from tests.networks import Residual, pictures, randomised

from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.evaluator import Evaluator
from bitwright.search.jobs import Processes, Runner, Serial
from bitwright.search.losses import LOSSES, UserLoss
from bitwright.search.similarity import Similarity
from bitwright.search.state import SearchState
from bitwright.search.true_runs import TrueRuns


def bench(similarity: Similarity | None = None) -> tuple[Evaluator, dict[str, Plan]]:
    evaluator, solver, plan = networks.bench(randomised(Residual()), pictures(), similarity=similarity)
    return evaluator, {g: solver.solve(plan.with_precision([g], "float", "tried")) for g in plan.groups}


@pytest.mark.parametrize("runner", [None, Serial()], ids=["here", "there"])
def test_each_plan_is_run_once_and_all_are_told(runner: Runner | None) -> None:
    evaluator, plans = bench()
    expected = evaluator.evaluate_all(plans)
    runs, told = TrueRuns(evaluator, runner=runner), list[tuple[str, float]]()
    first = next(iter(plans))
    assert runs.evaluate(plans[first]) == expected[first]
    before = evaluator.effort.forward_passes

    found = runs.evaluate_all({**plans, "again": plans[first]}, lambda *run: told.append(run))

    assert found == {**expected, "again": expected[first]}
    assert dict(told) == found
    assert len(told) == len(found)
    assert evaluator.effort.forward_passes - before == 12 * (len(plans) - 1)


@pytest.mark.parametrize("runner", [None, Serial()], ids=["here", "there"])
def test_runs_before_an_interruption_are_not_made_again(tmp_path: Path, runner: Runner | None) -> None:
    evaluator, plans = bench()
    expected = evaluator.evaluate_all(plans)
    path, told = tmp_path / "state.json", list[str]()

    def stop(name: str, similarity: float) -> None:
        told.append(name)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), SearchState(path, "") as state:
        TrueRuns(evaluator, runner=runner, state=state).evaluate_all(plans, stop)
    before = evaluator.effort.forward_passes
    found = TrueRuns(evaluator, runner=runner, state=SearchState(path, "")).evaluate_all(plans)

    assert found == expected
    assert evaluator.effort.forward_passes - before == 12 * (len(plans) - 3)


def test_a_loss_that_other_processes_cannot_import_stays_here() -> None:
    evaluator, plans = bench(Similarity(loss=UserLoss(lambda output, reference: (output - reference).sum(1))))
    some = dict([*plans.items()][:1])

    assert TrueRuns(evaluator, runner=Processes(1)).evaluate_all(some) == pytest.approx(
        evaluator.evaluate_all(some), abs=1e-6
    )


def test_the_loss_that_ranks_operators_is_measured_once_too() -> None:
    """Thresholds are chosen by it: each plan was run again for it after an interruption."""
    evaluator, plans = bench(Similarity(loss=LOSSES.get("mse", where="loss")))
    plan, state = next(iter(plans.values())), SearchState(None, "")
    expected = float(evaluator.losses(quantized_reads(evaluator.graph, plan)).mean())
    found = TrueRuns(evaluator, state=state).loss(plan)
    before = evaluator.effort.forward_passes

    assert found == TrueRuns(evaluator, state=state).loss(plan) == expected
    assert evaluator.effort.forward_passes == before
    assert found != TrueRuns(evaluator, state=state).evaluate(plan)


def test_the_fingerprint_of_a_plan_is_of_what_it_computes() -> None:
    _, plans = bench()
    plan = next(iter(plans.values()))
    other_reasons = replace(plan, ops={n: replace(e, why="another") for n, e in plan.ops.items()})

    assert len({p.fingerprint for p in plans.values()}) == len(plans)
    assert other_reasons.fingerprint == plan.fingerprint
    assert Plan.from_json(plan.to_json()).fingerprint == plan.fingerprint
    assert plan.with_methods(dict.fromkeys(plan.values, "kl")).fingerprint != plan.fingerprint
