"""`bitwright train`: quantization-aware training from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.job import job
from bitwright.cli.printing import print_json, print_table
from bitwright.cli.results import print_files
from bitwright.cli.signature import flat
from bitwright.flow.training import run_training

HELP = """Quantization-aware training of a classifier, from a recipe in YAML: calibrate, train, convert, measure each stage.

A recipe needs `model: net.py:make` (returns the module and example inputs) and
`data: {train: net.py:train_data, validation: net.py:test_data}`; docs/training.md lists the other fields (`checkpoint`, `weight`,
`epochs`, …) and their defaults.
After every epoch a checkpoint is written; run the same command again to go on from there."""
EXAMPLES = (
    "bitwright train recipe.yaml -o out",
    "bitwright train recipe.yaml -o out --json > result.json",
)

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file; see docs/training.md.", show_default=False)
]


@dataclass(frozen=True)
class OutputFlags:
    """Where results go."""

    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the results.")
    ] = Path("train_out")
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False


_FILES = ("_qat.onnx", "_qat.plan.json", "report.html", "history.csv", "summary.json")


@flat
def run(recipe: RecipeFile, result: OutputFlags) -> int:
    """Parse, train, print. *returns* the exit status."""
    with job(result.output, quiet=result.quiet) as watcher:
        trained = run_training(recipe, output=result.output, watcher=watcher)
    if result.json:
        print_json(trained.table().to_json())
    else:
        print_table(trained.table())
        print_files(result.output, *_FILES, model=trained.name)
    return 0
