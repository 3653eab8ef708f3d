"""Calibration as a job of its own: the range of every value, by one method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bitwright.exporters.tpu_mlir import write_calibration_table
from bitwright.files import write_text
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.outputs import check_writable
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.settings import Settings
from bitwright.graph.graph import Graph
from bitwright.table import Column, Table

_COLUMNS = (
    Column("name", "value"),
    Column("method", "method"),
    Column("min", "min", "", 5),
    Column("max", "max", "", 5),
    Column("low", "low", "", 5),
    Column("high", "high", "", 5),
    Column("dtype", "dtype"),
    Column("scale", "scale", "", 7),
    Column("zero_point", "zero point"),
)


def run_calibration(
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    output: str | Path,
    settings: Settings | None = None,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
) -> tuple[Bench, Table]:
    """One pass over the data. Writes `NAME_cali_table` and `ranges.csv` to *output*."""
    settings, watcher = settings or Settings(), watcher or Silence()
    folder = check_writable(Path(output))
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    table = range_table(bench)
    write_ranges(folder, bench, table)
    return bench, table


def range_table(bench: Bench) -> Table:
    """What was seen of every activation (min, max), and what its codes reach (low, high), real units."""
    rows = []
    for name, entry in bench.plan.values.items():
        if entry.role != "activation" or entry.qparams is None:
            continue
        seen, q = bench.statistics[name], entry.qparams
        low, high = q.limits
        rows.append(
            {
                "name": name,
                "method": entry.method,
                "min": seen.lo,
                "max": seen.hi,
                "low": low,
                "high": high,
                "dtype": q.spec.dtype.name,
                "scale": q.scale[0],
                "zero_point": q.zero_point[0],
            }
        )
    title = f"{bench.name} on {bench.target.name}: ranges from {bench.calibration_samples} samples"
    return Table(title, _COLUMNS, tuple(rows))


def write_ranges(folder: Path, bench: Bench, table: Table) -> None:
    """`NAME_cali_table` and `ranges.csv`."""
    extremes = {name: (s.lo, s.hi) for name, s in bench.statistics.items()}
    write_calibration_table(
        folder / f"{bench.name}_cali_table",
        bench.graph,
        bench.plan,
        extremes,
        samples=bench.calibration_samples,
    )
    write_text(folder / "ranges.csv", table.to_csv())
