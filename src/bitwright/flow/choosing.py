"""Thresholds and precisions as a part of jobs: proposed by the sketch, kept if a true run agrees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from bitwright.flow.bench import Bench
from bitwright.flow.limits import needs_sketch, options_and_costs
from bitwright.flow.progress import Watcher
from bitwright.flow.ranking import Ranking, note_unsketched
from bitwright.flow.refining import Refining, tell
from bitwright.flow.result import Chosen, Stage
from bitwright.flow.settings import Settings
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.choose import float_until, unchanged, widest_top
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.joint_precision import Goal, JointPrecision
from bitwright.search.sensitivity import best_methods, measure_sensitivity
from bitwright.search.similarity import COSINE
from bitwright.search.sketched import unreachable_groups
from bitwright.search.state import SearchState
from bitwright.search.thresholds import joint_thresholds
from bitwright.search.true_runs import TrueRuns


def measured_int8(bench: Bench, watcher: Watcher) -> Stage:
    """The plan that *bench* was opened with, compared with the float network."""
    watcher.stage("comparing int8 with float")
    return Stage(bench.plan, bench.evaluator.evaluate(bench.plan))


def nothing_to_choose(plan: Plan, int8: Stage) -> Chosen:
    """int8 meets the target already."""
    return Chosen(int8, False, unchanged(plan, int8.cosine), True)


def choose_thresholds(
    bench: Bench, runs: TrueRuns, ranking: Ranking, int8: Stage, settings: Settings, watcher: Watcher
) -> tuple[Stage, bool]:
    """Thresholds of all values: each by its group's best method, and jointly by the sketch. The loss of true runs chooses among
    them, and none is kept (False) if the network got worse by all."""
    solve = bench.solver.solve
    plans = [solve(bench.plan.with_methods(best_methods(bench.graph, bench.plan, ranking.rows)))]
    if ranking.sketch is not None:
        watcher.stage("choosing thresholds")
        plans += joint_thresholds(ranking.sketch, bench.plan, solve, settings.methods)
    stages = [Stage(plan, runs.evaluate(plan)) for plan in plans]
    best = min(stages, key=lambda s: _loss(bench, runs, s))
    return (best, True) if _loss(bench, runs, best) <= _loss(bench, runs, int8) else (int8, False)


def _loss(bench: Bench, runs: TrueRuns, stage: Stage) -> float:
    """The loss that ranks operators, of a whole plan by a true run."""
    assert stage.plan is not None
    if bench.evaluator.similarity.loss == COSINE:
        return 1 - stage.cosine
    return runs.loss(stage.plan)


def choose_precisions(
    bench: Bench,
    runs: TrueRuns,
    ranking: Ranking,
    tuned: Stage,
    goal: Goal,
    settings: Settings,
    watcher: Watcher,
    *,
    verify_all: bool = False,
) -> Chosen:
    """The cheapest mixed plan that reaches the target of *goal* (None: the best within its limit), beginning with *tuned*. Targets are
    cosines, so this is by the cosine whatever loss ranks."""
    assert tuned.plan is not None
    if goal.target is not None and tuned.cosine >= goal.target and not verify_all:
        return Chosen(tuned, True, unchanged(tuned.plan, tuned.cosine), True)
    watcher.stage("choosing precisions")
    if ranking.sketch is None:
        settings = _unsketched(settings, watcher)
        chosen = _chosen_singly(bench, runs, ranking, tuned, goal, settings, watcher)
    else:
        chosen = _chosen_jointly(
            bench, runs, ranking, ranking.sketch, tuned, goal, settings, watcher, verify_all=verify_all
        )
    if goal.target is None:
        return chosen
    refining = Refining(bench, runs, settings, watcher, goal.target, goal.limit)
    if (
        ranking.sketch is not None
        and settings.cost == "ops"
        and set(settings.precisions) == {"int8", "float"}
    ):
        chosen = refining.or_singles(chosen, ranking)
    return refining.refined(chosen)


def _chosen_jointly(
    bench: Bench,
    runs: TrueRuns,
    ranking: Ranking,
    around_float: ErrorSketch,
    tuned: Stage,
    goal: Goal,
    settings: Settings,
    watcher: Watcher,
    *,
    verify_all: bool,
) -> Chosen:
    """By a joint search, which begins with the sketch *around_float*."""
    assert tuned.plan is not None
    options, costs = options_and_costs(bench, tuned.plan, settings)
    known = _apart(bench, around_float, ranking.apart, tuned.plan, settings, runs.state, watcher)
    sketch, apart = _by_cosine(bench, around_float, known, settings)
    for group in options.keys() & apart.keys():  # what they would lose at other widths was not measured
        options[group] = [p for p in options[group] if p in (tuned.plan.precision(group), "float")]
    search = JointPrecision(
        runs,
        tuned.plan,
        bench.solver.solve,
        options,
        costs,
        start=tuned.cosine,
        apart=apart,
        on_true_run=partial(tell, watcher),
    )
    singles = [] if goal.target is not None else [widest_top(ranking.rows, options, costs, goal.limit)]
    found = search.search(
        sketch,
        goal,
        around=lambda reads: ErrorSketch(
            sketch.evaluator, probes=settings.probes, seed=settings.seed, base=reads
        ),
        alternatives=singles,
        verify_all=verify_all,
    )
    return Chosen(tuned, True, found.choice, goal.target is None or found.reached, found.parted, costs)


def _unsketched(settings: Settings, watcher: Watcher) -> Settings:
    """What *settings* ask for, as far as it can be tried where operators are not sketched. *raises* `DataError`."""
    unused = [p for p in settings.precisions if p not in ("int8", "float")]
    if unused:
        watcher.note(f"operators are not sketched: {', '.join(unused)} of --precisions cannot be tried")
    if settings.cost != "ops":
        raise needs_sketch(settings.cost)
    return replace(settings, precisions=("int8", "float"))


def _chosen_singly(
    bench: Bench,
    runs: TrueRuns,
    ranking: Ranking,
    tuned: Stage,
    goal: Goal,
    settings: Settings,
    watcher: Watcher,
) -> Chosen:
    """Where operators are not sketched: the most sensitive ones float, one after another."""
    assert tuned.plan is not None
    choice = float_until(
        runs,
        tuned.plan,
        ranking.rows,
        bench.solver.solve,
        target=math.inf if goal.target is None else goal.target,
        limit=int(goal.limit),
        progress=partial(tell, watcher),
    )
    _, costs = options_and_costs(bench, tuned.plan, settings)
    reached = goal.target is None or choice.similarity >= goal.target
    return Chosen(tuned, True, choice, reached, costs=costs)


def _apart(
    bench: Bench,
    sketch: ErrorSketch,
    known: Mapping[str, float],
    plan: Plan,
    settings: Settings,
    state: SearchState,
    watcher: Watcher,
) -> dict[str, float]:
    """Losses by group that no gradient tells: those *known*, and of groups that were not ranked, measured now as for a ranking."""
    sketch.measure(sketch.missing([quantized_reads(bench.graph, plan)]))
    found = {g: why for g, why in unreachable_groups(sketch, plan).items() if g not in known}
    note_unsketched(watcher, found)
    if not found:
        return dict(known)
    rows = measure_sensitivity(
        bench.evaluator,
        bench.plan,
        bench.solver.solve,
        methods=settings.methods,
        groups=list(found),
        state=state,
    )
    return {**known, **{r.name: r.loss for r in rows}}


def _by_cosine(
    bench: Bench, sketch: ErrorSketch, apart: Mapping[str, float], settings: Settings
) -> tuple[ErrorSketch, Mapping[str, float]]:
    """*sketch*, and the losses it does not know, by the cosine: measured again if they are by another loss."""
    if bench.evaluator.similarity.loss == COSINE:
        return sketch, apart
    evaluator = bench.evaluator.with_loss(COSINE)
    if apart:
        rows = measure_sensitivity(
            evaluator, bench.plan, bench.solver.solve, methods=settings.methods, groups=list(apart)
        )
        apart = {r.name: r.loss for r in rows}
    return ErrorSketch(evaluator, probes=settings.probes, seed=settings.seed), apart
