"""The flags that verbs have in common, and their way into `Settings`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from bitwright.data.images import ImageOptions
from bitwright.data.parse import parse_dtype, parse_floats, parse_named_shapes, parse_shape, parse_size
from bitwright.errors import DataError
from bitwright.flow.model_source import import_object
from bitwright.flow.settings import Settings
from bitwright.search.similarity import PostProcess

_DEFAULT = Settings()
_DATA, _PICTURES, _QUANTIZING, _SEARCH, _RESULTS = (
    "Data",
    "Pictures and raw files",
    "Quantizing",
    "Search",
    "Results",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An ONNX file, or file.py:function or module:function that returns (torch module, example inputs).",
        show_default=False,
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
            help="Threshold method: max, min_max, percentile, kl, mse, aciq, octav; a parameter as in percentile(99.9).",
            rich_help_panel=_QUANTIZING,
        ),
    ] = _DEFAULT.method


@dataclass(frozen=True)
class SearchFlags:
    """How the network's outputs are compared, and what the search may try."""

    expected_cos: Annotated[
        float,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Cosine of the outputs to the float network's to reach.",
            rich_help_panel=_SEARCH,
        ),
    ] = _DEFAULT.expected_cos
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
    save_state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File that an interrupted search is resumed from. Default: a file in the output folder.",
            rich_help_panel=_SEARCH,
        ),
    ] = None


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


def settings_of(
    data: DataFlags,
    quantize: QuantizeFlags,
    search: SearchFlags | None = None,
    *,
    max_float_ops: int | None = None,
) -> Settings:
    """The settings that the flags ask for. *raises* the error of the first flag that cannot be read."""
    search = search or SearchFlags()
    post_process, source = _post_process(search.post_process)
    return Settings(
        target=quantize.target,
        method=quantize.method,
        methods=_names(search.methods),
        expected_cos=search.expected_cos,
        input_num=data.input_num,
        inference_num=search.inference_num,
        max_float_ops=max_float_ops,
        seed=data.seed,
        device=data.device,
        labels=data.labels,
        calibration_data=data.calibration_data,
        input_shapes=parse_named_shapes(data.input_shape or ()),
        image=_image(data),
        bin_shape=None if data.bin_shape is None else parse_shape(data.bin_shape),
        bin_dtype=_checked_dtype(data.bin_dtype),
        output_weights=_weights(search.output_weights),
        post_process=post_process,
        post_process_source=source,
        cosine_scale=search.cosine_scale,
        save_state=search.save_state,
    )


def _image(data: DataFlags) -> ImageOptions:
    return ImageOptions(
        resize=None if data.resize is None else parse_size(data.resize, where="--resize"),
        crop=None if data.crop is None else parse_size(data.crop, where="--crop"),
        mean=parse_floats(data.mean, where="--mean"),
        scale=parse_floats(data.scale, where="--scale"),
        pixel_format=data.pixel_format,
        layout=data.layout,
    )


def _checked_dtype(text: str | None) -> str | None:
    if text is not None:
        parse_dtype(text)
    return text


def _names(text: str) -> tuple[str, ...]:
    """`max,kl` as names; each once."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise DataError(
            "--methods",
            expected="threshold methods separated by commas",
            found=repr(text),
            remedy="Example: --methods max,percentile,kl.",
        )
    return names


def _weights(text: str | None) -> dict[str, float]:
    """`a=0.3,b=0.7` as numbers by output. An output's name may hold `=`; the last one counts."""
    weights: dict[str, float] = {}
    for part in [] if text is None else text.split(","):
        name, _, number = part.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not 0 <= weight < float("inf") or name in weights:
            raise DataError(
                "--output-weights",
                expected="output=weight pairs separated by commas, each output once, no weight below 0",
                found=repr(part),
                remedy="Example: --output-weights boxes=0.3,scores=0.7.",
            )
        weights[name] = weight
    return weights


def _post_process(spec: str | None) -> tuple[PostProcess | None, str]:
    """The callable named by *spec*, and the text that it came from."""
    if spec is None:
        return None, ""
    spec = f"{spec}:PostProcess" if spec.endswith(".py") else spec
    found = import_object(spec, "--post-process")
    if isinstance(found, type):
        try:
            found = found()
        except Exception as e:
            raise DataError(
                f"--post-process {spec}",
                expected="a class that needs no arguments",
                found=f"{type(e).__name__}: {e}",
                remedy="Give its constructor's parameters defaults.",
            ) from e
    if not callable(found):
        raise DataError(
            f"--post-process {spec}",
            expected="a function, or a class with __call__, of a dictionary of arrays",
            found=type(found).__name__,
            remedy="Add def __call__(self, outputs).",
        )
    path = Path(spec.rpartition(":")[0])
    source = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
    return found, f"{spec}\n{source}"


def _name(place: str) -> str:
    """The name for files of a model or target: the stem of a file, else what stands behind the colon."""
    before, _, behind = place.rpartition(":")
    return behind if before and behind.isidentifier() else Path(place).stem or place
