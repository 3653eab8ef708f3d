"""Joint effects that no single loss and no gradient shows: operators beside those that were widened, tried by true runs.

An operator may cost nothing alone and everything beside a widened one: the maximum that a softmax subtracts, in coarse codes,
shifts all scores alike, until a table of the next operator saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.plan.target import Precision
from bitwright.search.choose import Choice, Tried, with_tried
from bitwright.search.true_runs import Runs

#: A neighbour must win this share of the loss, or reach the target; so must all of them together to be worth a try.
LEAST_GAIN = 0.02
#: The best neighbours of a round that are tried again in the next one.
_AGAIN = 8

#: What differs from the base plan: group -> precision.
_Groups = Mapping[str, Precision]


def with_neighbours(
    runs: Runs,
    choice: Choice,
    base: Plan,
    solve: Callable[[Plan], Plan],
    options: Mapping[str, Sequence[Precision]],
    *,
    target: float,
    limit: float,
    cost: Callable[[_Groups], float],
    progress: Callable[[Tried], None] | None = None,
) -> Choice:
    """*choice*, which misses *target*, with groups that share a value with widened ones as wide as *options* allows, one after another,
    always the one that true runs find best, until the target is met, none wins much, or the *limit* of the cost is reached.

    First one run with all of them wide, whatever that costs: if it wins little, nothing more is tried. (Where the limit allows it, it
    may be the result itself, if nothing else comes as near, or is as cheap.) Then a round of runs for each group that is added: the
    first tries all neighbours, the others only the `_AGAIN` best of the round before and the groups that the last one made neighbours.

    *base*: the plan that *choice* changes. *cost*: of the groups that differ from *base*. *progress*: called after every run; the
    result's `tried` has the best of each round only.
    """
    beside = _Beside(runs, base, solve, options, cost, limit, progress)
    moves = beside.moves(choice)
    if choice.similarity >= target or not moves:
        return choice
    together = beside.run(choice, {"": {g: p for after in moves.values() for g, p in after.items()}})[""]
    if not _is_worth_it(choice.similarity, together.similarity, target):
        return choice
    best, tried, seen = choice, [*choice.tried], {*moves}
    while moves and best.similarity < target:
        found = beside.run(best, moves)
        ranked = sorted(moves, key=lambda g: -found[g].similarity)
        step = found[ranked[0]]
        if not _is_worth_it(best.similarity, step.similarity, target):
            break
        best = Choice(step.plan, step.similarity, step.groups, ())
        tried.append(step)
        again, following = ranked[1 : 1 + _AGAIN], beside.moves(best)
        moves = {g: after for g, after in following.items() if g in again or g not in seen}
        seen |= {*following}
    if (together.cost or 0.0) <= limit:
        tried.append(together)
        nearer = together.similarity > best.similarity and best.similarity < target
        cheaper = together.similarity >= target and cost(together.groups) < cost(best.groups)
        if nearer or cheaper:
            best = Choice(together.plan, together.similarity, together.groups, ())
    return with_tried(best, tried)


def _is_worth_it(before: float, after: float, target: float) -> bool:
    return after >= target or 1 - after <= (1 - LEAST_GAIN) * (1 - before)


@dataclass(frozen=True)
class _Beside:
    """What `with_neighbours` is given, and its two steps: which groups to widen, and their runs."""

    runs: Runs
    base: Plan
    solve: Callable[[Plan], Plan]
    options: Mapping[str, Sequence[Precision]]
    cost: Callable[[_Groups], float]
    limit: float
    progress: Callable[[Tried], None] | None

    def moves(self, best: Choice) -> dict[str, _Groups]:
        """Each neighbour of what *best* widened, and what differs from the base with it as wide as it may be, within the limit."""
        wider = {g for g, p in best.groups.items() if self.cost({g: p}) > 0}
        found = {
            g: {**best.groups, g: self.options.get(g, [self.base.precision(g)])[-1]}
            for g in neighbours(self.runs.graph, self.base, wider)
        }
        now = self.cost(best.groups)
        return {g: after for g, after in found.items() if now < self.cost(after) <= self.limit}

    def run(self, best: Choice, moves: Mapping[str, _Groups]) -> dict[str, Tried]:
        """The runs of *moves* away from *best*, by their names."""
        why = f"beside widened operators: cosine of the network {best.similarity:.6f} without"
        plans = {name: self._solved(best, after, why) for name, after in moves.items()}
        found = dict[str, Tried]()

        def tell(name: str, similarity: float) -> None:
            found[name] = Tried(plans[name], moves[name], similarity, cost=self.cost(moves[name]))
            if self.progress:
                self.progress(found[name])

        self.runs.evaluate_all(plans, tell)
        return found

    def _solved(self, best: Choice, after: _Groups, why: str) -> Plan:
        plan = best.plan
        for group in (g for g, p in after.items() if best.groups.get(g) != p):
            plan = plan.with_precision([group], after[group], why)
        return self.solve(plan)


def neighbours(graph: Graph, plan: Plan, groups: Collection[str]) -> list[str]:
    """The groups of *plan* that make or read a quantizable activation which one of *groups* makes or reads, without these."""
    of, members = plan.values, plan.groups

    def touched(group: str) -> set[str]:
        names = {n for op in members[group] for n in (*graph.op_inputs(op), *graph.op(op).outputs)}
        return {n for n in names if n is not None and n in of and not graph.value(n).is_constant}

    shared = {n for g in groups for n in touched(g)}
    return [g for g in members if g not in groups and not shared.isdisjoint(touched(g))]
