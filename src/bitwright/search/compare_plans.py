"""Whole plans compared with the float network, many at a time: what `Evaluator.evaluate` does, wherever there is room."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.search.evaluator import Evaluator
from bitwright.search.jobs import Progress, Runner, run_jobs
from bitwright.search.similarity import Similarity
from bitwright.search.state import SearchState


@dataclass(frozen=True)
class PlanTask:
    """Jobs are plans as JSON, results their mean similarities on *chunks* of samples."""

    graph: Graph
    similarity: Similarity
    chunks: tuple[Mapping[str, Tensor], ...]

    def open(self) -> Callable[[Any], float]:
        """See `Task`."""
        evaluator = Evaluator(self.graph, lambda _: self.chunks, self.similarity)
        return lambda job: evaluator.evaluate(Plan.from_json(job))


def compare_plans(
    evaluator: Evaluator,
    plans: Mapping[str, Plan],
    runner: Runner,
    *,
    state: SearchState | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The mean similarity of each plan to the float network, by name.

    Samples are run in the evaluator's own chunks: with the same number of threads the results are those of
    `evaluator.evaluate`. *state*: measurements to resume from and add to, by the names that *plans* have.
    """
    state = state or SearchState(None, "")
    missing = [name for name in plans if name not in state]
    chunks = [{name: x.clone() for name, x in chunk.items()} for chunk in evaluator.chunks()]
    task = PlanTask(evaluator.graph.without_onnx_model(), evaluator.similarity, tuple(chunks))
    found = run_jobs(
        task, {name: p.to_json() for name, p in plans.items()}, runner, state=state, progress=progress
    )
    for chunk in chunks:
        evaluator.count(chunk, len(missing))
    return found
