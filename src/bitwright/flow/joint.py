"""`search --mode joint`: thresholds and precisions of the whole network, as an optimisation with a cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.errors import DataError
from bitwright.files import write_text
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.choosing import choose_precisions, choose_thresholds, measured_int8
from bitwright.flow.limits import check_search, cost_limit
from bitwright.flow.metrics import measure_plans
from bitwright.flow.outputs import (
    check_writable,
    ops_json,
    sensitivity_table,
    tried_table,
    versions,
    write_json,
    write_plan,
    write_search,
)
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.ranking import (
    METRIC_SEARCH,
    Ranking,
    open_runner,
    open_sketch,
    open_state,
    rank,
    state_path,
)
from bitwright.flow.result import Chosen, Stage
from bitwright.flow.settings import Settings
from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.report.curves import Curve
from bitwright.report.page import Page, Section, write_page
from bitwright.search.choose import Choice, Tried
from bitwright.search.interactions import Explanation, explain
from bitwright.search.joint_precision import Goal, thinned
from bitwright.search.sensitivity import Sensitivity
from bitwright.search.true_runs import TrueRuns
from bitwright.table import Column, Table

#: Interactions that are written down.
PAIRS = 40


@dataclass(frozen=True)
class JointSearch:
    """*int8*: the base network; *metrics*: a user's metric by plan (`float`, `int8`, then the numbers of plans tried: the chosen one,
    and those that none is better than), if asked for.
    *target*: the similarity asked for, None for the best within the budget or for *min_metric*, the metric asked for.
    """

    bench: Bench
    int8: Stage
    ranking: Ranking
    chosen: Chosen
    target: float | None
    explanation: Explanation | None
    metrics: Mapping[str, float]
    min_metric: float | None = None

    @property
    def choice(self) -> Choice:
        """The chosen plan, and what else was run."""
        return self.chosen.choice

    @property
    def rows(self) -> tuple[Sensitivity, ...]:
        """The ranking of the operators."""
        return self.ranking.rows


def run_joint(
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    output: str | Path,
    settings: Settings | None = None,
    best_in_budget: bool = False,
    explained: bool = False,
    min_metric: float | None = None,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
) -> JointSearch:
    """The cheapest plan that reaches the target similarity, or (*best_in_budget*) the most similar one within the budget; all plans
    of the front are run.

    *explained*: also which operators amplify or cancel each other. *min_metric*: with a metric in the settings, choose the cheapest
    plan whose metric is at least this instead. Writes `pareto.csv`, `interactions.csv`, `report.html` and the files of a
    sensitivity search to *output*.
    """
    settings, watcher = settings or Settings(), watcher or Silence()
    if min_metric is not None and settings.evaluate is None:
        raise DataError(
            "--min-metric", expected="a metric", found="none", remedy="Give --evaluate file.py:function."
        )
    folder = check_writable(Path(output))
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    check_search(bench, settings)
    int8 = measured_int8(bench, watcher)
    target = None if best_in_budget or min_metric is not None else settings.expected_cos
    goal = Goal(target, cost_limit(settings, usual=len(bench.plan.groups)))
    with open_state(bench, settings, folder, watcher, search="sensitivity") as state:
        runs = TrueRuns(bench.evaluator, runner=open_runner(settings), state=state)
        ranking = rank(bench, settings, state, folder, watcher)
        tuned, kept = choose_thresholds(bench, runs, ranking, int8, settings, watcher)
        chosen = choose_precisions(bench, runs, ranking, tuned, goal, settings, watcher, verify_all=True)
    chosen = replace(chosen, kept=kept)
    metrics = _metrics(bench, int8, chosen.choice, settings, folder, watcher)
    if min_metric is not None:
        chosen = _by_metric(chosen, metrics, min_metric)
    explanation = _explanation(bench, ranking, settings, folder, watcher) if explained else None
    result = JointSearch(bench, int8, ranking, chosen, target, explanation, metrics, min_metric)
    _write(folder, result)
    for search in ("sensitivity", METRIC_SEARCH):
        state_path(settings, folder, search).unlink(missing_ok=True)
    return result


def _explanation(
    bench: Bench, ranking: Ranking, settings: Settings, folder: Path, watcher: Watcher
) -> Explanation | None:
    sketch = ranking.sketch
    if sketch is None and settings.search_method == "exact":
        sketch = open_sketch(bench, settings, folder, watcher)
    if sketch is None:
        watcher.note("--explain needs gradients of the outputs: no interactions are listed")
        return None
    watcher.stage("explaining interactions")
    return explain(sketch, bench.plan, most=PAIRS)


# --- a user's metric -------------------------------------------------------------------------------------------


def _metrics(
    bench: Bench, int8: Stage, choice: Choice, settings: Settings, folder: Path, watcher: Watcher
) -> dict[str, float]:
    if settings.evaluate is None:
        return {}
    plans: dict[str, Plan | None] = {"float": None, "int8": int8.plan}
    plans |= {str(i): choice.tried[i].plan for i in _worth_measuring(choice)}
    return measure_plans(bench, plans, settings, folder, watcher)


def _worth_measuring(choice: Choice) -> list[int]:
    """Which of the plans tried a metric is measured of: the chosen one, and at most `FRONT` that no other one is better than."""
    tried = choice.tried
    front = [i for i, t in enumerate(tried) if not any(_is_better(other, t) for other in tried)]
    chosen = next(i for i, t in enumerate(tried) if t.plan is choice.plan)
    return sorted({chosen, *thinned(front)})


def _is_better(one: Tried, than: Tried) -> bool:
    """Whether *one* costs no more than the other and is no less similar, and is better in one of both."""
    costs, similarities = (one.cost or 0.0, than.cost or 0.0), (one.similarity, than.similarity)
    equal = costs[0] == costs[1] and similarities[0] == similarities[1]
    return costs[0] <= costs[1] and similarities[0] >= similarities[1] and not equal


def _by_metric(chosen: Chosen, metrics: Mapping[str, float], least: float) -> Chosen:
    """Of the plans that were measured, the cheapest whose metric is at least *least*, else the one with the best metric."""
    measured = [(metrics[str(i)], t) for i, t in enumerate(chosen.choice.tried) if str(i) in metrics]
    enough = [t for metric, t in measured if metric >= least]
    best = min(enough, key=lambda t: t.cost or 0.0) if enough else max(measured, key=lambda m: m[0])[1]
    choice = Choice(best.plan, best.similarity, best.groups, chosen.choice.tried)
    return replace(chosen, choice=choice, reached=bool(enough))


# --- what is written -------------------------------------------------------------------------------------------


def pareto_table(result: JointSearch) -> Table:
    """The plans that were run: cost, predicted and measured cosine, the metric where it was measured."""
    table = tried_table(result.choice)
    if not result.metrics:
        return replace(table, title="Pareto front")
    columns = (*table.columns[:-2], Column("metric", "metric", "", 4), *table.columns[-2:])
    rows = tuple({**row, "metric": result.metrics.get(str(i))} for i, row in enumerate(table.rows))
    return Table("Pareto front", columns, rows)


def interaction_table(explanation: Explanation) -> Table:
    """The pairs of operators whose errors add up or cancel most."""
    columns = (
        Column("first", "operator"),
        Column("second", "operator"),
        Column("effect", "interaction", "loss", 6),
        Column("error", "± standard error", "", 6),
        Column("correlation", "correlation", "", 3),
        Column("loss_first", "loss of the first", "", 6),
        Column("loss_second", "loss of the second", "", 6),
        Column("together", "loss of both", "", 6),
        Column("says", "they"),
    )
    rows = tuple(
        {
            "first": p.first,
            "second": p.second,
            "effect": p.effect,
            "error": p.error,
            "correlation": p.correlation,
            "loss_first": p.alone[0],
            "loss_second": p.alone[1],
            "together": p.together,
            "says": _says(p.effect, p.error),
        }
        for p in explanation.pairs
    )
    title = (
        f"Interactions at int8: parts {sum(explanation.parts.values()):.6f}, "
        f"interactions {explanation.interaction:+.6f}, together {explanation.total:.6f}"
    )
    return Table(title, columns, rows)


def _says(effect: float, error: float) -> str:
    if abs(effect) < 2 * error:
        return "uncertain"
    return "amplify" if effect > 0 else "cancel"


def _write(folder: Path, result: JointSearch) -> None:
    bench, pareto = result.bench, pareto_table(result)
    write_search(folder, bench, result.rows, result.choice, result.int8.cosine)
    write_text(folder / "pareto.csv", pareto.to_csv())
    metric_names = ("predicted", "cosine")
    curve = Curve("cost", metric_names, mark=("chosen", "yes"), level=result.target)
    unit = "" if result.chosen.costs is None else f"Cost: {result.chosen.costs.unit}."
    sections = [
        Section(pareto, curve=curve, note=unit),
        Section(sensitivity_table(result.rows, result.choice.plan), bar=("name", "loss")),
    ]
    if result.explanation is not None:
        interactions = interaction_table(result.explanation)
        write_text(folder / "interactions.csv", interactions.to_csv())
        sections.append(Section(interactions))
    subtitle = f"target {bench.target.name} · {bench.inference_samples} samples"
    write_page(
        folder / "report.html", Page(f"Bitwright: {bench.name}, mixed precision", subtitle, tuple(sections))
    )
    write_plan(folder, result.choice.plan)
    write_json(folder / "summary.json", joint_summary(result))


def joint_summary(result: JointSearch) -> dict[str, Any]:
    """The contents of summary.json."""
    bench, chosen = result.bench, result.chosen
    return {
        "model": bench.name,
        "target": bench.target.name,
        "images": {"calibration": bench.calibration_samples, "inference": bench.inference_samples},
        "float": {"cosine": 1.0},
        "int8": {"cosine": result.int8.cosine},
        "tuned": {"cosine": chosen.tuned.cosine},
        "mixed": {"cosine": result.choice.similarity},
        "expected_cos": result.target,
        "reached": chosen.reached,
        "cost": None if chosen.costs is None else chosen.costs.metric,
        "linearised_again_at_factors": list(chosen.parted),
        "pareto": [_tried_json(t) for t in result.choice.tried],
        "metrics": dict(result.metrics),
        "ops": ops_json(result.rows, result.choice.plan),
        "float_ops": result.choice.float_groups,
        "precisions": dict(result.choice.groups),
        "not_granted": bench.plan.refusals,
        "forward_passes": round(bench.evaluator.effort.forward_passes, 2),
        "versions": versions(),
    }


def _tried_json(tried: Tried) -> dict[str, Any]:
    return {
        "cost": tried.cost,
        "predicted": tried.predicted,
        "cosine": tried.similarity,
        "groups": dict(tried.groups),
    }
