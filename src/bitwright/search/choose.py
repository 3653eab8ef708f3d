"""What a search of precisions found, and the simplest one: the most sensitive groups float, in the order of their losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bitwright.plan.cost import Costs
from bitwright.plan.plan import Plan
from bitwright.plan.target import Precision
from bitwright.search.sensitivity import Sensitivity
from bitwright.search.true_runs import Runs


@dataclass(frozen=True)
class Tried:
    """A plan of the search. *groups*: those not at the base precision, and theirs; *similarity*: by a true run;
    *predicted*: by the sketch, None without one; *cost*: by the metric of the search; *plan*: solved.
    """

    plan: Plan
    groups: Mapping[str, Precision]
    similarity: float
    predicted: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Choice:
    """The chosen *plan* (solved) and its *similarity* by a true run. *groups*: what the search widened or narrowed, in the order
    in which it did; *tried*: plans on the way, in growing cost.
    """

    plan: Plan
    similarity: float
    groups: Mapping[str, Precision]
    tried: tuple[Tried, ...]

    @property
    def float_groups(self) -> list[str]:
        """The groups that were put back to float, in order."""
        return [g for g, p in self.groups.items() if p == "float"]


def unchanged(plan: Plan, similarity: float) -> Choice:
    """The choice to leave *plan* as it is."""
    return Choice(plan, similarity, {}, (Tried(plan, {}, similarity, cost=0.0),))


def widest_top(
    rows: Sequence[Sensitivity], options: Mapping[str, Sequence[Precision]], costs: Costs, limit: float
) -> dict[str, Precision]:
    """The widest precision for the most sensitive groups, in the order of *rows*, each as long as *limit* is not exceeded."""
    chosen: dict[str, Precision] = {}
    left = limit
    for name in (r.name for r in rows if r.name in options):
        widest = options[name][-1]
        price = costs.of[name][widest]
        if 0 < price <= left:
            chosen[name], left = widest, left - price
    return chosen


def float_top(
    runs: Runs,
    plan: Plan,
    rows: Sequence[Sensitivity],
    count: int,
    solve: Callable[[Plan], Plan],
) -> Choice:
    """Leave exactly the *count* most sensitive groups float (fewer if there are fewer)."""
    chosen: dict[str, Precision] = {}
    tried = [Tried(plan, {}, runs.evaluate(plan), cost=0.0)]
    # New thresholds can make a shift-only target refuse a group: it is float already.
    for rank, row in [(i, r) for i, r in enumerate(rows) if plan.precision(r.name) != "float"][:count]:
        plan = solve(plan.with_precision([row.name], "float", _reason(rank, row)))
        chosen[row.name] = "float"
        tried.append(Tried(plan, dict(chosen), runs.evaluate(plan), cost=float(len(chosen))))
    return Choice(plan, tried[-1].similarity, chosen, tuple(tried))


def float_until(
    runs: Runs,
    plan: Plan,
    rows: Sequence[Sensitivity],
    solve: Callable[[Plan], Plan],
    *,
    target: float,
    limit: int,
    progress: Callable[[Tried], None] | None = None,
) -> Choice:
    """Leave groups float in the order of *rows* until the similarity reaches *target*, at most *limit* groups.

    *returns*: the first plan that reaches the target, else the most similar one seen.
    """
    chosen: dict[str, Precision] = {}
    best = unchanged(plan, runs.evaluate(plan))
    tried = [*best.tried]
    for rank, row in [(i, r) for i, r in enumerate(rows) if plan.precision(r.name) != "float"][:limit]:
        if best.similarity >= target:
            break
        plan = solve(plan.with_precision([row.name], "float", _reason(rank, row)))
        similarity = runs.evaluate(plan)
        chosen[row.name] = "float"
        tried.append(Tried(plan, dict(chosen), similarity, cost=float(len(chosen))))
        if progress:
            progress(tried[-1])
        if similarity > best.similarity:
            best = Choice(plan, similarity, dict(chosen), ())
    return replace(best, tried=tuple(tried))


def without_needless(
    runs: Runs,
    choice: Choice,
    base: Plan,
    solve: Callable[[Plan], Plan],
    *,
    target: float,
    cost: Callable[[Mapping[str, Precision]], float],
    slack: float = 0.0,
    progress: Callable[[Tried], None] | None = None,
) -> Choice:
    """*choice*, less the groups that it can do without and that cost something.

    Each widened group in turn, the last chosen first, is put back to its precision in *base*, and stays so if the similarity still
    reaches *target*, or, where that is missed, if the loss is at most 1 + *slack* times the least so far: one true run for each
    group. Orders by predicted or single losses choose too many where losses are small and alike. *cost*: of the groups that
    differ from *base*.
    """
    best, tried, most_similar = choice, [*choice.tried], choice.similarity
    for group in reversed(list(choice.groups)):
        fewer = {g: p for g, p in best.groups.items() if g != group}
        if cost(fewer) >= cost(best.groups):  # it was narrowed, or came for nothing
            continue
        plan = solve(
            best.plan.with_precision([group], base.precision(group), base.ops[base.groups[group][0]].why)
        )
        found = Tried(plan, fewer, runs.evaluate(plan), cost=cost(fewer))
        tried.append(found)
        if progress:
            progress(found)
        is_little = 1 - found.similarity <= (1 + slack) * (1 - most_similar)
        if found.similarity >= target or (best.similarity < target and is_little):
            best = Choice(plan, found.similarity, fewer, ())
            most_similar = max(most_similar, found.similarity)
    return with_tried(best, tried)


def with_tried(choice: Choice, tried: Iterable[Tried]) -> Choice:
    """*choice* with the plans *tried*, in growing cost, each once. What was predicted of a plan stays known."""
    found: dict[str, Tried] = {}
    for t in sorted(tried, key=lambda t: t.plan is not choice.plan):  # the chosen plan itself is among them
        known = found.setdefault(t.plan.fingerprint, t)
        if known.predicted is None:
            found[t.plan.fingerprint] = replace(known, predicted=t.predicted)
    return replace(choice, tried=tuple(sorted(found.values(), key=lambda t: t.cost or 0.0)))


def _reason(rank: int, row: Sensitivity) -> str:
    return f"sensitive: rank {rank + 1}, loss {row.loss:.3g} alone at int8"
