"""Pictures: decoding, resizing, cropping, normalising, and folders of them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitwright.data import ImageOptions, InputInfo, open_data
from bitwright.errors import DataError


def _inputs(*shape: int | None, dtype: torch.dtype = torch.float32) -> dict[str, InputInfo]:
    return {"x": InputInfo("x", shape, dtype)}


def _save(path: Path, x: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(x, np.uint8)).save(path, **options)
    return path


def _coordinates(h: int, w: int) -> Any:
    """`[h, w, 3]`: red = row, green = column, blue = 200."""
    rows, columns = np.mgrid[:h, :w]
    return np.stack([rows, columns, np.full((h, w), 200)], axis=2).astype(np.uint8)


def _open(source: Path, inputs: dict[str, InputInfo], **options: Any) -> Any:
    return open_data(source, inputs, image=ImageOptions(**options))


def test_a_folder_of_pictures_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, level in [("b.png", 2), ("a.bmp", 1), ("sub/c.PNG", 3), ("sub/deeper/d.webp", 4)]:
        _save(tmp_path / name, np.full((4, 4, 3), level), **({"lossless": True} if "webp" in name else {}))
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / ".hidden.png").write_text("not a picture")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "e.png").write_text("not a picture")
    data = _open(tmp_path, _inputs(1, 3, 4, 4))

    assert data.names == ("a.bmp", "b.png", "sub/c.PNG", "sub/deeper/d.webp")
    assert data.labels is None
    assert [float(sample["x"].mean()) for sample in data] == [1, 2, 3, 4]
    assert {(sample["x"].shape, sample["x"].dtype) for sample in data} == {((1, 3, 4, 4), torch.float32)}


def test_one_picture_is_one_sample(tmp_path: Path) -> None:
    data = _open(_save(tmp_path / "a.png", _coordinates(3, 5)), _inputs(None, 3, 3, 5))

    assert data.names == ("a.png",)
    assert data[0]["x"][0, 1, 2].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("pixel_format", "layout", "shape", "expected"),
    [
        ("rgb", "nchw", (1, 3, 1, 1), [10.0, 20.0, 200.0]),
        ("bgr", "nchw", (1, 3, 1, 1), [200.0, 20.0, 10.0]),
        ("rgb", "nhwc", (1, 1, 1, 3), [10.0, 20.0, 200.0]),
        ("bgr", "nhwc", (1, 1, 1, 3), [200.0, 20.0, 10.0]),
        ("gray", "nchw", (1, 1, 1, 1), [38.0]),  # 0.299 R + 0.587 G + 0.114 B = 37.53
        ("gray", "nhwc", (1, 1, 1, 1), [38.0]),
    ],
)
def test_pixel_format_and_layout(
    tmp_path: Path, pixel_format: str, layout: str, shape: tuple[int, ...], expected: list[float]
) -> None:
    path = _save(tmp_path / "a.png", [[[10, 20, 200]]])
    data = _open(path, _inputs(*shape), pixel_format=pixel_format, layout=layout)

    assert data[0]["x"].shape == shape
    assert data[0]["x"].flatten().tolist() == expected


def test_mean_and_scale_follow_the_pixel_format(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", [[[10, 20, 200]]])

    rgb = _open(path, _inputs(1, 3, 1, 1), mean=(1.0, 2.0, 3.0), scale=(0.5, 0.25, 2.0))[0]["x"]
    assert rgb.flatten().tolist() == [4.5, 4.5, 394.0]
    bgr = _open(path, _inputs(1, 3, 1, 1), pixel_format="bgr", mean=(1.0, 2.0, 3.0), scale=(0.5,))[0]["x"]
    assert bgr.flatten().tolist() == [99.5, 9.0, 3.5]


def test_a_crop_is_taken_from_the_centre(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", _coordinates(10, 20))

    x = _open(path, _inputs(1, 3, 4, 6), crop=(4, 6))[0]["x"]
    assert x[0, 0, :, 0].tolist() == [3, 4, 5, 6]
    assert x[0, 1, 0].tolist() == [7, 8, 9, 10, 11, 12]
    square = _open(path, _inputs(1, 3, 2, 2), crop=2)[0]["x"]
    assert square[0, :2, 0, 0].tolist() == [4, 9]


def test_a_resize_to_the_size_that_is_there_changes_no_bit(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", _coordinates(8, 12))
    plain = _open(path, _inputs(1, 3, 8, 12))[0]["x"]

    assert torch.equal(_open(path, _inputs(1, 3, 8, 12), resize=8)[0]["x"], plain)
    assert torch.equal(_open(path, _inputs(1, 3, 8, 12), resize=(8, 12))[0]["x"], plain)


@pytest.mark.parametrize(
    ("size", "resize", "goal"),
    [
        ((10, 21), 5, (5, 10)),  # 10.5 is rounded down
        ((21, 10), 5, (10, 5)),
        ((7, 7), 14, (14, 14)),
        ((10, 21), (3, 4), (3, 4)),
    ],
)
def test_resize_sets_the_short_side_or_exactly_both(
    tmp_path: Path, size: tuple[int, int], resize: Any, goal: tuple[int, int]
) -> None:
    path = _save(tmp_path / "a.png", _coordinates(*size))

    assert _open(path, _inputs(1, 3, None, None), resize=resize)[0]["x"].shape[2:] == goal


def test_resize_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3))
    stripes[:, ::2] = 255
    path = _save(tmp_path / "a.png", stripes)

    x = _open(path, _inputs(1, 3, 8, 8), resize=8)[0]["x"]
    assert float((x - 127.5).abs().max()) < 16  # without antialiasing every pixel would be 0 or 255


def test_a_picture_is_turned_upright_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it rotated 90 degrees clockwise
    path = _save(tmp_path / "a.png", _coordinates(2, 3), exif=exif)

    x = _open(path, _inputs(1, 3, 3, 2))[0]["x"]
    assert x[0, 0].tolist() == [[1, 0], [1, 0], [1, 0]]
    assert x[0, 1].tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_pictures_of_any_8_bit_mode_are_read(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{suffix}")

    assert _open(tmp_path, _inputs(1, 3, 4, 4))[0]["x"].unique().tolist() == [255]


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([0, 0, 0, 9, 8, 7])
    picture.save(tmp_path / "a.png", transparency=b"\x00\x80")

    assert _open(tmp_path, _inputs(1, 3, 2, 2))[0]["x"][0, :, 0, 0].tolist() == [9, 8, 7]


def test_a_picture_of_16_bits_is_refused_instead_of_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")

    with pytest.raises(DataError, match=r"deep.png: expected a readable 8-bit picture; .*more than 8 bits"):
        _open(tmp_path, _inputs(1, 3, 4, 4))[0]


def test_an_integer_input_takes_grey_levels_as_they_are(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", [[[10, 20, 200]]])

    x = _open(path, _inputs(1, 3, 1, 1, dtype=torch.uint8))[0]["x"]
    assert (x.dtype, x.flatten().tolist()) == (torch.uint8, [10, 20, 200])
    with pytest.raises(DataError, match="Leave out --mean and --scale"):
        _open(path, _inputs(1, 3, 1, 1, dtype=torch.uint8), mean=(1.0,))
    with pytest.raises(DataError, match=r"int8 values in -128 … 127; found 10 … 200"):
        _open(path, _inputs(1, 3, 1, 1, dtype=torch.int8))[0]


def test_a_damaged_picture_among_good_ones_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.png"):
        _save(tmp_path / name, noise)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:1500])
    (tmp_path / "c.jpg").write_text("this is not a picture")
    (tmp_path / "d.png").write_bytes((tmp_path / "d.png").read_bytes()[:1500])
    (tmp_path / "e.png").write_bytes(b"")
    data = _open(tmp_path, _inputs(1, 3, 64, 64))

    assert data[0]["x"].shape == (1, 3, 64, 64)
    for i in range(1, 5):
        with pytest.raises(DataError, match=rf"{data.names[i]}: expected a readable .*Remove this file"):
            data[i]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (1, 3, 224, 224),
            {},
            r"a.png, input 'x': expected \[3, 224, 224\] \(chw\); found \[3, 30, 40\] from a picture of 40x30 "
            r"pixels\. Add --resize 256 --crop 224 \(or --resize 224,224\)",
        ),
        ((1, 3, 32, 32), {}, r"Add --resize 32,32\."),
        ((1, 3, 240, 320), {"resize": 300}, r"found \[3, 300, 400\].*Add --resize 240,320\."),
        ((1, 3, 224, None), {}, r"with --resize and --crop\."),
        ((1, 1, 30, 40), {}, r"--pixel-format gray"),
        ((1, 3, 30, 40), {"pixel_format": "gray"}, r"--pixel-format rgb"),
        ((1, 30, 40, 3), {}, r"--layout nhwc"),
        ((1, 3, 30, 40), {"layout": "nhwc"}, r"\(hwc\).*--layout nchw"),
        ((1, 8, 30, 40), {}, r"1 or 3 channels, not 8"),
        ((1, 3, 64, 64), {"crop": 64}, r"at least 64x64 pixels for --crop 64; found 40x30\. Resize first"),
    ],
)
def test_a_picture_of_the_wrong_shape_tells_the_flag_that_helps(
    tmp_path: Path, shape: tuple[int | None, ...], options: dict[str, Any], message: str
) -> None:
    data = _open(_save(tmp_path / "a.png", _coordinates(30, 40)), _inputs(*shape), **options)

    with pytest.raises(DataError, match=message):
        data[0]


@pytest.mark.parametrize("shape", [(1, 10), (4, 3, 8, 8), (1, 3, 8), ()])
def test_an_input_that_takes_no_pictures_is_told_when_opening(tmp_path: Path, shape: tuple[int, ...]) -> None:
    _save(tmp_path / "a.png", _coordinates(8, 8))

    with pytest.raises(DataError, match=r"an input \[1, channels, height, width\] for pictures"):
        _open(tmp_path, _inputs(*shape))


def test_pictures_cannot_feed_two_inputs(tmp_path: Path) -> None:
    _save(tmp_path / "a.png", _coordinates(8, 8))
    inputs = {name: InputInfo(name, (1, 3, 8, 8), torch.float32) for name in ("left", "right")}

    with pytest.raises(DataError, match=r"one input for picture files; found 2 inputs: left, right"):
        open_data(tmp_path, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (1.0, 2.0)}, r"--mean: expected one finite number, or 3 for rgb; found 2"),
        ({"scale": (1.0, 2.0, 3.0), "pixel_format": "gray"}, r"--scale: expected one finite number; found 3"),
        ({"mean": (float("nan"),)}, r"--mean"),
        ({"pixel_format": "yuv"}, r"--pixel-format: expected rgb or bgr or gray; found 'yuv'"),
        ({"layout": "chw"}, r"--layout: expected nchw or nhwc"),
        ({"resize": 0}, r"--resize: expected a size of at least 1 pixel"),
        ({"crop": (4, -1)}, r"--crop: expected a size of at least 1 pixel"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageOptions(**options)


def test_labels_txt_in_the_folder_is_used(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        _save(tmp_path / name, _coordinates(2, 2))
    (tmp_path / "labels.txt").write_text("b.png 7\na.png 5\n")
    data = _open(tmp_path, _inputs(1, 3, 2, 2))

    assert data.labels.tolist() == [5, 7]
    assert data.subset([1]).labels.tolist() == [7]


def test_a_given_label_file_replaces_labels_txt(tmp_path: Path) -> None:
    _save(tmp_path / "d" / "a.png", _coordinates(2, 2))
    (tmp_path / "d" / "labels.txt").write_text("a.png 5\n")
    (tmp_path / "other.txt").write_text("a.png 6\n")

    data = open_data(tmp_path / "d", _inputs(1, 3, 2, 2), labels=tmp_path / "other.txt")
    assert data.labels is not None
    assert data.labels.tolist() == [6]


def test_pictures_without_label_in_a_labelled_folder_are_listed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        _save(tmp_path / name, _coordinates(2, 2))
    (tmp_path / "labels.txt").write_text("b.png 7\n")

    with pytest.raises(
        DataError, match=r"labels.txt: expected a label for each of 3 files; found 2 without: a.png, c.png"
    ):
        _open(tmp_path, _inputs(1, 3, 2, 2))


def _shared(name: str) -> Path:
    root = Path(os.environ.get("BITWRIGHT_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = root / "data" / name
    if not path.exists():
        pytest.skip(f"development data {name} is not here: set BITWRIGHT_DATA")
    return path


@pytest.mark.shared
@pytest.mark.parametrize("resize", [256, None])
def test_imagenet_pictures_are_prepared_as_the_models_were_trained(
    tmp_path: Path, resize: int | None
) -> None:
    packed = np.load(_shared("imagenet_sample_even500.npz"))
    offsets, labels = packed["offsets"], packed["labels"]
    blob = packed["jpeg"][: offsets[6]].tobytes()
    expected = []
    for i in range(6):
        jpeg = blob[offsets[i] : offsets[i + 1]]
        (tmp_path / f"{i}.jpg").write_bytes(jpeg)
        x = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))[16:240, 16:240] / 255
        expected.append(((x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1))
    (tmp_path / "labels.txt").write_text("".join(f"{i}.jpg {labels[i]}\n" for i in range(6)))
    mean, scale = (123.675, 116.28, 103.53), (0.01712475, 0.017507, 0.01742919)
    data = _open(tmp_path, _inputs(None, 3, 224, 224), resize=resize, crop=224, mean=mean, scale=scale)

    assert data.labels.tolist() == labels[:6].tolist()
    (batch,) = data.batches(6)
    error = float((batch["x"] - torch.from_numpy(np.stack(expected))).abs().max())
    assert error < 1e-6 * 2.7  # the printed scales have 7 digits; |y| < 2.7
