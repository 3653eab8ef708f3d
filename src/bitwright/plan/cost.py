"""What precision costs: operators, multiply-accumulates, weight bytes, or a target's time (docs/targets.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from bitwright.errors import DataError, TargetError
from bitwright.graph.graph import Graph
from bitwright.graph.op import Role
from bitwright.plan.plan import Plan
from bitwright.plan.target import PRECISIONS, Estimate, Precision, Target

Metric = Literal["ops", "macs", "bytes", "latency"]

#: Bits of activations and of weights.
_BITS: dict[Precision, tuple[int, int]] = {
    "w4a8": (8, 4),
    "int8": (8, 8),
    "int16": (16, 8),
    "float": (32, 32),
}
#: Of two plans that widen as many operators, the narrower one is cheaper: by this much in all, which buys no operator.
_TIES = 0.5
#: Shares count operators too, a hundredth in all, so that one without multiply-accumulates or weights is not free.
_OPS_IN_SHARES = 0.01
_UNITS: dict[Metric, str] = {
    "ops": "operators widened beyond the tuned plan",
    "macs": "share of the multiply-accumulates, by products of bits, beyond the tuned plan: from int8 to float 1",
    "bytes": "share of the weight bytes, beyond the tuned plan: from int8 to float 1",
    "latency": "time beyond the tuned plan, as a share of the int8 network's",
}


@dataclass(frozen=True)
class Costs:
    """*of*: group -> precision -> cost; what the plan they were measured for has costs 0. *unit*: what is counted."""

    metric: Metric
    unit: str
    of: Mapping[str, Mapping[Precision, float]]

    def within(self, groups: Collection[str]) -> Costs:
        """The same for a search that chooses for *groups* only: what the others cost is not its business."""
        free: dict[Precision, float] = dict.fromkeys(PRECISIONS, 0.0)
        return Costs(self.metric, self.unit, {g: of if g in groups else free for g, of in self.of.items()})

    def total(self, precisions: Mapping[str, Precision]) -> float:
        """The cost of a plan with these *precisions* of groups."""
        return sum(self.of[g][p] for g, p in precisions.items())


def measure_costs(graph: Graph, plan: Plan, target: Target, metric: Metric) -> Costs:
    """What each precision of each group costs, beyond the one that *plan* gives it.

    `ops`, from int8: 1 for float, a little less for int16, a little less than nothing for w4a8; from int16, which is all that a target
    may allow inside softmax and norms: 1 for float. The littles of all groups together are less than an operator. `macs`: the group's share of the network's
    multiply-accumulates times (product of bits - 64) / (1024 - 64). `bytes`: its share of all weights and biases times
    (weight bits - 8) / (32 - 8). To both a hundredth of its share of operators is added. `latency`: see `Estimate`. *raises* `TargetError` for a target without figures,
    `DataError` for a network that has nothing of what is counted.
    """
    measures: dict[Metric, Callable[[], Mapping[str, Mapping[Precision, float]]]] = {
        "ops": lambda: _ops(plan),
        "macs": lambda: _shares(plan, _macs(graph, plan), _mac_cost, "multiply-accumulates"),
        "bytes": lambda: _shares(plan, _weights(graph, plan), _byte_cost, "weights"),
        "latency": lambda: _latency(graph, plan, target),
    }
    found = {g: (of, of[plan.precision(g)]) for g, of in measures[metric]().items()}
    return Costs(
        metric, _UNITS[metric], {g: {p: c - now for p, c in of.items()} for g, (of, now) in found.items()}
    )


def parse_budget(text: str) -> tuple[Metric, float]:
    """`macs=0.1` as what is counted and how much of it. *raises* `DataError`."""
    metric, _, number = text.partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if metric not in get_args(Metric) or not 0 <= amount < math.inf:
        raise DataError(
            "--budget",
            expected="ops=N, macs=X, bytes=X or latency=X, a number not below 0",
            found=repr(text),
            remedy="Example: --budget macs=0.1, a tenth of the multiply-accumulates in float.",
        )
    return cast(Metric, metric), amount


def _mac_cost(precision: Precision) -> float:
    a, w = _BITS[precision]
    return (a * w - 64) / (1024 - 64)


def _byte_cost(precision: Precision) -> float:
    return (_BITS[precision][1] - 8) / (32 - 8)


def _shares(
    plan: Plan, amounts: Mapping[str, float], cost: Callable[[Precision], float], what: str
) -> dict[str, dict[Precision, float]]:
    total = sum(amounts.values())
    if total <= 0:
        raise _nothing(what)
    each = _OPS_IN_SHARES / len(plan.groups)
    return {
        g: {p: amounts[g] / total * cost(p) + each * ops[p] for p in PRECISIONS}
        for g, ops in _ops(plan).items()
    }


def _ops(plan: Plan) -> dict[str, dict[Precision, float]]:
    """One for each group that is widened; of one that is int16 to begin with, from there."""
    groups = plan.groups
    tie = _TIES / max(1, len(groups))
    int8: dict[Precision, float] = {"w4a8": -tie, "int8": 0.0, "int16": 1 - tie, "float": 1.0}
    int16: dict[Precision, float] = {"w4a8": -2 * tie, "int8": -tie, "int16": 0.0, "float": 1.0}
    return {g: int16 if plan.ops[members[0]].precision == "int16" else int8 for g, members in groups.items()}


def _nothing(what: str) -> DataError:
    return DataError(
        "--budget",
        expected=f"a network with {what}",
        found="none",
        remedy="Count operators instead: --budget ops=N.",
    )


def _macs(graph: Graph, plan: Plan) -> dict[str, float]:
    macs = graph.macs()
    return {g: float(sum(macs[m] for m in members)) for g, members in plan.groups.items()}


def _weights(graph: Graph, plan: Plan) -> dict[str, float]:
    """Elements of weights and biases, each counted where it is read first."""
    found = dict.fromkeys(plan.groups, 0.0)
    for value in graph.values.values():
        reader = next((r for r in value.readers if r.role in (Role.WEIGHT, Role.BIAS)), None)
        if value.is_constant and reader is not None and plan.ops[reader.op].group in found:
            found[plan.ops[reader.op].group] += graph.constant(value.name).numel()
    return found


# --- latency ---------------------------------------------------------------------------------------------------


def _latency(graph: Graph, plan: Plan, target: Target) -> dict[str, dict[Precision, float]]:
    estimate = target.estimate
    if estimate is None:
        raise TargetError(
            f"target {target.name}",
            expected="figures to estimate latency with",
            found="none",
            remedy="Add `estimate:` to a target file of your own (docs/targets.md), or use --budget macs=X.",
        )
    macs, weights, values = _macs(graph, plan), _weights(graph, plan), _values(graph, plan)
    times = {
        g: {p: _time(estimate, p, macs[g], weights[g], values[g]) for p in PRECISIONS} for g in plan.groups
    }
    total, each = sum(of["int8"] for of in times.values()), _OPS_IN_SHARES / max(1, len(times))
    if total <= 0:
        raise _nothing("multiply-accumulates")
    return {
        g: {p: (times[g][p] - times[g]["int8"]) / total + each * ops[p] for p in PRECISIONS}
        for g, ops in _ops(plan).items()
    }


def _time(estimate: Estimate, precision: Precision, macs: float, weights: float, values: float) -> float:
    """Seconds for one sample: the longer of computing and moving."""
    a, w = _BITS[precision]
    rate = estimate.tops.get(precision) or estimate.tops["int8"] * (0.5 if precision == "int16" else 1.0)
    computing = 2 * macs / (rate * 1e12)
    if estimate.bandwidth_gb_s is None:
        return computing
    return max(computing, (values * a + weights * w) / 8 / (estimate.bandwidth_gb_s * 1e9))


def _values(graph: Graph, plan: Plan) -> dict[str, float]:
    """Elements of activations that a group reads or writes beyond its accumulators, of one sample."""
    found = {}
    for group, members in plan.groups.items():
        names = {*(n for m in members for n in (*graph.op_inputs(m), *graph.op(m).outputs))}
        read = [graph.value(n) for n in names if n is not None and n in plan.values]
        shapes = [v.info.shape for v in read if not v.is_constant]
        elements = sum(math.prod(s) for s in shapes if s is not None)
        found[group] = elements / max(1, graph.info.example_batch)
    return found
