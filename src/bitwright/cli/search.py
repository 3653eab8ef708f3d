"""`bitwright search`: searches of mixed precision."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Literal

import typer

from bitwright.cli.job import job
from bitwright.cli.options import DataFlags, Model, QuantizeFlags, ResultFlags
from bitwright.cli.printing import print_file, print_table
from bitwright.cli.results import print_changed, print_choice, print_files, verdict
from bitwright.cli.search_options import Evaluate, SearchFlags
from bitwright.cli.settings import refuse_unused, settings_of
from bitwright.cli.signature import flat
from bitwright.flow.joint import JointSearch, interaction_table, pareto_table, run_joint
from bitwright.flow.search import MixedResult, layer_table, run_mixed
from bitwright.flow.settings import Settings
from bitwright.table import Table

HELP = """Search a mixed-precision model: the cheapest that reaches the target cosine, or the best within a budget.

--mode joint predicts the loss of any combination from an error sketch and chooses thresholds and precisions of the whole network;
true runs decide. It writes the Pareto front, and with --explain which operators amplify or cancel each other. --budget without
--expected-cos asks for the best within the budget.

--mode mixed walks from the input: wherever an operator's own output is less similar to float than --min-layer-cos, the operator
and those that read it go back to float; a step that makes the network worse than plain int8 is undone.

Exit status: 0 if the target is met, 1 if not, 2 on bad input."""
EXAMPLES = (
    "bitwright search model.onnx --data samples.npz --target bm1684x --expected-cos 0.995 --explain",
    "bitwright search model.onnx --data samples.npz --budget macs=0.1 --precisions w4a8,int8,int16,float",
    "bitwright search model.onnx --data samples.npz --evaluate metric.py:top1 --min-metric 0.75 --workers 4",
    "bitwright search model.onnx --data pictures/ --mode mixed --min-layer-cos 0.98 -o out",
)
_ADVICE = "Allow more (--max-float-ops, --budget), more precisions (--precisions), or lower --expected-cos."
_WALK_ADVICE = (
    "Suspect more operators (--min-layer-cos), allow more (--max-float-ops), or lower --expected-cos."
)
#: Flags of searches that the walk has no use for.
_JOINT_ONLY = ("budget", "precisions", "loss", "operators", "probes", "verify", "workers", "ray")
#: Interactions on the screen.
_PAIRS = 12
#: Characters of a list of operators on the screen.
_WIDTH = 72
_JOINT_FILES = (
    "report.html",
    "pareto.csv",
    "interactions.csv",
    "_qtable",
    "new_cali_table",
    "sensitivity.csv",
    "search.log",
    "plan.json",
    "summary.json",
)
_WALK_FILES = ("_qtable", "new_cali_table", "layers.csv", "plan.json", "summary.json")


@flat
def run(
    model: Model,
    data: DataFlags,
    quantize: QuantizeFlags,
    search: SearchFlags,
    result: ResultFlags,
    mode: Annotated[
        Literal["joint", "mixed"], typer.Option(help="The kind of search.", rich_help_panel="Search")
    ] = "joint",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="List the pairs of operators that amplify or cancel each other most.",
            rich_help_panel="Search",
        ),
    ] = False,
    evaluate: Evaluate = None,
    min_metric: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="With --evaluate: choose the cheapest plan of the front whose metric is at least X.",
            rich_help_panel="Search",
        ),
    ] = None,
    min_layer_cos: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Of --mode mixed: cosine of an operator's output below which it is a suspect.",
            rich_help_panel="Search",
        ),
    ] = 0.99,
    max_float_ops: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Operators (groups) that may become float.",
            show_default="joint: all; mixed: a quarter",
            rich_help_panel="Search",
        ),
    ] = None,
) -> int:
    """Parse, search, print. *returns* the exit status."""
    folder = result.folder(model, quantize.target)
    with job(folder, quiet=result.quiet, save_state=search.save_state) as watcher:
        settings = settings_of(data, quantize, search, max_float_ops=max_float_ops, evaluate=evaluate)
        if mode == "mixed":
            given = {
                "--explain": explain,
                "--evaluate": evaluate is not None,
                "--min-metric": min_metric is not None,
            }
            refuse_unused("search --mode mixed", search, *_JOINT_ONLY, **given)
        found: JointSearch | MixedResult
        if mode == "mixed":
            found = run_mixed(
                model,
                data.data,
                output=folder,
                settings=settings,
                min_layer_cos=min_layer_cos,
                watcher=watcher,
            )
        else:
            found = run_joint(
                model,
                data.data,
                output=folder,
                settings=settings,
                best_in_budget=search.budget is not None and search.expected_cos is None,
                explained=explain,
                min_metric=min_metric,
                watcher=watcher,
            )
    if result.json:
        print_file(folder / "summary.json")
    if isinstance(found, MixedResult):
        return _walk_result(found, folder, settings, quiet=result.json)
    return _joint_result(found, folder, quiet=result.json)


def _walk_result(found: MixedResult, folder: Path, settings: Settings, *, quiet: bool) -> int:
    if not quiet:
        print_table(layer_table(found.walk))
        print_choice(found.walk.float_groups, int8=found.walk.initial, mixed=found.walk.similarity)
        print_files(folder, *_WALK_FILES, model=found.bench.name)
    sys.stdout.flush()
    return verdict(found.reached, found.walk.similarity, settings.expected_cos, folder, _WALK_ADVICE)


def _shortened(table: Table) -> Table:
    """*table* with lists of operators cut to what a screen holds; the file has all."""
    rows = tuple({**row, "groups": shorten(row["groups"], _WIDTH, placeholder=" …")} for row in table.rows)
    return replace(table, rows=rows)


def _joint_result(found: JointSearch, folder: Path, *, quiet: bool) -> int:
    if not quiet:
        print_table(_shortened(pareto_table(found)))
        if found.explanation is not None:
            print_table(
                interaction_table(found.explanation), limit=_PAIRS, more=str(folder / "interactions.csv")
            )
        print(f"\nint8: cosine {found.int8.cosine:.6f}; chosen: cosine {found.choice.similarity:.6f}.")
        print_changed(found.choice.groups)
        written = [f for f in _JOINT_FILES if f != "interactions.csv" or found.explanation is not None]
        print_files(folder, *written, model=found.bench.name)
    sys.stdout.flush()
    if found.min_metric is not None:
        best = max(metric for plan, metric in found.metrics.items() if plan not in ("float", "int8"))
        return verdict(found.chosen.reached, best, found.min_metric, folder, _ADVICE, what="metric")
    expected = 0.0 if found.target is None else found.target
    return verdict(found.chosen.reached, found.choice.similarity, expected, folder, _ADVICE)
