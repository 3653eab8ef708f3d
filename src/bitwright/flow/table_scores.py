"""How good a network is with some of its tables in fixed point: one number for each choice, measured once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bitwright.exporters.integer import lower
from bitwright.flow.accuracy import Accuracy, accuracy_of
from bitwright.flow.bench import Bench
from bitwright.flow.convert import QuantizedModel
from bitwright.flow.model_source import import_object
from bitwright.flow.progress import Watcher
from bitwright.flow.settings import Settings
from bitwright.flow.tables import TableKey, build_tables
from bitwright.graph.replay import Replay
from bitwright.numerics.lut import LookupTable
from bitwright.ops.table import with_tables
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.evaluator import Run
from bitwright.search.metric import Evaluate, measured
from bitwright.search.simulated import SimulatedModel
from bitwright.search.state import SearchState


@dataclass(frozen=True)
class Score:
    """*cosine*: to the float network. *metric*: the user's, None without one. More is better. *accuracy*: where labels are known."""

    cosine: float
    metric: float | None = None
    accuracy: Accuracy | None = None

    @property
    def value(self) -> float:
        """What decides: the metric, else the cosine."""
        return self.cosine if self.metric is None else self.metric

    def to_json(self) -> dict[str, float | None]:
        """`cosine`, `metric`; `top1`, `top5` if known."""
        found = {"cosine": self.cosine, "metric": self.metric}
        return found if self.accuracy is None else {**found, **vars(self.accuracy)}

    def lost(self, other: Score) -> float:
        """What *other* has less than this."""
        return self.value - other.value

    def exceeds(self, other: Score, tolerance: float) -> bool:
        """Whether *other* has less than this by more than *tolerance*, or one of them is NaN."""
        return not self.lost(other) <= tolerance


@dataclass(frozen=True)
class Form:
    """A form of the network. *run*: by value names. *model*: as a user calls it. *key*: under which its score is kept."""

    run: Run
    model: nn.Module
    key: str


class TableScores:
    """Scores of plans of *bench*, with tables in fixed point or put back to float. *state*: scores measured before; new ones are added."""

    def __init__(self, bench: Bench, settings: Settings, state: SearchState | None = None) -> None:
        self.bench, self._state = bench, state or SearchState(None, "")
        self._where = f"--evaluate {settings.evaluate}"
        self._evaluate: Evaluate | None = None
        if settings.evaluate is not None:
            self._evaluate = import_object(settings.evaluate, "--evaluate")
        #: By the plan's identity; the plan is kept so that no other can have it.
        self._tables: dict[int, tuple[Plan, dict[str, LookupTable]]] = {}
        self._made: dict[TableKey, LookupTable] = {}

    def tables(self, plan: Plan) -> dict[str, LookupTable]:
        """The tables of *plan* (solved). Each is built once, however many plans have it."""
        if id(plan) not in self._tables:
            made = build_tables(self.bench.graph, plan, self.bench.statistics, known=self._made)
            self._tables[id(plan)] = (plan, made)
        return self._tables[id(plan)][1]

    def score(self, plan: Plan, floating: Collection[str] = ()) -> Score:
        """The score of *plan* with all its tables in fixed point but those of the operators *floating*."""
        return self.of(self.simulated(plan, floating))

    def exact(self) -> Form:
        """The float network."""
        return Form(self.bench.evaluator.running(None), SimulatedModel(self.bench.graph, None), "float")

    def simulated(self, plan: Plan, floating: Collection[str] = ()) -> Form:
        """*plan* (solved) with all its tables in fixed point but those of the operators *floating*."""
        tables = {n: t for n, t in self.tables(plan).items() if n not in floating}
        graph = with_tables(self.bench.graph, tables)
        reads = quantized_reads(graph, plan)
        replay = Replay(graph)
        key = _key("simulated", plan, tables)
        return Form(lambda inputs: replay.run(inputs, reads), SimulatedModel(graph, plan), key)

    def integer(self, plan: Plan) -> Form:
        """The integer model of *plan*, on ONNX Runtime."""
        graph = self.bench.graph
        lowered = lower(graph, plan, self.bench.target, self.tables(plan))
        model = QuantizedModel.of(graph, plan, lowered.model)
        return Form(model.outputs, model, _key("integer", plan, self.tables(plan)))

    def lost_alone(self, plan: Plan, name: str) -> float:
        """The mean loss of the network with the one table of the operator *name* in fixed point, against none: by true runs."""
        return self._once(_key("alone", plan, [name]), lambda: self._lost_alone(plan, name))

    def _lost_alone(self, plan: Plan, name: str) -> float:
        evaluator, graph = self.bench.evaluator, self.bench.graph
        with_one = with_tables(graph, {name: self.tables(plan)[name]})
        plain, changed = Replay(graph), Replay(with_one)
        reads, changed_reads = quantized_reads(graph, plan), quantized_reads(with_one, plan)
        rows = []
        for inputs, _ in evaluator.pairs():
            count = evaluator.samples(inputs)
            before = evaluator.scored(plain.run(inputs, reads), count)
            after = evaluator.scored(changed.run(inputs, changed_reads), count)
            evaluator.count(inputs, 2.0)
            rows.append(evaluator.similarity.losses(before, after)[0])
        return float(torch.cat(rows).mean())

    def of(self, form: Form) -> Score:
        """The cosine and metric of any form of the network, each measured once."""
        cosine = self._once(f"cosine {form.key}", lambda: self.bench.evaluator.evaluate_run(form.run))
        evaluate = self._evaluate
        if evaluate is None:
            return Score(cosine)
        return Score(
            cosine, self._once(f"metric {form.key}", lambda: measured(evaluate, form.model, self._where))
        )

    def accuracies(self, forms: Mapping[str, Form], watcher: Watcher) -> dict[str, Accuracy]:
        """The accuracy of each of *forms* on all labelled samples, measured once, in one pass over them; empty without labels."""
        labels = self.bench.dataset.labels
        if labels is None:
            return {}
        seen = hashlib.sha256(
            json.dumps(labels.tolist()).encode()
        ).hexdigest()  # the state's own key does not know them
        keys = {name: f"accuracy {form.key} {seen}" for name, form in forms.items()}
        missing = {keys[name]: form.run for name, form in forms.items() if keys[name] not in self._state}
        if missing:
            watcher.stage("measuring accuracy", len(self.bench.dataset))
            for key, found in accuracy_of(self.bench, missing, watcher).items():
                self._state.put(key, vars(found))
        return {name: Accuracy(**self._state.get(key)) for name, key in keys.items()}

    def _once(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._state:
            self._state.put(key, measure())
        return float(self._state.get(key))


def _key(form: str, plan: Plan, tables: Collection[str]) -> str:
    """What a score is kept under: the contents of the plan, its tables' settings among them, and which tables are in fixed point."""
    return hashlib.sha256(json.dumps([form, plan.to_json(), sorted(tables)]).encode()).hexdigest()
