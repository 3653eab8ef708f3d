"""Writing what a job found. Each file appears whole or not at all; a folder that cannot be written is noticed first."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitwright.errors import OutputError
from bitwright.exporters.tpu_mlir import write_calibration_table, write_qtable
from bitwright.files import remove, write_text
from bitwright.flow.bench import Bench, fixed_batch
from bitwright.flow.exports import RECORD, Exports, exports_json, reason_table, write_exports
from bitwright.flow.progress import Watcher
from bitwright.flow.result import Stage, Tuned
from bitwright.plan.plan import Plan
from bitwright.report.page import Page, Section, write_page
from bitwright.search.choose import Choice
from bitwright.search.sensitivity import Sensitivity
from bitwright.table import Column, Table
from bitwright.version import __version__


def check_writable(folder: Path) -> Path:
    """Create *folder* and try to write in it. *raises* `OutputError`."""
    probe = folder / ".bitwright_probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise OutputError(
            str(folder),
            expected="a folder that can be written",
            found=e.strerror or str(e),
            remedy="Give another -o/--output.",
        ) from e
    return folder


def write_json(path: Path, data: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_plan(folder: Path, plan: Plan) -> None:
    """`plan.json`. The record of an earlier job goes: `verify` would compare that job's files with this plan."""
    remove(folder / RECORD)
    plan.save(folder / "plan.json")


# --- tables ----------------------------------------------------------------------------------------------------


def sensitivity_table(
    rows: Sequence[Sensitivity], plan: Plan, metrics: Mapping[str, float] | None = None
) -> Table:
    """Rank, operator, loss by method, best method, precision in *plan*, the mixed one; the user's metric where there is one."""
    methods = list(dict.fromkeys(m for r in rows for m in r.losses))
    columns = (
        Column("rank", "rank"),
        Column("name", "operator"),
        Column("kind", "kind"),
        *(Column(f"loss_{m}", m, "loss", 6) for m in methods),
        Column("method", "best method"),
        Column("loss", "loss", "", 6),
        Column("sketched", "sketched", "", 6),
        Column("measured", "measured", "", 6),
        Column("error", "± standard error", "", 6),
        *([Column("metric", "metric", "", 6)] if metrics else []),
        Column("precision", "precision"),
        Column("members", "members"),
    )
    cells = tuple(
        {
            "rank": rank,
            "name": r.name,
            "kind": r.kind,
            **{f"loss_{m}": r.losses.get(m) for m in methods},
            "method": r.method,
            "loss": r.loss,
            "sketched": r.sketched.get(r.method),
            "measured": r.loss if r.exact else None,
            "error": r.errors[r.method],
            "metric": (metrics or {}).get(r.name),
            "precision": plan.precision(r.name),
            "members": " ".join(r.members),
        }
        for rank, r in enumerate(rows, start=1)
    )
    return Table("Sensitivity: each operator alone at int8, the rest float", columns, cells)


#: Titles of lists of operators: float for whatever reason, and float because the target says so.
FLOATS, NOT_GRANTED = "Float operators", "Not granted by the target"
#: How stages are called for people.
_TITLES = {"tuned": "int8 + new thresholds", "integer": "integer file on ONNX Runtime"}


def stage_table(bench: Bench, stages: Mapping[str, Stage]) -> Table:
    """The final table, a line for each stage: of `tune` float / int8 / int8 + new thresholds / mixed, all simulated, and the
    integer file.
    """
    columns: tuple[Column, ...] = (Column("model", "model"), Column("cosine", "cosine", "", 6))
    if any(stage.accuracy is not None for stage in stages.values()):
        columns += (Column("top1", "top-1", "%", 2), Column("top5", "top-5", "%", 2))
    columns += (Column("float_ops", "float operators"),)
    rows = []
    for key, stage in stages.items():
        row: dict[str, Any] = {"model": _TITLES.get(key, key), "cosine": stage.cosine}
        if stage.accuracy is not None:
            row |= {"top1": 100 * stage.accuracy.top1, "top5": 100 * stage.accuracy.top5}
        row["float_ops"] = "all" if stage.float_ops is None else stage.float_ops
        rows.append(row)
    return Table(f"{bench.name} on {bench.target.name}", columns, tuple(rows))


def tried_table(choice: Choice) -> Table:
    """The plans that a search ran: what they change, their cost, the cosine predicted and measured."""
    columns = (
        Column("count", "changed"),
        Column("cost", "cost", "", 4),
        Column("predicted", "predicted cosine", "", 6),
        Column("cosine", "cosine", "", 6),
        Column("groups", "operators"),
        Column("chosen", "chosen"),
    )
    rows = tuple(
        {
            "count": len(t.groups),
            "cost": t.cost,
            "predicted": t.predicted,
            "cosine": t.similarity,
            "groups": " ".join(f"{g}={p}" for g, p in t.groups.items()),
            "chosen": "yes" if t.plan is choice.plan else "",
        }
        for t in choice.tried
    )
    return Table("Plans that were run", columns, rows)


def ops_json(rows: Sequence[Sensitivity], plan: Plan) -> list[dict[str, Any]]:
    """`ops` of summary.json, in descending order of loss."""
    return [
        {
            "name": r.name,
            "kind": r.kind,
            "method": r.method,
            "loss": r.loss,
            "rank": rank,
            "precision": plan.precision(r.name),
        }
        for rank, r in enumerate(rows, start=1)
    ]


# --- files of a search -----------------------------------------------------------------------------------------


