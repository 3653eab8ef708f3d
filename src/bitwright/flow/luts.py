"""`luts`: whether look-up tables lose accuracy, which of them, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.analysis.lut_blame import Blame, put_back
from bitwright.errors import ModelError
from bitwright.files import write_text
from bitwright.flow.accuracy import accuracy_of
from bitwright.flow.bench import Bench, check_plan, open_bench
from bitwright.flow.outputs import check_writable, versions, write_json, write_plan
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.ranking import note_unsketched
from bitwright.flow.settings import Settings
from bitwright.flow.table_errors import error_table
from bitwright.flow.table_remedies import Remedied, Repair
from bitwright.flow.table_scores import Form, Score, TableScores
from bitwright.flow.tables import error_on_data, settled, table_operators
from bitwright.graph.graph import Graph
from bitwright.numerics.lut import LookupTable, TableSettings
from bitwright.ops.table import TableLookup
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.report.curves import Curve
from bitwright.report.page import Page, Section, write_page
from bitwright.search.table_sketch import TableSketch
from bitwright.table import Column, Table

#: What tables may cost, of the cosine or of the user's metric, before they are blamed.
TOLERANCE = 0.001
#: Tables whose error is drawn in the report.
_DRAWN = 8


@dataclass(frozen=True)
class TableRow:
    """One table. *loss*: of the network with this table alone in fixed point, against none, by the sketch; *standard_error*: of that,
    None where it was measured instead. *largest*, *rms*: error on the data, in output steps.
    """

    name: str
    kind: str
    form: str
    loss: float
    standard_error: float | None
    largest: float
    rms: float


@dataclass(frozen=True)
class LutsResult:
    """*stages*: `float` network, `float tables`, `fixed tables`, `integer model`; where there is something to repair also
    `guilty in float`, `repaired` and `integer model, repaired`. *rows*: most suspicious first. *outcomes*: guilty table -> the
    remedy that was kept, or why there is none. *plan*: with the settings that helped.
    """

    bench: Bench
    stages: dict[str, Score]
    rows: tuple[TableRow, ...]
    blame: Blame
    remedies: tuple[Remedied, ...]
    outcomes: Mapping[str, str]
    plan: Plan
    tolerance: float
    metric: str | None

    @property
    def to_blame(self) -> bool:
        """Whether tables cost more than the tolerance."""
        return self._costs("fixed tables")

    @property
    def repaired(self) -> bool:
        """Whether tables cost no more than the tolerance (any more)."""
        return not self._costs("repaired" if "repaired" in self.stages else "fixed tables")

    def _costs(self, network: str) -> bool:
        return self.stages["float tables"].exceeds(self.stages[network], self.tolerance)


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
    given = None if plan is None else Plan.load(Path(plan))
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    if given is not None:
        check_plan(bench, given, str(plan))
    start = given or bench.plan
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
    watcher.stage("making tables")
    stages = _measured(
        scores,
        {
            "float": scores.exact(),
            "float tables": scores.simulated(base, names),
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
    decided = settled(bench.graph, repair.plan, scores.tables(repair.plan))
    result = LutsResult(
        bench,
        stages,
        rows,
        blame,
        tuple(repair.tried),
        repair.outcomes,
        decided,
        tolerance,
        settings.evaluate,
    )
    _write(folder, result, scores.tables(base), scores.tables(repair.plan))
    return result


def _measured(scores: TableScores, forms: Mapping[str, Form], watcher: Watcher) -> dict[str, Score]:
    """The score of each of *forms*, with its accuracy where labels are known."""
    bench, found = scores.bench, dict[str, Score]()
    watcher.stage("comparing float and fixed tables", len(forms))
    for name, form in forms.items():
        found[name] = scores.of(form)
        watcher.advance(1, f"{name}: {found[name].value:.6f}")
    if bench.dataset.labels is None:
        return found
    watcher.stage("measuring accuracy", len(bench.dataset))
    accuracy = accuracy_of(bench, {name: form.run for name, form in forms.items()}, watcher)
    return {name: replace(score, accuracy=accuracy[name]) for name, score in found.items()}


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


# --- what is written -------------------------------------------------------------------------------------------


def verdict(result: LutsResult) -> str:
    """The answers in words."""
    lost = result.stages["float tables"].lost(result.stages["fixed tables"])
    what = "metric" if result.metric is not None else "cosine"
    if not result.to_blame:
        said = f"Tables are not to blame: they cost {max(lost, 0.0):.6f} of the {what}, at most {result.tolerance:g} is tolerated."
        exact, quantized = result.stages["float"], result.stages["float tables"]
        if exact.exceeds(quantized, result.tolerance):
            said += f" Quantization costs {exact.lost(quantized):.6f}: try bitwright tune."
        return said
    guilty = ", ".join(result.blame.guilty)
    after = result.stages["float tables"].lost(result.stages["repaired"])
    said = f"Tables are to blame: they cost {lost:.6f} of the {what}. Guilty: {guilty}."
    if not result.blame.recovered:
        said += " Even with all of them in float it does not recover: tables are not all."
    said += f" After repair they cost {max(after, 0.0):.6f}."
    if any(r.kept for r in result.remedies):
        said += " plan.json has what helped: give it to bitwright quantize --plan."
    return said


def score_table(result: LutsResult) -> Table:
    """The answer to the first question: what tables cost."""
    columns = [Column("network", "network"), Column("cosine", "cosine", "", 6)]
    if result.metric is not None:
        columns.append(Column("metric", "metric", "", 6))
    if result.bench.dataset.labels is not None:
        columns += [Column("top1", "top-1", "%", 2), Column("top5", "top-5", "%", 2)]
    rows = tuple(_score_row(name, score) for name, score in result.stages.items())
    return Table(
        f"{result.bench.name} on {result.bench.target.name}: are the tables to blame?", tuple(columns), rows
    )


def _score_row(name: str, score: Score) -> dict[str, object]:
    row = {"network": name, "cosine": score.cosine, "metric": score.metric}
    if score.accuracy is not None:
        row |= {"top1": 100 * score.accuracy.top1, "top5": 100 * score.accuracy.top5}
    return row


def table_table(result: LutsResult) -> Table:
    """The answer to the second: which, most suspicious first."""
    columns = (
        Column("rank", "rank"),
        Column("name", "operator"),
        Column("guilty", "guilty"),
        Column("kind", "function"),
        Column("form", "table"),
        Column("loss", "loss", "", 9),
        Column("standard_error", "± standard error", "", 9),
        Column("largest", "largest error", "steps", 3),
        Column("rms", "RMS error", "steps", 3),
        Column("put_back", "score with it and all above in float", "", 6),
        Column("remedy", "remedy"),
    )
    put_back_at = dict(result.blame.steps)
    rows = tuple(
        {
            "rank": i,
            **vars(row),
            "put_back": put_back_at.get(row.name),
            "guilty": "yes" if row.name in result.blame.guilty else "",
            "remedy": result.outcomes.get(row.name, ""),
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
    title = "Remedies that were run, the guilty tables whose turn comes later in float"
    return Table(title, columns, rows)


def _write(
    folder: Path, result: LutsResult, before: dict[str, LookupTable], after: dict[str, LookupTable]
) -> None:
    bench = result.bench
    write_text(folder / "luts.csv", table_table(result).to_csv())
    write_text(folder / "remedies.csv", remedy_table(result.remedies).to_csv())
    write_plan(folder, result.plan)
    drawn = [*result.blame.guilty, *(r.name for r in result.rows if r.name not in result.blame.guilty)][
        :_DRAWN
    ]
    sections = [
        Section(score_table(result), note=verdict(result)),
        Section(table_table(result).without_empty(), bar=("name", "loss")),
    ]
    if result.remedies:
        sections.append(Section(remedy_table(result.remedies)))
    for name in drawn:
        table = error_table(bench, name, before[name], after[name])
        series = tuple(c.key for c in table.columns if c.key in ("error", "repaired"))
        sections.append(Section(table, curve=Curve("input", series, backdrop="inputs")))
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
        "stages": {name: score.to_json() for name, score in result.stages.items()},
        "tolerance": result.tolerance,
        "to_blame": result.to_blame,
        "verdict": verdict(result),
        "guilty": list(result.blame.guilty),
        "put_back": [{"name": name, "score": score} for name, score in result.blame.steps],
        "recovered_with_guilty_in_float": result.blame.recovered,
        "repaired": result.repaired,
        "tables": [vars(r) for r in result.rows],
        "remedies": [vars(r) for r in result.remedies],
        "versions": versions(),
    }
