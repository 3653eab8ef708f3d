"""What calibration saw of every value: exact extremes and a histogram, collected in one pass (docs/numerics.md §3)."""

from __future__ import annotations

import json
import math
from collections.abc import ItemsView, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitwright.errors import DataError, UnknownName
from bitwright.files import write_bytes
from bitwright.numerics.histogram import SLOTS, Array, Histogram, Magnitudes, Moments, quantile
from bitwright.numerics.spec import QuantSpec

#: Elements of one batch of one value that always enter the histogram; of more, at least one in `SPARSEST` does.
MAX_SAMPLES = 1 << 15
SPARSEST = 64

#: A larger batch is sampled in runs of this many neighbours: one line of cache (float32), read at the price of one element.
RUN = 16

_FORMAT = "bitwright statistics 1"


@dataclass
class ValueStatistics:
    """What was seen of the value *name*.

    *lo*, *hi*: exact extremes, real units (inf, -inf before the first element). *elements*: how many were seen.
    *histogram*: all of them, by weight.

    The extremes see every element. The histogram sees all elements of a batch of up to `MAX_SAMPLES`; of a larger
    batch it sees every s-th run of `RUN` neighbours in memory, s having no factor in common with the number of runs,
    so that no channel, row or column is left out. Each then counts for about s elements, so that totals stay right.
    The share of data below a percentile (p, as a fraction) read from n sampled elements is p ± √(p(1-p)/n), up to
    √RUN times that where neighbours are alike; thresholds never pass the exact extremes. The same batches in another
    order give the same counts.
    """

    name: str
    lo: float = math.inf
    hi: float = -math.inf
    elements: int = 0
    histogram: Histogram = field(default_factory=Histogram, repr=False)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in one batch. *x*: any shape, any floating dtype and device, real units.

        *raises* `DataError`, leaving everything as it was, if *x* is not floating point or holds NaN or infinity.
        """
        if not x.is_floating_point():
            raise DataError(
                f"value {self.name!r}",
                expected="floating-point numbers",
                found=f"{x.dtype}",
                remedy="Only real-valued values have statistics; leave this one out of the calibration.",
            )
        flat = _in_memory_order(x.to(torch.float32) if x.dtype == torch.float64 else x)
        if flat.numel() == 0:
            return
        lo, hi = torch.stack(torch.aminmax(flat)).tolist()
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise self._not_finite(flat)
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self.elements += flat.numel()
        sample = _sampled(flat)
        self.histogram.cover(self.largest)
        # A float32 weight leaves 29 bits of the float64 counts, so that sums of weights are exact in any order.
        self.histogram.add(sample, weight=float(np.float32(flat.numel() / sample.numel())))

    def _not_finite(self, flat: Tensor) -> DataError:
        nan, infinite = int(flat.isnan().sum()), int(flat.isinf().sum())
        return DataError(
            f"value {self.name!r} after {self.elements} elements",
            expected="finite numbers",
            found=f"{nan} NaN and {infinite} infinite of {flat.numel()} elements of a batch",
            remedy="Check the input data and their preprocessing; if the float network itself overflows, repair it first.",
        )

    def merge(self, other: ValueStatistics) -> None:
        """Add what *other* has seen, in place, as if this one had seen its batches too."""
        if other.elements == 0:
            return
        self.lo, self.hi = min(self.lo, other.lo), max(self.hi, other.hi)
        self.histogram.cover(self.largest)
        self.histogram.merge(other.histogram)
        self.elements += other.elements

    @property
    def largest(self) -> float:
        """The exact max |x|, real units; 0 if nothing was seen."""
        return max(abs(self.lo), abs(self.hi)) if self.hi >= self.lo else 0.0

    @property
    def zeros(self) -> float:
        """How many elements are exactly 0 (estimated where batches were sampled)."""
        return self.histogram.zeros

    @property
    def is_one_sided(self) -> bool:
        """No element is negative, or none is positive."""
        return self.lo >= 0.0 or self.hi <= 0.0

    def magnitudes(self) -> Magnitudes:
        """The distribution of |x|."""
        return self.histogram.magnitudes(self.largest)

    def quantile(self, percent: float) -> float:
        """The percentile (0..100) of the signed elements, real units, within one bin."""
        counts, width = self.histogram.array(), self.histogram.width
        return quantile(counts, percent, origin=-SLOTS * width, width=width, lo=self.lo, hi=self.hi)

    def distribution(self) -> tuple[Array, Array]:
        """The middles of the bins in use, `[n]` ascending, real units, and their weights `[n]`; exact zeros left out."""
        counts = self.histogram.array()
        used = np.flatnonzero(counts)
        weights = counts[used]
        weights[used == SLOTS] -= self.zeros
        return np.clip(self.histogram.centres()[used], self.lo, self.hi), np.maximum(weights, 0.0)

    def moments(self) -> Moments:
        """Moments of the signed elements, from the histogram: every element is taken for the middle of its bin."""
        x, weights = self.distribution()
        return Moments.of(np.append(x, 0.0), np.append(weights, self.zeros))

    def clipped_range(self, threshold: float, spec: QuantSpec) -> tuple[float, float]:
        """The range (lo, hi), real units, of *spec* that clips |x| at *threshold*.

        Symmetric: (-threshold, threshold), or (0, threshold) for unsigned codes. Asymmetric: the extremes, clipped.
        """
        if spec.symmetric:
            return (-threshold if spec.dtype.signed else 0.0), threshold
        lo, hi = np.clip([self.lo, self.hi], -threshold, threshold).tolist()
        return lo, hi

    def codes_serve_one_sign(self, spec: QuantSpec) -> bool:
        """Whether all codes of *spec* lie on one side of zero: the step is then half as wide at the same threshold."""
        return not spec.dtype.signed if spec.symmetric else self.is_one_sided

    def state(self) -> dict[str, Any]:
        """Everything, as plain numbers and one tensor: the counts between the first and the last bin in use."""
        counts = self.histogram.counts.cpu()
        used = torch.nonzero(counts).ravel()
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, -1)
        return {
            "lo": self.lo,
            "hi": self.hi,
            "elements": self.elements,
            "zeros": self.zeros,
            "exponent": self.histogram.exponent,
            "grain": self.histogram.grain,
            "first": first,
            "counts": counts[first : last + 1].clone(),
        }

    @classmethod
    def from_state(cls, name: str, state: Mapping[str, Any]) -> ValueStatistics:
        """Inverse of `state`. *raises* `DataError` if the counts do not fit."""
        counts, first, span = (
            torch.zeros(2 * SLOTS, dtype=torch.float64),
            int(state["first"]),
            state["counts"],
        )
        fits = span.dim() == 1 and 0 <= first <= 2 * SLOTS - len(span)
        if not fits or not bool((span >= 0).all()) or not bool(span.isfinite().all()):
            raise DataError(
                f"statistics of value {name!r}",
                expected=f"counts ≥ 0 within {2 * SLOTS} bins",
                found=f"shape {list(span.shape)} from bin {first}",
                remedy="Collect the statistics again.",
            )
        counts[first : first + len(span)] = span
        zeros, grain = float(state["zeros"]), float(state["grain"])
        histogram = Histogram(counts, exponent=int(state["exponent"]), zeros=zeros, grain=grain)
        return cls(name, float(state["lo"]), float(state["hi"]), int(state["elements"]), histogram)


class Statistics:
    """What calibration saw, value by value. *samples*: how many calibration samples it is based on."""

    def __init__(
        self,
        values: Mapping[str, ValueStatistics] | None = None,
        *,
        samples: int = 0,
        infinite: Iterable[str] = (),
    ) -> None:
        self._values = dict(values or {})
        self.samples = samples
        #: Values that held infinity (masked scores); only their finite elements were counted.
        self.infinite = set(infinite)

    def __getitem__(self, name: str) -> ValueStatistics:
        """The statistics of the value *name*. *raises* `UnknownName`."""
        if name not in self._values:
            raise UnknownName("statistics", kind="value", name=name, known=self._values)
        return self._values[name]

    def find(self, name: str) -> ValueStatistics | None:
        """The statistics of the value *name*, or None."""
        return self._values.get(name)

    def items(self) -> ItemsView[str, ValueStatistics]:
        """Names and statistics, in the order of their first batch."""
        return self._values.items()

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def update(self, name: str, x: Tensor) -> None:
        """Take in one batch of the value *name*; see `ValueStatistics.update`."""
        value = self._values.get(name)
        if value is None:
            value = self._values[name] = ValueStatistics(name)
        value.update(x)

    def update_masked(self, name: str, x: Tensor) -> None:
        """As `update`, but infinite elements are left out, and the value is remembered in `infinite`."""
        if bool(x.isinf().any()):
            self.infinite.add(name)
            x = x[~x.isinf()]
        self.update(name, x)

    def merge(self, other: Statistics) -> None:
        """Add what *other* has seen, in place."""
        for name, value in other.items():
            if name not in self._values:
                self._values[name] = ValueStatistics(name)
            self._values[name].merge(value)
        self.samples += other.samples
        self.infinite |= other.infinite

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: one tensor of counts per value, all else in its metadata. *raises* `OutputError`."""
        states = {name: value.state() for name, value in self.items()}
        counts = {name: state.pop("counts") for name, state in states.items()}
        metadata = {
            "format": _FORMAT,
            "samples": str(self.samples),
            "infinite": json.dumps(sorted(self.infinite)),
            "values": json.dumps(states),
        }
        write_bytes(Path(path), save(counts, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Inverse of `save`. *raises* `DataError` if the file is missing, broken or of another format."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"the format {metadata.get('format', 'of another program')!r}")
                states = json.loads(metadata["values"])
                values = {
                    name: ValueStatistics.from_state(name, {**state, "counts": file.get_tensor(name)})
                    for name, state in states.items()
                }
                infinite = json.loads(metadata["infinite"])
                return cls(values, samples=int(metadata["samples"]), infinite=infinite)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"statistics file {path}",
                expected=f"a safetensors file of the format {_FORMAT!r}",
                found=f"{type(error).__name__}: {error}",
                remedy="Check the path, or collect the statistics again.",
            ) from error


def sampling_step(elements: int) -> int:
    """The step from sampled run to sampled run; 1: every element is looked at.

    The smallest one that is prime to the number of runs and leaves at most max(`MAX_SAMPLES`, *elements* / `SPARSEST`)
    elements (and less than one run).
    """
    step = min(-(-elements // MAX_SAMPLES), SPARSEST)
    while math.gcd(step, elements // RUN) != 1:
        step += 1
    return step


def _sampled(flat: Tensor) -> Tensor:
    """The elements of *flat* `[n]` that enter the histogram, as a view `[runs, RUN]`, or `[n, 1]` if all do."""
    step = sampling_step(flat.numel())
    return flat.unsqueeze(1) if step == 1 else flat[: flat.numel() // RUN * RUN].view(-1, RUN)[::step]


def _in_memory_order(x: Tensor) -> Tensor:
    """The elements of *x*, `[n]`, as they lie in memory; a copy only where *x* has gaps or overlaps."""
    if x.is_contiguous():
        return x.view(-1)
    sizes = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in sizes:
        if stride != expected:
            return x.reshape(-1)
        expected *= size
    return x.as_strided((x.numel(),), (1,))
