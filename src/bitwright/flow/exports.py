"""The files of a plan, each proven on ONNX Runtime: with Q/DQ pairs, in integers alone, or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from bitwright.errors import ModelError, ProofError
from bitwright.exporters.integer import IntegerModel, lower
from bitwright.exporters.onnx_float import save_model
from bitwright.exporters.onnx_qdq import export_qdq
from bitwright.files import remove, write_text
from bitwright.flow.bench import Bench, Subject, batches_of, take
from bitwright.flow.progress import Watcher
from bitwright.flow.settings import Export, Settings
from bitwright.flow.tables import build_tables, settled
from bitwright.importers.onnx_prepare import read_file
from bitwright.numerics.lut import LookupTable
from bitwright.ops.table import with_tables
from bitwright.plan.plan import Plan
from bitwright.runtime.proof import Proof
from bitwright.runtime.verify import measure, verify
from bitwright.table import Column, Table

#: What follows the model's name in a file's.
QDQ, INTEGER = "_qdq.onnx", "_integer.onnx"
#: The largest sums of the integer file.
ACCUMULATORS = "accumulators.csv"
#: From what the files of a folder were made; `verify` refuses a folder without it.
RECORD = "job.json"
#: Samples of a proof: every operator is compared on each of them.
PROOF_SAMPLES = 16


@dataclass(frozen=True)
class Exports:
    """*plan*: what the files hold, down to the dividing points of tables. *proofs*: of the files there are, by what
    follows the model's name; of the integer file against the simulation with tables.
    """

    plan: Plan
    qdq: onnx.ModelProto | None
    integer: IntegerModel | None
    proofs: Mapping[str, Proof]


def for_exports(settings: Settings) -> Settings:
    """*settings* of a job that writes files: composite operators are taken apart where integers are asked for."""
    return replace(settings, tables=settings.tables or settings.export != "qdq")


def make_exports(
    bench: Bench,
    plan: Plan,
    settings: Settings,
    watcher: Watcher,
    lap: Callable[[str], None] = lambda _: None,
) -> Exports:
    """The files of *plan* that the settings ask for, proven. *lap*: called with the name of each part when it ends.

    *raises* `ProofError` if ONNX Runtime computes something else than the simulation.
    """
    export: Export = settings.export
    tables = build_tables(bench.graph, plan, bench.statistics) if export != "qdq" else {}
    plan = settled(bench.graph, plan, tables)
    qdq = export_qdq(bench.graph, plan) if export != "integer" else None
    integer = lower(bench.graph, plan, bench.target, tables) if export != "qdq" else None
    lap("export")
    models = {QDQ: qdq, INTEGER: None if integer is None else integer.model}
    proofs = prove(bench, plan, {n: m for n, m in models.items() if m is not None}, tables, settings, watcher)
    lap("proof")
    return Exports(plan, qdq, integer, proofs)


def prove(
    subject: Subject,
    plan: Plan,
    models: Mapping[str, onnx.ModelProto],
    tables: Mapping[str, LookupTable],
    settings: Settings,
    watcher: Watcher,
    *,
    check: bool = True,
) -> dict[str, Proof]:
    """The proof of each of *models*, by what follows the model's name in its file's. *tables*: of an integer model.

    *raises* `ProofError` unless told not to *check*.
    """
    samples = take(subject.graph, subject.dataset, PROOF_SAMPLES, settings.seed)
    compare = verify if check else measure
    proofs = {}
    for name, model in models.items():
        kind = "integers" if name == INTEGER else "Q/DQ pairs"
        watcher.stage(f"proving on ONNX Runtime ({kind})", len(samples))
        graph = with_tables(subject.graph, tables) if name == INTEGER and tables else subject.graph
        try:
            proofs[name] = compare(
                graph, plan, model, batches_of(subject, samples, 4), progress=watcher.advance
            )
        except ProofError as e:
            raise ProofError(
                f"{name.strip('_')}, {e.where}", expected=e.expected, found=e.found, remedy=e.remedy
            ) from e
    return proofs


def write_exports(folder: Path, name: str, exports: Exports, watcher: Watcher) -> None:
    """`NAME_qdq.onnx`, `NAME_integer.onnx` with `accumulators.csv`, those there are.

    Of an earlier job in *folder*, first its record and summary are removed, so that an interruption leaves nothing that
    passes for whole; then those of its files that this job does not write: they are not of this plan.
    """
    integer = exports.integer
    for mark in (RECORD, "summary.json"):
        remove(folder / mark)
    for end, model in ((QDQ, exports.qdq), (INTEGER, None if integer is None else integer.model)):
        place = folder / f"{name}{end}"
        if model is not None:
            save_model(model, place)
        elif remove(place):
            watcher.note(f"removed {place}: an earlier run made it, from another plan than this one's")
    if integer is None:
        remove(folder / ACCUMULATORS)
    else:
        write_text(folder / ACCUMULATORS, integer.proofs().to_csv())


def read_exports(folder: Path, name: str, export: Export) -> dict[str, onnx.ModelProto]:
    """What `write_exports` has written for a job that asked for *export*, by what follows the model's name.

    The file of another name serves if there is but one (a model may have been renamed). *raises* `ModelError` for a file
    that is missing or damaged.
    """
    ends = {"qdq": (QDQ,), "integer": (INTEGER,), "both": (QDQ, INTEGER)}[export]
    found = {}
    for end in ends:
        files = sorted(folder.glob(f"*{end}"))
        chosen = [f for f in files if f.name == name + end] or files
        if len(chosen) != 1:
            raise ModelError(
                str(folder),
                expected=f"the file {name}{end}, which was written there",
                found=", ".join(f.name for f in files) or f"none that ends with {end}",
                remedy="Name a folder that bitwright quantize or tune wrote, or write it again.",
            )
        found[end] = read_file(chosen[0])
    return found


def exports_json(exports: Exports) -> dict[str, Any]:
    """What `summary.json` holds of the files."""
    found: dict[str, Any] = {"runtime_check": None, "runtime_check_default": None}
    if QDQ in exports.proofs:
        proof = exports.proofs[QDQ]
        found = {"runtime_check": proof.to_json(), "runtime_check_default": proof.default.to_json()}
    if exports.integer is not None:
        proof = exports.proofs[INTEGER]
        found["integer"] = {
            "runtime_check": proof.to_json(),
            "runtime_check_default": proof.default.to_json(),
            "islands": dict(exports.integer.islands),
            "bytes": exports.integer.model.ByteSize(),
        }
    return found


def reason_table(title: str, reasons: Mapping[str, str]) -> Table:
    """Operators with their *reasons*."""
    columns = (Column("op", "operator"), Column("why", "reason"))
    return Table(title, columns, tuple({"op": n, "why": w} for n, w in reasons.items()))
