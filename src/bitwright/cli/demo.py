"""`bitwright demo`: the main job on networks and data that come with Bitwright."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bitwright.cli.job import job
from bitwright.cli.printing import print_json
from bitwright.cli.results import print_tuned
from bitwright.cli.signature import flat
from bitwright.flow.demo import DEMO_SETTINGS, run_demo
from bitwright.flow.outputs import summary
from bitwright.flow.settings import Settings

HELP = """Tune two small networks that come with Bitwright, on scikit-learn's handwritten digits.

Shows a real loss at int8 and its repair: a convolutional network with depthwise layers, and a transformer. Needs the extra
`demo` (scikit-learn), no model and no data."""
EXAMPLES = (
    "bitwright demo",
    "bitwright demo --network cnn --target journey6 -o out",
)


@dataclass(frozen=True)
class DemoFlags:
    """What the demo changes; everything else is set for each network."""

    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Chip or engine, or a YAML file.",
            show_default="one that each network suffers on",
        ),
    ] = None
    expected_cos: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="X", help="Cosine to reach.", show_default="set for each network"),
    ] = None
    max_float_ops: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Operators (groups) that may stay float.",
            show_default="set for each network",
        ),
    ] = None

    def settings(self, network: str) -> Settings:
        """The demo's settings for *network*, with what was asked for."""
        return replace(DEMO_SETTINGS[network], **{k: v for k, v in vars(self).items() if v is not None})


@flat
def run(
    flags: DemoFlags,
    network: Annotated[
        Literal["cnn", "transformer", "both"], typer.Option(help="Which network to tune.")
    ] = "both",
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for the results, one folder in it for each network.",
        ),
    ] = Path("bitwright_demo"),
    json: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON, not as tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> int:
    """Tune the chosen networks and print their tables. *returns* 0 if all meet their targets, else 1."""
    status, summaries = 0, dict[str, Any]()
    for name in ("cnn", "transformer") if network == "both" else (network,):
        folder = output / name
        with job(folder, quiet=quiet) as watcher:
            tuned = run_demo(name, folder, flags.settings(name), watcher)
        if json:
            summaries[name] = summary(tuned)
            status = max(status, 0 if tuned.reached else 1)
        else:
            status = max(status, print_tuned(tuned, folder, as_json=False))
    if json:
        print_json(summaries)
    return status
