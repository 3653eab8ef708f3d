"""Samples from Python: arrays, dictionaries of arrays, and iterables of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from bitwright.data.dataset import Dataset, InputInfo, Sample
from bitwright.data.labels import as_labels
from bitwright.data.sample import LABEL_HELP, Array, bind, count, pick
from bitwright.errors import BitwrightError, DataError

MATERIALISED_BYTES = 2 * 1024**3
"""How much an iterable that cannot be indexed may hold: its samples are kept in memory."""


def open_object(
    source: object, inputs: Mapping[str, InputInfo], *, where: str, limit: int = MATERIALISED_BYTES
) -> Dataset:
    """The samples of a Python object.

    * a `Dataset`: itself;
    * a tensor, an array, or a dictionary of arrays: its rows, as in an `.npy` or `.npz` file;
    * a sequence (`len` and `[i]`: a list, a map-style torch dataset): read once here, to count and to take
      the labels, and again sample by sample; an attribute `labels` counts as labels;
    * any other iterable (a generator, a DataLoader): read once and kept in memory, at most *limit* bytes,
      because a second pass may be empty or shuffled.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Tensor | np.ndarray | Mapping):
        arrays, label = bind(source, inputs, where=where)
        n = count(arrays, inputs, where=where)
        return Dataset(
            _numbered(n),
            lambda i: pick(arrays, i, inputs, where=f"{where}, sample {i}"),
            inputs,
            labels=None if label is None else as_labels(label, n, where=where),
            where=where,
        )
    if _is_sequence(source):
        return _open_sequence(source, inputs, where=where)
    if hasattr(source, "__iter__") and not isinstance(source, str | bytes):
        return _materialise(source, inputs, where=where, limit=limit)
    raise DataError(
        where,
        expected="an iterable of samples: tensors, arrays, tuples or dictionaries",
        found=f"a {type(source).__name__}",
        remedy="Return a list, a generator, or a dataset with len() and [i].",
    )


def _is_sequence(source: object) -> bool:
    if isinstance(source, str | bytes | IterableDataset):  # the last inherits a [i] that only raises
        return False
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _open_sequence(source: Any, inputs: Mapping[str, InputInfo], *, where: str) -> Dataset:
    rows: list[tuple[int, int]] = []  # sample number -> item of the sequence, row of the item
    labels = _Labels(where)
    for j in range(len(source)):
        _, label, n = _item(source, j, inputs, where=where)
        labels.add(label, n, where=f"{where}, item {j}")
        rows += [(j, r) for r in range(n)]

    def read(i: int) -> Sample:
        j, r = rows[i]
        arrays, _, n = _item(source, j, inputs, where=where)
        if r >= n:
            raise DataError(
                f"{where}, item {j}",
                expected=f"more than {r} samples, as when it was opened",
                found=str(n),
                remedy="The data must stay the same while it is used.",
            )
        return pick(arrays, r, inputs, where=f"{where}, item {j}")

    found = labels.tensor()
    if found is None and getattr(source, "labels", None) is not None:
        found = as_labels(source.labels, len(rows), where=f"{where}, labels")
    return Dataset(_numbered(_some(len(rows), where)), read, inputs, labels=found, where=where)


def _item(
    source: Any, j: int, inputs: Mapping[str, InputInfo], *, where: str
) -> tuple[dict[str, Array], Any, int]:
    where = f"{where}, item {j}"
    try:
        item = source[j]
    except BitwrightError:
        raise
    except Exception as error:
        raise failed(where, error) from error
    arrays, label = bind(item, inputs, where=where)
    return arrays, label, count(arrays, inputs, where=where)


def _materialise(source: Any, inputs: Mapping[str, InputInfo], *, where: str, limit: int) -> Dataset:
    samples: list[Sample] = []
    labels = _Labels(where)
    held = 0
    for j, item in enumerate(_guarded(source, where)):
        here = f"{where}, item {j}"
        arrays, label = bind(item, inputs, where=here)
        n = count(arrays, inputs, where=here)
        labels.add(label, n, where=here)
        for r in range(n):
            sample = pick(arrays, r, inputs, where=here)
            held += sum(x.nbytes for x in sample.values())
            if held > limit:
                raise DataError(
                    where,
                    expected=f"at most {limit} bytes from an iterable that cannot be indexed",
                    found=f"more, after {len(samples)} samples",
                    remedy="Yield fewer samples, or give a dataset with len() and [i].",
                )
            samples.append(sample)
    n = _some(len(samples), where)
    # A shallow copy: whoever adds a key to a sample must not change the next reading of it.
    return Dataset(_numbered(n), lambda i: dict(samples[i]), inputs, labels=labels.tensor(), where=where)


def _guarded(source: Any, where: str) -> Iterator[object]:
    """The items of *source*; what its code raises becomes a `DataError` with the original message."""
    try:
        yield from source
    except BitwrightError:
        raise
    except Exception as error:
        raise failed(where, error) from error


def failed(where: str, error: Exception) -> DataError:
    """The error for user code that raised *error*."""
    return DataError(
        where,
        expected="samples from your code",
        found=f"it raised {type(error).__name__}: {error}",
        remedy="Correct that code; call it in Python to see its traceback.",
    )


class _Labels:
    """Collects the labels of items: all have one, or none."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._labels: list[int] = []
        self._samples = 0

    def add(self, label: object, n: int, *, where: str) -> None:
        """Take the *label* of an item of *n* samples; None: it has none."""
        if (label is None) == bool(self._labels) and self._samples:
            raise DataError(
                where,
                expected="a label with every sample or with none",
                found="samples with a label and samples without",
                remedy=LABEL_HELP,
            )
        if label is not None:
            self._labels += as_labels(label, n, where=where).tolist()
        self._samples += n

    def tensor(self) -> Tensor | None:
        """`[n]` int64, or None if no item had a label."""
        return as_labels(self._labels, self._samples, where=self._where) if self._labels else None


def _some(n: int, where: str) -> int:
    if n == 0:
        raise DataError(where, expected="at least one sample", found="none", remedy="Check the source.")
    return n


def _numbered(n: int) -> tuple[str, ...]:
    return tuple(map(str, range(n)))
