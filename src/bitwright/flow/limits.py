"""What a search may do: which precisions, at what cost, up to which limit; and what it cannot, said before any work."""

from __future__ import annotations

import math

from bitwright.errors import DataError
from bitwright.flow.bench import Bench
from bitwright.flow.ranking import chosen_groups, obstacle_to_sketch
from bitwright.flow.settings import Settings
from bitwright.plan.assign import allowed_precisions
from bitwright.plan.cost import Costs, Metric, measure_costs
from bitwright.plan.plan import Plan
from bitwright.plan.target import Precision


def check_search(bench: Bench, settings: Settings) -> None:
    """Settings that no search can follow are better named before the work, and where nothing is to be searched.

    *raises* `DataError` for patterns that match nothing, two limits, a cost that the network has nothing of, or one that needs
    a sketch where none is made; `TargetError` for a cost that the target has no figures for.
    """
    chosen_groups(bench, settings)
    if settings.budget is not None and settings.max_float_ops is not None:
        raise DataError(
            "--budget and --max-float-ops",
            expected="one limit",
            found="both",
            remedy="--max-float-ops N is --budget ops=N.",
        )
    if settings.cost == "ops":
        return
    measure_costs(bench.graph, bench.plan, bench.target, settings.cost)
    if settings.search_method == "exact" or obstacle_to_sketch(bench, settings) is not None:
        raise needs_sketch(settings.cost)


def needs_sketch(metric: Metric) -> DataError:
    """The error of a cost that only joint searches know, where operators are not sketched."""
    return DataError(
        f"--budget {metric}=…",
        expected="ops=N where operators are not sketched",
        found=metric,
        remedy="Use --method sketch+verify on a network that gradients lead through, or --budget ops=N.",
    )


def cost_limit(settings: Settings, usual: int) -> float:
    """The greatest cost of a plan. *usual*: of operators, where the settings name no limit."""
    if settings.budget is not None:
        return settings.budget
    if settings.cost != "ops":
        return math.inf
    return float(usual if settings.max_float_ops is None else settings.max_float_ops)


def options_and_costs(
    bench: Bench, plan: Plan, settings: Settings
) -> tuple[dict[str, list[Precision]], Costs]:
    """Group -> the precisions that the target allows it, of those that the settings ask for, its present one in *plan* always
    among them; and what they cost beyond *plan*. Groups that are float have no options."""
    found: dict[str, list[Precision]] = {}
    for group in plan.groups:
        present = plan.precision(group)
        if present == "float":
            continue
        allowed = allowed_precisions(bench.graph, plan, bench.target, group)
        found[group] = [p for p in allowed if p in settings.precisions or p == present]
    return found, measure_costs(bench.graph, plan, bench.target, settings.cost).within(found)
