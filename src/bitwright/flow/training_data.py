"""Training data as users have it: a DataLoader, a Dataset, or two tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bitwright.errors import DataError, explained
from bitwright.flow.model_source import import_object


@dataclass(frozen=True)
class Batch:
    """Inputs in order, inputs by name, and labels `[n]`."""

    inputs: tuple[Tensor, ...]
    named: Mapping[str, Tensor]
    labels: Tensor


class Source:
    """Batches that can be gone through any number of times."""

    def __init__(self, where: str, data: Any, batch_size: int) -> None:
        self._where, self._data, self._batch_size = where, data, batch_size

    def length(self, *, training: bool = False) -> int | None:
        """How many batches there are (in a shuffled pass if *training*), None if unknown."""
        if self._is_indexed:
            count = len(self._data)
            return -(-count // self._batch_size) - (self._leaves_one(count) if training else 0)
        try:
            count = len(self._data)
        except TypeError:
            return None
        return -(-count // self._batch_size) if isinstance(self._data, Dataset) else count

    @property
    def _is_indexed(self) -> bool:
        is_dataset = isinstance(self._data, Dataset) and not isinstance(self._data, IterableDataset)
        return is_dataset and isinstance(self._data, Sized)

    def _leaves_one(self, count: int) -> bool:
        """Whether the last batch holds one sample, of which batch normalisation can make no statistics."""
        return count > self._batch_size > 1 and count % self._batch_size == 1

    def batches(self, *, seed: int | None = None) -> Iterator[Batch]:
        """One pass. *seed*: shuffle a Dataset by it (a last batch of one sample is left out); None keeps its order. A loader keeps its own. *raises* `DataError`."""
        with explained(
            DataError,
            self._where,
            expected="samples that can be read and stacked",
            remedy="Mend the Dataset or the DataLoader.",
        ):
            for item in self._iterable(seed):
                yield self._batch(item)

    def _iterable(self, seed: int | None) -> Any:
        if not self._is_indexed:
            return DataLoader(self._data, self._batch_size) if isinstance(self._data, Dataset) else self._data
        if seed is None:
            return DataLoader(self._data, self._batch_size)
        generator, drops = torch.Generator().manual_seed(seed), self._leaves_one(len(self._data))
        return DataLoader(self._data, self._batch_size, shuffle=True, generator=generator, drop_last=drops)

    def _batch(self, item: Any) -> Batch:
        if not isinstance(item, (tuple, list)) or len(item) < 2 or not isinstance(item[-1], Tensor):
            raise DataError(
                self._where,
                expected="batches (inputs, labels), both tensors",
                found=type(item).__name__,
                remedy="Return a DataLoader or Dataset of (x, y), or two tensors.",
            )
        *inputs, labels = item
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return Batch((), inputs[0], labels)
        return Batch(tuple(inputs), {}, labels)


def open_source(spec: str, batch_size: int) -> Source:
    """The data that the function *spec* returns. *raises* `ModelError` if it cannot be called, `DataError` for another kind."""
    function = import_object(spec, "data")
    try:
        data = function()
    except Exception as e:
        raise DataError(
            spec,
            expected="a function without arguments that returns data",
            found=f"{type(e).__name__}: {e}",
            remedy="Mend the function.",
        ) from e
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(x, Tensor) for x in data):
        if len(data[0]) != len(data[1]):
            raise DataError(
                spec,
                expected="as many labels as samples",
                found=f"{len(data[0])} samples, {len(data[1])} labels",
                remedy="Mend the function.",
            )
        return Source(spec, TensorDataset(*data), batch_size)
    if isinstance(data, Iterator) or not (hasattr(data, "__iter__") or isinstance(data, Dataset)):
        raise DataError(
            spec,
            expected="a DataLoader, a Dataset, or two tensors (x, y), which can be gone through again",
            found=type(data).__name__,
            remedy="Return one of these; a generator is used up after one pass.",
        )
    return Source(spec, data, batch_size)
