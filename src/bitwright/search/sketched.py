"""The sensitivity of all operators from the error sketch, the top ones verified by partial re-execution."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from bitwright.graph.replay import Reads
from bitwright.plan.plan import Plan
from bitwright.plan.reads import reads_of_group
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.sensitivity import Sensitivity

#: Groups at the beginning of a network that are measured with the top ones: there a sketch sees least of an error.
EARLY = 4
#: Measures some groups exactly: their rows.
Exact = Callable[[Collection[str]], Sequence[Sensitivity]]


def sketch_sensitivity(
    sketch: ErrorSketch,
    plan: Plan,
    candidates: Mapping[str, Mapping[str, Reads]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Sensitivity], dict[str, str]]:
    """The rows of all *candidates*, in descending order of loss, and group -> reason of those that no gradient reaches."""
    sketch.measure(sketch.missing(r for of in candidates.values() for r in of.values()), progress=progress)
    rows, unreachable = [], dict[str, str]()
    for group, by_method in candidates.items():
        losses = {m: sketch.predict(reads) for m, reads in by_method.items()}
        best = min(losses, key=lambda m: losses[m].loss)
        values = {m: p.loss for m, p in losses.items()}
        errors = {m: p.error for m, p in losses.items()}
        members = tuple(plan.groups[group])
        rows.append(Sensitivity(group, plan.ops[group].kind, members, values, errors, best, sketched=values))
        for unit in (u for reads in by_method.values() for u in sketch.units_of(reads)):
            if unit in sketch.unreachable:
                unreachable.setdefault(group, f"{unit.value}: {sketch.unreachable[unit]}")
    return sorted(rows, key=lambda r: -r.loss), unreachable


def unreachable_groups(sketch: ErrorSketch, plan: Plan) -> dict[str, str]:
    """Quantized groups of *plan* (solved, measured) with a unit that no gradient tells: group -> why."""
    found: dict[str, str] = {}
    for group, members in plan.groups.items():
        for unit in sketch.units_of(reads_of_group(sketch.evaluator.graph, plan, members)):
            if unit in sketch.unreachable:
                found.setdefault(group, f"{unit.value}: {sketch.unreachable[unit]}")
    return found


def verify_top(
    rows: Sequence[Sensitivity],
    exact: Exact,
    *,
    count: int,
    early: Sequence[str] = (),
    always: Collection[str] = (),
) -> list[Sensitivity]:
    """*rows* with the *count* most sensitive groups measured exactly, and ranked anew; with them those of *always*, of which the
    sketch knows nothing, and the first of *early*, up to `EARLY` or *count*.

    A group that comes up into the first *count* as others fall is measured too, until all of them are (at most as many again).
    """
    by_name = {r.name: r for r in rows}
    sure = [*always, *early[: min(EARLY, count)]]
    known, budget = set[str](), 2 * count + len(sure)
    wanted = [*dict.fromkeys([*sure, *(r.name for r in rows[:count])])]
    while wanted and len(known) < budget:
        for row in exact(wanted):
            sketched = by_name[row.name].sketched
            by_name[row.name] = replace(row, sketched={} if row.name in always else sketched)
        known.update(wanted)
        ranked = sorted(by_name.values(), key=lambda r: -r.loss)
        wanted = [r.name for r in ranked[:count] if r.name not in known]
    return sorted(by_name.values(), key=lambda r: -r.loss)
