"""The look-up tables of a plan, from what calibration saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from bitwright.calibrate.statistics import Statistics, ValueStatistics
from bitwright.errors import PlanError, UnknownName
from bitwright.graph.graph import Graph
from bitwright.numerics.histogram import SLOTS, Array
from bitwright.numerics.lut import LookupTable, SegmentTable, TableSettings
from bitwright.numerics.segments import CELL_BITS
from bitwright.numerics.spec import QParams
from bitwright.ops.table import own_settings, table_of
from bitwright.plan.plan import Plan
from bitwright.plan.reads import is_quantized

#: What a table depends on: operator, parameters of what it reads and makes, settings.
TableKey = tuple[str, QParams, QParams, TableSettings | None]


def build_tables(
    graph: Graph,
    plan: Plan,
    statistics: Statistics,
    settings: Mapping[str, TableSettings] | None = None,
    *,
    known: dict[TableKey, LookupTable] | None = None,
) -> dict[str, LookupTable]:
    """Operator -> table, of every quantized operator of *plan* (solved) that is looked up in one.

    *settings*: of single operators, instead of the plan's; where neither says anything, the default. Tables are made for the
    inputs that *statistics* saw. *known*: tables made before, which are taken as they are, and to which new ones are added.
    *raises* `PlanError`, `UnknownName`, `NumericsError`, naming the operator.
    """
    settings = settings or {}
    names = table_operators(graph, plan)
    for name in settings:
        if name not in names:
            raise UnknownName("table settings", kind="table operator", name=name, known=names)
    found = {}
    for name in names:
        read = graph.op_inputs(name)[0]
        assert read is not None
        q_in = _solved(plan, name, read, "input")
        q_out = _solved(plan, name, graph.op(name).outputs[0], "output")
        key = (name, q_in, q_out, settings.get(name) or plan.ops[name].table)
        if known is None or key not in known:
            weights = seen_codes(graph, statistics, name, q_in)
            found[name] = table_of(graph.op(name), q_in, q_out, key[3], weights=weights)
        else:
            found[name] = known[key]
        if known is not None:
            known[key] = found[name]
    return found


def seen_codes(graph: Graph, statistics: Statistics, op: str, q_in: QParams) -> Array | None:
    """`code_weights` of what the operator *op* reads; None if *statistics* did not see it."""
    seen = statistics.find(str(graph.op_inputs(op)[0]))
    return None if seen is None else code_weights(seen, q_in)


def error_on_data(
    graph: Graph, statistics: Statistics, op: str, table: LookupTable, *, unit: QParams | None = None
) -> tuple[float, float]:
    """Largest and RMS error of the operator's *table* on the inputs that *statistics* saw, in steps of *unit* (None: of its output)."""
    function = graph.op(op).table_function()
    assert function is not None
    largest, rms = table.error(function, weights=seen_codes(graph, statistics, op, table.q_in))
    ratio = 1.0 if unit is None else steps_in(unit, table)
    return ratio * largest, ratio * rms


def steps_in(unit: QParams, table: LookupTable) -> float:
    """How many steps of *unit* one output step of *table* is."""
    return table.q_out.scale[0] / unit.scale[0]


def table_operators(graph: Graph, plan: Plan) -> list[str]:
    """The quantized operators of *plan* that are looked up in tables, in execution order."""
    return [op.name for op in graph.ops if is_quantized(plan, op.name) and op.table_function() is not None]


def settled(graph: Graph, plan: Plan, tables: Mapping[str, LookupTable]) -> Plan:
    """*plan* with the dividing points of *tables* in place of the strategy that found them: no statistics are needed to make these
    tables again."""
    found = {}
    for name, table in tables.items():
        settings = plan.ops[name].table or own_settings(graph.op(name), table.q_in, table.q_out)
        if isinstance(table, SegmentTable):
            q, size = table.q_in, 1 << CELL_BITS
            codes = [b * size - 1 + q.spec.dtype.qmin for b in table.boundaries[1:]]
            points = tuple((c - q.zero_point[0]) * q.scale[0] for c in codes)
            settings = replace(settings, strategy="manual", dividing_points=points, num_tables=len(points))
        found[name] = settings
    return plan.with_tables(found)


def _solved(plan: Plan, op: str, value: str, what: str) -> QParams:
    q = plan.qparams(value)
    if q is None:
        raise PlanError(
            f"operator {op}",
            expected=f"a calibrated {what}",
            found=f"that its {what} {value} was never calibrated",
            remedy="Solve the plan with the statistics of this graph, or keep the operator float.",
        )
    return q


def code_weights(seen: ValueStatistics, q: QParams) -> Array:
    """How many elements were seen at each code of *q*, from the smallest on, `[256]` or `[65536]`.

    Where bins of the histogram are wider than codes, their elements are spread evenly; what was beyond the range counts at its end.
    """
    d, histogram = q.spec.dtype, seen.histogram
    counts = histogram.array().copy()
    counts[SLOTS] = max(counts[SLOTS] - seen.zeros, 0.0)
    edges = np.clip(np.arange(-SLOTS, SLOTS + 1) * histogram.width, seen.lo, seen.hi)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    between = (np.arange(d.qmin, d.qmax) + 0.5 - q.zero_point[0]) * q.scale[0]
    at = np.interp(between, edges, below)
    weights = np.diff(np.concatenate([[0.0], at, [below[-1]]]))
    weights[q.zero_point[0] - d.qmin] += seen.zeros
    return weights
