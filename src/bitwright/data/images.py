"""Pictures: decode, resize, crop, and `y = (x - mean) * scale` on 0..255."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bitwright.data.dataset import InputInfo
from bitwright.data.sample import show_shape
from bitwright.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
OTHER_IMAGE_SUFFIXES = frozenset({".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".ppm", ".pgm"})

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# Modes with more than 8 bits per channel: PIL's conversion to 8 bits clips them without a word.
_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class ImageOptions:
    """How a picture becomes an input.

    *resize*: pixels of the short side, keeping the aspect ratio, or exactly (height, width). *crop*: of the
    centre, a square or (height, width). *mean*, *scale*: one number or one per channel, in the order of
    *pixel_format*; mean on the scale of 0..255, scale in real units per grey level.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)
    pixel_format: Literal["rgb", "bgr", "gray"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"

    def __post_init__(self) -> None:
        _check_choice("--pixel-format", self.pixel_format, ("rgb", "bgr", "gray"))
        _check_choice("--layout", self.layout, ("nchw", "nhwc"))
        for flag, values in (("--mean", self.mean), ("--scale", self.scale)):
            if len(values) not in (1, self.channels) or not np.isfinite(values).all():
                raise DataError(
                    flag,
                    expected="one finite number"
                    + (f", or {self.channels} for {self.pixel_format}" if self.channels > 1 else ""),
                    found=f"{len(values)}: {', '.join(map(str, values))}",
                    remedy=f"Example: {flag} 0.5"
                    + (", or one number per channel: 1,2,3." if self.channels > 1 else "."),
                )
        for flag, size in (("--resize", self.resize), ("--crop", self.crop)):
            if size is not None and min(_pair(size)) < 1:
                raise DataError(
                    flag,
                    expected="a size of at least 1 pixel",
                    found=str(size),
                    remedy=f"Example: {flag} 224.",
                )

    @property
    def channels(self) -> int:
        return 1 if self.pixel_format == "gray" else 3

    @property
    def is_identity(self) -> bool:
        """Whether grey levels stay as they are; then pictures also fit integer inputs."""
        return not any(self.mean) and all(s == 1.0 for s in self.scale)


def check_picture_input(info: InputInfo, options: ImageOptions, where: str) -> None:
    """*raises* `DataError` unless *info* takes `[1, a, b, c]` of the dtype that *options* lead to."""
    if not info.is_batched or len(info.shape) != 4:
        raise DataError(
            f"{where}, input {info.name!r}",
            expected="an input [1, channels, height, width] for pictures",
            found=f"shape {show_shape(info.shape)}",
            remedy="Give .npy or .npz files, or a loader function; a fixed batch needs an export with batch 1.",
        )
    if not info.dtype.is_floating_point and not options.is_identity:
        raise DataError(
            f"{where}, input {info.name!r}",
            expected="grey levels as they are, for an integer input",
            found="a mean or scale",
            remedy="Leave out --mean and --scale.",
        )


def read_picture(path: Path, info: InputInfo, options: ImageOptions) -> NDArray[Any]:
    """The picture as `[c, h, w]` or `[h, w, c]` float32 (uint8 if mean and scale change nothing).

    *raises* `DataError` if the file cannot be decoded or its shape is not that of the input.
    """
    picture = _decode(path, options)
    size = f"{picture.width}x{picture.height}"
    if options.resize is not None:
        picture = _resize(picture, options.resize)
    if options.crop is not None:
        picture = _crop(picture, options.crop, where=str(path))
    x = _arrange(np.asarray(picture), options)
    if any(w not in (None, n) for w, n in zip(info.sample_shape, x.shape, strict=True)):
        raise _wrong_shape(path, size, x.shape, info, options)
    return x


def _decode(path: Path, options: ImageOptions) -> Image.Image:
    """The upright picture in 8 bits: mode L or RGB."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(_DEEP_MODES):
                raise ValueError(f"{path.name} holds more than 8 bits per channel (mode {image.mode})")
            upright = ImageOps.exif_transpose(image)
            # PIL warns when a palette with transparency loses it at once; by way of RGBA it does not.
            opaque = upright.convert("RGBA") if upright.mode == "P" else upright
            return opaque.convert("L" if options.pixel_format == "gray" else "RGB")
    except _UNREADABLE as error:
        raise DataError(
            str(path),
            expected="a readable 8-bit picture",
            found=str(error) or type(error).__name__,
            remedy="Remove this file from the folder, or save the picture again.",
        ) from error


def _resize(picture: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Bilinear, antialiased as PIL does. The long side is rounded down, like torchvision's Resize."""
    w, h = picture.size
    if isinstance(size, int):
        short = min(w, h)
        goal = (int(w * size / short), size) if h == short else (size, int(h * size / short))
    else:
        goal = (size[1], size[0])
    return picture if goal == (w, h) else picture.resize(goal, Image.Resampling.BILINEAR)


def _crop(picture: Image.Image, size: int | tuple[int, int], *, where: str) -> Image.Image:
    h, w = _pair(size)
    if h > picture.height or w > picture.width:
        raise DataError(
            where,
            expected=f"a picture of at least {w}x{h} pixels for --crop {_show_size(size)}",
            found=f"{picture.width}x{picture.height}",
            remedy=f"Resize first: --resize {max(h, w)}.",
        )
    # round() on ties to even, like torchvision's CenterCrop.
    left, top = round((picture.width - w) / 2), round((picture.height - h) / 2)
    return picture.crop((left, top, left + w, top + h))


def _arrange(x: NDArray[Any], options: ImageOptions) -> NDArray[Any]:
    """*x*: `[h, w]` or `[h, w, 3]` uint8. *returns* channels in the asked order and place, normalised."""
    x = x[:, :, None] if x.ndim == 2 else x
    if options.pixel_format == "bgr":
        x = x[:, :, ::-1]
    if not options.is_identity:
        x = (x.astype(np.float32) - np.asarray(options.mean, np.float32)) * np.asarray(
            options.scale, np.float32
        )
    return x if options.layout == "nhwc" else x.transpose(2, 0, 1)


def _wrong_shape(
    path: Path, size: str, found: tuple[int, ...], info: InputInfo, options: ImageOptions
) -> DataError:
    want = info.sample_shape
    channels, (h, w) = (want[0], want[1:]) if options.layout == "nchw" else (want[2], want[:2])
    if channels not in (None, options.channels):
        other = "nhwc" if options.layout == "nchw" else "nchw"
        if (want[2] if options.layout == "nchw" else want[0]) in (1, 3) and channels not in (1, 3):
            remedy = f"Say where the channels are: --layout {other}."
        elif channels in (1, 3):
            remedy = f"Choose --pixel-format {'gray' if channels == 1 else 'rgb'}."
        else:
            remedy = f"A picture has 1 or 3 channels, not {channels}: use .npy files or a loader function."
    elif h is not None and h == w and h >= 64:
        remedy = f"Add --resize {round(h * 8 / 7)} --crop {h} (or --resize {h},{w})."  # 8/7: 256 for 224
    elif h is not None and w is not None:
        remedy = f"Add --resize {h},{w}."
    else:
        remedy = "Bring the pictures to this size with --resize and --crop."
    return DataError(
        f"{path}, input {info.name!r}",
        expected=f"{show_shape(want)} ({options.layout[1:]})",
        found=f"{show_shape(found)} from a picture of {size} pixels",
        remedy=remedy,
    )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _show_size(size: int | tuple[int, int]) -> str:
    return str(size) if isinstance(size, int) else f"{size[0]},{size[1]}"


def _check_choice(flag: str, found: str, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise DataError(
            flag, expected=" or ".join(choices), found=repr(found), remedy=f"Example: {flag} {choices[0]}."
        )
