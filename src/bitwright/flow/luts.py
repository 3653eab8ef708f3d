"""`luts`: whether look-up tables lose accuracy, which of them, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bitwright.analysis.lut_blame import Walk, put_back
from bitwright.errors import ModelError
from bitwright.files import write_text
from bitwright.flow.bench import Bench, given_plan, open_bench
from bitwright.flow.outputs import check_writable, versions, write_json, write_plan
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.settings import Settings
from bitwright.flow.table_remedies import Remedied, Repair
from bitwright.flow.table_scores import Score, TableScores
from bitwright.flow.tables import error_on_data, seen_codes, settled, table_operators
from bitwright.graph.graph import Graph
from bitwright.numerics.lut import LookupTable, TableSettings
from bitwright.ops.table import TableLookup
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.report.curves import Curve
from bitwright.report.page import Page, Section, write_page
from bitwright.search.prediction import Prediction
from bitwright.search.simulated import SimulatedModel
from bitwright.search.table_sketch import TableSketch
from bitwright.table import Column, Table

#: What tables may cost, of the cosine or of the user's metric, before they are blamed.
TOLERANCE = 0.001
#: Tables whose error is drawn in the report.
_DRAWN = 8
#: Points of a drawing.
_POINTS = 96


@dataclass(frozen=True)
class TableRow:
    """One table. *loss*: sketched loss of the network with this table alone in fixed point, against none; *standard_error* of that, 0
    where it was measured instead.
    *largest*, *rms*: error on the data, in output steps.
    """

    name: str
    kind: str
    form: str
    loss: float
    standard_error: float
    largest: float
    rms: float


@dataclass(frozen=True)
class LutsResult:
    """*stages*: `float` network, `float tables`, `fixed tables`, `integer model`; where there is something to repair also `repaired` and
    `integer model, repaired`. *rows*: most
    suspicious first. *to_blame*: whether tables cost more than the tolerance. *plan*: with the settings that helped.
    """

    bench: Bench
    stages: dict[str, Score]
    rows: tuple[TableRow, ...]
    to_blame: bool
    walk: Walk
    remedies: tuple[Remedied, ...]
    plan: Plan
    tolerance: float
    metric: str | None

    @property
    def repaired(self) -> bool:
        """Whether tables cost no more than the tolerance (any more)."""
        return self._lost(self.stages.get("repaired", self.stages["fixed tables"])) <= self.tolerance

    def _lost(self, score: Score) -> float:
        return self.stages["float tables"].value - score.value


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
    *raises* `ModelError` for a network without tables.
    """
    settings, watcher = replace(settings or Settings(), tables=True), watcher or Silence()
    folder = check_writable(Path(output))
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    start = bench.plan if plan is None else given_plan(bench, Path(plan))
    names = table_operators(bench.graph, start)
    if not names:
        raise ModelError(
            bench.name,
            expected="operators that a chip looks up in tables (exp, sigmoid, softmax, norms, …), quantized",
            found="none",
            remedy="There is nothing to blame tables for; try bitwright sensitivity.",
        )
    base = start.with_tables({} if table_settings is None else dict.fromkeys(names, table_settings))
    scores = TableScores(bench, settings)
    stages = _stages(scores, base, names, watcher)
    rows = _ranked(scores, base, settings, watcher)
    to_blame = stages["float tables"].value - stages["fixed tables"].value > tolerance
    walk, repair = Walk((), (), stages["fixed tables"].value, True), _repair(scores, base, watcher)
    if to_blame:
        walk = _named(scores, base, rows, stages, watcher)
        watcher.stage("trying remedies", len(walk.guilty))
        for done, name in enumerate(walk.guilty, start=1):
            repair.run(name, walk.guilty[done:])
            watcher.advance(1, name)
        stages["repaired"] = scores.score(repair.plan)
        stages["integer model, repaired"] = scores.deployed(repair.plan)
    decided = settled(bench.graph, repair.plan, scores.tables(repair.plan))
    result = LutsResult(
        bench, stages, rows, to_blame, walk, tuple(repair.tried), decided, tolerance, settings.evaluate
    )
    _write(folder, result, scores.tables(base), scores.tables(repair.plan))
    return result


