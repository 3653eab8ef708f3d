"""Whole plans on several processes, against the same evaluator in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.networks import Residual, pictures, randomised, ready, solved
from torch import Tensor

from bitwright.plan.plan import Plan
from bitwright.search.compare_plans import compare_plans
from bitwright.search.evaluator import Evaluator
from bitwright.search.jobs import Processes, Runner, Serial
from bitwright.search.state import SearchState


def bench() -> tuple[Evaluator, dict[str, Plan]]:
    x = pictures()
    graph = ready(randomised(Residual()), x)
    _, plan = solved(graph, x)
    name = graph.info.inputs[0].name

    def batches(size: int) -> Iterator[dict[str, Tensor]]:
        return ({name: x[i : i + size]} for i in range(0, len(x), size))

    return Evaluator(graph, batches), {g: plan.with_precision([g], "float", "tried") for g in plan.groups}


@pytest.mark.parametrize("runner", [Serial(), Processes(1)], ids=["serial", "processes"])
def test_similarities_are_the_evaluator_s_own_with_the_same_chunks_and_threads(runner: Runner) -> None:
    evaluator, plans = bench()
    expected = {name: evaluator.evaluate(plan) for name, plan in plans.items()}

    assert compare_plans(evaluator, plans, runner) == expected


def test_other_thread_counts_agree_to_float_tolerance() -> None:
    evaluator, plans = bench()
    expected = {name: evaluator.evaluate(plan) for name, plan in plans.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = compare_plans(evaluator, plans, Processes(2))
    finally:
        torch.set_num_threads(before)

    assert found == {name: pytest.approx(similarity, abs=1e-4) for name, similarity in expected.items()}


def test_measured_plans_are_not_measured_again(tmp_path: Path) -> None:
    evaluator, plans = bench()
    state = SearchState(tmp_path / "state.json", "")
    first = next(iter(plans))
    state.put(first, 0.5)
    before = evaluator.effort.forward_passes

    found = compare_plans(evaluator, plans, Serial(), state=state)

    assert found[first] == 0.5
    assert evaluator.effort.forward_passes - before == 12 * (len(plans) - 1)
