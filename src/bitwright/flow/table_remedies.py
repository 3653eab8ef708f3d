"""What helps a guilty table: other dividing points, more segments, a narrower range, one period, a wider output."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from bitwright.analysis.lut_blame import recovered_at
from bitwright.flow.table_scores import TableScores
from bitwright.flow.tables import error_on_data, seen_codes
from bitwright.graph.op import Op
from bitwright.numerics.lut import DirectTable, LookupTable, TableSettings
from bitwright.ops.table import own_settings, table_of
from bitwright.plan.plan import LEARNED, Plan

#: Segments that are tried, few to many.
COUNTS = (6, 12, 24, 48, 96)
#: Remedies of a table that are run; what makes the table itself no better is not.
_RUNS = 6
#: A remedy must make the table's error on the data smaller than this share of what it was.
_BETTER = 0.95
#: A remedy that halves it, and with which the score recovers, ends the search. A score alone can recover by luck.
_GOOD = 0.5
_PERIODIC = {"Sin": 2 * math.pi, "Cos": 2 * math.pi, "Tan": math.pi}


@dataclass(frozen=True)
class Remedied:
    """One remedy that was run.

    *error*: (largest, RMS) of the table on the data before and after, both in steps of the output as it was before. *score*: of the
    network with all tables in fixed point but those whose turn comes later, before and after. *kept*: whether the plan has it.
    """

    name: str
    remedy: str
    error: tuple[tuple[float, float], tuple[float, float]]
    score: tuple[float, float]
    kept: bool


def remedies(
    op: Op, table: LookupTable, now: TableSettings, seen: tuple[float, float]
) -> Iterator[tuple[str, TableSettings]]:
    """Settings worth trying in place of *now*, the cheapest first. *seen*: smallest and largest input, real units."""
    if isinstance(table, DirectTable):
        return
    plain = replace(now, form="auto", dividing_points=None, period=None)
    if now.strategy == "manual":
        plain = replace(plain, strategy="optimal")
    if op.kind in _PERIODIC:
        free = TableSettings(period=_PERIODIC[op.kind], num_tables=now.num_tables)
        yield "one period", free
    for count in sorted({*COUNTS, now.num_tables}):
        if count < now.num_tables:
            continue
        more = "" if count == now.num_tables else f", {count} segments"
        for strategy in ("optimal", "curvature", "mix"):
            yield f"divided anew ({strategy}){more}", replace(plain, strategy=strategy, num_tables=count)
        if seen[0] < seen[1]:
            narrow = replace(plain, strategy="optimal", num_tables=count, symmetric_mode="none")
            yield f"range of the data only{more}", replace(narrow, input_range=seen)


class Repair:
    """Remedies tried on *plan*, operator by operator, each by a true run; `plan` is the best so far."""

    def __init__(self, scores: TableScores, plan: Plan, tell: Callable[[Remedied], None]) -> None:
        self.scores, self.bench, self.plan, self._tell = scores, scores.bench, plan, tell
        self.tried: list[Remedied] = []
        #: Operator -> the remedy that was kept, or why there is none.
        self.outcomes: dict[str, str] = {}

    def run(self, name: str, pending: Collection[str] = ()) -> None:
        """Find what helps the table of operator *name* and keep it.

        *pending*: guilty ones whose turn comes later. They are float meanwhile: where several spoil the score, mending one shows nothing.
        """
        before = self.scores.score(self.plan, pending).value
        enough = recovered_at(before, self.scores.score(self.plan, [name, *pending]).value)
        if enough <= before:
            self.outcomes[name] = "none needed"
            return
        found: list[tuple[Remedied, Plan]] = []
        for remedy, plan in self._plans(name):
            remedied = self._remedied(name, remedy, plan, before, self.scores.score(plan, pending).value)
            found.append((remedied, plan))
            if remedied.score[1] >= enough and remedied.error[1][1] <= _GOOD * remedied.error[0][1]:
                break
        kept = self._keep_best(found, enough)
        self.outcomes[name] = kept or ("none helped" if found else "none known")

    def _keep_best(self, found: Sequence[tuple[Remedied, Plan]], enough: float) -> str | None:
        """Of remedies with which the score recovers the one of the least error, else that of the best score, if it helps.

        *returns*: the remedy that was kept.
        """
        helping = [f for f in found if f[0].score[1] > f[0].score[0]]
        recovering = [f for f in found if f[0].score[1] >= enough]
        best = None
        if recovering:
            best = min(recovering, key=lambda f: f[0].error[1][1])
        elif helping:
            best = max(helping, key=lambda f: f[0].score[1])
        if best is not None:
            self.plan = best[1]
        for pair in found:
            remedied = replace(pair[0], kept=pair is best)
            self.tried.append(remedied)
            self._tell(remedied)
        return None if best is None else best[0].remedy

    def _plans(self, name: str) -> Iterator[tuple[str, Plan]]:
        """Plans in which the table's error on the data is smaller, the cheapest first; then one with a wider output."""
        ran, (_, now) = 0, self._error(name, self.scores.tables(self.plan)[name])
        for remedy, settings in self._candidates(name):
            if ran == _RUNS:
                break
            _, error = self._error(name, self._table(name, settings))
            if error < _BETTER * now:
                now, ran = error, ran + 1
                yield remedy, self.plan.with_tables({name: settings})
        wider = self._wider(name)
        if wider is not None:
            yield "int16 output", wider

    def _candidates(self, name: str) -> Iterator[tuple[str, TableSettings]]:
        table, op = self.scores.tables(self.plan)[name], self.bench.graph.op(name)
        now = self.plan.ops[name].table or own_settings(op, table.q_in, table.q_out)
        read = self.bench.graph.op_inputs(name)[0]
        assert read is not None
        seen = self.bench.statistics[read]
        return remedies(op, table, now, (seen.lo, seen.hi))

    def _wider(self, name: str) -> Plan | None:
        """The plan with an int16 result of the operator, where the target allows it and it is not so already."""
        entry, target = self.plan.ops[name], self.bench.target
        group = self.plan.groups[entry.group]
        if any(e.method == LEARNED for e in self.plan.values.values()):
            return None  # no statistics would give the parameters of the rest again
        if entry.precision != "int8" or any(
            "int16" not in target.allowed(self.plan.ops[m].kind) for m in group
        ):
            return None
        return self.bench.solver.solve(
            self.plan.with_precision([entry.group], "int16", "its table loses accuracy at int8")
        )

    def _table(self, name: str, settings: TableSettings) -> LookupTable:
        table = self.scores.tables(self.plan)[name]
        weights = seen_codes(self.bench.graph, self.bench.statistics, name, table.q_in)
        return table_of(self.bench.graph.op(name), table.q_in, table.q_out, settings, weights=weights)

    def _error(self, name: str, table: LookupTable) -> tuple[float, float]:
        """Largest and RMS error on the data, in output steps of the table that the plan has so far."""
        unit = self.scores.tables(self.plan)[name].q_out
        return error_on_data(self.bench.graph, self.bench.statistics, name, table, unit=unit)

    def _remedied(self, name: str, remedy: str, plan: Plan, before: float, after: float) -> Remedied:
        then, now = (self._error(name, self.scores.tables(p)[name]) for p in (self.plan, plan))
        return Remedied(name, remedy, (then, now), (before, after), False)
