"""The cheapest plan for a similarity, or the most similar one for a cost: proposed by the sketch, decided by true runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from bitwright.graph.replay import Reads
from bitwright.plan.cost import Costs
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.plan.target import Precision
from bitwright.search.choose import Choice, Tried
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.optimize import Optimizer, Point
from bitwright.search.plan_model import PlanModel
from bitwright.search.true_runs import Runs

#: Prediction and truth that differ by more than this factor have parted: the network is linearised anew, around the plan.
PARTED = 1.5
#: The front is drawn on until its predicted loss is this share of the allowed one: predictions may be too low.
_BEYOND = 0.3
#: Below this loss a factor says nothing.
_NEGLIGIBLE = 1e-5

#: Plans of a front that are run, or measured by a user's metric.
FRONT = 24
#: Guesses from predictions before the search for the first sufficient plan halves instead.
_GUESSES = 4

#: A sketch around the plan with the given reads.
SketchAround = Callable[[Reads], ErrorSketch]
T = TypeVar("T")


@dataclass(frozen=True)
class Goal:
    """*target*: the similarity asked for, None for the best within *limit*, the greatest cost."""

    target: float | None
    limit: float


@dataclass(frozen=True)
class JointResult:
    """*reached*: whether the chosen plan meets the goal's target. *parted*: how far truth and prediction were apart (a factor)
    before each new linearisation."""

    choice: Choice
    reached: bool
    parted: tuple[float, ...]


class JointPrecision:
    """One search: a base *plan* (solved), the precisions that each group may have, what they cost."""

    def __init__(
        self,
        runs: Runs,
        plan: Plan,
        solve: Callable[[Plan], Plan],
        options: Mapping[str, Sequence[Precision]],
        costs: Costs,
        *,
        start: float | None = None,
        apart: Mapping[str, float] | None = None,
        on_true_run: Callable[[Tried], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.runs, self.plan, self.solve = runs, plan, solve
        self.options, self.costs, self._added = options, costs, apart
        self._on_true_run, self._progress = on_true_run, progress
        self._base = {g: plan.precision(g) for g in plan.groups}
        self._true: dict[frozenset[tuple[str, Precision]], Tried] = {}
        if start is not None:
            self._true[frozenset()] = Tried(plan, {}, start, cost=costs.total(self._base))

    def search(
        self,
        sketch: ErrorSketch,
        goal: Goal,
        *,
        around: SketchAround | None = None,
        rounds: int = 1,
        alternatives: Sequence[Mapping[str, Precision]] = (),
        verify_all: bool = False,
    ) -> JointResult:
        """Draw the front, verify where the target is met; where truth and prediction part, or there is no target to stop at, linearise
        around that plan with *around* and draw it again, at most *rounds* times. *alternatives*: precisions of other plans to run.
        *verify_all*: run plans all along the front, `FRONT` at most.
        """
        parted: list[float] = []
        for attempt in range(rounds + 1):
            points = self._front(sketch, goal)
            at = self._decide(points, goal)
            factor = self._factor(points[at])
            if around is None or attempt == rounds or (factor <= PARTED and goal.target is not None):
                break
            parted += [factor] if factor > PARTED else []
            sketch = around(quantized_reads(self.runs.graph, self._run(points[at]).plan))
        for precisions in alternatives:
            self._run_alternative(precisions)
        if verify_all:
            self._run_all(thinned(points))
        return self._result(goal, tuple(parted))

    def _front(self, sketch: ErrorSketch, goal: Goal) -> list[Point]:
        model = PlanModel(
            sketch, self.plan, self.solve, self.options, apart=self._added, progress=self._progress
        )
        enough = 0.0 if goal.target is None else _BEYOND * (1 - goal.target)
        points = Optimizer(model, self.costs).front(limit=goal.limit, enough=enough)
        for point in points:
            known = self._true.get(self._key(point))
            if known is not None and known.predicted is None:  # the plan that the search began with
                self._true[self._key(point)] = replace(known, predicted=1 - point.predicted)
        return points

    def _decide(self, points: Sequence[Point], goal: Goal) -> int:
        """The first point that truly meets the target, by bisection from the predicted one; else the last."""
        if goal.target is None:
            self._run(points[-1])
            return len(points) - 1
        allowed, scale = 1 - goal.target, 1.0
        low, high = 0, len(points)  # the answer lies in low..high; high: the first that is known to do
        for step in range(2 * len(points)):
            if low >= high:
                break
            guess = next((i for i in range(low, high) if points[i].predicted * scale <= allowed), high - 1)
            at = guess if step < _GUESSES else (low + high) // 2
            found = self._run(points[at]).similarity
            if found >= goal.target:
                high = at
            else:
                low = at + 1
            scale = (1 - found) / max(points[at].predicted, _NEGLIGIBLE)
        return min(high, len(points) - 1)

    def _changed(self, point: Point) -> dict[str, Precision]:
        return {g: p for g, p in point.precisions.items() if p != self._base[g]}

    def _key(self, point: Point) -> frozenset[tuple[str, Precision]]:
        return frozenset(self._changed(point).items())

    def _run(self, point: Point) -> Tried:
        """The plan of *point*, solved and run."""
        key = self._key(point)
        if key not in self._true:
            plan = self._solved(point)
            self._record(point, plan, self.runs.evaluate(plan))
        return self._true[key]

    def _run_alternative(self, precisions: Mapping[str, Precision]) -> None:
        changed = {g: p for g, p in precisions.items() if p != self._base[g]}
        key = frozenset(changed.items())
        if key not in self._true:
            plan = self._with(changed, "sensitive alone, by the ranking of single operators")
            cost = self.costs.total({**self._base, **changed})
            self._tell(key, Tried(plan, changed, self.runs.evaluate(plan), cost=cost))

    def _run_all(self, points: Sequence[Point]) -> None:
        missing = {self._key(p): p for p in points if self._key(p) not in self._true}
        named = {str(i): p for i, p in enumerate(missing.values())}
        plans = {name: self._solved(p) for name, p in named.items()}
        self.runs.evaluate_all(plans, lambda name, found: self._record(named[name], plans[name], found))

    def _solved(self, point: Point) -> Plan:
        cosine = 1 - point.predicted
        return self._with(self._changed(point), f"joint search: predicted cosine of the network {cosine:.6f}")

    def _with(self, changed: Mapping[str, Precision], why: str) -> Plan:
        plan = self.plan
        for precision in dict.fromkeys(changed.values()):
            groups = [g for g, p in changed.items() if p == precision]
            plan = plan.with_precision(groups, precision, why)
        return self.solve(plan)

    def _record(self, point: Point, plan: Plan, similarity: float) -> None:
        tried = Tried(plan, self._changed(point), similarity, 1 - point.predicted, point.cost)
        self._tell(self._key(point), tried)

    def _tell(self, key: frozenset[tuple[str, Precision]], tried: Tried) -> None:
        self._true[key] = tried
        if self._on_true_run:
            self._on_true_run(tried)

    def _factor(self, point: Point) -> float:
        truth, predicted = 1 - self._run(point).similarity, point.predicted
        if max(truth, predicted) < _NEGLIGIBLE:
            return 1.0
        return max(truth, predicted) / max(min(truth, predicted), _NEGLIGIBLE)

    def _result(self, goal: Goal, parted: tuple[float, ...]) -> JointResult:
        tried = sorted(self._true.values(), key=_cost)
        enough = [t for t in tried if goal.target is not None and t.similarity >= goal.target]
        best = min(enough, key=_cost) if enough else max(tried, key=lambda t: t.similarity)
        choice = Choice(best.plan, best.similarity, best.groups, tuple(tried))
        return JointResult(choice, bool(enough), parted)


def thinned(those: Sequence[T]) -> list[T]:
    """At most `FRONT` of *those*, evenly by their place: each costs a true run, or a metric of minutes."""
    if len(those) <= FRONT:
        return list(those)
    return [those[round(i * (len(those) - 1) / (FRONT - 1))] for i in range(FRONT)]


def _cost(tried: Tried) -> float:
    return tried.cost or 0.0
