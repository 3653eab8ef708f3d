"""Choices of float operators by true runs: the most sensitive ones, until a target is met, less what is needless."""

from __future__ import annotations

import pytest
from tests.networks import Residual, bench, pictures, randomised

from bitwright.plan.plan import Plan
from bitwright.search.choose import Choice, Tried, float_top, float_until, with_tried, without_needless
from bitwright.search.sensitivity import measure_sensitivity


def test_floats_are_added_in_order_until_the_target_is_met() -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures(), "bm1684")
    rows = measure_sensitivity(evaluator, plan, solver.solve)
    start = evaluator.evaluate(plan)
    target = (1 + start) / 2
    choice = float_until(evaluator, plan, rows, solver.solve, target=target, limit=len(rows))

    assert choice.similarity >= target
    assert choice.float_groups == [r.name for r in rows[: len(choice.groups)]]
    assert all(t.similarity < target for t in choice.tried[:-1])
    assert evaluator.evaluate(choice.plan) == pytest.approx(choice.similarity)


def test_floats_that_the_target_does_not_need_are_given_back() -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures(), "bm1684")
    rows = measure_sensitivity(evaluator, plan, solver.solve)
    backwards = list(reversed(rows))  # the worst order: what matters comes last
    target = (1 + evaluator.evaluate(plan)) / 2
    choice = float_until(evaluator, plan, backwards, solver.solve, target=target, limit=len(rows))
    fewer = without_needless(
        evaluator, choice, plan, solver.solve, target=target, cost=lambda groups: float(len(groups))
    )

    assert len(fewer.groups) < len(choice.groups)
    assert fewer.similarity == pytest.approx(evaluator.evaluate(fewer.plan))
    assert fewer.similarity >= target
    assert set(fewer.plan.float_groups) == set(fewer.groups)
    for group in fewer.groups:
        less = solver.solve(fewer.plan.with_precision([group], "int8", ""))
        assert evaluator.evaluate(less) < target
    returned = next(iter(choice.groups.keys() - fewer.groups.keys()))
    assert fewer.plan.ops[returned] == plan.ops[returned]


def test_a_choice_that_misses_its_target_gives_back_what_does_it_no_good() -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures(), "bm1684")
    rows = measure_sensitivity(evaluator, plan, solver.solve)
    choice = float_top(evaluator, plan, rows, len(rows) - 1, solver.solve)
    fewer = without_needless(
        evaluator, choice, plan, solver.solve, target=2.0, cost=lambda groups: float(len(groups))
    )

    assert fewer.similarity >= choice.similarity
    assert fewer.groups.keys() <= choice.groups.keys()
    runs = {frozenset(t.groups) for t in fewer.tried}
    assert len(fewer.tried) == len(runs) > len(choice.tried)


def test_what_was_narrowed_is_not_put_back() -> None:
    """Widening it again reached the target too, and so its savings were thrown away, whatever the budget was."""
    evaluator, solver, plan = bench(randomised(Residual()), pictures(), "bm1684")
    narrow, wide, *_ = plan.groups
    base = solver.solve(plan.with_precision([narrow], "float", ""))
    mixed = solver.solve(base.with_precision([narrow], "int8", "").with_precision([wide], "float", ""))
    price = {narrow: -1.0, wide: 2.0}
    choice = Choice(mixed, evaluator.evaluate(mixed), {narrow: "int8", wide: "float"}, ())
    fewer = without_needless(
        evaluator, choice, base, solver.solve, target=0.0, cost=lambda groups: sum(price[g] for g in groups)
    )

    assert fewer.groups == {narrow: "int8"}
    assert [t.cost for t in fewer.tried] == [-1.0]


def test_with_some_slack_what_wins_little_goes_but_the_losses_do_not_add_up() -> None:
    """Similarity 0.9 with all, a hundredth of the loss more for each group that is int8 again."""
    evaluator, solver, plan = bench(randomised(Residual()), pictures(), "bm1684")
    groups = [*plan.groups]

    class Runs:
        graph = evaluator.graph

        def evaluate(self, plan: Plan) -> float:
            return 0.9 - 0.001 * sum(plan.precision(g) == "int8" for g in groups)

    wide = solver.solve(plan.with_precision(groups, "float", ""))
    choice = Choice(wide, 0.9, dict.fromkeys(groups, "float"), ())

    def fewer(slack: float, target: float = 1.0) -> Choice:
        return without_needless(
            Runs(),  # type: ignore[arg-type]
            choice,
            plan,
            solver.solve,
            target=target,
            cost=lambda groups: float(len(groups)),
            slack=slack,
        )

    assert len(fewer(0.0).groups) == len(groups)
    assert len(fewer(0.025).groups) == len(groups) - 2
    assert len(fewer(0.025, target=0.8995).groups) == len(groups)  # a target that is met stays met


def test_a_run_is_listed_once_and_the_chosen_plan_is_in_the_list() -> None:
    _, solver, plan = bench(randomised(Residual()), pictures(), "bm1684")
    again = solver.solve(plan.with_precision(["fc"], "int8", "the same for another reason"))
    other = solver.solve(plan.with_precision(["fc"], "float", ""))
    choice = with_tried(
        Choice(again, 0.9, {}, ()),
        [
            Tried(plan, {}, 0.9, predicted=0.8, cost=0.0),
            Tried(other, {"fc": "float"}, 0.95, cost=1.0),
            Tried(again, {}, 0.9, cost=0.0),
            Tried(other, {"fc": "float"}, 0.95, cost=1.0),
        ],
    )

    assert [t.plan for t in choice.tried] == [again, other]
    assert choice.tried[0].plan is again
    assert choice.tried[0].predicted == 0.8


def test_a_target_already_met_leaves_everything_int8() -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    rows = measure_sensitivity(evaluator, plan, solver.solve)

    assert float_until(evaluator, plan, rows, solver.solve, target=0.0, limit=5).float_groups == []


def test_exactly_the_asked_number_becomes_float() -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    rows = measure_sensitivity(evaluator, plan, solver.solve)
    choice = float_top(evaluator, plan, rows, 2, solver.solve)

    assert set(choice.plan.float_groups) == {rows[0].name, rows[1].name}
    assert "rank 1" in choice.plan.ops[rows[0].name].why
    first = solver.solve(plan.with_precision([rows[0].name], "float", ""))
    assert [t.similarity for t in choice.tried[1:]] == [evaluator.evaluate(first), choice.similarity]


def test_groups_that_are_float_already_are_not_counted_again() -> None:
    evaluator, solver, plan = bench(randomised(Residual()), pictures())
    rows = measure_sensitivity(evaluator, plan, solver.solve)
    refused = solver.solve(plan.with_precision([rows[0].name], "float", "refused"))

    assert float_top(evaluator, refused, rows, 2, solver.solve).float_groups == [r.name for r in rows[1:3]]
    choice = float_until(evaluator, refused, rows, solver.solve, target=2.0, limit=2)
    assert rows[0].name not in choice.float_groups
