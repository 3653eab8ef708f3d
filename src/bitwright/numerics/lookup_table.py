"""The formats of look-up tables, and what they compute, in integers (docs/numerics.md §9.2 to §9.4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bitwright.numerics.fixed_point import shift_right
from bitwright.numerics.segments import CELL_BITS, CELLS, WIDEST, Boundaries
from bitwright.numerics.spec import QParams
from bitwright.numerics.table_curve import Array, RealFunction, evaluate, in_steps

#: Fraction bits of an interpolated entry of a segment table: an interval has at most 2^10 codes.
BLEND_BITS = WIDEST
#: log2 of the codes between two entries of a regular table.
REGULAR_BITS = 7
#: Fraction bits of the straight lines outside the covered range.
LINE_BITS = 24
#: Bits of the fraction of a period: of the multiplier that makes one of a code, and of those that are then looked at.
PHASE_BITS, SEEN_BITS = 44, 26
#: Offset code of the middle of 16-bit inputs: code 0 of int16.
MIDDLE = CELLS << (CELL_BITS - 1)


@dataclass(frozen=True, eq=False)
class LookupTable:
    """A function from the codes of *q_in* to those of *q_out*; one of the kinds below."""

    q_in: QParams
    q_out: QParams

    def compute(self, codes: Tensor) -> Tensor:
        """The arithmetic itself. *codes*: int64, any shape. *returns*: output codes, int64."""
        raise NotImplementedError(type(self).__name__)

    def lookup(self, codes: Tensor) -> Tensor:
        """`compute` of *codes*, any shape, integers of *q_in*, on any device. *returns*: the storage dtype of *q_out*.

        Reads the result of every possible code, which is computed once.
        """
        at = codes.to(torch.int32).sub(self.q_in.spec.dtype.qmin).flatten()
        found = self._on(codes.device).index_select(0, at).reshape(codes.shape)
        return found.view(self.q_out.spec.dtype.storage)

    def error(self, function: RealFunction, *, weights: Array | None = None) -> tuple[float, float]:
        """Largest and RMS error against *function*, in output steps, over all input codes at which it is finite.

        The reference saturates like the output and is not rounded: a perfect table errs by up to 0.5. *weights*: `[n]`, how often each
        code occurs; codes of weight 0 are left out.
        """
        errors = self.errors(function)
        weights = np.ones(len(errors)) if weights is None else weights
        used = np.isfinite(errors) & (weights > 0)
        if not used.any():
            return 0.0, 0.0
        return float(errors[used].max()), float(np.sqrt(np.average(errors[used] ** 2, weights=weights[used])))

    def errors(self, function: RealFunction) -> Array:
        """The error at every input code, from the smallest on, in output steps: `[n]`; not finite where *function* is not."""
        d, exact = self.q_out.spec.dtype, evaluate(function, self.q_in, "look-up table")[:-1]
        exact = np.where(np.isfinite(exact), exact, np.nan)
        reference = np.clip(in_steps(exact, self.q_out) + self.q_out.zero_point[0], d.qmin, d.qmax)
        return np.abs(self.results.numpy() - reference)

    @cached_property
    def results(self) -> Tensor:
        """The output code of every input code, from the smallest on: `[256]` or `[65536]`, int32."""
        d = self.q_in.spec.dtype
        return self.compute(torch.arange(d.qmin, d.qmax + 1)).to(torch.int32)

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        """`results` in the width of the output, signed: torch looks up no uint16."""
        storage = self.q_out.spec.dtype.storage
        signed = torch.int16 if storage is torch.uint16 else storage
        return {torch.device("cpu"): self.results.to(storage).view(signed)}

    def _on(self, device: torch.device) -> Tensor:
        """The results on *device*, copied there once."""
        if device not in self._copies:
            self._copies[device] = self._copies[torch.device("cpu")].to(device)
        return self._copies[device]

    def _clamped(self, codes: Tensor) -> Tensor:
        return codes.clamp(self.q_out.spec.dtype.qmin, self.q_out.spec.dtype.qmax)


@dataclass(frozen=True, eq=False)
class DirectTable(LookupTable):
    """8-bit input. *entries*: `[256]`, output codes, from the smallest input code on, in the storage dtype of *q_out*."""

    entries: Tensor

    def compute(self, codes: Tensor) -> Tensor:
        return self.entries.to(torch.int64)[codes - self.q_in.spec.dtype.qmin]


@dataclass(frozen=True, eq=False)
class RegularTable(LookupTable):
    """16-bit input, 513 entries 128 codes apart, linear between them: the TABLE operator of TOSA.

    *entries*: `[513]` int16, (output code - *offset*) · 2^*fraction_bits*.
    """

    entries: Tensor
    offset: int
    fraction_bits: int

    def compute(self, codes: Tensor) -> Tensor:
        u = codes - self.q_in.spec.dtype.qmin
        entries, i = self.entries.to(torch.int64), u >> REGULAR_BITS
        fraction = u & ((1 << REGULAR_BITS) - 1)
        y = (entries[i] << REGULAR_BITS) + (entries[i + 1] - entries[i]) * fraction
        rounded = shift_right(y, REGULAR_BITS + self.fraction_bits, self.q_out.spec.rounding)
        return self._clamped(rounded + self.offset)


@dataclass(frozen=True, eq=False)
class SegmentTable(LookupTable):
    """16-bit input in segments, each with its own power of two of codes between entries; straight lines outside.

    *entries*: `[e]` int16, (output code - *offset*) · 2^*fraction_bits*. *boundaries*: of the segments, in cells of 64 codes.
    *spacings*, *bases*: `[1024]` int32, of the segment that each cell is in: log2 of its entry spacing, and what to add to u >> spacing to
    have the entry's index. *first*, *last*: the covered offset codes (code - qmin). *slopes*: of the lines, entries per code · 2^24.
    """

    entries: Tensor
    offset: int
    fraction_bits: int
    boundaries: Boundaries
    spacings: Tensor
    bases: Tensor
    first: int
    last: int
    slopes: tuple[int, int]
    symmetric_mode: str

    @property
    def has_lines(self) -> bool:
        """Whether a code may lie on a sloped line; if not, all arithmetic fits int32."""
        lowest = 0 if self.symmetric_mode == "none" else MIDDLE
        return (self.first > lowest and self.slopes[0] != 0) or (
            self.last < 2 * MIDDLE - 1 and self.slopes[1] != 0
        )

    def compute(self, codes: Tensor) -> Tensor:
        u = codes - self.q_in.spec.dtype.qmin
        negative = u < MIDDLE
        if self.symmetric_mode != "none":
            u = (MIDDLE + (u - MIDDLE).abs()).clamp(max=2 * MIDDLE - 1)
        y, shift = self._on_the_curve(u), BLEND_BITS
        if self.has_lines:
            y, shift = self._with_lines(u, y), LINE_BITS
        if self.symmetric_mode == "odd":
            y = torch.where(negative, -y, y)
        return self._clamped(
            shift_right(y, shift + self.fraction_bits, self.q_out.spec.rounding) + self.offset
        )

    def _on_the_curve(self, u: Tensor) -> Tensor:
        """Entries · 2^10 at offset codes *u*, those outside taken to the nearest end of the range."""
        u = u.clamp(self.first, self.last)
        cell = u >> CELL_BITS
        k, entries = self.spacings.to(torch.int64)[cell], self.entries.to(torch.int64)
        i = (u >> k) + self.bases.to(torch.int64)[cell]
        fraction = u & ((1 << k) - 1)
        return blended(entries[i], entries[i + 1], fraction, k)

    def _with_lines(self, u: Tensor, y: Tensor) -> Tensor:
        """Entries · 2^24: *y*, and what the lines add outside."""
        left, right = (u - self.first).clamp(max=0), (u - self.last).clamp(min=0)
        return (y << (LINE_BITS - BLEND_BITS)) + left * self.slopes[0] + right * self.slopes[1]


@dataclass(frozen=True, eq=False)
class PeriodicTable(LookupTable):
    """16-bit input, one period of a function that repeats, in 2^*index_bits* intervals, linear between entries.

    *entries*: `[2^index_bits + 1]` int16, (output code - *offset*) · 2^*fraction_bits*. *multiplier*: periods per input code · 2^44, below 2^44.
    """

    entries: Tensor
    offset: int
    fraction_bits: int
    index_bits: int
    multiplier: int

    def compute(self, codes: Tensor) -> Tensor:
        turns = (codes - self.q_in.zero_point[0]) * self.multiplier
        phase = (turns & ((1 << PHASE_BITS) - 1)) >> (PHASE_BITS - SEEN_BITS)
        bits = SEEN_BITS - self.index_bits
        entries, i = self.entries.to(torch.int64), phase >> bits
        y = (entries[i] << bits) + (entries[i + 1] - entries[i]) * (phase & ((1 << bits) - 1))
        rounded = shift_right(y, bits + self.fraction_bits, self.q_out.spec.rounding)
        return self._clamped(rounded + self.offset)


def blended(low: Tensor, high: Tensor, fraction: Tensor, k: Tensor | int) -> Tensor:
    """Between two neighbouring entries 2^*k* codes apart, *fraction* codes from the lower one: entries · 2^10."""
    return (low << BLEND_BITS) + (high - low) * (fraction << (BLEND_BITS - k))
