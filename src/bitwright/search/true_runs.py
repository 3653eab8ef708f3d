"""True runs of a job's plans: wherever there is room, each of them made once, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.plan.reads import quantized_reads
from bitwright.search.compare_plans import compare_plans
from bitwright.search.evaluator import Evaluator, Told
from bitwright.search.jobs import Runner
from bitwright.search.similarity import COSINE
from bitwright.search.state import SearchState


class Runs(Protocol):
    """What compares plans with the float network by true runs: an `Evaluator`, or `TrueRuns`."""

    graph: Graph

    def evaluate(self, plan: Plan) -> float:
        """Mean similarity of *plan* to the float network over all samples."""
        ...

    def evaluate_all(self, plans: Mapping[str, Plan], progress: Told | None = None) -> dict[str, float]:
        """The same of each plan, by name; they may be run in any order, or at once."""
        ...


class TrueRuns:
    """Runs of whole plans, each made once and kept in *state* under what the plan computes: an interrupted job goes on from there.

    *runner*: where the plans of `evaluate_all` run; None: in this process, as those of `evaluate` do in any case.
    """

    def __init__(
        self, evaluator: Evaluator, *, runner: Runner | None = None, state: SearchState | None = None
    ) -> None:
        self.graph = evaluator.graph
        self._by_loss = evaluator
        # A similarity is a cosine whatever loss ranks operators, and a user's loss may not go to other processes.
        self._evaluator = evaluator.with_loss(COSINE)
        self._runner = runner
        self.state = state or SearchState(None, "")

    def evaluate(self, plan: Plan) -> float:
        """Mean similarity of *plan* to the float network over all samples."""
        return self._kept(_key(plan), lambda: self._evaluator.evaluate(plan))

    def loss(self, plan: Plan) -> float:
        """Mean loss that ranks operators, of the whole network under *plan*."""
        evaluator, reads = self._by_loss, quantized_reads(self.graph, plan)
        return self._kept(f"loss {plan.fingerprint}", lambda: float(evaluator.losses(reads).mean()))

    def evaluate_all(self, plans: Mapping[str, Plan], progress: Told | None = None) -> dict[str, float]:
        """The same of each plan, by name. *progress*: called for each, also for those that were run before.

        *raises* the first error of the *runner*.
        """
        keys = {name: _key(plan) for name, plan in plans.items()}

        def tell(key: str) -> None:
            for name in (n for n, k in keys.items() if k == key):
                if progress:
                    progress(name, self.state.get(key))

        for key in dict.fromkeys(k for k in keys.values() if k in self.state):
            tell(key)
        self._run({keys[n]: plan for n, plan in plans.items() if keys[n] not in self.state}, tell)
        return {name: float(self.state.get(key)) for name, key in keys.items()}

    def _run(self, missing: Mapping[str, Plan], tell: Callable[[str], None]) -> None:
        if self._runner is None:
            for key, plan in missing.items():
                self.evaluate(plan)
                tell(key)
        elif missing:
            compare_plans(
                self._evaluator,
                missing,
                self._runner,
                state=self.state,
                progress=lambda done, total, key: tell(key),
            )

    def _kept(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self.state:
            self.state.put(key, measure())
        return float(self.state.get(key))


def _key(plan: Plan) -> str:
    return f"run {plan.fingerprint}"
