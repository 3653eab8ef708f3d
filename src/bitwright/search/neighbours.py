"""Joint effects that no single loss and no gradient shows: operators beside those that were widened, tried by true runs.

An operator may cost nothing alone and everything beside a widened one: the maximum that a softmax subtracts, in coarse codes,
shifts all scores alike, until a table of the next operator saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.plan.target import Precision
from bitwright.search.choose import Choice, Tried

#: A neighbour must win this share of the loss, or reach the target.
_LEAST_GAIN = 0.02


def with_neighbours(
    graph: Graph,
    choice: Choice,
    base: Plan,
    solve: Callable[[Plan], Plan],
    options: Mapping[str, Sequence[Precision]],
    run: Callable[[Mapping[str, Plan]], Mapping[str, float]],
    *,
    target: float,
    limit: float,
    cost: Callable[[Mapping[str, Precision]], float],
    progress: Callable[[Tried], None] | None = None,
) -> Choice:
    """*choice*, which misses *target*, with groups that share a value with widened ones as wide as *options* allows, one after another,
    always the one that true runs find best, until the target is met, none wins much, or the *limit* of the cost is reached.

    *base*: the plan that *choice* changes. *run*: true similarities of plans by name, all of a round at once. *cost*: of the groups that
    differ from *base*. *progress*: called with every run; the result's `tried` has the best of each round only.
    """
    best, tried = choice, [*choice.tried]
    while best.similarity < target:
        wider = {g for g, p in best.groups.items() if cost({g: p}) > 0}
        moves = {
            g: {**best.groups, g: options.get(g, [base.precision(g)])[-1]}
            for g in neighbours(graph, base, wider)
        }
        moves = {g: after for g, after in moves.items() if cost(best.groups) < cost(after) <= limit}
        why = f"beside widened operators: cosine of the network {best.similarity:.6f} without"
        plans = {g: solve(best.plan.with_precision([g], after[g], why)) for g, after in moves.items()}
        similarities = run(plans) if plans else {}
        found = [Tried(plans[g], after, similarities[g], cost=cost(after)) for g, after in moves.items()]
        for t in found if progress else ():
            progress(t)  # type: ignore[misc]
        step = max(found, key=lambda t: t.similarity, default=None)
        if step is None or not _is_worth_it(best.similarity, step.similarity, target):
            break
        best = Choice(step.plan, step.similarity, step.groups, ())
        tried.append(step)
    return Choice(best.plan, best.similarity, best.groups, tuple(sorted(tried, key=lambda t: t.cost or 0.0)))


def _is_worth_it(before: float, after: float, target: float) -> bool:
    return after >= target or 1 - after <= (1 - _LEAST_GAIN) * (1 - before)


def neighbours(graph: Graph, plan: Plan, groups: Collection[str]) -> list[str]:
    """The groups of *plan* that make or read a quantizable activation which one of *groups* makes or reads, without these."""
    of, members = plan.values, plan.groups

    def touched(group: str) -> set[str]:
        names = {n for op in members[group] for n in (*graph.op_inputs(op), *graph.op(op).outputs)}
        return {n for n in names if n is not None and n in of and not graph.value(n).is_constant}

    shared = {n for g in groups for n in touched(g)}
    return [g for g in members if g not in groups and not shared.isdisjoint(touched(g))]
