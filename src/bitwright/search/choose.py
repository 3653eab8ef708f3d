"""How many groups to leave float: in the order of their losses, until the target similarity is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitwright.plan.plan import Plan
from bitwright.search.evaluator import Evaluator
from bitwright.search.sensitivity import Sensitivity


@dataclass(frozen=True)
class Choice:
    """A plan with some groups float. *steps*: (group, similarity once it was float too), in order."""

    plan: Plan
    similarity: float
    steps: tuple[tuple[str, float], ...]

    @property
    def float_groups(self) -> list[str]:
        """The groups that were put back to float, in order."""
        return [g for g, _ in self.steps]


def float_top(
    evaluator: Evaluator, plan: Plan, rows: Sequence[Sensitivity], count: int, solve: Callable[[Plan], Plan]
) -> Choice:
    """Leave exactly the *count* most sensitive groups float (fewer if there are fewer)."""
    similarity, steps = None, list[tuple[str, float]]()
    for rank, row in _still_quantized(plan, rows)[:count]:
        plan = solve(plan.with_precision([row.name], "float", _reason(rank, row)))
        similarity = evaluator.evaluate(plan)
        steps.append((row.name, similarity))
    return Choice(plan, evaluator.evaluate(plan) if similarity is None else similarity, tuple(steps))


def float_until(
    evaluator: Evaluator,
    plan: Plan,
    rows: Sequence[Sensitivity],
    solve: Callable[[Plan], Plan],
    *,
    target: float,
    limit: int,
    progress: Callable[[str, float], None] | None = None,
) -> Choice:
    """Leave groups float in the order of *rows* until the similarity reaches *target*, at most *limit* groups.

    *returns*: the first plan that reaches the target, else the most similar one seen.
    """
    best = Choice(plan, evaluator.evaluate(plan), ())
    steps: list[tuple[str, float]] = []
    for rank, row in _still_quantized(plan, rows)[:limit]:
        if best.similarity >= target:
            break
        plan = solve(plan.with_precision([row.name], "float", _reason(rank, row)))
        similarity = evaluator.evaluate(plan)
        steps.append((row.name, similarity))
        if progress:
            progress(row.name, similarity)
        if similarity > best.similarity:
            best = Choice(plan, similarity, tuple(steps))
    return best


def _still_quantized(plan: Plan, rows: Sequence[Sensitivity]) -> list[tuple[int, Sensitivity]]:
    """Rank and row of the groups that are not float already: new thresholds can make a shift-only target refuse one."""
    return [(rank, row) for rank, row in enumerate(rows) if plan.precision(row.name) != "float"]


def _reason(rank: int, row: Sensitivity) -> str:
    return f"sensitive: rank {rank + 1}, loss {row.loss:.3g} alone at int8"
