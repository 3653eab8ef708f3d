"""The flags that verbs have in common; `cli/settings.py` makes `Settings` of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from bitwright.flow.settings import Export, Settings

_DEFAULT = Settings()
_DATA, _PICTURES, _QUANTIZING, _RESULTS = ("Data", "Pictures and raw files", "Quantizing", "Results")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An ONNX file, or file.py:function or module:function that returns (torch module, example inputs).",
        show_default=False,
    ),
]


ExportFlag = Annotated[
    Export,
    typer.Option(
        help="Which files: with Q/DQ pairs, in integer operators alone, or both.", rich_help_panel=_QUANTIZING
    ),
]


PlanFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A plan.json of this network and target. Default: everything that the target allows, by --method.",
        rich_help_panel=_QUANTIZING,
    ),
]


@dataclass(frozen=True)
class DataFlags:
    """Which samples, and how pictures and raw files become inputs."""

    data: Annotated[
        str,
        typer.Option(
            metavar="PLACE",
            help="Folder of pictures or arrays, a .npy, .npz or .bin file, or module:function.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ]
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File of labels, one 'file label' per line, for top-1 and top-5. Default: labels.txt in the folder.",
            rich_help_panel=_DATA,
        ),
    ] = None
    calibration_data: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Calibrate on these samples. Default: samples of --data.",
            rich_help_panel=_DATA,
        ),
    ] = None
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHAPE",
            help="Shape of an input that the ONNX file leaves open, such as images=-1,3,320,320 (-1: any batch). "
            "May be repeated.",
            rich_help_panel=_DATA,
        ),
    ] = None
    input_num: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Samples to calibrate with; 0: all.", rich_help_panel=_DATA),
    ] = _DEFAULT.input_num
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the choice of samples.", rich_help_panel=_DATA)
    ] = _DEFAULT.seed
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Where torch computes: cpu, cuda, cuda:1, mps.", rich_help_panel=_DATA
        ),
    ] = _DEFAULT.device
    resize: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Pixels of the short side, or height,width.", rich_help_panel=_PICTURES
        ),
    ] = None
    crop: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Crop of the centre: pixels, or height,width.", rich_help_panel=_PICTURES
        ),
    ] = None
    mean: Annotated[
        str,
        typer.Option(
            metavar="X",
            help="Mean, one number or one per channel, on the scale 0..255: y = (x - mean) * scale.",
            rich_help_panel=_PICTURES,
        ),
    ] = "0"
    scale: Annotated[
        str,
        typer.Option(metavar="X", help="Scale, one number or one per channel.", rich_help_panel=_PICTURES),
    ] = "1"
    pixel_format: Annotated[
        Literal["rgb", "bgr", "gray"], typer.Option(help="Order of the channels.", rich_help_panel=_PICTURES)
    ] = "rgb"
    layout: Annotated[
        Literal["nchw", "nhwc"], typer.Option(help="Place of the channels.", rich_help_panel=_PICTURES)
    ] = "nchw"
    bin_shape: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE",
            help="Shape of one sample of a .bin file. Default: the model's.",
            rich_help_panel=_PICTURES,
        ),
    ] = None
    bin_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Numbers of a .bin file, such as float32. Default: the model's.",
            rich_help_panel=_PICTURES,
        ),
    ] = None


@dataclass(frozen=True)
class QuantizeFlags:
    """What to quantize for, and how."""

    target: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Chip or engine (see: bitwright targets), or a YAML file of your own.",
            rich_help_panel=_QUANTIZING,
        ),
    ] = str(_DEFAULT.target)
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Threshold method: max, min_max, percentile, kl, mse, aciq, octav; a parameter as in percentile(99.9). "
            "Of searches also how operators are measured: sketch, exact, sketch+verify. One of each, separated by a comma.",
            rich_help_panel=_QUANTIZING,
        ),
    ] = _DEFAULT.method


@dataclass(frozen=True)
class ResultFlags:
    """Where results go, and what is printed."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for the results. Default: MODEL_TARGET.",
            rich_help_panel=_RESULTS,
        ),
    ] = None
    json: Annotated[
        bool,
        typer.Option("--json", help="Print the summary as JSON, not as tables.", rich_help_panel=_RESULTS),
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=_RESULTS)
    ] = False

    def folder(self, model: str, target: str) -> Path:
        """The output folder: as asked, else named after *model* and *target*."""
        return self.output or Path(f"{_name(model)}_{_name(target)}")


def _name(place: str) -> str:
    """The name for files of a model or target: the stem of a file, else what stands behind the colon."""
    before, _, behind = place.rpartition(":")
    return behind if before and behind.isidentifier() else Path(place).stem or place
