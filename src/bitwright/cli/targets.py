"""`bitwright targets`: what can be quantized for."""

from __future__ import annotations

from typing import Annotated

import typer

from bitwright.cli.printing import print_json, print_table
from bitwright.plan.target import Target, load_target, target_names
from bitwright.table import Column, Table

HELP = """List the chips and engines that --target names.

A YAML file of your own works the same way: --target my_chip.yaml."""
EXAMPLES = (
    "bitwright targets",
    "bitwright targets --json",
    "bitwright tune model.onnx --data samples.npz --target journey6",
)
_COLUMNS = (
    Column("name", "target"),
    Column("activations", "activations"),
    Column("weights", "weights"),
    Column("rescale", "rescale"),
    Column("description", "description"),
)


def run(
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Print the targets. *returns* the exit status."""
    targets = [load_target(name) for name in target_names()]
    if json:
        print_json([t.model_dump(mode="json") for t in targets])
    else:
        print_table(Table("Targets", _COLUMNS, tuple(_row(t) for t in targets)))
    return 0


def _row(target: Target) -> dict[str, str]:
    symmetric = "symmetric" if target.activation.symmetric else "asymmetric"
    return {
        "name": target.name,
        "activations": f"{target.activation.dtype} {symmetric}",
        "weights": f"per {target.weight.granularity}",
        "rescale": target.rescale.form.replace("_", " + "),
        "description": " ".join(target.description.split()),
    }
