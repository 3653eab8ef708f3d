"""Mixed precision as an optimisation: the least predicted loss for a cost, and the cheapest plan for a loss.

Greedy descent by gain per cost, from the cheapest state up and from the widest down, over moves of one group, of two neighbours and of all groups around a value, since putting an
operator alone to float rarely frees its inputs: its neighbours still quantize them. Then exchanges: give one group back, take
another. Every state that the descent passes is a point of the front (docs/error-sketch.md §6).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitwright.plan.cost import Costs
from bitwright.plan.target import Precision
from bitwright.search.plan_model import PlanModel, Precisions, Vector

#: A move must gain more than this share of the loss.
_LEAST_GAIN = 1e-4
#: Rounds of exchanges at one cost.
_EXCHANGES = 4
#: Groups around one value that a single move may change.
_CLUSTER = 6
_FREE = 1e-12


@dataclass(frozen=True)
class Point:
    """A state of the search. *cost*: by its `Costs`; *predicted*: loss by the sketch."""

    precisions: Mapping[str, Precision]
    cost: float
    predicted: float


@dataclass(frozen=True)
class _Move:
    """Give *groups* one *precision*, those that may have it."""

    groups: tuple[str, ...]
    precision: Precision


@dataclass
class _State:
    """*total*: the sum whose squared length is, but for the model's constant, the loss."""

    precisions: Precisions
    total: Vector
    cost: float

    @property
    def square(self) -> float:
        return float(self.total @ self.total)


