"""`Dataset`: samples for a model, read one at a time; `InputInfo`: what one input of the model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from bitwright.errors import DataError

Sample = dict[str, Tensor]
"""One sample: input name to tensor, with a batch axis of length 1 where the input has one."""


@dataclass(frozen=True)
class InputInfo:
    """What one input of a model takes. *shape*: batch axis included, None = an axis of any length."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def is_batched(self) -> bool:
        """Whether the first axis counts samples: its length is 1 or None.

        Any other input (a scalar, a state `[2, n, 128]`) is *whole*: every sample carries all of it.
        """
        return bool(self.shape) and self.shape[0] in (1, None)

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """The shape of one sample, without a batch axis."""
        return self.shape[1:] if self.is_batched else self.shape


@dataclass(frozen=True, eq=False)
class Dataset:
    """A sequence of samples that can be read again and again; a sample exists in memory only while it is used.

    *names*: where each sample came from. *read*: makes sample i, `0 <= i < len(names)`.
    *labels*: `[n]` int64 class numbers, one per sample, or None.
    """

    names: tuple[str, ...]
    read: Callable[[int], Sample]
    inputs: Mapping[str, InputInfo]
    labels: Tensor | None = None
    where: str = "data"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Sample *index*, checked: right shape, right dtype, finite. *raises* `DataError` naming the sample."""
        return self.read(range(len(self))[index])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def subset(self, indices: Iterable[int]) -> Dataset:
        """The samples at *indices*, in that order."""
        chosen = [range(len(self))[i] for i in indices]
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            read=lambda i: self.read(chosen[i]),
            labels=None if self.labels is None else self.labels[torch.tensor(chosen, dtype=torch.int64)],
        )

    def take(self, n: int | None, seed: int = 0) -> Dataset:
        """*n* samples chosen by *seed*; all of them, in their own order, for None, 0 or n >= len.

        One seed gives one order: `take(8)` is the beginning of `take(16)`, on every machine.
        """
        if n is not None and n < 0:
            raise DataError(
                self.where, expected="a number of samples >= 0", found=str(n), remedy="Use 0 for all samples."
            )
        if not n or n >= len(self):
            return self
        # Only Random.random() is promised to repeat across Python versions; shuffle() and sample() are not.
        random = Random(seed)
        keys = [random.random() for _ in range(len(self))]
        return self.subset(sorted(range(len(self)), key=keys.__getitem__)[:n])

    def batches(self, size: int) -> Iterator[Sample]:
        """All samples in order, *size* at a time (the last batch may be smaller), concatenated along axis 0.

        A whole input (see `InputInfo.is_batched`) has no axis to concatenate: it is passed once if it is the
        same in every sample of the batch. *raises* `DataError` if samples of one batch do not fit together.
        """
        if size < 1:
            raise DataError(
                self.where, expected="a batch size >= 1", found=str(size), remedy="Use 1 or more."
            )
        starts = range(0, len(self), size)
        return (self._batch(range(start, min(start + size, len(self)))) for start in starts)

    def _batch(self, indices: Sequence[int]) -> Sample:
        samples = [self[i] for i in indices]
        if len(samples) == 1:
            return samples[0]
        names = f"{self.names[indices[0]]} … {self.names[indices[-1]]}"
        return {key: self._join(key, [s[key] for s in samples], where=names) for key in samples[0]}

    def _join(self, key: str, values: list[Tensor], *, where: str) -> Tensor:
        info = self.inputs[key]
        first = values[0]
        if not info.is_batched and None not in info.shape and all(torch.equal(first, v) for v in values[1:]):
            return first
        if info.is_batched and all(v.shape == first.shape for v in values[1:]):
            return torch.cat(values)
        raise DataError(
            f"{self.where}, {where}, input {key!r}",
            expected="samples that fit in one batch",
            found="different shapes"
            if info.is_batched
            else f"an input {list(info.shape)} without a batch axis",
            remedy="Use a batch size of 1, or bring the samples to one shape.",
        )