def _stages(scores: TableScores, plan: Plan, names: Sequence[str], watcher: Watcher) -> dict[str, Score]:
    """The network in float, with tables in float, in fixed point, and as an integer model."""
    watcher.stage("comparing float and fixed tables", 3)
    stages = {"float": _float_score(scores)}
    watcher.advance(1)
    for title, back in (("float tables", names), ("fixed tables", ())):
        stages[title] = scores.score(plan, back)
        watcher.advance(1, f"{title}: {stages[title].value:.6f}")
    watcher.stage("running the integer model")
    stages["integer model"] = scores.deployed(plan)
    return stages


def _named(
    scores: TableScores, plan: Plan, rows: Sequence[TableRow], stages: Mapping[str, Score], watcher: Watcher
) -> Walk:
    watcher.stage("putting tables back to float")
    return put_back(
        [r.name for r in rows],
        lambda back: scores.score(plan, back).value,
        fixed=stages["fixed tables"].value,
        floating=stages["float tables"].value,
    )


def _repair(scores: TableScores, plan: Plan, watcher: Watcher) -> Repair:
    def tell(remedied: Remedied) -> None:
        before, after = remedied.score
        watcher.note(f"{remedied.name}: {remedied.remedy}: {before:.6f} -> {after:.6f}")

    return Repair(scores, plan, tell)


def _float_score(scores: TableScores) -> Score:
    evaluator = scores.bench.evaluator
    return scores.of(lambda inputs: evaluator.replay.run(inputs), SimulatedModel(scores.bench.graph, None))


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
    rows = []
    for name, table in tables.items():
        if sketch.tells(name):
            found = sketch.loss([name])
        else:
            watcher.note(f"not sketchable, measured exactly: {name} (its gradient is not finite)")
            found = Prediction(scores.lost_alone(plan, name), 0.0)
        largest, rms = error_on_data(bench.graph, bench.statistics, name, table)
        rows.append(
            TableRow(name, bench.graph.op(name).kind, _form(table), found.loss, found.error, largest, rms)
        )
    # Where no gradient tells, the table's own error does.
    return tuple(sorted(rows, key=lambda r: (-r.loss, -r.rms)))


def _form(table: LookupTable) -> str:
    return type(table).__name__.removesuffix("Table").lower()


# --- what is written -------------------------------------------------------------------------------------------


def score_table(result: LutsResult) -> Table:
    """The answer to the first question: what tables cost."""
    columns = [Column("network", "network"), Column("cosine", "cosine", "", 6)]
    if result.metric is not None:
        columns.append(Column("metric", "metric", "", 6))
    rows = tuple({"network": n, "cosine": s.cosine, "metric": s.metric} for n, s in result.stages.items())
    return Table(
        f"{result.bench.name} on {result.bench.target.name}: are the tables to blame?", tuple(columns), rows
    )


def table_table(result: LutsResult) -> Table:
    """The answer to the second: which, most suspicious first."""
    columns = (
        Column("rank", "rank"),
        Column("name", "operator"),
        Column("kind", "function"),
        Column("form", "table"),
        Column("loss", "sketched loss", "", 9),
        Column("standard_error", "± standard error", "", 9),
        Column("largest", "largest error", "steps", 3),
        Column("rms", "RMS error", "steps", 3),
        Column("guilty", "guilty"),
        Column("remedy", "remedy"),
    )
    kept = {r.name: r.remedy for r in result.remedies if r.kept}
    rows = tuple(
        {
            "rank": i,
            **vars(row),
            "guilty": "yes" if row.name in result.walk.guilty else "",
            "remedy": kept.get(row.name, ""),
        }
        for i, row in enumerate(result.rows, start=1)
    )
    return Table("Look-up tables: each alone in fixed point, against none", columns, rows)


