"""The values of data flags."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.data import parse_dtype, parse_floats, parse_shape, parse_size
from bitwright.data.parse import parse_named_shapes
from bitwright.errors import DataError, UnknownName


def test_floats_are_separated_by_commas() -> None:
    assert parse_floats("123.675,116.28,103.53") == (123.675, 116.28, 103.53)
    assert parse_floats(" 0.5 , -1e-3") == (0.5, -0.001)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_printed_floats_are_read_back_exactly(values: list[float]) -> None:
    assert parse_floats(",".join(map(repr, values))) == tuple(values)


@pytest.mark.parametrize("text", ["", "1,", "1;2", "nan", "1,inf", "a"])
def test_anything_else_than_finite_floats_is_refused_with_the_flag_named(text: str) -> None:
    with pytest.raises(DataError, match=r"--scale: expected finite numbers.*Example: --scale"):
        parse_floats(text, where="--scale")


@pytest.mark.parametrize(
    ("text", "size"),
    [("256", 256), ("256,320", (256, 320)), ("256x320", (256, 320)), (" 7 X 9 ", (7, 9))],
)
def test_a_size_is_one_number_or_height_and_width(text: str, size: int | tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "256,", "1,2,3", "2.5", "256,0", "x", "a,b"])
def test_anything_else_than_a_size_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"--crop: expected a size in pixels"):
        parse_size(text, where="--crop")


def test_a_shape_takes_any_number_of_axes() -> None:
    assert parse_shape("3,224,224") == parse_shape("3x224x224") == (3, 224, 224)
    assert parse_shape("16000") == (16000,)


@pytest.mark.parametrize("text", ["", "3,", "3,0", "3,-1", "1.0", "a"])
def test_anything_else_than_a_shape_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"--bin-shape: expected lengths of axes"):
        parse_shape(text)


def test_a_dtype_has_its_torch_name() -> None:
    assert parse_dtype("float32") is torch.float32
    assert parse_dtype("uint8") is torch.uint8
    with pytest.raises(UnknownName, match="Did you mean 'float32'"):
        parse_dtype("flaot32")


def test_named_shapes_are_read_by_input() -> None:
    assert parse_named_shapes(["x=-1,3,8,8", "a=b=1,5"]) == {"x": (-1, 3, 8, 8), "a=b": (1, 5)}


@pytest.mark.parametrize("text", ["x", "=1,2", "x=", "x=0,2", "x=1,-1", "x=1,a"])
def test_a_wrong_named_shape_shows_an_example(text: str) -> None:
    with pytest.raises(DataError, match="images=-1,3,320,320"):
        parse_named_shapes([text])
