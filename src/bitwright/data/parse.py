"""The values of data flags: `123.675,116.28,103.53`, `256`, `256x320`, `3,224,224`, `float32`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from bitwright.errors import DataError, UnknownName

_FLOATS = (torch.float16, torch.float32, torch.float64)
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_FLOATS, *_SIGNED, *_UNSIGNED)}


def parse_floats(text: str, *, where: str = "--mean") -> tuple[float, ...]:
    """`"123.675,116.28,103.53"` as numbers. *raises* `DataError` if one is not a finite number."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise DataError(
            where,
            expected="finite numbers separated by commas",
            found=repr(text),
            remedy=f"Example: {where} 123.675,116.28,103.53.",
        )
    return numbers


def parse_size(text: str, *, where: str = "--resize") -> int | tuple[int, int]:
    """`"256"` as 256; `"256,320"` or `"256x320"` as (256, 320), height first. All >= 1 pixel."""
    match = re.fullmatch(r"\s*([1-9]\d*)\s*(?:[,xX]\s*([1-9]\d*)\s*)?", text, re.ASCII)
    if match is None:
        raise DataError(
            where,
            expected="a size in pixels, or height,width",
            found=repr(text),
            remedy=f"Examples: {where} 256, {where} 256,320.",
        )
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def parse_shape(text: str, *, where: str = "--bin-shape") -> tuple[int, ...]:
    """`"3,224,224"` or `"3x224x224"` as a shape; every axis >= 1."""
    parts = re.split(r"\s*[,xX]\s*", text.strip())
    if not all(re.fullmatch(r"[1-9]\d*", part, re.ASCII) for part in parts):
        raise DataError(
            where,
            expected="lengths of axes, integers >= 1, separated by commas",
            found=repr(text),
            remedy=f"Example: {where} 3,224,224.",
        )
    return tuple(map(int, parts))


def parse_named_shapes(texts: Sequence[str], *, where: str = "--input-shape") -> dict[str, tuple[int, ...]]:
    """`["x=1,3,320,320"]` as shapes by input; -1 may stand first. A name may hold `=`; the last one counts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, shape = (part.strip() for part in text.rpartition("="))
        fits = re.fullmatch(r"(-1|[1-9]\d*)(\s*,\s*[1-9]\d*)*", shape, re.ASCII)
        if not name or name in shapes or not fits:
            raise DataError(
                where,
                expected="input=shape, each input once, lengths of axes >= 1, or -1 first for any batch",
                found=repr(text),
                remedy=f"Example: {where} images=-1,3,320,320.",
            )
        shapes[name] = tuple(map(int, shape.split(",")))
    return shapes


def parse_dtype(text: str, *, where: str = "--bin-dtype") -> torch.dtype:
    """`"float32"` as `torch.float32`. *raises* `UnknownName`."""
    if text not in _DTYPES:
        raise UnknownName(where, kind="dtype", name=text, known=_DTYPES)
    return _DTYPES[text]
