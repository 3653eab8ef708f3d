"""Joint effects: what costs nothing alone and everything beside a widened operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.networks import Residual, bench, pictures, randomised
from torch import Tensor, nn

from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.settings import Settings
from bitwright.flow.tune import Tuned, tune
from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.search.choose import Choice, Tried
from bitwright.search.evaluator import Evaluator
from bitwright.search.neighbours import neighbours, with_neighbours

SETTINGS = Settings(target="journey6", expected_cos=0.985, inference_num=16, max_float_ops=4)


class _Masked(nn.Module):
    """A softmax over masked scores: in 8-bit codes of ±10,000 all scores are 0, and so is the maximum that is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.head = nn.Linear(16, 12), nn.Linear(12, 5)
        self.register_buffer("mask", torch.where(torch.arange(12) < 8, 0.0, -10_000.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.softmax(self.scores(x) + self.mask, -1))


def tuned(folder: Path, watcher: Watcher | None = None, **settings: object) -> Tuned:
    torch.manual_seed(0)
    module = _Masked().eval()
    with torch.no_grad():
        module.scores.weight.mul_(8)
    data = list(torch.randn(40, 16).split(1))
    asked = replace(SETTINGS, **settings)  # type: ignore[arg-type]
    return tune(
        module, data, output=folder, settings=asked, watcher=watcher, example_inputs=torch.randn(2, 16)
    )


def test_the_maximum_of_masked_scores_is_widened_beside_what_reads_it(tmp_path: Path) -> None:
    """Alone it loses nothing: a softmax does not see what is subtracted from all. Beside a float difference the table of exp saturates."""
    found = tuned(tmp_path)

    alone = {r.kind: r.loss for r in found.rows}
    assert alone["ReduceMax"] < 1e-6 < alone["Sub"]
    assert found.reached
    assert {found.bench.graph.op(name).kind for name in found.choice.float_groups} >= {"ReduceMax", "Sub"}
    why = {e.why for e in found.choice.plan.ops.values() if e.precision == "float"}
    assert any(w.startswith("beside widened operators") for w in why)


def test_what_is_int16_on_every_target_does_not_use_up_the_budget(tmp_path: Path) -> None:
    """Inner operators of softmax once cost as much as the search may spend, so that nothing at all was tried."""
    found = tuned(tmp_path, precisions=("int8", "int16"))

    assert found.reached
    assert set(found.choice.groups.values()) == {"int16"}


@pytest.mark.parametrize("limit", [3, 4])
def test_what_wins_next_to_nothing_does_not_use_up_the_room_of_neighbours(tmp_path: Path, limit: int) -> None:
    """With room for three the search missed its target, with room for four it reached it with three."""
    found = tuned(tmp_path, max_float_ops=limit)

    assert found.reached
    assert len(found.choice.groups) == 3


def test_neighbours_are_tried_where_operators_are_not_sketched(tmp_path: Path) -> None:
    """Without a sketch the search ended with the most sensitive operators, and missed its target."""
    found = tuned(tmp_path, search_method="exact")

    assert found.reached
    assert {found.bench.graph.op(name).kind for name in found.choice.float_groups} >= {"ReduceMax", "Sub"}
    assert found.chosen.costs is not None


def test_workers_try_neighbours_whatever_the_loss_is(tmp_path: Path) -> None:
    """A loss that other processes cannot import ended the job there, although similarities do not need it."""

    def distance(output: Tensor, reference: Tensor) -> Tensor:
        return ((output - reference) ** 2).flatten(1).sum(1)

    assert tuned(tmp_path, loss=distance, search_method="sketch", workers=2).reached


class _Listening(Silence):
    """The stages of a job, and how many runs each had."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, title: str, total: int | None = None) -> None:
        self.stages.append(title)


@pytest.mark.parametrize(("limit", "changed"), [(3, True), (2, False)])
def test_what_is_needless_is_left_out_again_only_where_neighbours_changed_something(
    tmp_path: Path, limit: int, changed: bool
) -> None:
    watcher = _Listening()
    found = tuned(tmp_path, watcher, max_float_ops=limit)

    stages = watcher.stages[watcher.stages.index("leaving out what is needless") :]
    expected = ["leaving out what is needless", "leaving out what wins little", "trying neighbours"]
    assert found.reached == changed
    assert [s for s in stages if s in expected] == expected + expected[:1] * changed
    affordable = [t for t in found.choice.tried if (t.cost or 0.0) <= limit]
    assert found.choice.similarity == max(t.similarity for t in affordable)  # nothing that was better is lost


@pytest.mark.parametrize("stage", ["trying neighbours", "leaving out what is needless"])
def test_true_runs_after_the_ranking_survive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Only what the ranking had measured was kept: all that was chosen by true runs began anew."""
    watcher, runs, evaluate = _Listening(), list[str](), Evaluator.evaluate

    def counted(self: Evaluator, plan: Plan) -> float:
        runs.append(watcher.stages[-1])
        if interrupting and runs.count(stage) == 2:
            raise KeyboardInterrupt
        return evaluate(self, plan)

    monkeypatch.setattr(Evaluator, "evaluate", counted)
    interrupting = False
    expected = tuned(tmp_path / "whole", watcher, max_float_ops=3)
    whole = [*runs]
    interrupting = True
    runs.clear()
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "parts", watcher, max_float_ops=3)
    kept = len(runs) - 2  # the last did not end, and the first, int8, is what the job begins with
    interrupting = False
    runs.clear()
    found = tuned(tmp_path / "parts", watcher, max_float_ops=3)

    assert kept > 5
    assert len(runs) == len(whole) - kept
    assert (found.choice.groups, found.choice.similarity) == (
        expected.choice.groups,
        expected.choice.similarity,
    )
    assert not (tmp_path / "parts" / "sensitivity_state.json").exists()


