"""`bitwright sensitivity`: rank the operators."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import typer

from bitwright.cli.job import job
from bitwright.cli.options import DataFlags, Model, QuantizeFlags, ResultFlags
from bitwright.cli.printing import print_file, print_table
from bitwright.cli.results import SEARCH_FILES, print_choice, print_files, verdict
from bitwright.cli.search_options import Evaluate, SearchFlags
from bitwright.cli.settings import refuse_unused, settings_of
from bitwright.cli.signature import flat
from bitwright.flow.outputs import sensitivity_table
from bitwright.flow.search import DEFAULT_FLOAT_OPS, run_sensitivity

HELP = """Rank operators by what the network loses when each alone is int8, with every threshold method.

By default all losses come from an error sketch, a few backward passes for everything at once, and the top ones are then measured
exactly (--method sketch+verify). --method exact measures all by partial re-execution, --method sketch none.

Leaves the most sensitive ones in float and writes a qtable and a calibration table with the best thresholds. Stops at once if
plain int8 already meets the target cosine.

Exit status: 0 if the target cosine is met, 1 if not, 2 on bad input."""
EXAMPLES = (
    "bitwright sensitivity model.onnx --data samples.npz --target bm1684x --max-float-ops 8",
    "bitwright sensitivity model.onnx --data pictures/ --auto --expected-cos 0.99 -o out",
    "bitwright sensitivity model.onnx --data samples.npz --method exact --workers 2 --operators '*/attn/*'",
    "bitwright sensitivity model.onnx --data samples.npz --methods max,mse,octav --post-process decode.py:PostProcess",
    "bitwright sensitivity model.onnx --data samples.npz --evaluate metric.py:top1 --operators 'conv1,head*' --workers 4",
)
#: Rows on the screen, and columns that are not there: the file has all.
_ROWS, _NOT_SHOWN = 30, ("loss", "members")


@flat
def run(
    model: Model,
    data: DataFlags,
    quantize: QuantizeFlags,
    search: SearchFlags,
    result: ResultFlags,
    max_float_ops: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Operators (groups) to leave float: exactly so many, or with --auto at most.",
            show_default=str(DEFAULT_FLOAT_OPS),
            rich_help_panel="Search",
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto", help="Leave as many float as the target cosine needs.", rich_help_panel="Search"
        ),
    ] = False,
    evaluate: Evaluate = None,
) -> int:
    """Parse, measure, print. *returns* the exit status."""
    folder = result.folder(model, quantize.target)
    with job(folder, quiet=result.quiet, save_state=search.save_state) as watcher:
        settings = settings_of(data, quantize, search, max_float_ops=max_float_ops, evaluate=evaluate)
        if not auto:
            refuse_unused("sensitivity without --auto", search, "budget", "precisions")
        found = run_sensitivity(
            model, data.data, output=folder, settings=settings, auto=auto, watcher=watcher
        )
    if result.json:
        print_file(folder / "summary.json")
    else:
        if found.skipped:
            print(f"int8 alone has cosine {found.int8:.6f}: nothing to search.")
        else:
            table = sensitivity_table(found.rows, found.choice.plan, found.metrics)
            shown = replace(table, columns=tuple(c for c in table.columns if c.key not in _NOT_SHOWN))
            print_table(shown, limit=_ROWS, more=str(folder / "sensitivity.csv"))
            print_choice(found.choice.float_groups, int8=found.int8, mixed=found.choice.similarity)
        print_files(folder, *SEARCH_FILES, model=found.bench.name)
    sys.stdout.flush()
    return verdict(found.reached, found.choice.similarity, settings.expected_cos, folder)
