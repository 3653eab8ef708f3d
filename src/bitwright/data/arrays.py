"""Array files: `.npy`, `.npz` and raw `.bin`. Data is mapped from the file, not read into memory."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from bitwright.data.dataset import InputInfo
from bitwright.errors import DataError

_UNREADABLE = (OSError, ValueError, EOFError, KeyError, struct.error, zipfile.BadZipFile, NotImplementedError)


@dataclass(frozen=True)
class RawOptions:
    """How a `.bin` file is read; what is None is taken from the model's input.

    *shape*: of one sample, with or without a batch axis of 1. *dtype*: of the stored numbers.
    """

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.shape is not None and any(n < 1 for n in self.shape):
            raise DataError(
                "--bin-shape",
                expected="axes of at least 1",
                found=str(list(self.shape)),
                remedy="Example: --bin-shape 3,224,224.",
            )


def read_npy(path: Path) -> NDArray[Any]:
    """The array of an `.npy` file, mapped read-only."""
    try:
        with path.open("rb") as file:
            if file.read(6) != npy.MAGIC_PREFIX:
                raise ValueError("a file that does not begin like .npy")
        # mypy: np.load returns Any; mmap cannot map an array without elements, so those are read.
        return np.asarray(np.load(path, mmap_mode="r" if _has_elements(path) else None, allow_pickle=False))
    except _UNREADABLE as error:
        raise _unreadable(path, ".npy file of numbers", error) from error


def read_npz(path: Path, *, only: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file by key: mapped if stored plainly (np.savez), else read into memory.

    *only*: keys to read, where present; None: all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            keys = [key for key in members if only is None or key in only]
            return {key: _read_member(archive, path, members[key]) for key in keys}
    except _UNREADABLE as error:
        raise _unreadable(path, ".npz file of arrays of numbers", error) from error


def read_bin(path: Path, info: InputInfo, options: RawOptions) -> NDArray[Any]:
    """The samples of a raw little-endian file (`numpy.tofile`): `[n, *sample]`, mapped read-only."""
    shape = _raw_shape(path, info, options)
    dtype = _raw_dtype(path, options.dtype or info.dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    try:
        found = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, ".bin file", error) from error
    if found == 0 or found % size:
        raise DataError(
            str(path),
            expected=f"a multiple of {size} bytes, the size of one sample {list(shape)} of {dtype.name}",
            found=f"{found} bytes",
            remedy="State the layout of the file with --bin-shape and --bin-dtype.",
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(found // size, *shape))


def one_input(inputs: Mapping[str, InputInfo], where: str, *, kind: str) -> InputInfo:
    """The only input of the model. *raises* `DataError` if there are more: *kind* of data cannot name them."""
    if len(inputs) != 1:
        raise DataError(
            where,
            expected=f"a model with one input for {kind}",
            found=f"{len(inputs)} inputs: {', '.join(inputs)}",
            remedy="Give .npz files, whose keys are the input names, or a loader function.",
        )
    return next(iter(inputs.values()))


def _has_elements(path: Path) -> bool:
    with path.open("rb") as file:
        shape, _, _ = _read_header(file)
    return 0 not in shape


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype from the head of an `.npy` stream; leaves *file* at the first element."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    return shape, fortran, dtype


def _read_member(archive: zipfile.ZipFile, path: Path, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        if member.compress_type != zipfile.ZIP_STORED:
            return np.asarray(npy.read_array(file, allow_pickle=False))
        shape, fortran, dtype = _read_header(file)
        head = file.tell()
    if 0 in shape:
        return np.empty(shape, dtype)
    with path.open("rb") as raw:
        # The central directory does not tell where the data begins: the local header has its own extra field
        # (PKWARE APPNOTE 4.3.7: 30 fixed bytes, the last four are the lengths of name and extra field).
        raw.seek(member.header_offset)
        name, extra = struct.unpack("<HH", raw.read(30)[26:])
    offset = member.header_offset + 30 + name + extra + head
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def _raw_shape(path: Path, info: InputInfo, options: RawOptions) -> tuple[int, ...]:
    want = info.sample_shape
    shape = options.shape
    if shape is None:
        if None in want:
            raise DataError(
                str(path),
                expected="the shape of one sample",
                found=f"input {info.name!r} of shape {['?' if d is None else d for d in info.shape]}",
                remedy="State it with --bin-shape, e.g. --bin-shape 3,224,224.",
            )
        return tuple(d for d in want if d is not None)
    # With its batch axis of 1 the shape reads like the input's own; the axis is dropped, rows are counted.
    return shape[1:] if info.is_batched and len(shape) == len(want) + 1 and shape[0] == 1 else shape


def _raw_dtype(path: Path, dtype: torch.dtype) -> np.dtype[Any]:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype.newbyteorder("<")
    except TypeError as error:
        raise DataError(
            str(path),
            expected="a dtype that raw files can hold",
            found=str(dtype),
            remedy="State the dtype of the file with --bin-dtype, e.g. --bin-dtype float32.",
        ) from error


def _unreadable(path: Path, expected: str, error: Exception) -> DataError:
    return DataError(
        str(path),
        expected=f"a readable {expected}",
        found=str(error) or type(error).__name__,
        remedy="Write the file again, or remove it.",
    )