# --- the rounds ------------------------------------------------------------------------------------------------


def test_neighbours_share_a_value() -> None:
    evaluator, _, plan = bench(randomised(Residual()), pictures())
    found = neighbours(evaluator.graph, plan, ["depthwise"])
    assert {"conv1", "project"} <= set(found)
    assert not {"depthwise", "fc"} & set(found)


class _Runs:
    """True runs by a rule: similarity by the groups that are float."""

    def __init__(self, graph: Graph, rule: Callable[[frozenset[str]], float]) -> None:
        self.graph, self.rule = graph, rule
        self.rounds: list[int] = []

    def evaluate(self, plan: Plan) -> float:
        return self.rule(frozenset(g for g in plan.groups if plan.precision(g) == "float"))

    def evaluate_all(
        self, plans: Mapping[str, Plan], progress: Callable[[str, float], None]
    ) -> dict[str, float]:
        self.rounds.append(len(plans))
        found = {name: self.evaluate(plan) for name, plan in plans.items()}
        for name, similarity in found.items():
            progress(name, similarity)
        return found


def grown(
    rule: Callable[[frozenset[str]], float],
    *,
    target: float,
    limit: float,
    module: nn.Module | None = None,
    data: Tensor | None = None,
    first: str = "depthwise",
) -> tuple[Choice, list[int]]:
    """What becomes of a choice that left *first* float and has the similarity 0.9, and how many runs each round had."""
    evaluator, solver, plan = bench(module or randomised(Residual()), pictures() if data is None else data)
    wide = solver.solve(plan.with_precision([first], "float", ""))
    choice = Choice(wide, 0.9, {first: "float"}, (Tried(wide, {first: "float"}, 0.9, cost=1.0),))
    runs = _Runs(evaluator.graph, rule)
    found = with_neighbours(
        runs,
        choice,
        plan,
        solver.solve,
        dict.fromkeys(plan.groups, ("int8", "float")),
        target=target,
        limit=limit,
        cost=lambda groups: float(len(groups)),
    )
    return found, runs.rounds