def write_search(
    folder: Path,
    bench: Bench,
    rows: Sequence[Sensitivity],
    choice: Choice,
    int8: float,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """`NAME_qtable`, `new_cali_table`, `sensitivity.csv` and `search.log`."""
    write_tables(folder, bench, choice.plan)
    write_text(folder / "sensitivity.csv", sensitivity_table(rows, choice.plan, metrics).to_csv())
    write_text(folder / "search.log", _log(bench, rows, choice, int8))


def write_tables(folder: Path, bench: Bench, plan: Plan) -> None:
    """`NAME_qtable` and `new_cali_table` of *plan*."""
    samples = bench.calibration_samples
    write_qtable(folder / f"{bench.name}_qtable", bench.graph, plan, samples=samples)
    extremes = {n: (s.lo, s.hi) for n, s in bench.statistics.items()}
    write_calibration_table(folder / "new_cali_table", bench.graph, plan, extremes, samples=samples)


def _log(bench: Bench, rows: Sequence[Sensitivity], choice: Choice, int8: float) -> str:
    lines = [f"int8 similarity: {int8:.6f}"]
    for row in sorted(rows, key=lambda r: list(bench.plan.groups).index(r.name)):
        lines += [
            f"operator {row.name}, type {row.kind}, method {m}, loss {loss:.12g}"
            for m, loss in row.losses.items()
        ]
        lines.append(f"operator {row.name}, best method {row.method}, best loss {row.loss:.12g}")
    lines += [
        f"operator {row.name} is sensitive operator number {rank}, loss {row.loss:.12g}, type {row.kind}"
        for rank, row in enumerate(rows, start=1)
    ]
    for tried in (t for t in choice.tried if t.groups):
        changed = ", ".join(f"{g} {p}" for g, p in tried.groups.items())
        lines.append(f"with {changed}: similarity {tried.similarity:.6f}")
    lines.append(f"mixed similarity: {choice.similarity:.6f}")
    lines += [f"not granted: {name}: {why}" for name, why in bench.plan.refusals.items()]
    return "\n".join(lines) + "\n"


# --- files of tune ---------------------------------------------------------------------------------------------


def write_tune(folder: Path, result: Tuned, watcher: Watcher) -> None:
    """Everything that `tune` promises, the summary last."""
    bench = result.bench
    write_search(folder, bench, result.rows, result.choice, result.stages["int8"].cosine)
    write_exports(folder, bench.name, result.exports, watcher)
    write_plan(folder, result.plan)
    write_page(folder / "report.html", tune_page(result))
    write_json(folder / "summary.json", summary(result))


def summary(result: Tuned) -> dict[str, Any]:
    """The contents of summary.json; its keys are stable."""
    bench = result.bench
    return {
        "model": bench.name,
        "target": bench.target.name,
        "images": images_json(bench),
        **figures_json(result.stages, result.exports),
        "expected_cos": result.expected_cos,
        "reached": result.reached,
        "new_thresholds_kept": result.chosen.kept,
        "ops": ops_json(result.rows, result.plan),
        "float_ops": result.choice.float_groups,
        "not_granted": bench.plan.refusals,
        "opaque": list(bench.graph.info.opaque),
        "seconds": {k: round(v, 3) for k, v in result.seconds.items()},
        "forward_passes": round(bench.evaluator.effort.forward_passes, 2),
        "versions": versions(),
    }


def images_json(bench: Bench) -> dict[str, int]:
    """How many samples were calibrated with, compared on, and labelled."""
    batch = fixed_batch(bench.graph)
    labelled = 0 if bench.dataset.labels is None else len(bench.dataset) // batch * batch
    return {
        "calibration": bench.calibration_samples,
        "inference": bench.inference_samples,
        "accuracy": labelled,
    }


def figures_json(stages: Mapping[str, Stage], exports: Exports) -> dict[str, Any]:
    """The stages by name, and what is known of the files; under `integer` both."""
    files = exports_json(exports)
    return {name: {**stage.to_json(), **files.pop(name, {})} for name, stage in stages.items()} | files


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    names = ("torch", "onnx", "onnxruntime", "numpy")
    return {"bitwright": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


def export_sections(exports: Exports) -> list[Section]:
    """The proof of every file, and what an integer model has besides integers."""
    sections = [Section(proof.table(), note=f"{name.strip('_')}") for name, proof in exports.proofs.items()]
    if exports.integer is not None:
        if exports.integer.islands:
            islands = reason_table("Float islands of the integer model", exports.integer.islands)
            sections.append(Section(islands))
        sections.append(Section(exports.integer.proofs()))
    return sections


def tune_page(result: Tuned) -> Page:
    """The report: the final table, the losses, the proof."""
    bench = result.bench
    sensitivity = sensitivity_table(result.rows, result.choice.plan)
    sections = [Section(stage_table(bench, result.stages))]
    if result.rows:
        sections += [Section(sensitivity, bar=("name", "loss")), Section(tried_table(result.choice))]
    if bench.plan.refusals:
        sections.append(Section(reason_table(NOT_GRANTED, bench.plan.refusals)))
    sections += export_sections(result.exports)
    subtitle = (
        f"target {bench.target.name} · {bench.calibration_samples} calibration samples · "
        f"{bench.inference_samples} inference samples · asked-for cosine {result.expected_cos:g}: "
        f"{'reached' if result.reached else 'missed'}"
    )
    return Page(f"Bitwright: {bench.name}", subtitle, tuple(sections))
