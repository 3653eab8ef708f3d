"""`bitwright tune`: the main job."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from bitwright.cli.job import job
from bitwright.cli.options import DataFlags, ExportFlag, Model, QuantizeFlags, ResultFlags
from bitwright.cli.record import record_of
from bitwright.cli.results import print_tuned
from bitwright.cli.search_options import SearchFlags
from bitwright.cli.settings import settings_of
from bitwright.cli.signature import flat
from bitwright.flow.tune import tune

HELP = """Quantize a network, find the operators that lose accuracy, repair them, export the result and prove it.

Measures float against int8; where the target cosine is missed, ranks all operators, takes the best threshold for each
value, and leaves as few operators in float as the target needs. Writes ONNX models (--export; see bitwright quantize
--help), tables for vendor tools, a report.

Exit status: 0 if the target cosine is met, 1 if not (the best result so far is written), 2 on bad input."""
EXAMPLES = (
    "bitwright tune model.onnx --data pictures/ --resize 256 --crop 224 --mean 123.675,116.28,103.53 "
    "--scale 0.01712,0.01751,0.01743",
    "bitwright tune model.onnx --data samples.npz --target bm1684x --expected-cos 0.995 -o out",
    "bitwright tune network.py:build --data loader:samples --labels labels.txt --max-float-ops 3",
)


@flat
def run(
    model: Model,
    data: DataFlags,
    quantize: QuantizeFlags,
    search: SearchFlags,
    result: ResultFlags,
    export: ExportFlag = "qdq",
    max_float_ops: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Operators (groups) that may stay float.",
            show_default="a tenth of all",
            rich_help_panel="Search",
        ),
    ] = None,
) -> int:
    """Parse, tune, print. *returns* the exit status."""
    folder = result.folder(model, quantize.target)
    with job(folder, quiet=result.quiet, save_state=search.save_state) as watcher:
        settings = settings_of(data, quantize, search, max_float_ops=max_float_ops, export=export)
        tuned = tune(model, data.data, output=folder, settings=settings, watcher=watcher)
        # What the search was is of no use to verify, which reads a threshold method alone.
        record_of(model, replace(quantize, method=settings.method), data, export).save(folder)
    return print_tuned(tuned, folder, as_json=result.json)
