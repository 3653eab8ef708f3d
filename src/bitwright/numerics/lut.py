"""Look-up tables: building them from float64 functions (docs/numerics.md §9). The public names of tables are all here."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import NumericsError
from bitwright.numerics.fixed_point import shift_right
from bitwright.numerics.lookup_table import (
    BLEND_BITS,
    LINE_BITS,
    MIDDLE,
    PHASE_BITS,
    REGULAR_BITS,
    DirectTable,
    LookupTable,
    PeriodicTable,
    RegularTable,
    SegmentTable,
    blended,
)
from bitwright.numerics.rounding import round_
from bitwright.numerics.segments import (
    CELL_BITS,
    CELLS,
    INTERVALS,
    WIDEST,
    Boundaries,
    CellErrors,
    by_density,
    curvature,
    mixture,
    optimal,
    spacing,
)
from bitwright.numerics.spec import QParams
from bitwright.numerics.table_curve import (
    Array,
    Mask,
    RealFunction,
    TableCurve,
    evaluate,
    in_steps,
    require_known_inputs,
    sample,
    usable_range,
)
from bitwright.numerics.table_settings import TableSettings

__all__ = [
    "DirectTable",
    "LookupTable",
    "PeriodicTable",
    "RegularTable",
    "SegmentTable",
    "TableSettings",
    "build_table",
    "usable_range",
]

_INT16 = (-(1 << 15), (1 << 15) - 1)
#: Steeper lines (entries per code) saturate any output after one code.
_STEEPEST = 1 << 16
#: Output steps by which a function may miss the period, or the symmetry, that is claimed; a saturated output has one code more on one side.
_GAP = 1.0
#: Share of the weight that all covered codes have in common, seen or not.
UNSEEN = 0.001


def build_table(
    function: RealFunction,
    q_in: QParams,
    q_out: QParams,
    settings: TableSettings | None = None,
    *,
    weights: Array | None = None,
    where: str = "",
) -> LookupTable:
    """The table of *function*, float64 to float64 element by element, between these codes.

    *weights*: `[n]`, how often each input code was seen, from the smallest on (None: all alike). *where*: names the operator in errors.
    *raises* `NumericsError`.
    """
    settings = settings or TableSettings()
    where = where or "look-up table"
    form = _form(q_in, q_out, settings, where)
    curve = sample(
        function, q_in, q_out, input_range=settings.input_range, gradients=settings.gradients, where=where
    )
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        assert weights.shape == curve.known.shape, "one weight for each input code"
        require_known_inputs(curve, weights, q_in, where)
    if form == "direct":
        return _direct(curve, q_in, q_out)
    if settings.period is not None:
        return _periodic(function, curve, q_in, q_out, settings, where)
    if form == "regular":
        entries, offset, bits = _entries(curve.with_lines(), q_out)
        return RegularTable(q_in, q_out, entries[:: 1 << REGULAR_BITS], offset, bits)
    return _SegmentBuilder(curve, q_in, q_out, settings, weights, where).table()


def _form(q_in: QParams, q_out: QParams, settings: TableSettings, where: str) -> str:
    bits = q_in.spec.dtype.bits
    if bits not in (8, 16) or q_out.spec.dtype.bits > 16:
        raise NumericsError(
            where,
            expected="an input of 8 or 16 bits, an output of at most 16",
            found=f"{q_in.spec.dtype.name} to {q_out.spec.dtype.name}",
            remedy="Choose int8 or int16 for what the table reads and writes.",
        )
    natural = "direct" if bits == 8 else "segment"
    form = natural if settings.form == "auto" else settings.form
    if (form == "direct") != (bits == 8):
        raise NumericsError(
            where,
            expected=f"{'an 8' if form == 'direct' else 'a 16'}-bit input for a table of form {form!r}",
            found=q_in.spec.dtype.name,
            remedy=f'Use form "auto" (here {natural!r}), or another precision of the input.',
        )
    if form != "segment" and settings.symmetric_mode != "none" and bits == 16:
        raise NumericsError(
            where,
            expected='symmetric_mode "none" for a table of 513 entries at fixed places',
            found=repr(settings.symmetric_mode),
            remedy='Use form "segment".',
        )
    return form


def _direct(curve: TableCurve, q_in: QParams, q_out: QParams) -> DirectTable:
    """entry[c] = clamp(round(f((c - z_in) s_in) / s_out) + z_out), in float64."""
    d = q_out.spec.dtype
    steps = round_(torch.from_numpy(curve.with_lines()[:-1].copy()), q_out.spec.rounding)
    # Clamped before it becomes an integer: a value may be beyond any.
    entries = (steps + q_out.zero_point[0]).clamp(d.qmin, d.qmax)
    return DirectTable(q_in, q_out, entries.to(torch.int64).to(d.storage))


def entry_format(q_out: QParams) -> tuple[int, int]:
    """The output code of entry 0, and the fraction bits of entries, the most with which all output codes fit int16.

    The code is the zero point; where a 16-bit output has one off the middle, it is the middle.
    """
    d, z = q_out.spec.dtype, q_out.zero_point[0]
    for bits in range(16 - d.bits, -1, -1):
        if (d.qmin - z) << bits >= _INT16[0] and (d.qmax - z) << bits <= _INT16[1]:
            return z, bits
    return d.qmin + MIDDLE, 0


def _entries(values: Array, q_out: QParams) -> tuple[Tensor, int, int]:
    """Entries of *values*, output codes minus the zero point: same shape, int16; the output code of entry 0; fraction bits."""
    offset, bits = entry_format(q_out)
    exact = torch.from_numpy((values + (q_out.zero_point[0] - offset)) * 2.0**bits)
    return round_(exact, q_out.spec.rounding).clamp(*_INT16).to(torch.int16), offset, bits


def _periodic(
    function: RealFunction,
    curve: TableCurve,
    q_in: QParams,
    q_out: QParams,
    settings: TableSettings,
    where: str,
) -> PeriodicTable:
    """Entries over one period, from 0 on; as many intervals as the segments would have, rounded up to a power of two."""
    period = settings.period
    assert period is not None
    gap = np.abs(in_steps(evaluate(lambda x: function(x + period), q_in, where), q_out) - curve.values)
    if not curve.known.all() or not gap.max() <= _GAP:
        raise NumericsError(
            where,
            expected=f"a function that repeats every {period:g}",
            found=f"values that differ by up to {gap.max():.3g} output steps",
            remedy="Leave period out, or give the function's own.",
        )
    index_bits = (settings.num_tables * INTERVALS - 1).bit_length()
    x = torch.arange((1 << index_bits) + 1, dtype=torch.float64) * (period / (1 << index_bits))
    entries, offset, bits = _entries(in_steps(function(x).double().numpy(), q_out), q_out)
    whole = 1 << PHASE_BITS
    multiplier = round(Fraction(q_in.scale[0]) / Fraction(period) * whole) % whole
    return PeriodicTable(q_in, q_out, entries, offset, bits, index_bits, multiplier)


class _SegmentBuilder:
    """One `SegmentTable` in the making."""

    def __init__(
        self,
        curve: TableCurve,
        q_in: QParams,
        q_out: QParams,
        settings: TableSettings,
        weights: Array | None,
        where: str,
    ) -> None:
        self.curve, self.q_in, self.q_out, self.settings, self.where = curve, q_in, q_out, settings, where
        self.entries, self.offset, self.bits = _entries(curve.values, q_out)
        d = q_out.spec.dtype
        #: The output code, not rounded, that is right for each offset code.
        self.reference = np.clip(curve.values + q_out.zero_point[0], d.qmin, d.qmax)
        self.first, self.last = curve.first, curve.last
        self.weights = np.ones(len(curve.known)) if weights is None else weights
        self.seen = self.weights > 0
        if settings.symmetric_mode != "none":
            self._fold()
        self.start, self.stop = self.first >> CELL_BITS, (self.last >> CELL_BITS) + 1

    def table(self) -> SegmentTable:
        boundaries = self.divided()
        spacings, bases = torch.zeros(CELLS, dtype=torch.int32), torch.zeros(CELLS, dtype=torch.int32)
        parts: list[Tensor] = []
        size = 0
        for a, b in pairwise(boundaries):
            k = spacing(a, b)
            first, last = (a << CELL_BITS) >> k, ((b << CELL_BITS) - 1) >> k
            spacings[a:b], bases[a:b] = k, size - first
            parts.append(self.entries[torch.arange(first, last + 2) << k])
            size += last + 2 - first
        unit = 2.0 ** (self.bits + LINE_BITS)
        limit = float(_STEEPEST << LINE_BITS)
        slopes = [int(np.clip(np.rint(s * unit), -limit, limit)) for s in self.curve.slopes]
        return SegmentTable(
            self.q_in, self.q_out, torch.cat(parts), self.offset, self.bits, boundaries, spacings, bases,
            self.first, self.last, (slopes[0], slopes[1]), self.settings.symmetric_mode,
        )  # fmt: skip

    def divided(self) -> Boundaries:
        """Boundaries by the strategy of the settings."""
        count = min(self.settings.num_tables, self.stop - self.start)
        strategy = self.settings.strategy
        if strategy == "manual":
            return self._by_hand()
        ways = {name: self._by_density(name, count) for name in ("evenly", "curvature", "mix")}
        return ways[strategy] if strategy in ways else optimal(self.errors(), count, tuple(ways.values()))

    def errors(self) -> CellErrors:
        """What the table computes at every covered code with each spacing, against what is right."""
        u = torch.arange(self.start << CELL_BITS, self.stop << CELL_BITS)
        inside = np.arange(len(self.curve.known))
        covered = self.curve.known & (inside >= self.first) & (inside <= self.last)
        weights = self._weights(covered)[u.numpy()]
        visible = (covered & self.seen)[u.numpy()]
        cells = self.stop - self.start
        squared, largest = np.zeros((WIDEST + 1, cells)), np.zeros((WIDEST + 1, cells))
        for k in range(WIDEST + 1):
            errors = np.abs(self._interpolated(u, k) - self.reference[u.numpy()])
            squared[k] = (weights * errors**2).reshape(cells, -1).sum(axis=1)
            largest[k] = np.where(visible, errors, 0.0).reshape(cells, -1).max(axis=1)
        return CellErrors(squared, largest, self.start)

    def _interpolated(self, u: Tensor, k: int) -> Array:
        """Output codes at *u* with entries 2^k apart; the arithmetic of `SegmentTable`."""
        entries = self.entries.to(torch.int64)
        low, step = (u >> k) << k, 1 << k
        y = blended(entries[low], entries[low + step], u - low, k)
        rounded = shift_right(y, BLEND_BITS + self.bits, self.q_out.spec.rounding) + self.offset
        d = self.q_out.spec.dtype
        return np.asarray(rounded.clamp(d.qmin, d.qmax).numpy(), dtype=np.float64)

    def _weights(self, covered: Mask) -> Array:
        """Weights of sum 1 over the *covered* codes; each has at least `UNSEEN` / codes."""
        weights = np.where(covered, self.weights, 0.0)
        floor = covered / max(int(covered.sum()), 1)
        total = weights.sum()
        return weights / total * (1 - UNSEEN) + floor * UNSEEN if total > 0 else floor

    def _by_density(self, name: str, count: int) -> Boundaries:
        at = np.clip(np.arange(self.start, self.stop + 1) << CELL_BITS, self.first, self.last)
        values = self.reference[at]
        density = {"evenly": np.ones(len(at) - 1), "curvature": curvature(values), "mix": mixture(values)}
        return by_density(density[name], self.start, count)

    def _by_hand(self) -> Boundaries:
        """Each dividing point moved to the nearest cell boundary; points that meet, or lie outside, fall away."""
        points = np.asarray(self.settings.dividing_points)
        codes = points / self.q_in.scale[0] + self.q_in.zero_point[0] - self.q_in.spec.dtype.qmin
        # A point is the last code of its segment, a boundary the first of the next.
        cells = np.rint((codes + 1) / (1 << CELL_BITS))
        inner = {int(c) for c in cells if self.start < c < self.stop}
        return (self.start, *sorted(inner), self.stop)

    def _fold(self) -> None:
        """Let the codes from the middle on stand for both signs."""
        mode, z = self.settings.symmetric_mode, self.q_in.zero_point[0] - self.q_in.spec.dtype.qmin
        covers_all = self.first == 0 and self.last == 2 * MIDDLE - 1
        if z != MIDDLE or not (covers_all or self.first == 2 * MIDDLE - self.last):
            raise NumericsError(
                self.where,
                expected="zero point 0 and an input_range (-r, r) for a symmetric table",
                found=f"zero point {self.q_in.zero_point[0]}, input_range {self.settings.input_range}",
                remedy='Use symmetric_mode "none", or a symmetric range.',
            )
        if mode == "odd" and self.offset != self.q_out.zero_point[0]:
            raise NumericsError(
                self.where,
                expected="a 16-bit output of zero point 0 for an odd table",
                found=f"zero point {self.q_out.zero_point[0]}",
                remedy='Use symmetric_mode "none", or a symmetric output.',
            )
        z_out = self.q_out.zero_point[0] if mode == "odd" else 0
        right = self.reference[MIDDLE + 1 : -1] - z_out
        left = (self.reference[1:MIDDLE] - z_out)[::-1] * (-1 if mode == "odd" else 1)
        known = self.curve.known[MIDDLE + 1 :] & self.curve.known[1:MIDDLE][::-1]
        gap = np.abs(right - left)[known]
        if len(gap) and gap.max() > _GAP:
            raise NumericsError(
                self.where,
                expected=f"an {mode} function",
                found=f"values of both signs that differ by up to {gap.max():.3g} output steps",
                remedy='Use symmetric_mode "none".',
            )
        self.weights = self._both_signs(self.weights)
        self.seen = self.weights > 0
        self.first = MIDDLE

    @staticmethod
    def _both_signs(weights: Array) -> Array:
        folded = weights.copy()
        folded[MIDDLE + 1 :] += weights[1:MIDDLE][::-1]
        folded[-1] += weights[0]
        return folded
