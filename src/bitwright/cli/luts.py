"""`bitwright luts`: look-up tables."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.job import job
from bitwright.cli.options import DataFlags, Model, PlanFile, QuantizeFlags, ResultFlags
from bitwright.cli.printing import print_json, print_table
from bitwright.cli.results import print_files
from bitwright.cli.search_options import Evaluate, SaveState, SearchFlags
from bitwright.cli.settings import refuse_method, settings_of
from bitwright.cli.signature import flat
from bitwright.errors import UnknownName
from bitwright.flow.luts import TOLERANCE, run_luts
from bitwright.flow.luts_result import LutsResult, remedy_table, score_table, summary, table_table, verdict
from bitwright.numerics.table_settings import MOST_SEGMENTS, STRATEGIES, TableSettings

HELP = """Find out whether look-up tables lose accuracy, which of them, and what to do about it.

Functions (exp, sigmoid, softmax, norms, …) become fixed-point tables. Measures the network with float tables, with fixed ones, and as an integer model, ranks all
tables by an error sketch, puts them back to float one after another until the score recovers, and tries remedies on the guilty ones:
other dividing points, more segments, a narrower range, one period, an int16 result. What helps is written into plan.json.

--strategy and --num-tables say how your chip makes its tables to begin with; --plan examines the plan.json of another job (a mixed one of
tune or search, say) in place of everything at int8.

Exit status: 0 if tables cost no more than the tolerance (any more), 1 if they still do, 2 on bad input."""
EXAMPLES = (
    "bitwright luts model.onnx --data samples.npz --target journey6 -o out",
    "bitwright luts model.onnx --data samples.npz --strategy evenly --num-tables 6 --evaluate metric.py:top1",
    "bitwright luts model.onnx --data samples.npz --target journey6 --plan out/plan.json -o tables",
    "bitwright quantize model.onnx --data samples.npz --target journey6 --plan tables/plan.json --export both",
)
#: Rows on the screen: the file has all.
_ROWS = 20
_TABLES = "Tables"
#: "manual" needs points, which differ from table to table: they are given in a plan.
_STRATEGIES = tuple(s for s in STRATEGIES if s != "manual")


@dataclass(frozen=True)
class TableFlags:
    """How tables are made to begin with, and what they may cost."""

    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How segments are divided: {', '.join(_STRATEGIES)}.",
            show_default=f"{TableSettings().strategy}, or as the plan says",
            rich_help_panel=_TABLES,
        ),
    ] = None
    num_tables: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST_SEGMENTS,
            help="Segments of a table.",
            show_default=f"{TableSettings().num_tables}, or as the plan says",
            rich_help_panel=_TABLES,
        ),
    ] = None
    plan: PlanFile = None
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="X", min=0, help="What tables may cost, of the cosine or metric.", rich_help_panel=_TABLES
        ),
    ] = TOLERANCE
    inference_num: Annotated[
        int, typer.Option(metavar="N", min=0, help="Samples to compare on; 0: all.", rich_help_panel=_TABLES)
    ] = SearchFlags().inference_num
    save_state: SaveState = None

    def settings(self) -> TableSettings | None:
        """What the flags say of tables; None if they say nothing. *raises* `UnknownName`."""
        usual = TableSettings()
        if self.strategy is None and self.num_tables is None:
            return None
        if self.strategy is not None and self.strategy not in _STRATEGIES:
            raise UnknownName("--strategy", kind="strategy", name=self.strategy, known=_STRATEGIES)
        return TableSettings(
            strategy=self.strategy or usual.strategy, num_tables=self.num_tables or usual.num_tables
        )


@flat
def run(
    model: Model,
    data: DataFlags,
    quantize: QuantizeFlags,
    tables: TableFlags,
    result: ResultFlags,
    evaluate: Evaluate = None,
) -> int:
    """Parse, find, print. *returns* the exit status."""
    folder = result.folder(model, quantize.target)
    with job(folder, quiet=result.quiet, save_state=tables.save_state) as watcher:
        search = SearchFlags(inference_num=tables.inference_num, save_state=tables.save_state)
        if tables.plan is not None:
            refuse_method("luts --plan", quantize)
        found = run_luts(
            model,
            data.data,
            output=folder,
            settings=settings_of(data, quantize, search, evaluate=evaluate),
            table_settings=tables.settings(),
            tolerance=tables.tolerance,
            plan=tables.plan,
            watcher=watcher,
        )
    if result.json:
        print_json(summary(found))
    else:
        _print(found, folder)
    return 0 if found.repaired else 1


def _print(found: LutsResult, folder: Path) -> None:
    print_table(score_table(found))
    print(f"\n{verdict(found)}\n")
    print_table(table_table(found).without_empty(), limit=_ROWS, more=str(folder / "luts.csv"))
    if found.remedies:
        print()
        print_table(remedy_table(found.remedies))
    print_files(folder, "report.html", "luts.csv", "remedies.csv", "plan.json", "summary.json")
    sys.stdout.flush()
