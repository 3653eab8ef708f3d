"""`bitwright calibrate`: the range of every value."""

from __future__ import annotations

from pathlib import Path

from bitwright.cli.job import job
from bitwright.cli.options import DataFlags, Model, QuantizeFlags, ResultFlags, settings_of
from bitwright.cli.printing import print_json, print_table
from bitwright.cli.results import print_files
from bitwright.cli.signature import flat
from bitwright.export.file import write_text
from bitwright.export.tpu_mlir import write_calibration_table
from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.outputs import check_writable
from bitwright.table import Column, Table

HELP = """Find the range of every value in one pass over the data, and write a calibration table.

The thresholds are those of --method."""
EXAMPLES = (
    "bitwright calibrate model.onnx --data samples.npz --method kl -o out",
    "bitwright calibrate model.onnx --data pictures/ --resize 224,224 --method 'percentile(99.99)' --input-num 200",
)
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
#: Rows on the screen; the file has all.
_ROWS = 60


@flat
def run(model: Model, data: DataFlags, quantize: QuantizeFlags, result: ResultFlags) -> int:
    """Parse, calibrate, print. *returns* the exit status."""
    folder = result.folder(model, quantize.target)
    with job(folder, quiet=result.quiet) as watcher:
        settings = settings_of(data, quantize)
        check_writable(folder)
        bench = open_bench(model, data.data, settings, watcher)
        table = range_table(bench)
        write_ranges(folder, bench, table)
    if result.json:
        print_json(table.to_json())
    else:
        print_table(table, limit=_ROWS, more=str(folder / "ranges.csv"))
        print_files(folder, "_cali_table", "ranges.csv")
    return 0


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
