"""Look-up tables: Gather, and linear interpolation between entries in the arithmetic of `numerics/lookup_table.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitwright.exporters.integer.lowering import LOWERINGS, TABLE, Lowering
from bitwright.exporters.integer.number import NO_ZERO, Carrier, Integer, codes_of, same_parameters
from bitwright.exporters.integer.rescale import finish, requantize
from bitwright.exporters.writer import to_numpy
from bitwright.graph.op import Op
from bitwright.numerics.affine import dequantize, quantize
from bitwright.numerics.lookup_table import (
    BLEND_BITS,
    LINE_BITS,
    MIDDLE,
    PHASE_BITS,
    REGULAR_BITS,
    SEEN_BITS,
    DirectTable,
    LookupTable,
    PeriodicTable,
    RegularTable,
    SegmentTable,
)
from bitwright.numerics.segments import CELL_BITS, CELLS
from bitwright.numerics.spec import QParams

_Interpolated = RegularTable | SegmentTable | PeriodicTable


@LOWERINGS.register(TABLE)
def _table(low: Lowering, op: Op) -> None:
    table = low.tables[op.name]
    x = low.integer(op, 0)
    if x.q is None or not same_parameters(x.q, table.q_in) or (x.floor, x.ceiling) != (None, None):
        x = requantize(low, op, x, table.q_in)
    with low.function(_NAMES[type(table)]):
        result = _FORMS[type(table)](low, op, x.name, table)
    finish(low, op, result)


@LOWERINGS.register("Floor", "Ceil", "Round", "Trunc", "Sign", "Shrink", "ThresholdedRelu")
def _jumping(low: Lowering, op: Op) -> None:
    """Functions that jump: the result of every code, since no interpolation follows them."""
    x, q = low.integer(op, 0), low.output_q(op)
    if x.q is None:
        raise low.refusal(op, "an input that is quantized")
    d = x.q.spec.dtype
    every = dequantize(torch.arange(d.qmin, d.qmax + 1), x.q)
    finish(low, op, _looked_up(low, x.name, x.q, quantize(op(every), q), q))


def _looked_up(low: Lowering, codes: str, q_in: QParams, entries: Tensor, q_out: QParams) -> Integer:
    """*entries* `[n]`, from the smallest code on, at *codes*. Negative indices count from the end, so nothing is subtracted."""
    d = q_in.spec.dtype
    stored = np.roll(to_numpy(entries), d.qmin)
    result = codes_of("", q_out)
    with low.function("Table"):
        index = codes if d.bits == 16 else low.cast(codes, "int32")
        name = low.node("Gather", low.constant(stored.astype(result.carrier), "table"), index)
    return codes_of(name, q_out)


def _direct(low: Lowering, op: Op, codes: str, table: LookupTable) -> Integer:
    assert isinstance(table, DirectTable)
    return _looked_up(low, codes, table.q_in, table.entries, table.q_out)


def _regular(low: Lowering, op: Op, codes: str, table: LookupTable) -> Integer:
    assert isinstance(table, RegularTable)
    u = _from_zero(low, codes, table)
    fraction = low.node("BitwiseAnd", u, low.literal((1 << REGULAR_BITS) - 1))
    y = _between(low, table.entries, _shift(low, u, REGULAR_BITS), fraction, REGULAR_BITS, "int32")
    return _result(low, op, y, "int32", REGULAR_BITS, table)


def _segments(low: Lowering, op: Op, codes: str, table: LookupTable) -> Integer:
    assert isinstance(table, SegmentTable)
    u = _from_zero(low, codes, table)
    negative = ""
    if table.symmetric_mode != "none":
        offset = low.node("Sub", u, low.literal(MIDDLE))
        negative = low.node("Less", offset, low.literal(0))
        u = low.node("Add", low.node("Abs", offset), low.literal(MIDDLE))
        u = low.node("Min", u, low.literal(2 * MIDDLE - 1))
    held = low.node(
        "Clip",
        u,
        low.constant(np.array(table.first, np.int32), "first"),
        low.constant(np.array(table.last, np.int32), "last"),
    )
    y, carrier, bits = _on_the_curve(low, held, table), "int32", BLEND_BITS
    if table.has_lines:
        y, carrier, bits = _with_lines(low, u, y, table), "int64", LINE_BITS
    if table.symmetric_mode == "odd":
        y = low.node("Where", negative, low.node("Neg", y), y)
    return _result(low, op, y, "int64" if carrier == "int64" else "int32", bits, table)


def _on_the_curve(low: Lowering, u: str, table: SegmentTable) -> str:
    """Entries · 2^10 at the covered offset codes *u*."""
    columns = np.stack([to_numpy(t).astype(np.int64) for t in (table.spacings, table.bases)])
    starts = np.flatnonzero((columns[:, 1:] != columns[:, :-1]).any(0)) + 1
    spacings, bases = columns[:, [0, *starts]]
    of_cell = _segments_of_cells(low, starts)
    # By cell, all this depends on constants alone: engines compute it when they load.
    k = low.node("Gather", low.cast(low.constant(spacings.astype(np.uint8), "spacings"), "uint32"), of_cell)
    base = low.node("Gather", low.constant(bases.astype(np.int32), "bases"), of_cell)
    width = low.cast(low.node("BitShift", low.literal(1, "uint32"), k, direction="LEFT"), "int32")
    mask = low.node("Sub", width, low.literal(1))
    factor = low.node("Div", low.literal(1 << BLEND_BITS), width)

    cell = _shift(low, u, CELL_BITS)
    shifted = low.node("BitShift", low.cast(u, "uint32"), low.node("Gather", k, cell), direction="RIGHT")
    index = low.node("Add", low.cast(shifted, "int32"), low.node("Gather", base, cell))
    fraction = low.node("BitwiseAnd", u, low.node("Gather", mask, cell))
    fraction = low.node("Mul", fraction, low.node("Gather", factor, cell))
    return _between(low, table.entries, index, fraction, BLEND_BITS, "int32")


def _segments_of_cells(low: Lowering, starts: npt.NDArray[np.int64]) -> str:
    """The number of the segment of each cell, from the cells at which all but the first start."""
    cells = low.node("Range", low.literal(0), low.literal(CELLS), low.literal(1))
    column = low.node("Unsqueeze", cells, low.literal([1], "int64"))
    begun = low.node("GreaterOrEqual", column, low.constant(starts.astype(np.int32), "starts"))
    return low.node("ReduceSum", low.cast(begun, "int32"), low.literal([1], "int64"), keepdims=0)


def _with_lines(low: Lowering, u: str, y: str, table: SegmentTable) -> str:
    """Entries · 2^24: *y*, and what the straight lines add outside."""
    wide = low.cast(u, "int64")
    y = low.node("Mul", low.cast(y, "int64"), low.literal(1 << (LINE_BITS - BLEND_BITS), "int64"))
    for bound, slope, op_type in (
        (table.first, table.slopes[0], "Min"),
        (table.last, table.slopes[1], "Max"),
    ):
        if slope:
            beyond = low.node(
                op_type,
                low.node("Sub", wide, low.constant(np.array(bound, np.int64), "end")),
                low.literal(0, "int64"),
            )
            y = low.node("Add", y, low.node("Mul", beyond, low.constant(np.array(slope, np.int64), "slope")))
    return y


def _periodic(low: Lowering, op: Op, codes: str, table: LookupTable) -> Integer:
    assert isinstance(table, PeriodicTable)
    wide = low.node("Sub", low.cast(codes, "int64"), low.constant(np.array(table.q_in.zero_point[0]), "zero"))
    turns = low.node("Mul", wide, low.constant(np.array(table.multiplier), "multiplier"))
    phase = low.node("BitwiseAnd", turns, low.literal((1 << PHASE_BITS) - 1, "int64"))
    phase = _shift(low, phase, PHASE_BITS - SEEN_BITS, "uint64")
    bits = SEEN_BITS - table.index_bits
    fraction = low.cast(low.node("BitwiseAnd", phase, low.literal((1 << bits) - 1)), "int64")
    y = _between(low, table.entries, _shift(low, phase, bits), fraction, bits, "int64")
    return _result(low, op, y, "int64", bits, table)


_FORMS: dict[type[LookupTable], Callable[[Lowering, Op, str, LookupTable], Integer]] = {
    DirectTable: _direct,
    RegularTable: _regular,
    SegmentTable: _segments,
    PeriodicTable: _periodic,
}
_NAMES = {
    DirectTable: "Table",
    RegularTable: "RegularTable",
    SegmentTable: "SegmentTable",
    PeriodicTable: "PeriodicTable",
}


def _from_zero(low: Lowering, codes: str, table: LookupTable) -> str:
    """Offset codes, 0 … 65535."""
    qmin = table.q_in.spec.dtype.qmin
    return low.node("Sub", codes, low.literal(qmin)) if qmin else codes


def _shift(low: Lowering, u: str, bits: int, unsigned: str = "uint32") -> str:
    """u >> bits, of integers that are not negative; int32."""
    shifted = low.node("BitShift", low.cast(u, unsigned), low.literal(bits, unsigned), direction="RIGHT")
    return low.cast(shifted, "int32")


def _between(low: Lowering, entries: Tensor, index: str, fraction: str, bits: int, to: Carrier) -> str:
    """Entries · 2^bits, *fraction* · 2^-bits of the way from entry *index* to the next."""
    stored = low.constant(to_numpy(entries).astype(np.int16), "table")
    first = low.cast(low.node("Gather", stored, index), to)
    second = low.cast(low.node("Gather", stored, low.node("Add", index, low.literal(1))), to)
    rise = low.node("Mul", low.node("Sub", second, first), fraction)
    return low.node("Add", low.node("Mul", first, low.literal(1 << bits, to)), rise)


def _result(low: Lowering, op: Op, name: str, to: Carrier, bits: int, table: _Interpolated) -> Integer:
    """Output codes of entries · 2^bits: rounded before the offset is added, as the table does it."""
    shift = bits + table.fraction_bits
    # On a straight line an entry may grow by the steepest slope, 2^16, for each of 2^16 codes.
    peak = 1 << (bits + (15 if to == "int32" else 33))
    y = Integer(name, to, np.array(table.q_out.scale[0] * 2.0**-shift), NO_ZERO, -peak, peak)
    rounded = requantize(low, op, y, replace(table.q_out, zero_point=(table.offset,)))
    return codes_of(rounded.name, table.q_out)
