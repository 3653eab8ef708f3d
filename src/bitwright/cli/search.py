"""`bitwright search`: searches other than the ranking of all operators."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from bitwright.cli.job import job
from bitwright.cli.options import DataFlags, Model, QuantizeFlags, ResultFlags, SearchFlags, settings_of
from bitwright.cli.printing import print_file, print_table
from bitwright.cli.results import print_choice, print_files, verdict
from bitwright.cli.signature import flat
from bitwright.flow.search import layer_table, run_mixed

HELP = """Search a mixed-precision model by a walk from the input.

Wherever an operator's own output is less similar to float than --min-layer-cos, the operator and those that read it go back
to float; a step that makes the network worse than plain int8 is undone; the target cosine ends the walk.

Exit status: 0 if the target cosine is met, 1 if not, 2 on bad input."""
EXAMPLES = (
    "bitwright search model.onnx --data samples.npz --mode mixed --target bm1684x",
    "bitwright search model.onnx --data pictures/ --expected-cos 0.99 --min-layer-cos 0.98 -o out",
)
_ADVICE = "Suspect more operators (--min-layer-cos), allow more (--max-float-ops), or lower --expected-cos."


@flat
def run(
    model: Model,
    data: DataFlags,
    quantize: QuantizeFlags,
    search: SearchFlags,
    result: ResultFlags,
    mode: Annotated[
        Literal["mixed"], typer.Option(help="The kind of search.", rich_help_panel="Search")
    ] = "mixed",
    min_layer_cos: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Cosine of an operator's output below which it is a suspect.",
            rich_help_panel="Search",
        ),
    ] = 0.99,
    max_float_ops: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Operators (groups) that may become float.",
            show_default="a quarter of all",
            rich_help_panel="Search",
        ),
    ] = None,
) -> int:
    """Parse, search, print. *returns* the exit status."""
    folder = result.folder(model, quantize.target)
    with job(folder, quiet=result.quiet, save_state=search.save_state) as watcher:
        settings = settings_of(data, quantize, search, max_float_ops=max_float_ops)
        found = run_mixed(
            model, data.data, output=folder, settings=settings, min_layer_cos=min_layer_cos, watcher=watcher
        )
    if result.json:
        print_file(folder / "summary.json")
    else:
        print_table(layer_table(found.walk))
        print_choice(found.walk.float_groups, int8=found.walk.initial, mixed=found.walk.similarity)
        print_files(folder, "_qtable", "new_cali_table", "layers.csv", "plan.json", "summary.json")
    sys.stdout.flush()
    return verdict(found.reached, found.walk.similarity, settings.expected_cos, folder, _ADVICE)
