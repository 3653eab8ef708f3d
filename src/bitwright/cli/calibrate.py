"""`bitwright calibrate`: the range of every value."""

from __future__ import annotations

from bitwright.cli.job import job
from bitwright.cli.options import DataFlags, Model, QuantizeFlags, ResultFlags
from bitwright.cli.printing import print_json, print_table
from bitwright.cli.results import print_files
from bitwright.cli.settings import settings_of
from bitwright.cli.signature import flat
from bitwright.flow.calibration import run_calibration

HELP = """Find the range of every value in one pass over the data, and write a calibration table.

The thresholds are those of --method."""
EXAMPLES = (
    "bitwright calibrate model.onnx --data samples.npz --method kl -o out",
    "bitwright calibrate model.onnx --data pictures/ --resize 224,224 --method 'percentile(99.99)' --input-num 200",
)
#: Rows on the screen; the file has all.
_ROWS = 60


@flat
def run(model: Model, data: DataFlags, quantize: QuantizeFlags, result: ResultFlags) -> int:
    """Parse, calibrate, print. *returns* the exit status."""
    folder = result.folder(model, quantize.target)
    with job(folder, quiet=result.quiet) as watcher:
        settings = settings_of(data, quantize)
        bench, table = run_calibration(model, data.data, output=folder, settings=settings, watcher=watcher)
    if result.json:
        print_json(table.to_json())
    else:
        print_table(table, limit=_ROWS, more=str(folder / "ranges.csv"))
        print_files(folder, "_cali_table", "ranges.csv", model=bench.name)
    return 0
