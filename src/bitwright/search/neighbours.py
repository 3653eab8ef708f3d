"""Joint effects that no single loss and no gradient shows: operators beside those that were widened, tried by true runs.

An operator may cost nothing alone and everything beside a widened one: the maximum that a softmax subtracts, in coarse codes,
shifts all scores alike, until a table of the next operator saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.plan.target import Precision
from bitwright.search.choose import Choice, Tried
from bitwright.search.evaluator import Evaluator

#: A neighbour must win this share of the loss.
_LEAST_GAIN = 0.02
#: The search goes on from the cheapest plan that is worse than the best by at most this share of its loss.
_SLACK = 0.02


def with_neighbours(
    evaluator: Evaluator,
    choice: Choice,
    base: Plan,
    solve: Callable[[Plan], Plan],
    options: Mapping[str, Sequence[Precision]],
    *,
    target: float,
    limit: int,
    progress: Callable[[Tried], None] | None = None,
) -> Choice:
    """*choice*, which misses *target*, with groups that share a value with the changed ones as wide as *options* allows, one after another,
    always the one that a true run finds best, until it meets the target, none wins much, or *limit* groups are changed.
    """
    best = _cheapest_alike(choice)
    tried = [*choice.tried]
    while best.groups and best.similarity < target and len(best.groups) < limit:
        found = []
        for group in neighbours(evaluator.graph, base, best.groups):
            widest = options.get(group, [base.precision(group)])[-1]
            if widest == base.precision(group):
                continue
            why = f"beside widened operators: cosine of the network {best.similarity:.6f} without"
            plan = solve(best.plan.with_precision([group], widest, why))
            groups = {**best.groups, group: widest}
            found.append(Tried(plan, groups, evaluator.evaluate(plan), cost=float(len(groups))))
            if progress:
                progress(found[-1])
        tried += found
        step = max(found, key=lambda t: t.similarity, default=best)
        if 1 - step.similarity > (1 - _LEAST_GAIN) * (1 - best.similarity):
            break
        best = step
    if best.similarity <= choice.similarity:
        return replace(choice, tried=_by_cost(tried))
    return Choice(best.plan, best.similarity, best.groups, _by_cost(tried))


def neighbours(graph: Graph, plan: Plan, groups: Collection[str]) -> list[str]:
    """The groups of *plan* that make or read a value which one of *groups* makes or reads, without these."""
    touched = {v for g in groups for op in plan.groups[g] for v in _values(graph, op)}
    return [
        g
        for g, members in plan.groups.items()
        if g not in groups and any(touched.intersection(_values(graph, op)) for op in members)
    ]


def _values(graph: Graph, op: str) -> set[str]:
    read = {n for n in graph.op_inputs(op) if n is not None and not graph.value(n).is_constant}
    return read | {*graph.op(op).outputs}


def _cheapest_alike(choice: Choice) -> Tried:
    """Of the plans tried the one with the fewest changes that is hardly worse than the best."""
    allowed = (1 + _SLACK) * (1 - choice.similarity)
    alike = [t for t in choice.tried if 1 - t.similarity <= allowed]
    return min(alike, key=lambda t: len(t.groups))


def _by_cost(tried: Sequence[Tried]) -> tuple[Tried, ...]:
    return tuple(sorted(tried, key=lambda t: t.cost or 0.0))