def remedy_table(remedies: Sequence[Remedied]) -> Table:
    """The answer to the third: what was tried, and what it did."""
    columns = (
        Column("name", "operator"),
        Column("remedy", "remedy"),
        Column("largest_before", "largest error before", "steps", 3),
        Column("largest_after", "after", "steps", 3),
        Column("rms_before", "RMS error before", "steps", 3),
        Column("rms_after", "after", "steps", 3),
        Column("score_before", "score before", "", 6),
        Column("score_after", "after", "", 6),
        Column("kept", "kept"),
    )
    rows = tuple(
        {
            "name": r.name,
            "remedy": r.remedy,
            "largest_before": r.error[0][0],
            "largest_after": r.error[1][0],
            "rms_before": r.error[0][1],
            "rms_after": r.error[1][1],
            "score_before": r.score[0],
            "score_after": r.score[1],
            "kept": "yes" if r.kept else "",
        }
        for r in remedies
    )
    return Table("Remedies that were run", columns, rows)


def error_table(bench: Bench, name: str, before: LookupTable, after: LookupTable) -> Table:
    """Along the inputs that were seen: the table's mean error, and how many inputs there are."""
    function = bench.graph.op(name).table_function()
    weights = seen_codes(bench.graph, bench.statistics, name, before.q_in)
    assert function is not None
    assert weights is not None
    used = np.flatnonzero(weights)
    parts = np.array_split(np.arange(used[0], used[-1] + 1), min(_POINTS, int(used[-1] - used[0]) + 1))
    errors = [np.nan_to_num(t.errors(function)) for t in (before, after)]
    means = [[float(e[p].mean()) for p in parts] for e in errors]
    counts = np.array([weights[p].sum() for p in parts])
    share = counts / counts.max() * max(map(max, means))
    d, scale, zero = before.q_in.spec.dtype, before.q_in.scale[0], before.q_in.zero_point[0]
    rows = tuple(
        {
            "input": (float(p.mean()) + d.qmin - zero) * scale,
            "error": error,
            "repaired": repaired,
            "inputs": float(n),
        }
        for p, error, repaired, n in zip(parts, *means, share, strict=True)
    )
    columns = [Column("input", "input", "", 5), Column("error", "mean error", "steps", 4)]
    if before is not after:
        columns.append(Column("repaired", "mean error, repaired", "steps", 4))
    columns.append(Column("inputs", "inputs seen (share of the highest)", "", 4))
    return Table(f"Error of the table of {name} over its inputs", tuple(columns), rows)


def _write(
    folder: Path, result: LutsResult, before: dict[str, LookupTable], after: dict[str, LookupTable]
) -> None:
    bench = result.bench
    write_text(folder / "luts.csv", table_table(result).to_csv())
    write_text(folder / "remedies.csv", remedy_table(result.remedies).to_csv())
    write_plan(folder, result.plan)
    drawn = [*result.walk.guilty, *(r.name for r in result.rows if r.name not in result.walk.guilty)][:_DRAWN]
    sections = [Section(score_table(result)), Section(table_table(result), bar=("name", "loss"))]
    if result.remedies:
        sections.append(Section(remedy_table(result.remedies)))
    for name in drawn:
        table = error_table(bench, name, before[name], after[name])
        series = tuple(c.key for c in table.columns[1:])
        sections.append(Section(table, curve=Curve("input", series)))
    subtitle = f"target {bench.target.name} · {bench.calibration_samples} calibration samples · {bench.inference_samples} samples"
    write_page(
        folder / "report.html", Page(f"Bitwright: look-up tables of {bench.name}", subtitle, tuple(sections))
    )
    write_json(folder / "summary.json", summary(result))


def summary(result: LutsResult) -> dict[str, Any]:
    """The contents of summary.json."""
    bench = result.bench
    return {
        "model": bench.name,
        "target": bench.target.name,
        "images": {"calibration": bench.calibration_samples, "inference": bench.inference_samples},
        "stages": {name: vars(score) for name, score in result.stages.items()},
        "tolerance": result.tolerance,
        "to_blame": result.to_blame,
        "guilty": list(result.walk.guilty),
        "recovered_with_guilty_in_float": result.walk.recovered,
        "repaired": result.repaired,
        "tables": [vars(r) for r in result.rows],
        "remedies": json.loads(json.dumps([vars(r) for r in result.remedies])),
        "versions": versions(),
    }
