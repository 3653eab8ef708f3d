"""A user's own function on plans."""

from __future__ import annotations

import operator
from functools import partial
from pathlib import Path

import pytest
from tests.networks import Residual, pictures, randomised, ready, solved
from tests.tasks import METRICS, mean_output

from bitwright.errors import BitwrightError, DataError
from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.search.jobs import Processes, Runner, Serial
from bitwright.search.metric import MetricTask, measure_metric
from bitwright.search.simulated import SimulatedModel
from bitwright.search.state import SearchState


def prepared() -> tuple[Graph, dict[str, Plan | None]]:
    graph = ready(randomised(Residual()), pictures())
    _, plan = solved(graph, pictures())
    first = next(iter(plan.groups))
    return graph, {
        "float": None,
        "int8": plan,
        "mixed": plan.with_precision([first], "float", "tried"),
    }


def task(graph: Graph, name: str) -> MetricTask:
    return MetricTask(graph, partial(operator.getitem, METRICS, name))


@pytest.mark.parametrize("runner", [Serial(), Processes(2)], ids=["serial", "processes"])
def test_every_plan_is_measured_as_simulated(runner: Runner) -> None:
    graph, plans = prepared()

    found = measure_metric(task(graph, "mean_output"), plans, runner)

    assert found == {name: mean_output(SimulatedModel(graph, plan)) for name, plan in plans.items()}
    assert len(set(found.values())) == 3


def test_measurements_are_resumed(tmp_path: Path) -> None:
    graph, plans = prepared()
    path = tmp_path / "state.json"
    measure_metric(task(graph, "mean_output"), {"int8": plans["int8"]}, Serial(), state=SearchState(path, ""))
    kept = SearchState(path, "")
    seen: list[str] = []

    found = measure_metric(
        task(graph, "mean_output"), plans, Serial(), state=kept, progress=lambda *s: seen.append(s[2])
    )

    assert kept.resumed == 1
    assert seen == ["float", "mixed"]
    assert list(found) == list(plans)


@pytest.mark.parametrize("runner", [Serial(), Processes(1)], ids=["serial", "processes"])
@pytest.mark.parametrize(
    ("name", "found"),
    [("fails", "ValueError: no such folder: val/"), ("infinite", "inf"), ("words", "str")],
)
def test_a_function_that_gives_no_finite_number_is_an_error_of_the_user_s(
    runner: Runner, name: str, found: str
) -> None:
    graph, plans = prepared()

    with pytest.raises(DataError) as caught:
        measure_metric(task(graph, name), plans, runner)

    assert str(caught.value) == (
        f"--evaluate: expected a function of a model that returns a finite number; found {found}. "
        "Mend the function."
    )


def test_a_function_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    graph, plans = prepared()

    with pytest.raises(BitwrightError, match="KeyError: 'absent'"):
        measure_metric(task(graph, "absent"), plans, Processes(1))
