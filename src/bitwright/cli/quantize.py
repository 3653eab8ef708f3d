"""`bitwright quantize`: calibrate, export, prove."""

from __future__ import annotations

from bitwright.cli.job import job
from bitwright.cli.options import DataFlags, ExportFlag, Model, PlanFile, QuantizeFlags, ResultFlags
from bitwright.cli.printing import print_json, print_table
from bitwright.cli.record import record_of
from bitwright.cli.results import EXPORT_FILES, print_exports, print_files
from bitwright.cli.settings import refuse_method, settings_of
from bitwright.cli.signature import flat
from bitwright.flow.exports import RECORD
from bitwright.flow.outputs import FLOATS, stage_table
from bitwright.flow.quantize import quantized_summary, run_quantize

HELP = """Quantize everything that the target allows, without a search, and export it: as standard ONNX with Q/DQ pairs,
as standard ONNX in integer operators alone, or both. Every operator of every file is compared with the simulation on ONNX
Runtime. A file of the other kind that an earlier run left in the folder is removed: it holds another plan.

In the integer file convolutions, products, sums and look-up tables are integer operators; softmax, norms and division are
taken apart, with int16 inside. What stays float is listed, with the reason. bitwright tune --export does the same after a
search.

Exit status: 0, or 2 on bad input or where ONNX Runtime computes something else than the simulation."""
EXAMPLES = (
    "bitwright quantize model.onnx --data samples.npz --target journey6 --export both -o out",
    "bitwright quantize model.onnx --data samples.npz --target journey6 --plan tuned/plan.json --export integer",
    "bitwright verify out",
)


@flat
def run(
    model: Model,
    data: DataFlags,
    quantize: QuantizeFlags,
    result: ResultFlags,
    export: ExportFlag = "qdq",
    plan: PlanFile = None,
) -> int:
    """Parse, quantize, print. *returns* the exit status."""
    folder = result.folder(model, quantize.target)
    with job(folder, quiet=result.quiet) as watcher:
        settings = settings_of(data, quantize, export=export)
        if plan is not None:
            refuse_method("quantize --plan", quantize)
        made = run_quantize(model, data.data, output=folder, settings=settings, watcher=watcher, plan=plan)
        record_of(model, quantize, data, export).save(folder)
    if result.json:
        print_json(quantized_summary(made))
    else:
        print_table(stage_table(made.bench, made.stages))
        print_exports(made.exports, FLOATS, made.exports.plan.refusals)
        print_files(
            folder,
            "report.html",
            *EXPORT_FILES,
            "_qtable",
            "_cali_table",
            "ranges.csv",
            "plan.json",
            "summary.json",
            RECORD,
            model=made.bench.name,
        )
    return 0
