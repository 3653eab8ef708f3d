"""The two searches as jobs of their own: `sensitivity` and `search --mode mixed`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.files import write_text
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.choosing import choose_precisions, choose_thresholds, measured_int8
from bitwright.flow.limits import check_search, cost_limit
from bitwright.flow.metrics import metrics_alone
from bitwright.flow.outputs import (
    check_writable,
    ops_json,
    versions,
    write_json,
    write_plan,
    write_search,
    write_tables,
)
from bitwright.flow.progress import Silence, Watcher, counting
from bitwright.flow.ranking import METRIC_SEARCH, Ranking, open_runner, open_state, rank, state_path
from bitwright.flow.result import Stage
from bitwright.flow.settings import Settings
from bitwright.graph.graph import Graph
from bitwright.search.choose import Choice, float_top, unchanged
from bitwright.search.joint_precision import Goal
from bitwright.search.mixed_precision import Walk, search_mixed_precision
from bitwright.search.sensitivity import Sensitivity
from bitwright.search.true_runs import TrueRuns
from bitwright.table import Column, Table

#: Groups that `sensitivity` leaves float unless told otherwise.
DEFAULT_FLOAT_OPS = 5


@dataclass(frozen=True)
class SensitivityResult:
    """*skipped*: int8 already met the target, so nothing was searched. *reached*: the mixed plan meets it. *metrics*: a user's
    metric with each group alone at int8, the float network's under the empty name; then *ranking* is by it.
    """

    bench: Bench
    int8: float
    tuned: float
    ranking: Ranking
    choice: Choice
    reached: bool
    skipped: bool
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Sensitivity, ...]:
        """The ranking of the operators, in descending order of loss."""
        return self.ranking.rows


def run_sensitivity(
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    output: str | Path,
    settings: Settings | None = None,
    auto: bool = False,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
) -> SensitivityResult:
    """Rank all operators; leave the most sensitive float: `max_float_ops` of them, or (*auto*) as many as the target needs.

    Writes `NAME_qtable`, `new_cali_table`, `sensitivity.csv`, `search.log`, `plan.json` and `summary.json` to *output*.
    """
    settings, watcher = settings or Settings(), watcher or Silence()
    folder = check_writable(Path(output))
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    check_search(bench, settings)
    int8 = measured_int8(bench, watcher)
    if int8.cosine >= settings.expected_cos:
        result = SensitivityResult(
            bench,
            int8.cosine,
            int8.cosine,
            Ranking((), None, {}),
            unchanged(bench.plan, int8.cosine),
            True,
            True,
        )
    else:
        result = _searched(bench, int8, settings, folder, watcher, auto=auto)
    write_search(folder, bench, result.rows, result.choice, result.int8, result.metrics)
    write_plan(folder, result.choice.plan)
    write_json(folder / "summary.json", _sensitivity_summary(result))
    for search in () if result.skipped else ("sensitivity", METRIC_SEARCH):
        state_path(settings, folder, search).unlink(missing_ok=True)
    return result


def _searched(
    bench: Bench, int8: Stage, settings: Settings, folder: Path, watcher: Watcher, *, auto: bool
) -> SensitivityResult:
    metrics = dict[str, float]()
    with open_state(bench, settings, folder, watcher, search="sensitivity") as state:
        runs = TrueRuns(bench.evaluator, runner=open_runner(settings), state=state)
        ranking = rank(bench, settings, state, folder, watcher)
        if settings.evaluate is not None:
            metrics = metrics_alone(bench, ranking.rows, settings, folder, watcher)
            ranking = replace(ranking, rows=tuple(sorted(ranking.rows, key=lambda r: metrics[r.name])))
        tuned, _ = choose_thresholds(bench, runs, ranking, int8, settings, watcher)
        assert tuned.plan is not None
        if auto:
            goal = Goal(settings.expected_cos, cost_limit(settings, usual=len(ranking.rows)))
            choice = choose_precisions(bench, runs, ranking, tuned, goal, settings, watcher).choice
        else:
            watcher.stage("choosing float operators")
            count = DEFAULT_FLOAT_OPS if settings.max_float_ops is None else settings.max_float_ops
            choice = float_top(runs, tuned.plan, ranking.rows, count, bench.solver.solve)
    reached = choice.similarity >= settings.expected_cos
    return SensitivityResult(bench, int8.cosine, tuned.cosine, ranking, choice, reached, False, metrics)


def _sensitivity_summary(result: SensitivityResult) -> dict[str, Any]:
    bench = result.bench
    return {
        "model": bench.name,
        "target": bench.target.name,
        "images": {"calibration": bench.calibration_samples, "inference": bench.inference_samples},
        "float": {"cosine": 1.0},
        "int8": {"cosine": result.int8},
        "tuned": {"cosine": result.tuned},
        "mixed": {"cosine": result.choice.similarity},
        "reached": result.reached,
        "ops": ops_json(result.rows, result.choice.plan),
        "float_ops": result.choice.float_groups,
        "not_granted": bench.plan.refusals,
        "forward_passes": round(bench.evaluator.effort.forward_passes, 2),
        "versions": versions(),
    }


@dataclass(frozen=True)
class MixedResult:
    """*reached*: the walk ended at the target similarity."""

    bench: Bench
    walk: Walk
    reached: bool


def run_mixed(
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    output: str | Path,
    settings: Settings | None = None,
    min_layer_cos: float = 0.99,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
) -> MixedResult:
    """The mixed-precision walk. Writes `NAME_qtable`, `new_cali_table`, `layers.csv`, `plan.json`, `summary.json`."""
    settings, watcher = settings or Settings(), watcher or Silence()
    folder = check_writable(Path(output))
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    groups = len(bench.plan.groups)
    limit = settings.max_float_ops if settings.max_float_ops is not None else max(1, groups // 4)
    state = open_state(bench, settings, folder, watcher, search="mixed")
    watcher.stage("walking from the input", groups)
    walk = search_mixed_precision(
        bench.evaluator,
        bench.plan,
        bench.solver.solve,
        target=settings.expected_cos,
        min_layer_similarity=min_layer_cos,
        limit=limit,
        state=state,
        progress=counting(watcher),
    )
    result = MixedResult(bench, walk, walk.similarity >= settings.expected_cos)
    write_tables(folder, bench, walk.plan)
    write_text(folder / "layers.csv", layer_table(walk).to_csv())
    write_plan(folder, walk.plan)
    write_json(folder / "summary.json", _mixed_summary(result))
    state.discard()
    return result


def layer_table(walk: Walk) -> Table:
    """Similarity of each group's output to float, and what the walk did about it."""
    steps = {s.group: s for s in walk.steps}
    rows = []
    for group, similarity in walk.layers.items():
        step = steps.get(group)
        rows.append(
            {
                "name": group,
                "layer_cosine": similarity if step is None else step.layer_similarity,
                "cosine": None if step is None else step.similarity,
                "action": "" if step is None else ("float" if step.kept else "undone"),
                "groups": "" if step is None else " ".join(step.groups),
            }
        )
    columns = (
        Column("name", "operator"),
        Column("layer_cosine", "cosine of its output", "", 6),
        Column("cosine", "cosine of the network", "", 6),
        Column("action", "action"),
        Column("groups", "put to float"),
    )
    return Table("Mixed-precision walk", columns, tuple(rows))


def _mixed_summary(result: MixedResult) -> dict[str, Any]:
    bench = result.bench
    return {
        "model": bench.name,
        "target": bench.target.name,
        "images": {"calibration": bench.calibration_samples, "inference": bench.inference_samples},
        "float": {"cosine": 1.0},
        "int8": {"cosine": result.walk.initial},
        "mixed": {"cosine": result.walk.similarity},
        "reached": result.reached,
        "float_ops": result.walk.float_groups,
        "not_granted": bench.plan.refusals,
        "forward_passes": round(bench.evaluator.effort.forward_passes, 2),
        "versions": versions(),
    }
