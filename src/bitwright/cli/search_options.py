"""The flags of verbs that search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from bitwright.flow.settings import Settings

_DEFAULT = Settings()
_SEARCH = "Search"

Evaluate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:NAME",
        help="Function of a model, called like the float network, that returns a number; more is better.",
        rich_help_panel=_SEARCH,
    ),
]

SaveState = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File that an interrupted search is resumed from. Default: a file in the output folder.",
        rich_help_panel=_SEARCH,
    ),
]


@dataclass(frozen=True)
class SearchFlags:
    """How the network's outputs are compared, and what the search may try."""

    expected_cos: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Cosine of the outputs to the float network's to reach.",
            show_default=str(_DEFAULT.expected_cos),
            rich_help_panel=_SEARCH,
        ),
    ] = None
    inference_num: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Samples to compare outputs on; 0: all.", rich_help_panel=_SEARCH
        ),
    ] = _DEFAULT.inference_num
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Threshold methods that the search tries, separated by commas.",
            rich_help_panel=_SEARCH,
        ),
    ] = ",".join(_DEFAULT.methods)
    output_weights: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Weights of several outputs: a=0.3,b=0.7. Default: all equal.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    post_process: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="Class or function applied to the outputs, a dictionary of arrays, before they are compared.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    cosine_scale: Annotated[
        Literal["true", "half"],
        typer.Option(
            help="half: report (1 + cosine) / 2, as one vendor's tools do.", rich_help_panel=_SEARCH
        ),
    ] = _DEFAULT.cosine_scale
    loss: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.py:NAME",
            help="Loss that ranks operators: cosine, mse, sqnr, kl, or a differentiable function (output, float output) -> "
            "one number per sample.",
            rich_help_panel=_SEARCH,
        ),
    ] = "cosine"
    probes: Annotated[
        int,
        typer.Option(
            metavar="K",
            min=1,
            help="Random probes of the error sketch, for each output.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.probes
    verify: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Most sensitive operators that sketch+verify measures exactly, with the network's first 4.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.verify
    operators: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERNS",
            help="Rank only these operators: names separated by commas, * and ? are wildcards.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    precisions: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Precisions that the joint search may give: w4a8, int8, int16, float, as far as the target allows.",
            rich_help_panel=_SEARCH,
        ),
    ] = ",".join(_DEFAULT.precisions)
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT=X",
            help="What mixed precision may cost: ops=5, or a share of the network: macs=0.1, bytes=0.1, latency=0.1.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    workers: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Processes for exact measurements.", rich_help_panel=_SEARCH),
    ] = _DEFAULT.workers
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster for exact measurements, such as auto, local or ray://host:10001.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    save_state: SaveState = None
