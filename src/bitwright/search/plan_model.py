"""The loss of any choice of precisions, from a sketch: the squared length of a sum of vectors, no solving and no forward pass.

Every quantized value is a *term*. What it adds to the sum depends only on the precisions of the groups that make and read it,
so a move of one group changes a handful of terms, and a term is computed once for each combination of its neighbours. Errors of
constants share the first coordinates, where they add up or cancel; an activation has one coordinate for itself, the root of
what its rounding costs, for roundings are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bitwright.graph.graph import Graph
from bitwright.numerics.spec import QParams
from bitwright.plan.plan import Plan
from bitwright.plan.reads import read_edges
from bitwright.plan.target import Precision
from bitwright.search.error_sketch import ErrorSketch
from bitwright.search.sketch_file import Unit
from bitwright.search.thresholds import scaled

Vector = npt.NDArray[np.float64]
#: Group -> precision.
Precisions = dict[str, Precision]
#: A value's code width, widest last.
_WIDTHS: tuple[Precision, ...] = ("w4a8", "int8", "int16")


@dataclass(frozen=True)
class _Term:
    """A value and the groups that decide how it is read. *source*: the value whose parameters it shares, or itself."""

    value: str
    source: str
    groups: tuple[str, ...]


class PlanModel:
    """Predicted losses of plans that differ from *plan* (solved) in the precisions of groups only.

    *options*: group -> precisions it may have. *solve*: gives plans their parameters; asked once for each precision. *apart*:
    group -> loss measured without the sketch, because no gradient reaches it; it is added while the group is not float.
    """

    def __init__(
        self,
        sketch: ErrorSketch,
        plan: Plan,
        solve: Callable[[Plan], Plan],
        options: Mapping[str, Sequence[Precision]],
        *,
        apart: Mapping[str, float] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sketch, self.plan, self.options = sketch, plan, options
        self.graph: Graph = sketch.evaluator.graph
        self._group_of = {op: e.group for op, e in plan.ops.items() if e.quantizable}
        self._solved = {p: self._solve_all(plan, solve, options, p) for p in _WIDTHS}
        self._memo: dict[tuple[str, tuple[Precision, ...]], Vector] = {}
        self.terms = [self._term(name) for name in plan.values]
        sketch.measure(sketch.unmeasured(self._units()), progress=progress)
        self.terms_of: dict[str, list[_Term]] = {g: [] for g in plan.groups}
        for term in self.terms:
            for group in term.groups:
                self.terms_of[group].append(term)
        self._rows = sketch.rows * sketch.images
        activations = [t.value for t in self.terms if not self.graph.value(t.value).is_constant]
        self._place = {n: self._rows + i for i, n in enumerate(activations)}
        # Losses measured without the sketch add up as those of roundings do.
        first = self._rows + len(activations)
        self._apart = {g: (first + i, loss**0.5) for i, (g, loss) in enumerate((apart or {}).items())}
        self._size = first + len(self._apart)
        #: What is added to the squared length of a sum to make it a loss: nothing, unless there is a base.
        self.constant = self._base_constant() if sketch.base else 0.0

    def _in_base(self, group: str) -> bool:
        members = self.plan.groups[group]
        made = {o for m in members for o in self.graph.op(m).outputs}
        return any(reader in members or value in made for value, reader in self.sketch.base)

    @staticmethod
    def _solve_all(
        plan: Plan,
        solve: Callable[[Plan], Plan],
        options: Mapping[str, Sequence[Precision]],
        wanted: Precision,
    ) -> Plan:
        return solve(plan.with_precision([g for g, o in options.items() if wanted in o], wanted, ""))

    def _units(self) -> Iterator[Unit]:
        """Every unit that some choice of precisions can ask for, but for biases under steps of two widths, which come to little."""
        base = self.sketch.base
        for term in self.terms:
            for edge in self._possible(term.value):
                asked = [plan.qparams(term.source) for plan in self._solved.values()]
                for q in dict.fromkeys([*asked, None] if edge in base else asked):
                    if q != base.get(edge):
                        yield Unit(*edge, q)
        for edge in base:
            yield Unit(*edge, None)

    # --- terms -----------------------------------------------------------------------------------------------

    def _term(self, name: str) -> _Term:
        source = name
        while (shared := self.plan.values[source].same_as) is not None and shared in self.plan.values:
            source = shared
        groups: dict[str, None] = {}
        for value in dict.fromkeys([name, source]):
            groups.update(dict.fromkeys(self._touching(value)))
        producer = self.graph.value(name).producer
        if producer is not None and self.graph.op(producer).passthrough:
            for held in self.graph.op_inputs(producer)[:1]:
                groups.update(dict.fromkeys(self._touching(held) if held in self.plan.values else ()))
        return _Term(name, source, tuple(groups))

    def _touching(self, name: str | None) -> Iterable[str]:
        assert name is not None
        value = self.graph.value(name)
        ops = [*([value.producer] if value.producer else []), *(r.op for r in value.readers)]
        return [self._group_of[op] for op in ops if op in self._group_of]

    def _precision_of(self, precisions: Mapping[str, Precision], op: str) -> Precision:
        group = self._group_of.get(op)
        return "float" if group is None else precisions[group]

    def _qparams(self, precisions: Mapping[str, Precision], name: str) -> QParams | None:
        """The parameters of *name* in the plan of these *precisions* (docs/numerics.md §4: whose width a value has)."""
        value = self.graph.value(name)
        readers = [self._precision_of(precisions, r.op) for r in value.readers]
        made = "float" if value.producer is None else self._precision_of(precisions, value.producer)
        asked = [made] if made != "float" else [p for p in readers if p != "float"]
        width: Precision = max(asked, key=_WIDTHS.index, default="int8")
        return self._solved[width].qparams(name)

    def _possible(self, name: str) -> list[tuple[str, str]]:
        """The reads of the value *name* if all operators were quantized."""
        return read_edges(self.graph.value(name), self._group_of.__contains__)

    def _edges(self, precisions: Mapping[str, Precision], name: str) -> list[tuple[str, str]]:
        return read_edges(self.graph.value(name), lambda op: self._precision_of(precisions, op) != "float")

    def _vector(self, term: _Term, precisions: Mapping[str, Precision]) -> Vector:
        """What *term* adds: to the constants' coordinates `[rows * images]`, or to the one of its own `[1]`."""
        key = (term.value, tuple(precisions[g] for g in term.groups))
        if key not in self._memo:
            q = self._qparams(precisions, term.source)
            edges: dict[tuple[str, str], QParams] = {}
            if q is not None and not self._passed_on(term, precisions, q):
                edges = dict.fromkeys(self._edges(precisions, term.value), q)
            moved = self._requantized(term, precisions, edges)
            if moved is not None:
                edges = {moved: self.sketch.base[moved]}
            zero = torch.zeros(self.sketch.rows, self.sketch.images, dtype=torch.float64)
            total = sum((self.sketch.error(edge, asked) for edge, asked in edges.items()), zero)
            made = scaled(self.sketch, total.numpy())
            if term.value in self._place:
                made = np.array([np.linalg.norm(made)])
            self._memo[key] = made
        return self._memo[key]

    def _passed_on(self, term: _Term, precisions: Mapping[str, Precision], q: QParams) -> bool:
        """Whether the producer passes on codes of these very parameters: reading them again changes nothing."""
        producer = self.graph.value(term.value).producer
        if producer is None or not self.graph.op(producer).passthrough or term.source == term.value:
            return False
        source = self.graph.op_inputs(producer)[0]
        return source is not None and (source, producer) in self._edges(precisions, source)

    def _requantized(
        self,
        term: _Term,
        precisions: Mapping[str, Precision],
        edges: Mapping[tuple[str, str], QParams],
    ) -> tuple[str, str] | None:
        """The read of a base that only moves: an operator that passes on codes reads float now, and all readers of its output see
        what the base's read made of it. The error is the same.
        """
        producer = self.graph.value(term.value).producer
        op = None if producer is None else self.graph.op(producer)
        if producer is None or op is None or not op.passthrough or len(op.outputs) != 1:
            return None
        source = self.graph.op_inputs(producer)[0]
        if source is None or (source, producer) not in self.sketch.base:
            return None
        q = self.sketch.base[(source, producer)]
        moved = (source, producer) not in self._edges(precisions, source)
        same = set(edges) == set(self._possible(term.value)) and all(e == q for e in edges.values())
        return (source, producer) if moved and same else None

    # --- losses ----------------------------------------------------------------------------------------------

    def start(self, precisions: Mapping[str, Precision]) -> Vector:
        """The sum of all terms, scaled so that its squared length, plus `constant`, is a loss."""
        total = np.zeros(self._size)
        for term in self.terms:
            self._add(total, term, precisions, 1.0)
        for group, (place, root) in self._apart.items():
            total[place] = root if precisions[group] != "float" else 0.0
        return total

    def change(self, precisions: Precisions, move: Mapping[str, Precision]) -> Vector:
        """What *move* adds to the sum."""
        after = {**precisions, **move}
        terms = {t.value: t for g in move for t in self.terms_of[g]}
        total = np.zeros(self._size)
        for term in terms.values():
            self._add(total, term, after, 1.0)
            self._add(total, term, precisions, -1.0)
        for group in move:
            if group in self._apart:
                place, root = self._apart[group]
                total[place] = root * ((after[group] != "float") - (precisions[group] != "float"))
        return total

    def _add(self, total: Vector, term: _Term, precisions: Mapping[str, Precision], sign: float) -> None:
        place = self._place.get(term.value)
        where = slice(0, self._rows) if place is None else slice(place, place + 1)
        total[where] += sign * self._vector(term, precisions)

    def _base_constant(self) -> float:
        """The base's true loss, without what the model itself makes of the base."""
        told = self.sketch.squares(self.sketch.base).mean(1) @ self.sketch.row_weights
        apart = sum(root**2 for group, (_, root) in self._apart.items() if self._in_base(group))
        found: float = float(self.sketch.base_losses.mean()) - float(told) - apart
        return found

    def neighbourhood(self, groups: Iterable[str]) -> frozenset[str]:
        """The groups whose precisions decide what a change of *groups* does, themselves among them."""
        return frozenset(g for group in groups for t in self.terms_of[group] for g in (*t.groups, group))
