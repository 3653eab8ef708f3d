"""`luts`: whether look-up tables lose accuracy, which of them, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.analysis.lut_blame import Blame, put_back
from bitwright.errors import ModelError
from bitwright.flow.bench import Bench, check_plan, open_bench
from bitwright.flow.luts_result import LutsResult, TableRow, write
from bitwright.flow.outputs import check_writable
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.ranking import TABLE_SEARCH, note_unsketched, open_state
from bitwright.flow.settings import Settings
from bitwright.flow.table_remedies import Remedied, Repair
from bitwright.flow.table_scores import Form, Score, TableScores
from bitwright.flow.tables import error_on_data, settled, table_operators
from bitwright.graph.graph import Graph
from bitwright.numerics.lut import LookupTable, TableSettings
from bitwright.ops.table import TableLookup
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.table_sketch import TableSketch

#: What tables may cost, of the cosine or of the user's metric, before they are blamed.
TOLERANCE = 0.001


def run_luts(
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    output: str | Path,
    settings: Settings | None = None,
    table_settings: TableSettings | None = None,
    tolerance: float = TOLERANCE,
    plan: str | Path | None = None,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
) -> LutsResult:
    """Blame, name and repair look-up tables; write `luts.csv`, `remedies.csv`, `plan.json`, `report.html`, `summary.json` to *output*.

    *table_settings*: how tables are made to begin with (a chip's way). *tolerance*: what they may cost, of the cosine to the float network,
    or of `settings.evaluate`. *plan*: a `plan.json` of this network; None: everything that the target allows, by one threshold method.
    Scores that an interrupted run measured are not measured again. *raises* `ModelError` for a network without tables.
    """
    settings, watcher = replace(settings or Settings(), tables=True), watcher or Silence()
    folder = check_writable(Path(output))
    given = None if plan is None else Plan.load(Path(plan))
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    if given is not None:
        check_plan(bench, given, str(plan))
    base = _with_settings(bench, given or bench.plan, table_settings)
    state = open_state(bench, settings, folder, watcher, search=TABLE_SEARCH)
    scores = TableScores(bench, settings, state)
    try:
        result = _examined(scores, base, settings, tolerance, watcher)
    finally:
        state.save()
    write(folder, result)
    state.discard()
    return result


def _with_settings(bench: Bench, plan: Plan, settings: TableSettings | None) -> Plan:
    """*plan* with the tables of all its operators made by *settings*, or by its own. *raises* `ModelError` without tables."""
    names = table_operators(bench.graph, plan)
    if not names:
        raise ModelError(
            bench.name,
            expected="operators that a chip looks up in tables (exp, sigmoid, softmax, norms, …), quantized",
            found="none",
            remedy="There is nothing to blame tables for; try bitwright sensitivity.",
        )
    return plan.with_tables({} if settings is None else dict.fromkeys(names, settings))


def _examined(
    scores: TableScores, base: Plan, settings: Settings, tolerance: float, watcher: Watcher
) -> LutsResult:
    """The three answers for the plan *base*."""
    bench = scores.bench
    watcher.stage("making tables")
    stages = _measured(
        scores,
        {
            "float": scores.exact(),
            "float tables": scores.simulated(base, scores.tables(base)),
            "fixed tables": scores.simulated(base),
            "integer model": scores.integer(base),
        },
        watcher,
    )
    rows = _ranked(scores, base, settings, watcher)
    blame, repair = Blame((), (), True), _repair(scores, base, watcher)
    if stages["float tables"].exceeds(stages["fixed tables"], tolerance):
        blame = _blame(scores, base, rows, stages, watcher)
        watcher.stage("trying remedies", len(blame.guilty))
        for done, name in enumerate(blame.guilty, start=1):
            repair.run(name, blame.guilty[done:])
            watcher.advance(1, name)
        stages |= _measured(
            scores,
            {
                "guilty in float": scores.simulated(base, blame.guilty),
                "repaired": scores.simulated(repair.plan),
                "integer model, repaired": scores.integer(repair.plan),
            },
            watcher,
        )
    return LutsResult(
        bench,
        stages,
        rows,
        blame,
        tuple(repair.tried),
        repair.outcomes,
        settled(bench.graph, repair.plan, scores.tables(repair.plan)),
        tolerance,
        settings.evaluate,
        scores.tables(base),
        scores.tables(repair.plan),
    )


def _measured(scores: TableScores, forms: Mapping[str, Form], watcher: Watcher) -> dict[str, Score]:
    """The score of each of *forms*, with its accuracy where labels are known."""
    found = dict[str, Score]()
    watcher.stage("comparing float and fixed tables", len(forms))
    for name, form in forms.items():
        found[name] = scores.of(form)
        watcher.advance(1, f"{name}: {found[name].value:.6f}")
    accuracies = scores.accuracies(forms, watcher)
    return {name: replace(score, accuracy=accuracies.get(name)) for name, score in found.items()}


def _blame(
    scores: TableScores, plan: Plan, rows: Sequence[TableRow], stages: Mapping[str, Score], watcher: Watcher
) -> Blame:
    """The guilty of *rows*, by true runs."""
    watcher.stage("putting tables back to float")

    def score(back: Collection[str]) -> float:
        found = scores.score(plan, back).value
        watcher.advance(1, f"{len(back)} in float: {found:.6f}")
        return found

    return put_back(
        [r.name for r in rows],
        score,
        fixed=stages["fixed tables"].value,
        floating=stages["float tables"].value,
    )


def _repair(scores: TableScores, plan: Plan, watcher: Watcher) -> Repair:
    def tell(remedied: Remedied) -> None:
        before, after = remedied.score
        watcher.note(f"{remedied.name}: {remedied.remedy}: {before:.6f} -> {after:.6f}")

    return Repair(scores, plan, tell)


def _ranked(scores: TableScores, plan: Plan, settings: Settings, watcher: Watcher) -> tuple[TableRow, ...]:
    """Every table, most suspicious first: sketched, or measured alone where no finite gradient tells (a root or reciprocal of 0 behind it)."""
    bench, tables = scores.bench, scores.tables(plan)
    watcher.stage("sketching tables", bench.inference_samples)
    sketch = TableSketch(
        bench.evaluator,
        quantized_reads(bench.graph, plan),
        {n: TableLookup(t) for n, t in tables.items()},
        probes=settings.probes,
        seed=settings.seed,
    )
    sketch.measure(watcher.advance)
    note_unsketched(watcher, {n: "its gradient is not finite" for n in tables if not sketch.tells(n)})
    rows = []
    for name, table in tables.items():
        if sketch.tells(name):
            found = sketch.loss([name])
            loss, error = found.loss, found.error
        else:
            loss, error = scores.lost_alone(plan, name), None
        largest, rms = error_on_data(bench.graph, bench.statistics, name, table)
        rows.append(TableRow(name, bench.graph.op(name).kind, _form(table), loss, error, largest, rms))
    return most_suspicious_first(rows)


def most_suspicious_first(rows: Iterable[TableRow]) -> tuple[TableRow, ...]:
    """*rows* by their losses, NaN before all; where those are alike, by the tables' own errors."""
    return tuple(sorted(rows, key=lambda r: (math.isnan(r.loss), r.loss, r.rms), reverse=True))


def _form(table: LookupTable) -> str:
    return type(table).__name__.removesuffix("Table").lower()