class Optimizer:
    """Searches the precisions that *model* offers, under *costs*."""

    def __init__(self, model: PlanModel, costs: Costs) -> None:
        self.model, self.costs = model, costs
        self._moves = list(_moves(model))
        self._cheapest: Precisions = {
            g: min(o, key=lambda p: costs.of[g].get(p, 0.0)) for g, o in model.options.items()
        }
        self._widest: Precisions = {
            g: max(o, key=lambda p: costs.of[g].get(p, 0.0)) for g, o in model.options.items()
        }
        near = [model.neighbourhood(m.groups) for m in self._moves]
        #: Group -> the moves whose effect depends on its precision.
        self._near = {g: np.array([i for i, n in enumerate(near) if g in n], int) for g in model.options}
        self._single = np.array([len(m.groups) == 1 for m in self._moves], bool)
        self._vectors = np.zeros((0, 0))
        self._squares = self._prices = np.zeros(0)

    def front(self, *, limit: float, enough: float = 0.0) -> list[Point]:
        """States of growing cost and shrinking predicted loss, from the cheapest on, until the cost would exceed *limit* or the
        predicted loss is *enough*.
        """
        found = _pareto([*self._upwards(limit, enough), *self._downwards(limit)])
        last = next((i for i, p in enumerate(found) if p.predicted <= enough), len(found) - 1)
        return found[: last + 1]

    def _upwards(self, limit: float, enough: float) -> Iterator[Point]:
        """From the cheapest state on, by the gain per cost."""
        state: _State | None = self._begin(self._cheapest)
        while state is not None:
            point = self._point(state)
            yield point
            grown = self._grow(state, limit) if point.predicted > enough else None
            state = None if grown is None else self._exchanged(grown)

    def _downwards(self, limit: float) -> Iterator[Point]:
        """From the state of least loss on, giving back what loses least for what it saves: it knows what is worth most together."""
        state: _State | None = self._begin(self._widest)
        while state is not None:
            if state.cost <= limit + _FREE:
                yield self._point(state)
            state = self._shrunk(state)
            if state is not None and state.cost <= limit + _FREE:
                state = self._exchanged(state)

    def _begin(self, precisions: Precisions) -> _State:
        base: Precisions = {g: self.model.plan.precision(g) for g in self.model.plan.groups}
        precisions = {**base, **precisions}
        state = _State(precisions, self.model.start(precisions), self.costs.total(precisions))
        self._vectors = np.zeros((len(self._moves), len(state.total)))
        self._squares, self._prices = np.zeros(len(self._moves)), np.full(len(self._moves), np.inf)
        self._refresh(state.precisions, range(len(self._moves)))
        return state

    def _point(self, state: _State) -> Point:
        loss = max(0.0, state.square + self.model.constant)
        return Point(dict(state.precisions), state.cost, loss)

    # --- moves -----------------------------------------------------------------------------------------------

    def _effect(self, precisions: Precisions, move: _Move) -> tuple[Vector | None, float, Precisions]:
        """What *move* adds to the sum, its price, and the precisions that it changes; None if it changes nothing."""
        changed: Precisions = {
            g: move.precision
            for g in move.groups
            if move.precision in self.model.options[g] and precisions[g] != move.precision
        }
        if not changed:
            return None, np.inf, changed
        of = self.costs.of
        price = sum(of[g].get(p, 0.0) - of[g].get(precisions[g], 0.0) for g, p in changed.items())
        return self.model.change(precisions, changed), price, changed

    def _refresh(self, precisions: Precisions, rows: Iterator[int] | npt.NDArray[np.int64] | range) -> None:
        for i in rows:
            vector, self._prices[i], _ = self._effect(precisions, self._moves[i])
            if vector is not None:
                self._vectors[i], self._squares[i] = vector, float(vector @ vector)

    def _best(self, state: _State, limit: float) -> tuple[int, float]:
        """The affordable move with the best gain per cost, and the square it leads to; -1 if none gains."""
        squares = state.square + 2 * (self._vectors @ state.total) + self._squares
        open_ = state.cost + self._prices <= limit + _FREE
        open_ &= squares < state.square * (1 - _LEAST_GAIN)
        if not open_.any():
            return -1, np.inf
        prices = np.maximum(np.where(open_, self._prices, 1.0), _FREE)
        rates = np.where(open_, (state.square - squares) / prices, -np.inf)
        i = int(rates.argmax())
        return i, float(squares[i])

    def _applied(self, state: _State, move: _Move) -> _State:
        vector, price, changed = self._effect(state.precisions, move)
        assert vector is not None
        made = _State({**state.precisions, **changed}, state.total + vector, state.cost + price)
        rows = np.unique(np.concatenate([self._near[g] for g in changed]))
        self._refresh(made.precisions, rows)
        return made

    def _grow(self, state: _State, limit: float) -> _State | None:
        i, _ = self._best(state, limit)
        return None if i < 0 else self._applied(state, self._moves[i])

    def _shrunk(self, state: _State) -> _State | None:
        """The state with one group cheaper that loses least for what it saves; None at the bottom."""
        squares = state.square + 2 * (self._vectors @ state.total) + self._squares
        saves = np.where(self._single & np.isfinite(self._prices), -self._prices, 0.0)
        if not (saves > _FREE).any():
            return None
        rates = np.where(saves > _FREE, (squares - state.square) / np.maximum(saves, _FREE), np.inf)
        return self._applied(state, self._moves[int(rates.argmin())])

    # --- exchanges -------------------------------------------------------------------------------------------

    def _exchanged(self, state: _State) -> _State:
        """*state*, improved by giving back what has become useless and by swaps at no higher cost."""
        budget = state.cost
        for _ in range(_EXCHANGES):
            better = self._swapped(state, budget)
            if better is None:
                return state
            state = better
        return state

    def _swapped(self, state: _State, budget: float) -> _State | None:
        """The best result of giving one group back, and taking the best affordable move instead where that is better."""
        best: tuple[float, _Move, int] | None = None
        goal = state.square * (1 - _LEAST_GAIN)
        for group, cheapest in self._cheapest.items():
            if state.precisions[group] == cheapest:
                continue
            back = _Move((group,), cheapest)
            given = self._applied(state, back)
            instead, square = self._best(given, budget)
            self._refresh(state.precisions, self._near[group])
            for found, index in ((given.square, -1), (square, instead)):
                if found < goal:
                    best, goal = (found, back, index), found
        if best is None:
            return None
        _, back, index = best
        state = self._applied(state, back)
        return state if index < 0 else self._applied(state, self._moves[index])


def _pareto(points: Iterable[Point]) -> list[Point]:
    """Those of *points* that no cheaper one is as good as, in growing cost."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.predicted)):
        if not kept or (point.predicted < kept[-1].predicted and point.cost > kept[-1].cost + _FREE):
            kept.append(point)
    return kept


def _moves(model: PlanModel) -> Iterator[_Move]:
    """One group, two that share a value, all around a value; each to every precision that one of them may have."""
    free = {g for g, o in model.options.items() if len(o) > 1}
    together: dict[tuple[str, ...], None] = {(g,): None for g in model.options if g in free}
    for term in model.terms:
        around = tuple(g for g in term.groups if g in free)
        pairs = [(a, b) for i, a in enumerate(around) for b in around[i + 1 :]]
        together.update(dict.fromkeys(pairs if len(around) <= _CLUSTER else pairs[:_CLUSTER]))
        if 2 < len(around) <= _CLUSTER:
            together[around] = None
    for groups in together:
        for precision in dict.fromkeys(p for g in groups for p in model.options[g]):
            yield _Move(groups, precision)
