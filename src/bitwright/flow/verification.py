"""`verify`: prove again the files that `quantize` or `tune` has written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from bitwright.flow.bench import Bench, batches_of, given_plan, open_bench, take
from bitwright.flow.exports import INTEGER, PROOF_SAMPLES, for_exports, prove, read_exports
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.settings import Settings
from bitwright.flow.tables import build_tables
from bitwright.graph.graph import Graph
from bitwright.numerics.lut import LookupTable
from bitwright.plan.plan import Plan
from bitwright.runtime.proof import OpDifference, Proof
from bitwright.runtime.verify import measure
from bitwright.table import Column, Table


@dataclass(frozen=True)
class TableCheck:
    """The table of an operator in the integer file against the float function, fed with the same codes. *steps*: the largest difference
    of two output codes; *error*: what the table says of itself, over all input codes, in output steps.
    """

    difference: OpDifference
    error: float

    @property
    def holds(self) -> bool:
        """True if no code is off by more than the table says; the function's own result is rounded too, by half a step."""
        return self.difference.steps <= math.ceil(self.error + 0.5)


@dataclass(frozen=True)
class Verified:
    """*proofs*: by what follows the model's name in its file's. *tables*: of the integer file, if there is one."""

    proofs: Mapping[str, Proof]
    tables: tuple[TableCheck, ...]

    @property
    def holds(self) -> bool:
        """True if every rule is kept."""
        return all(p.holds for p in self.proofs.values()) and all(t.holds for t in self.tables)

    def table_table(self) -> Table:
        """One row for each look-up table, the largest difference first."""
        columns = (
            Column("name", "operator"),
            Column("kind", "function"),
            Column("dtype", "codes"),
            Column("steps", "largest difference", "steps"),
            Column("error", "the table's own error", "steps", 3),
            Column("holds", "within it"),
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
            for t in sorted(self.tables, key=lambda t: -t.difference.steps)
        )
        return Table(
            "Tables of the integer file against the float functions, same input codes", columns, rows
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        proofs = {name.strip("_"): proof.to_json() for name, proof in self.proofs.items()}
        return {**proofs, "tables": self.table_table().to_json(), "holds": self.holds}


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

    *settings*: as the files were made with. Nothing is raised if a proof fails; ask `Verified.holds`. *raises* `PlanError` for a plan
    of another network, `ModelError` for a missing or damaged file.
    """
    place, watcher = Path(folder), watcher or Silence()
    settings = for_exports(settings or Settings())
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    plan = given_plan(bench, place / "plan.json")
    models = read_exports(place, bench.name, settings.export)
    tables = build_tables(bench.graph, plan, bench.statistics) if INTEGER in models else {}
    proofs = prove(bench, plan, models, tables, settings, watcher, check=False)
    checks = _table_checks(bench, plan, models[INTEGER], tables, settings, watcher) if tables else ()
    return Verified(proofs, checks)


def _table_checks(
    bench: Bench,
    plan: Plan,
    model: onnx.ModelProto,
    tables: Mapping[str, LookupTable],
    settings: Settings,
    watcher: Watcher,
) -> tuple[TableCheck, ...]:
    samples = take(bench.graph, bench.dataset, PROOF_SAMPLES, settings.seed)
    watcher.stage("comparing tables with functions", len(samples))
    proof = measure(bench.graph, plan, model, batches_of(bench, samples, 4), progress=watcher.advance)
    groups = {plan.ops[name].group: name for name in tables}
    found = []
    for difference in proof.per_op:
        name = groups.get(difference.name)
        if name is not None:
            function = bench.graph.op(name).table_function()
            assert function is not None
            found.append(TableCheck(difference, tables[name].error(function)[0]))
    return tuple(found)