def table(known: Mapping[tuple[str, ...], float], others: float = 0.5) -> Callable[[frozenset[str]], float]:
    """Similarities of *known* sets; of sets of four and more, as of all neighbours at once, 0.99."""
    found = {frozenset(k): v for k, v in known.items()}
    return lambda floats: found.get(floats, 0.99 if len(floats) > 3 else others)


def test_the_best_neighbour_is_kept_and_its_neighbours_are_tried_next() -> None:
    known = {
        ("depthwise", "project"): 0.95,
        ("depthwise", "project", "conv1"): 0.99,
        ("depthwise", "conv1"): 0.94,
    }
    found, rounds = grown(table(known), target=0.98, limit=3)
    assert list(found.groups) == ["depthwise", "project", "conv1"]
    assert found.similarity == 0.99
    assert rounds[0] == 1
    assert len(rounds) == 3
    assert [t.similarity for t in found.tried] == [0.9, 0.95, 0.99]


def test_the_limit_is_kept() -> None:
    found, rounds = grown(table({("depthwise", "project"): 0.95}), target=0.98, limit=1)
    assert (list(found.groups), rounds) == (["depthwise"], [])


def test_a_small_gain_is_not_worth_an_operator_unless_it_reaches_the_target() -> None:
    """A run that met the target by a hair was thrown away, and the job said that it was missed."""
    rule = table({("depthwise", "project"): 0.901})
    assert list(grown(rule, target=0.98, limit=3)[0].groups) == ["depthwise"]
    assert list(grown(rule, target=0.9005, limit=3)[0].groups) == ["depthwise", "project"]


def test_where_all_neighbours_together_win_little_none_is_tried_alone() -> None:
    """A hundred neighbours of an operator that errs alone were a hundred runs in vain."""
    found, rounds = grown(lambda floats: 0.901, target=0.98, limit=9)
    assert (list(found.groups), rounds) == (["depthwise"], [1])


def test_all_neighbours_together_are_the_result_where_none_wins_alone_and_the_limit_allows_it() -> None:
    found, _ = grown(table({}), target=0.98, limit=9)
    assert found.similarity == 0.99
    assert len(found.groups) > 3
    assert any(t.plan is found.plan for t in found.tried)
    assert list(grown(table({}), target=0.98, limit=3)[0].groups) == ["depthwise"]


class _Fan(nn.Module):
    """Many layers that read the same value."""

    BRANCHES = 14

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(16, 4) for _ in range(self.BRANCHES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], -1)


def test_later_rounds_try_the_best_neighbours_of_the_round_before_only() -> None:
    """Every round tried all of them: the runs grew with the square of the neighbours."""

    def rule(floats: frozenset[str]) -> float:
        places = [int(g.rpartition(".")[2]) if "." in g else _Fan.BRANCHES for g in floats]
        return 1 - 0.1 * 0.9 ** (len(floats) - 1) - 1e-4 * sum(places)

    found, rounds = grown(
        rule, target=0.9999, limit=4, module=randomised(_Fan()), data=torch.randn(12, 16), first="branches.0"
    )
    assert list(found.groups) == [f"branches.{i}" for i in range(4)]
    assert rounds[1] >= _Fan.BRANCHES - 1
    assert rounds[2:] == [8, 7]


def test_every_run_of_a_round_is_told_when_it_ends() -> None:
    """Nothing was told before the last run of a round: minutes, with many neighbours."""
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    wide = solver.solve(plan.with_precision(["depthwise"], "float", ""))
    happened: list[str] = []
    evaluate = evaluator.evaluate

    def run(plan: Plan) -> float:
        happened.append("run")
        return evaluate(plan)

    evaluator.evaluate = run  # type: ignore[method-assign]
    with_neighbours(
        evaluator,
        Choice(wide, -1.0, {"depthwise": "float"}, ()),
        plan,
        solver.solve,
        dict.fromkeys(plan.groups, ("int8", "float")),
        target=2.0,
        limit=3,
        cost=lambda groups: float(len(groups)),
        progress=lambda tried: happened.append("told"),
    )
    assert happened == ["run", "told"] * (len(happened) // 2)
    assert len(happened) > 6
