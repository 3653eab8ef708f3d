"""`bitwright verify`: prove files again."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from bitwright.cli.job import job
from bitwright.cli.printing import print_json, print_table
from bitwright.cli.record import Record
from bitwright.cli.results import proof_line
from bitwright.cli.settings import settings_of
from bitwright.cli.signature import flat
from bitwright.flow.verification import Verified, run_verify

HELP = """Prove again the files of a folder that bitwright quantize or tune wrote: every operator of the Q/DQ file and of the integer file on ONNX
Runtime against the simulation of plan.json, both fed with the same input codes; and every look-up table against its float function.

Model, data and flags are found in job.json there; --model and --data name others, should they have moved. All thresholds and
dividing points are the plan's.

Exit status: 0 if every operator keeps the rule of docs/numerics.md and no table differs by more than its error explains, 1 if not, 2 on bad input."""
EXAMPLES = ("bitwright verify out", "bitwright verify out --data other_samples.npz --json")
#: Rows on the screen, and where the others are.
_ROWS, _WHOLE = 12, "what --json prints"
_REMEDY = "The model, the file or plan.json has changed since, or ONNX Runtime has: write the folder again."

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="What quantize or tune wrote.", show_default=False)
]


@dataclass(frozen=True)
class VerifyFlags:
    """What differs from the job that wrote the files."""

    model: Annotated[str | None, typer.Option(metavar="MODEL", help="The model, if it has moved.")] = None
    data: Annotated[str | None, typer.Option(metavar="PLACE", help="Samples to compare on.")] = None
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False


@flat
def run(folder: Folder, flags: VerifyFlags) -> int:
    """Parse, prove, print. *returns* the exit status."""
    record = Record.load(folder)
    # plan.json holds every threshold and dividing point: neither calibration data nor labels have to be there still.
    data = replace(record.data, data=flags.data or record.data.data, calibration_data=None, labels=None)
    with job(folder, quiet=flags.quiet) as watcher:
        settings = settings_of(data, record.quantize, export=record.export)
        found = run_verify(folder, flags.model or record.model, data.data, settings=settings, watcher=watcher)
    if flags.json:
        print_json(found.to_json())
    else:
        _print(found)
    return _verdict(found, folder)


def _print(found: Verified) -> None:
    for name, proof in found.proofs.items():
        print(f"\n{name.strip('_')}: {proof_line(proof)}")
        print_table(proof.table(worst_first=True), limit=_ROWS, more=_WHOLE)
    if found.tables:
        print()
        print_table(found.table_table(), limit=_ROWS, more=_WHOLE)
    if found.holds:
        files = " and ".join(name.strip("_") for name in found.proofs)
        samples = max(proof.literal.samples for proof in found.proofs.values())
        print(f"\nProven on {samples} samples against plan.json: {files}.")


def _verdict(found: Verified, folder: Path) -> int:
    """The exit status; what breaks a rule is said on standard error."""
    sys.stdout.flush()
    for line in found.broken:
        print(f"bitwright: not proven: {folder}: {line}. {_REMEDY}", file=sys.stderr)
    return 0 if found.holds else 1
