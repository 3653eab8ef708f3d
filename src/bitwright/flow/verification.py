"""`verify`: prove again the files that `quantize` or `tune` has written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from bitwright.calibrate.statistics import Statistics
from bitwright.errors import ProofError
from bitwright.flow.bench import Subject, batches_of, check_plan, open_subject, take
from bitwright.flow.exports import INTEGER, PROOF_SAMPLES, for_exports, prove, read_exports
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.settings import Settings
from bitwright.flow.tables import build_tables
from bitwright.graph.graph import Graph
from bitwright.numerics.lut import DirectTable, LookupTable
from bitwright.numerics.rounding import round_
from bitwright.numerics.table_curve import RealFunction, evaluate, in_steps
from bitwright.ops.table import with_tables
from bitwright.plan.plan import Plan
from bitwright.runtime.proof import OpDifference, Proof
from bitwright.runtime.verify import measure
from bitwright.table import Column, Table

#: Output steps by which float64 arithmetic may be off.
_FLOAT64 = 1e-6


@dataclass(frozen=True)
class TableCheck:
    """The table of an operator in the integer file against its function, fed with the same codes.

    *difference*: of output codes. *error*: the table's largest, against the function before rounding, over all input
    codes at which that is finite, in output steps.
    """

    difference: OpDifference
    error: float

    @property
    def allowed(self) -> int:
        """The largest difference that the table's error explains, in steps.

        With the table's code T, the function's result f (in steps) and its code R, which is f rounded:
        |T - R| <= |T - f| + |f - R| <= error + 1/2, and T - R is an integer.
        """
        return math.floor(self.error + 0.5 + _FLOAT64)

    @property
    def holds(self) -> bool:
        """True if no code is off by more than the table's error explains."""
        return self.difference.steps <= self.allowed


@dataclass(frozen=True)
class Verified:
    """*proofs*: by what follows the model's name in its file's. *tables*: of the integer file, if there is one."""

    proofs: Mapping[str, Proof]
    tables: tuple[TableCheck, ...]

    @property
    def holds(self) -> bool:
        """True if every rule is kept."""
        return all(p.holds for p in self.proofs.values()) and all(t.holds for t in self.tables)

    @property
    def broken(self) -> list[str]:
        """What breaks a rule: of each file the first operator, and every table."""
        found = []
        for name, proof in self.proofs.items():
            try:
                proof.check()
            except ProofError as e:
                found.append(f"{name.strip('_')}, {e.where}: expected {e.expected}; found {e.found}")
        for t in self.tables:
            if not t.holds:
                limit = f"codes within {t.allowed} step(s) of the function's"
                found.append(f"table of {t.difference.name}: expected {limit}; found {t.difference.steps}")
        return found

    def table_table(self) -> Table:
        """One row for each look-up table: those that break the rule, then by difference, the largest first."""
        columns = (
            Column("name", "operator"),
            Column("kind", "function"),
            Column("dtype", "codes"),
            Column("steps", "steps"),
            Column("error", "error", "steps", 3),
            Column("holds", "explained"),
        )
        rows = tuple(
            {
                "name": t.difference.name,
                "kind": t.difference.kind,
                "dtype": t.difference.dtype.name,
                "steps": t.difference.steps,
                "error": t.error,
                "holds": "yes" if t.holds else "no",
            }
            for t in sorted(self.tables, key=lambda t: (t.holds, -t.difference.steps))
        )
        title = "Tables, same input codes: steps by which they differ from their functions, and whether their error explains it"
        return Table(title, columns, rows)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        proofs = {name.strip("_"): proof for name, proof in self.proofs.items()}
        return {
            **{name: proof.to_json() for name, proof in proofs.items()},
            "operators": {name: proof.table().to_json() for name, proof in proofs.items()},
            "tables": self.table_table().to_json(),
            "holds": self.holds,
            "broken": self.broken,
        }


def run_verify(
    folder: str | Path,
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    settings: Settings | None = None,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
) -> Verified:
    """Prove the files of *folder* against `plan.json` there, on samples of *data*.

    *settings*: as the files were made with. Nothing is raised if a proof fails; ask `Verified.holds`. *raises*
    `PlanError` for a plan of another network, `ModelError` for a missing or damaged file.
    """
    place, watcher = Path(folder), watcher or Silence()
    settings = for_exports(settings or Settings())
    plan = Plan.load(place / "plan.json")
    subject = open_subject(model, data, settings, watcher, example_inputs=example_inputs)
    check_plan(subject, plan, place / "plan.json")
    models = read_exports(place, subject.name, settings.export)
    # The plan holds every dividing point: nothing is calibrated again.
    tables = build_tables(subject.graph, plan, Statistics()) if INTEGER in models else {}
    proofs = prove(subject, plan, models, tables, settings, watcher, check=False)
    checks = _table_checks(subject, plan, models[INTEGER], tables, settings, watcher) if tables else ()
    return Verified(proofs, checks)


def _table_checks(
    subject: Subject,
    plan: Plan,
    model: onnx.ModelProto,
    tables: Mapping[str, LookupTable],
    settings: Settings,
    watcher: Watcher,
) -> tuple[TableCheck, ...]:
    samples = take(subject.graph, subject.dataset, PROOF_SAMPLES, settings.seed)
    watcher.stage("comparing tables with functions", len(samples))
    functions = {name: _function(subject, name) for name in tables}
    exact = {name: exact_table(functions[name], table) for name, table in tables.items()}
    graph = with_tables(subject.graph, exact)
    proof = measure(graph, plan, model, batches_of(subject, samples, 4), progress=watcher.advance)
    groups = {plan.ops[name].group: name for name in tables}
    return tuple(
        TableCheck(difference, tables[name].error(functions[name])[0])
        for difference in proof.per_op
        if (name := groups.get(difference.name)) is not None
    )


def _function(subject: Subject, op: str) -> RealFunction:
    function = subject.graph.op(op).table_function()
    assert function is not None
    return function


def exact_table(function: RealFunction, table: LookupTable) -> DirectTable:
    """The codes of *function* itself, computed in float64 and rounded once, for every input code of *table*.

    Where the function is not finite there is nothing to compare with, and *table* has its way (docs/numerics.md §9.1).
    """
    q, values = table.q_out, evaluate(function, table.q_in, "look-up table")[:-1]
    steps = round_(torch.from_numpy(in_steps(values, q)), q.spec.rounding) + q.zero_point[0]
    codes = steps.nan_to_num().clamp(q.spec.dtype.qmin, q.spec.dtype.qmax).to(torch.int32)
    finite = torch.from_numpy(np.isfinite(values))
    return DirectTable(table.q_in, q, torch.where(finite, codes, table.results))
