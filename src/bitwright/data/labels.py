"""Labels: class numbers of samples, from a text file, an array file, or an array that came with the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitwright.data.arrays import read_npy
from bitwright.errors import DataError

# A name may contain spaces and digits, so the label is the last number of the line; a comment may follow it.
_NAMED = re.compile(r"(?P<name>\S|\S.*?\S)\s+(?P<label>\d+)\s*(?:#.*)?")
_PLAIN = re.compile(r"(?P<label>\d+)\s*(?:#.*)?")


def read_named_labels(path: Path, names: Sequence[str]) -> Tensor:
    """Labels from lines `file label`; a file is named by its path in the folder or by its last part alone.

    *names*: paths of the samples relative to their folder, with `/`. *returns* `[n]` int64, in that order.
    *raises* `DataError` naming the line that is not understood, names no file, or repeats one; and listing
    the files without a line.
    """
    positions = _positions(names)
    labels: dict[int, int] = {}
    lines: dict[int, int] = {}
    for number, text in _lines(path):
        where = f"{path}, line {number}"
        match = _NAMED.fullmatch(text)
        if match is None:
            raise _bad_line(where, "a file name and a label, an integer >= 0", text)
        found = positions.get(match["name"].replace("\\", "/").removeprefix("./"), [])
        if len(found) != 1:
            raise DataError(
                where,
                expected="a file of the data folder",
                found=repr(match["name"]) + (f", which is the name of {len(found)} files" if found else ""),
                remedy="Write the path relative to the folder." if found else "Correct or remove this line.",
            )
        index = found[0]
        if index in labels:
            raise DataError(
                where,
                expected="one label for each file",
                found=f"{match['name']!r} again, first in line {lines[index]}",
                remedy="Keep one of the two lines.",
            )
        labels[index], lines[index] = int(match["label"]), number
    missing = [name for i, name in enumerate(names) if i not in labels]
    if missing:
        raise DataError(
            str(path),
            expected=f"a label for each of {len(names)} files",
            found=f"{len(missing)} without: {', '.join(missing[:10])}{' …' if len(missing) > 10 else ''}",
            remedy="Add the missing lines, or move these files elsewhere.",
        )
    return torch.tensor([labels[i] for i in range(len(names))], dtype=torch.int64)


def read_row_labels(path: Path, n: int) -> Tensor:
    """Labels of *n* numbered samples: one integer per line, or an `.npy` file `[n]`. *returns* `[n]` int64."""
    if path.suffix.lower() == ".npy":
        return as_labels(read_npy(path), n, where=str(path))
    labels = []
    for number, text in _lines(path):
        match = _PLAIN.fullmatch(text)
        if match is None:
            raise _bad_line(f"{path}, line {number}", "one label, an integer >= 0", text)
        labels.append(int(match["label"]))
    return as_labels(labels, n, where=str(path))


def as_labels(values: object, n: int, *, where: str) -> Tensor:
    """*values*: integers >= 0, a number (n = 1), `[n]` or `[n, 1]`. *returns* `[n]` int64."""
    try:
        x = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError) as error:
        raise _bad_labels(where, n, found=str(error)) from error
    if x.ndim == 0 or (x.ndim == 2 and x.shape[1] == 1):
        x = x.reshape(-1)
    if x.shape != (n,):
        raise _bad_labels(where, n, found=f"{len(x)} labels" if x.ndim == 1 else f"an array {list(x.shape)}")
    if x.dtype.kind not in "iu":
        raise _bad_labels(where, n, found=f"dtype {x.dtype}")
    if x.min() < 0:
        raise _bad_labels(where, n, found=f"the label {int(x.min())} of sample {int(x.argmin())}")
    return torch.from_numpy(x.astype(np.int64))


def _positions(names: Sequence[str]) -> dict[str, list[int]]:
    """Where each spelling of a name points: full relative paths first, then last parts that are not paths."""
    positions: dict[str, list[int]] = {name: [i] for i, name in enumerate(names)}
    full = set(positions)
    for i, name in enumerate(names):
        last = name.rpartition("/")[2]
        if last not in full:
            positions.setdefault(last, []).append(i)
    return positions


def _lines(path: Path) -> list[tuple[int, str]]:
    """The numbered lines of a text file, without empty lines and comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            str(path), expected="a readable text file of labels", found=str(error), remedy="Check the file."
        ) from error
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def _bad_line(where: str, expected: str, text: str) -> DataError:
    return DataError(where, expected=expected, found=repr(text), remedy="Correct this line.")


def _bad_labels(where: str, n: int, *, found: str) -> DataError:
    return DataError(
        where,
        expected=f"{n} label(s), integers >= 0",
        found=found,
        remedy="Give one class number per sample, in the order of the samples.",
    )
