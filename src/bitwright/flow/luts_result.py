"""What `luts` found: in words, as tables, and as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.analysis.lut_blame import Blame
from bitwright.files import write_text
from bitwright.flow.bench import Bench
from bitwright.flow.outputs import versions, write_json, write_plan
from bitwright.flow.table_errors import error_table
from bitwright.flow.table_remedies import Remedied
from bitwright.flow.table_scores import Score
from bitwright.numerics.lut import LookupTable
from bitwright.plan.plan import Plan
from bitwright.report.curves import Curve
from bitwright.report.page import Page, Section, write_page
from bitwright.table import Column, Table

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
    remedy that was kept, or why there is none. *plan*: with the settings that helped. *before*, *after*: tables before and after
    repair, the same object where nothing was mended.
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
    before: Mapping[str, LookupTable]
    after: Mapping[str, LookupTable]

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


def write(folder: Path, result: LutsResult) -> None:
    """`luts.csv`, `remedies.csv`, `plan.json`, `report.html` and `summary.json`."""
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
        table = error_table(bench, name, result.before[name], result.after[name])
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
