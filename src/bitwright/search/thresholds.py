"""Thresholds chosen jointly: coordinate descent on the sketch's quadratic form (docs/error-sketch.md §5).

Every value has some options: threshold methods, or one method with factors around it. Roundings of different values are
independent, so each has a loss of its own; what a threshold does to weights and biases is a share of one sum, which a move
replaces. Nothing is executed: what each option does was sketched before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitwright.graph.graph import Graph
from bitwright.graph.replay import Reads
from bitwright.numerics.spec import QParams
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.error_sketch import ErrorSketch, effective_reads

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

    *sketch*: around the float network; it is asked to measure what it has not yet. If new thresholds would make a group
    float (a shift-only target), they are dropped. *returns*: the solved plan after each of the two; a true run decides.
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
        reads = quantized_reads(sketch.evaluator.graph, best)
        moved = shares.descend(current, scaled(sketch, sketch.constants(reads).numpy()))
        if moved == current:
            break
        current = moved
        trial = solve(best.with_methods({n: options[n][i] for n, i in current.items()}))
        if trial.float_groups != best.float_groups:
            break
        sketch.measure(sketch.missing([quantized_reads(sketch.evaluator.graph, trial)]), progress=progress)
        best = trial
    return best


def scaled(sketch: ErrorSketch, c: npt.NDArray[np.float64]) -> Vector:
    """`c` `[..., rows, images]` as vectors whose squared length is a loss: `[..., rows * images]`."""
    weights = (sketch.row_weights.numpy()[:, None] / max(1, sketch.images)) ** 0.5
    made: Vector = (c * weights).reshape(*c.shape[:-2], -1)
    return made


class _Shares:
    """What every option of every value adds: to the sum of the constants (`constants`, `[options, rows * images]`: a bias's step follows
    from thresholds, on a shift-only target a weight's too), and by its own roundings to the loss (`own`, `[options]`)."""

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
        reads = [effective_reads(graph, quantized_reads(graph, p)) for p in plans]
        sketch.measure(sketch.missing(reads), progress=progress)
        owned = [_by_owner(graph, plan, r) for r in reads]
        #: Options that make the target refuse an operator are none.
        self.usable = [p.float_groups == plan.float_groups for p in plans]
        self.usable[0] = True
        self.constants: dict[str, Vector] = {}
        self.own: dict[str, Vector] = {}
        for name in options:
            mine = [by.get(name, {}) for by in owned]
            self.constants[name] = scaled(sketch, np.stack([sketch.constants(r).numpy() for r in mine]))
            alone = [{e: q for e, q in r.items() if not graph.value(e[0]).is_constant} for r in mine]
            self.own[name] = np.array([sketch.predict(r).loss for r in alone])

    def descend(self, start: Mapping[str, int], total: Vector) -> dict[str, int]:
        """Coordinate descent from *start*, whose constants add up to *total*, until no value's move gains anything."""
        chosen = dict(start)
        usable = np.flatnonzero(self.usable)
        loss = float(total @ total) + sum(float(own[chosen[n]]) for n, own in self.own.items())
        for _ in range(_SWEEPS):
            before = loss
            for name, own in self.own.items():
                share, now = self.constants[name], chosen[name]
                trials = total - share[now] + share[usable]
                gained = np.einsum("ij,ij->i", trials, trials) + own[usable] - float(total @ total) - own[now]
                i = int(gained.argmin())
                if gained[i] < -loss * _LEAST_GAIN / 10:
                    chosen[name], total = int(usable[i]), trials[i]
                    loss += float(gained[i])
            if loss >= before * (1 - _LEAST_GAIN):
                break
        return chosen


def _by_owner(graph: Graph, plan: Plan, reads: Reads) -> dict[str, dict[tuple[str, str], QParams]]:
    """Reads by the value whose threshold decides them: itself or what it shares with; of a bias or weight, the operator's input."""
    found: dict[str, dict[tuple[str, str], QParams]] = {}
    for (value, reader), q in reads.items():
        name: str | None = value
        if graph.value(value).is_constant:
            name = graph.op_inputs(reader)[0]
        while name is not None and name in plan.values and plan.values[name].same_as is not None:
            name = plan.values[name].same_as
        if name is not None:
            found.setdefault(name, {})[(value, reader)] = q
    return found
