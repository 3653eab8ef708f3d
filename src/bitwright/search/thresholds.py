"""Thresholds chosen jointly: coordinate descent on the sketch's quadratic form (docs/error-sketch.md §5).

Every value has some options: threshold methods, or one method with factors around it. The sum of all units' `c` is kept; a
move replaces one value's share of it. Nothing is executed: what each option does was sketched before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.sketch_file import Unit

#: Factors around a method's threshold. Rounding errors at two scales have nothing in common, so a grid is searched.
FACTORS = (0.7, 0.8, 0.9, 1.1)
_SWEEPS = 20
#: A move must gain more than this share of the loss: sketches are noisy.
_LEAST_GAIN = 1e-3
#: On shift-only targets a value's method changes its neighbours' weights: solve, sketch and descend again.
_ROUNDS = 3

Vector = npt.NDArray[np.float64]


def joint_thresholds(
    sketch: ErrorSketch,
    plan: Plan,
    solve: Callable[[Plan], Plan],
    methods: Sequence[str],
    *,
    factors: Sequence[float] = FACTORS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Plan]:
    """Methods, then factors around them, for all values of *plan* (solved) at once, at the precisions it has.

    *sketch*: around the float network; it is asked to measure what it has not yet. A group that would become float by new
    thresholds (a shift-only target) is left as it is. *returns*: the solved plan after each of the two; a true run decides.
    """
    roots = [n for n, e in plan.values.items() if e.role == "activation" and e.same_as is None]
    by_method = {
        n: [plan.values[n].method, *(m for m in methods if m != plan.values[n].method)] for n in roots
    }
    found = [_improved(sketch, plan, solve, by_method, progress)]
    if factors:
        chosen = {n: found[0].values[n].method for n in roots}
        around = {n: [m, *(f"{m}*{f:g}" for f in factors)] for n, m in chosen.items()}
        found.append(_improved(sketch, found[0], solve, around, progress))
    return found


def sketch_loss(sketch: ErrorSketch, plan: Plan, progress: Callable[[int, int], None] | None = None) -> float:
    """Predicted loss of a solved *plan*; measures what is missing."""
    reads = quantized_reads(sketch.evaluator.graph, plan)
    sketch.measure(sketch.missing([reads]), progress=progress)
    return sketch.predict(reads).loss


def _improved(
    sketch: ErrorSketch,
    best: Plan,
    solve: Callable[[Plan], Plan],
    options: Mapping[str, Sequence[str]],
    progress: Callable[[int, int], None] | None,
) -> Plan:
    """*best*, with the choice among the *options* of every value (the first is what it has now) that the sketch prefers."""
    shares = _Shares(sketch, best, solve, options, progress)
    current = dict.fromkeys(options, 0)
    for _ in range(_ROUNDS):
        moved = shares.descend(current, _scaled(sketch, best))
        if moved == current:
            break
        current = moved
        trial = solve(best.with_methods({n: options[n][i] for n, i in current.items()}))
        if trial.float_groups != best.float_groups:
            break
        sketch.measure(sketch.missing([quantized_reads(sketch.evaluator.graph, trial)]), progress=progress)
        best = trial
    return best


def _scaled(sketch: ErrorSketch, plan: Plan) -> Vector:
    """The plan's sum of `c`, scaled so that its squared length is the loss."""
    c = sketch.vector(quantized_reads(sketch.evaluator.graph, plan))
    return np.asarray(scaled(sketch, c.numpy()))


def scaled(sketch: ErrorSketch, c: npt.NDArray[np.float64]) -> Vector:
    """`c` `[..., rows, images]` as vectors whose squared length is a loss: `[..., rows * images]`."""
    weights = (sketch.row_weights.numpy()[:, None] / max(1, sketch.images)) ** 0.5
    made: Vector = (c * weights).reshape(*c.shape[:-2], -1)
    return made


class _Shares:
    """What every option of every value adds to the sum: `[options, rows * images]` for each value."""

    def __init__(
        self,
        sketch: ErrorSketch,
        plan: Plan,
        solve: Callable[[Plan], Plan],
        options: Mapping[str, Sequence[str]],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        count = max((len(o) for o in options.values()), default=0)
        plans = [
            solve(plan.with_methods({n: o[min(i, len(o) - 1)] for n, o in options.items()}))
            for i in range(count)
        ]
        graph = sketch.evaluator.graph
        reads = [quantized_reads(graph, p) for p in plans]
        sketch.measure(sketch.missing(reads), progress=progress)
        owned = [_by_owner(graph, plan, sketch.units_of(r)) for r in reads]
        #: Options that make the target refuse an operator are none.
        self.usable = [p.float_groups == plan.float_groups for p in plans]
        self.usable[0] = True
        zero = np.zeros((sketch.rows, sketch.images))
        self.shares: dict[str, Vector] = {}
        for name in options:
            per_option = [sum((_c(sketch, u) for u in by.get(name, ())), zero) for by in owned]
            self.shares[name] = scaled(sketch, np.stack(per_option))

    def trust(self, chosen: Mapping[str, int]) -> float:
        """How far interactions are believed, 0 to 1: the share of their mean square that is not the probes' noise.

        The cosine of two vectors of d random entries that have nothing in common has mean square 1/d; a search over all values
        would exploit just that (docs/error-sketch.md §5).
        """
        vectors = np.stack([s[chosen[n]] for n, s in self.shares.items()])
        vectors = vectors[np.einsum("ij,ij->i", vectors, vectors) > 0]
        if len(vectors) < 2:
            return 1.0
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        effective = (vectors**2).sum() ** 2 / ((vectors**2).sum(0) ** 2).sum()
        return float(np.clip(1 - 1 / effective / max((cosines**2).mean(), 1e-30), 0.0, 1.0))

    def descend(self, start: Mapping[str, int], total: Vector) -> dict[str, int]:
        """Coordinate descent from *start*, whose sum is *total*, until no value's move gains anything."""
        chosen = dict(start)
        usable = np.flatnonzero(self.usable)
        trust = self.trust(chosen)
        alone = sum(float(s[chosen[n]] @ s[chosen[n]]) for n, s in self.shares.items())
        loss = trust * float(total @ total) + (1 - trust) * alone
        for _ in range(_SWEEPS):
            before = loss
            for name, share in self.shares.items():
                without = total - share[chosen[name]]
                trials = without + share[usable]
                own = np.einsum("ij,ij->i", share, share)
                others = alone - own[chosen[name]]
                losses = trust * np.einsum("ij,ij->i", trials, trials) + (1 - trust) * (others + own[usable])
                i = int(losses.argmin())
                if losses[i] < loss * (1 - _LEAST_GAIN / 10):
                    chosen[name], total, loss = int(usable[i]), trials[i], float(losses[i])
                    alone = others + own[chosen[name]]
            if loss >= before * (1 - _LEAST_GAIN):
                break
        return chosen


def _c(sketch: ErrorSketch, unit: Unit) -> npt.NDArray[np.float64]:
    found = sketch.c.get(unit)
    return np.zeros((sketch.rows, sketch.images)) if found is None else found.numpy()


def _by_owner(graph: Graph, plan: Plan, units: Sequence[Unit]) -> dict[str, list[Unit]]:
    """Units by the value whose threshold decides them: itself or what it shares with; of a bias or weight, the operator's input."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        name: str | None = unit.value
        if graph.value(unit.value).is_constant:
            name = graph.op_inputs(unit.reader)[0]
        while name is not None and name in plan.values and plan.values[name].same_as is not None:
            name = plan.values[name].same_as
        if name is not None:
            found.setdefault(name, []).append(unit)
    return found
