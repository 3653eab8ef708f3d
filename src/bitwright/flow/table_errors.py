"""The error of a look-up table along its inputs, before and after repair, as a drawing."""

from __future__ import annotations

import numpy as np

from bitwright.flow.bench import Bench
from bitwright.flow.tables import seen_codes, steps_in
from bitwright.numerics.histogram import Array
from bitwright.numerics.lut import LookupTable
from bitwright.numerics.spec import QParams
from bitwright.numerics.table_curve import RealFunction
from bitwright.table import Column, Table

#: Points of a drawing.
_POINTS = 96


def error_table(bench: Bench, name: str, before: LookupTable, after: LookupTable) -> Table:
    """Mean error of the table of operator *name* in each of `_POINTS` parts of the inputs that were seen, and how many inputs lie there,
    as a share of the part with the most. *after*: the table once repaired: at the same real inputs, and also in output steps of
    *before*.
    """
    function = bench.graph.op(name).table_function()
    weights = seen_codes(bench.graph, bench.statistics, name, before.q_in)
    assert function is not None
    assert weights is not None
    edges = _edges(before.q_in, weights)
    seen = _sums(_inputs(before.q_in), edges, weights)
    series = {
        "input": (edges[:-1] + edges[1:]) / 2,
        "error": _mean_errors(function, before, edges, before.q_out),
        "repaired": _mean_errors(function, after, edges, before.q_out),
        "inputs": seen / seen.max(),
    }
    columns = [Column("input", "input", "", 5), Column("error", "mean error", "steps", 4)]
    if before is not after:
        columns.append(Column("repaired", "mean error, repaired", "steps", 4))
    columns.append(Column("inputs", "inputs seen, as a share of the most", "", 4))
    rows = tuple({c.key: _cell(series[c.key][part]) for c in columns} for part in range(len(series["input"])))
    return Table(f"Error of the table of {name} over its inputs", tuple(columns), rows)


def _cell(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def _inputs(q: QParams) -> Array:
    """The real value of every code of *q*, from the smallest on."""
    d = q.spec.dtype
    return _real(np.arange(d.qmin, d.qmax + 1, dtype=np.float64), q)


def _real(codes: Array, q: QParams) -> Array:
    return (codes - q.zero_point[0]) * q.scale[0]


def _edges(q: QParams, weights: Array) -> Array:
    """Where the parts begin and end: real inputs, each halfway between two codes of *q*. All inputs that were seen lie between them."""
    used = np.flatnonzero(weights)
    first, stop = int(used[0]), int(used[-1]) + 1
    parts = np.array_split(np.arange(first, stop), min(_POINTS, stop - first))
    return _real(np.array([*(p[0] for p in parts), stop], np.float64) - 0.5 + q.spec.dtype.qmin, q)


def _sums(inputs: Array, edges: Array, weights: Array) -> Array:
    """The sum of *weights* over the *inputs* in each part."""
    return np.asarray(np.histogram(inputs, edges, weights=weights)[0], np.float64)


def _mean_errors(function: RealFunction, table: LookupTable, edges: Array, unit: QParams) -> Array:
    """Mean error of *table* in each part, in steps of *unit*; NaN where it has no code, or *function* no finite value."""
    errors, inputs = table.errors(function), _inputs(table.q_in)
    known = np.isfinite(errors)
    total = _sums(inputs[known], edges, errors[known])
    count = _sums(inputs[known], edges, np.ones(int(known.sum())))
    total[count == 0] = np.nan
    return steps_in(unit, table) * total / np.maximum(count, 1)
