"""Thresholds and precisions as a part of jobs: proposed by the sketch, kept if a true run agrees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from bitwright.errors import DataError
from bitwright.flow.bench import Bench
from bitwright.flow.progress import Watcher
from bitwright.flow.ranking import Ranking, note_unsketched, open_runner
from bitwright.flow.result import Chosen, Stage
from bitwright.flow.settings import Settings
from bitwright.plan.assign import allowed_precisions
from bitwright.plan.cost import Costs, measure_costs
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.plan.target import Precision
from bitwright.search.choose import Tried, float_until, unchanged, widest_top, without_needless
from bitwright.search.compare_plans import compare_plans
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.joint_precision import Goal, JointPrecision, RunMany
from bitwright.search.neighbours import with_neighbours
from bitwright.search.sensitivity import best_methods, measure_sensitivity
from bitwright.search.similarity import COSINE
from bitwright.search.sketched import unreachable_groups
from bitwright.search.thresholds import joint_thresholds


def measured_int8(bench: Bench, watcher: Watcher) -> Stage:
    """The plan that *bench* was opened with, compared with the float network."""
    watcher.stage("comparing int8 with float")
    return Stage(bench.plan, bench.evaluator.evaluate(bench.plan))


def nothing_to_choose(plan: Plan, int8: Stage) -> Chosen:
    """int8 meets the target already."""
    return Chosen(int8, False, unchanged(plan, int8.cosine), True)


def choose_thresholds(
    bench: Bench, ranking: Ranking, int8: Stage, settings: Settings, watcher: Watcher
) -> tuple[Stage, bool]:
    """Thresholds of all values: each by its group's best method, and jointly by the sketch. The loss of true runs chooses among
    them, and none is kept (False) if the network got worse by all."""
    solve = bench.solver.solve
    plans = [solve(bench.plan.with_methods(best_methods(bench.graph, bench.plan, ranking.rows)))]
    if ranking.sketch is not None:
        watcher.stage("choosing thresholds")
        plans += joint_thresholds(ranking.sketch, bench.plan, solve, settings.methods)
    stages = [Stage(plan, bench.evaluator.evaluate(plan)) for plan in plans]
    best = min(stages, key=lambda s: _loss(bench, s))
    return (best, True) if _loss(bench, best) <= _loss(bench, int8) else (int8, False)


def _loss(bench: Bench, stage: Stage) -> float:
    """The loss that ranks operators, of a whole plan by a true run."""
    assert stage.plan is not None
    if bench.evaluator.similarity.loss == COSINE:
        return 1 - stage.cosine
    return float(bench.evaluator.losses(quantized_reads(bench.graph, stage.plan)).mean())


def choose_precisions(
    bench: Bench,
    ranking: Ranking,
    tuned: Stage,
    settings: Settings,
    watcher: Watcher,
    *,
    usual_limit: int,
    target: float | None,
    verify_all: bool = False,
) -> Chosen:
    """The cheapest mixed plan that reaches *target* (None: the best within the budget), beginning with *tuned*. *usual_limit*: groups
    that may become float where the settings name no limit. Targets are cosines, so this is by the cosine whatever loss ranks."""
    assert tuned.plan is not None
    if target is not None and tuned.cosine >= target and not verify_all:
        return Chosen(tuned, True, unchanged(tuned.plan, tuned.cosine), True)
    watcher.stage("choosing precisions")
    if ranking.sketch is None:
        return _chosen_unsketched(bench, ranking, tuned, settings, watcher, usual_limit, target)
    options, limit = precision_options(bench, tuned.plan, settings), cost_limit(settings, usual_limit)
    costs = measure_costs(bench.graph, tuned.plan, bench.target, settings.cost).within(options)
    known = _apart(bench, ranking.sketch, ranking.apart, tuned.plan, settings, watcher)
    sketch, apart = _by_cosine(bench, ranking.sketch, known, settings)
    for group in options.keys() & apart.keys():  # what they would lose at other widths was not measured
        options[group] = [p for p in options[group] if p in (tuned.plan.precision(group), "float")]
    search = JointPrecision(
        bench.evaluator,
        tuned.plan,
        bench.solver.solve,
        options,
        costs,
        start=tuned.cosine,
        apart=apart,
        run_many=_run_many(bench, settings),
        on_true_run=partial(_tell, watcher),
    )
    found = search.search(
        sketch,
        Goal(target, limit),
        around=lambda reads: ErrorSketch(
            sketch.evaluator, probes=settings.probes, seed=settings.seed, base=reads
        ),
        alternatives=[] if target is not None else [widest_top(ranking.rows, options, costs, limit)],
        verify_all=verify_all,
    )
    chosen = Chosen(tuned, True, found.choice, target is None or found.reached, found.parted, costs)
    if target is None:
        return chosen
    if settings.cost == "ops" and set(settings.precisions) == {"int8", "float"}:
        chosen = _or_singles(bench, ranking, chosen, target, int(limit), watcher)
    chosen = _without_needless(bench, chosen, target, costs, watcher)
    if chosen.reached or settings.cost != "ops" or not chosen.choice.groups:
        return chosen
    beside = _with_neighbours(bench, chosen, options, target, limit, settings, watcher)
    if beside.choice.groups == chosen.choice.groups:
        return beside
    return _without_needless(bench, beside, target, costs, watcher)


def _chosen_unsketched(
    bench: Bench,
    ranking: Ranking,
    tuned: Stage,
    settings: Settings,
    watcher: Watcher,
    usual_limit: int,
    target: float | None,
) -> Chosen:
    """Where operators are not sketched: the most sensitive ones float, one after another."""
    assert tuned.plan is not None
    unused = [p for p in settings.precisions if p not in ("int8", "float")]
    if unused:
        watcher.note(f"operators are not sketched: {', '.join(unused)} of --precisions cannot be tried")
    if settings.cost != "ops":
        raise DataError(
            f"--budget {settings.cost}=…",
            expected="ops=N where operators are not sketched",
            found=settings.cost,
            remedy="Use --method sketch+verify on a network that gradients lead through, or --budget ops=N.",
        )
    choice = float_until(
        bench.evaluator,
        tuned.plan,
        ranking.rows,
        bench.solver.solve,
        target=math.inf if target is None else target,
        limit=int(cost_limit(settings, usual_limit)),
        progress=partial(_tell, watcher),
    )
    chosen = Chosen(tuned, True, choice, target is None or choice.similarity >= target)
    return chosen if target is None else _without_needless(bench, chosen, target, None, watcher)


def _tell(watcher: Watcher, tried: Tried) -> None:
    changed = ", ".join(tried.groups)
    watcher.advance(1, f"{tried.similarity:.6f} with {len(tried.groups)} changed: {changed:.60}")


def _without_needless(
    bench: Bench, chosen: Chosen, target: float, costs: Costs | None, watcher: Watcher
) -> Chosen:
    """*chosen*, less what it can do without. *costs*: None counts the groups."""
    base = chosen.tuned.plan
    assert base is not None
    if not chosen.choice.groups:
        return chosen
    watcher.stage("leaving out what is needless", len(chosen.choice.groups))
    precisions = {g: base.precision(g) for g in base.groups}
    choice = without_needless(
        bench.evaluator,
        chosen.choice,
        base,
        bench.solver.solve,
        target=target,
        cost=lambda groups: float(len(groups)) if costs is None else costs.total({**precisions, **groups}),
        progress=partial(_tell, watcher),
    )
    return replace(chosen, choice=choice, reached=choice.similarity >= target)


def _with_neighbours(
    bench: Bench,
    chosen: Chosen,
    options: Mapping[str, Sequence[Precision]],
    target: float,
    limit: float,
    settings: Settings,
    watcher: Watcher,
) -> Chosen:
    """*chosen*, or what comes nearer with operators widened that share values with the widened ones."""
    base, costs = chosen.tuned.plan, chosen.costs
    assert base is not None
    assert costs is not None
    watcher.stage("trying neighbours")
    precisions = {g: base.precision(g) for g in base.groups}
    evaluate = bench.evaluator.evaluate
    choice = with_neighbours(
        bench.graph,
        chosen.choice,
        base,
        bench.solver.solve,
        options,
        _run_many(bench, settings) or (lambda plans: {name: evaluate(plan) for name, plan in plans.items()}),
        target=target,
        limit=limit,
        cost=lambda groups: costs.total({**precisions, **groups}),
        progress=partial(_tell, watcher),
    )
    return replace(chosen, choice=choice, reached=choice.similarity >= target)


def _or_singles(
    bench: Bench,
    ranking: Ranking,
    chosen: Chosen,
    target: float,
    limit: int,
    watcher: Watcher,
) -> Chosen:
    """*chosen*, or what costs less or comes nearer: the most sensitive operators float, one after another, on their own best
    thresholds. Where little is left to gain, predictions of whole plans are no better than this, and true runs are cheap.
    """
    fewer = len(chosen.choice.groups) - 1 if chosen.reached else limit
    if fewer < 1:
        return chosen
    solve = bench.solver.solve
    plan = solve(bench.plan.with_methods(best_methods(bench.graph, bench.plan, ranking.rows)))
    watcher.stage("trying the most sensitive alone", fewer)
    singles = float_until(
        bench.evaluator,
        plan,
        ranking.rows,
        solve,
        target=target,
        limit=fewer,
        progress=partial(_tell, watcher),
    )
    known = {(frozenset(t.groups.items()), t.similarity) for t in chosen.choice.tried}
    new = [t for t in singles.tried if (frozenset(t.groups.items()), t.similarity) not in known]
    tried = sorted([*chosen.choice.tried, *new], key=lambda t: t.cost or 0.0)
    reached = singles.similarity >= target
    if not reached and (chosen.reached or singles.similarity <= chosen.choice.similarity):
        return replace(chosen, choice=replace(chosen.choice, tried=tuple(tried)))
    stage = Stage(plan, singles.tried[0].similarity)
    return replace(chosen, tuned=stage, choice=replace(singles, tried=tuple(tried)), reached=reached)


def _run_many(bench: Bench, settings: Settings) -> RunMany | None:
    runner = open_runner(settings)
    return None if runner is None else lambda plans: compare_plans(bench.evaluator, plans, runner)


def _apart(
    bench: Bench,
    sketch: ErrorSketch,
    known: Mapping[str, float],
    plan: Plan,
    settings: Settings,
    watcher: Watcher,
) -> dict[str, float]:
    """Losses by group that no gradient tells: those *known*, and of groups that were not ranked, measured now."""
    sketch.measure(sketch.missing([quantized_reads(bench.graph, plan)]))
    found = {g: why for g, why in unreachable_groups(sketch, plan).items() if g not in known}
    note_unsketched(watcher, found)
    if not found:
        return dict(known)
    rows = measure_sensitivity(
        bench.evaluator, bench.plan, bench.solver.solve, methods=settings.methods, groups=list(found)
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


def precision_options(bench: Bench, plan: Plan, settings: Settings) -> dict[str, list[Precision]]:
    """Group -> the precisions that the target allows it, of those that the settings ask for; its present one is always among them."""
    found: dict[str, list[Precision]] = {}
    for group in plan.groups:
        present = plan.precision(group)
        if present == "float":
            continue
        allowed = allowed_precisions(bench.graph, plan, bench.target, group)
        found[group] = [p for p in allowed if p in settings.precisions or p == present]
    return found


def cost_limit(settings: Settings, usual: int) -> float:
    """The greatest cost of a plan. *raises* `DataError` if two limits are given."""
    if settings.budget is not None and settings.max_float_ops is not None:
        raise DataError(
            "--budget and --max-float-ops",
            expected="one limit",
            found="both",
            remedy="--max-float-ops N is --budget ops=N.",
        )
    if settings.budget is not None:
        return settings.budget
    if settings.max_float_ops is not None and settings.cost == "ops":
        return float(settings.max_float_ops)
    return float(usual) if settings.cost == "ops" else math.inf
