"""Choices of precisions, refined by true runs: less what is needless, with what predictions and single losses do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from bitwright.flow.bench import Bench
from bitwright.flow.limits import options_and_costs
from bitwright.flow.progress import Watcher
from bitwright.flow.ranking import Ranking
from bitwright.flow.result import Chosen, Stage
from bitwright.flow.settings import Settings
from bitwright.plan.target import Precision
from bitwright.search.choose import Tried, float_until, with_tried, without_needless
from bitwright.search.neighbours import LEAST_GAIN, with_neighbours
from bitwright.search.sensitivity import best_methods
from bitwright.search.true_runs import TrueRuns


def tell(watcher: Watcher, tried: Tried) -> None:
    """Tell *watcher* of a true run."""
    changed = ", ".join(tried.groups)
    watcher.advance(1, f"{tried.similarity:.6f} with {len(tried.groups)} changed: {changed:.60}")


@dataclass(frozen=True)
class Refining:
    """*target*: the similarity asked for; *limit*: the greatest cost of a plan."""

    bench: Bench
    runs: TrueRuns
    settings: Settings
    watcher: Watcher
    target: float
    limit: float

    def or_singles(self, chosen: Chosen, ranking: Ranking) -> Chosen:
        """*chosen*, or what costs less or comes nearer: the most sensitive operators float, one after another, on their own best
        thresholds. Where little is left to gain, predictions of whole plans are no better than this, and true runs are cheap.
        """
        fewer = len(chosen.choice.groups) - 1 if chosen.reached else int(self.limit)
        if fewer < 1:
            return chosen
        bench, solve = self.bench, self.bench.solver.solve
        plan = solve(bench.plan.with_methods(best_methods(bench.graph, bench.plan, ranking.rows)))
        self.watcher.stage("trying the most sensitive alone", fewer)
        singles = float_until(
            self.runs,
            plan,
            ranking.rows,
            solve,
            target=self.target,
            limit=fewer,
            progress=partial(tell, self.watcher),
        )
        tried = (*chosen.choice.tried, *singles.tried)
        reached = singles.similarity >= self.target
        if not reached and (chosen.reached or singles.similarity <= chosen.choice.similarity):
            return replace(chosen, choice=with_tried(chosen.choice, tried))
        stage = Stage(plan, self.runs.evaluate(plan))
        return replace(chosen, tuned=stage, choice=with_tried(singles, tried), reached=reached)

    def refined(self, chosen: Chosen) -> Chosen:
        """*chosen*, less what it can do without; where it misses the target and operators are counted, with neighbours of what it
        widened, if they come nearer. Costs are counted anew: its base plan may be another than the search began with."""
        assert chosen.tuned.plan is not None
        options, costs = options_and_costs(self.bench, chosen.tuned.plan, self.settings)
        chosen = self._less(replace(chosen, costs=costs))
        if chosen.reached or self.settings.cost != "ops" or not chosen.choice.groups:
            return chosen
        # What wins next to nothing would use up the room that neighbours need.
        lean = self._less(chosen, slack=LEAST_GAIN)
        beside = self._with_neighbours(lean, options)
        if beside.choice.similarity <= chosen.choice.similarity:
            return replace(chosen, choice=with_tried(chosen.choice, beside.choice.tried))
        return beside if beside.choice.groups == lean.choice.groups else self._less(beside)

    def _less(self, chosen: Chosen, slack: float = 0.0) -> Chosen:
        """*chosen*, less what it can do without. *slack*: see `without_needless`."""
        assert chosen.tuned.plan is not None
        assert chosen.costs is not None
        cost = chosen.costs.total  # of what differs from the base plan, which costs nothing
        widened = [g for g, p in chosen.choice.groups.items() if cost({g: p}) > 0]
        if not widened:
            return chosen
        title = "leaving out what wins little" if slack else "leaving out what is needless"
        self.watcher.stage(title, len(widened))
        choice = without_needless(
            self.runs,
            chosen.choice,
            chosen.tuned.plan,
            self.bench.solver.solve,
            target=self.target,
            cost=cost,
            slack=slack,
            progress=partial(tell, self.watcher),
        )
        return replace(chosen, choice=choice, reached=choice.similarity >= self.target)

    def _with_neighbours(self, chosen: Chosen, options: Mapping[str, Sequence[Precision]]) -> Chosen:
        """*chosen*, or what comes nearer with operators widened that share values with the widened ones."""
        assert chosen.tuned.plan is not None
        assert chosen.costs is not None
        self.watcher.stage("trying neighbours")
        choice = with_neighbours(
            self.runs,
            chosen.choice,
            chosen.tuned.plan,
            self.bench.solver.solve,
            options,
            target=self.target,
            limit=self.limit,
            cost=chosen.costs.total,
            progress=partial(tell, self.watcher),
        )
        return replace(chosen, choice=choice, reached=choice.similarity >= self.target)
