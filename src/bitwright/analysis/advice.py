"""What looks wrong in the layers of an analysed model, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from bitwright.analysis.layers import LayerStatistics
from bitwright.table import Column, Table

#: Real units; beyond it the steps of 8 bits are coarse.
LARGE_RANGE = 10.0
#: Below it a layer whose range is covered suffers from rounding.
LOW_COSINE = 0.95

COLUMNS = (Column("name", "mod_name"), Column("kind", "op_type"), Column("advice", "advice"))


def advise(layers: Collection[LayerStatistics]) -> Table:
    """One row for each thing that looks wrong."""
    rows = tuple(
        {"name": layer.name, "kind": layer.kind, "advice": text}
        for layer in layers
        for text in _advice(layer)
    )
    return Table("Layers that look abnormal" if rows else "No layer looks abnormal", COLUMNS, rows)


def _advice(layer: LayerStatistics) -> Iterator[str]:
    row, q = layer.row, layer.qparams
    lo, hi = row.get("base_model_min"), row.get("base_model_max")
    if lo is None or hi is None:
        return
    most = max(abs(lo), abs(hi))
    if not math.isfinite(most):
        yield "The baseline has NaN or infinity here: mend the float model."
        return
    if not math.isfinite(row["L1"]):
        yield "The analysed model has NaN or infinity here."
    if q is None:
        return
    if most > LARGE_RANGE and q.spec.dtype.bits <= 8:
        yield f"Total data range {lo:.4g} … {hi:.4g} maybe too large for quantization. Try int16."
    if layer.clipped:
        yield (
            f"Current scale does not cover the data range: {layer.clipped:.2%} of the numbers are clipped."
            f" Calibrate on more data, or set fixed scale {most / q.spec.dtype.qmax:.6g}."
        )
    elif most > 0.0 and row["Cosine"] < LOW_COSINE:
        yield f"Rounding error: the range is covered, but the cosine is {row['Cosine']:.4f}. Try int16."
