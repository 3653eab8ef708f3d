"""Plans measured by a user's own function: `evaluate(model) -> float`, on the simulated network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn

from bitwright.errors import BitwrightError, DataError
from bitwright.graph.graph import Graph
from bitwright.plan.plan import Plan
from bitwright.search.jobs import Progress, Runner, run_jobs
from bitwright.search.simulated import SimulatedModel
from bitwright.search.state import SearchState

#: A user's measure of a network; it is given a `SimulatedModel`.
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class MetricTask:
    """Jobs are plans as JSON (None: the float network), results what the user's function finds of them.

    *load*: gives the function, and is called once in each worker; it must be possible to pickle it, which the function
    itself need not be. *where*: what messages call the function.
    """

    graph: Graph
    load: Callable[[], Evaluate]
    where: str = "--evaluate"

    def open(self) -> Callable[[Any], float]:
        """See `Task`."""
        evaluate = self.load()

        def measure(job: Any) -> float:
            plan = None if job is None else Plan.from_json(job)
            return measured(evaluate, SimulatedModel(self.graph, plan), self.where)

        return measure


def measured(evaluate: Evaluate, model: nn.Module, where: str) -> float:
    """What the user's function, called *where* in messages, finds of *model*. *raises* `DataError` if that is no finite number."""

    def wrong(found: str) -> DataError:
        return DataError(
            where,
            expected="a function of a model that returns a finite number",
            found=found,
            remedy="Mend the function.",
        )

    try:
        found: Any = evaluate(model)
    except BitwrightError:
        raise
    except Exception as e:
        raise wrong(f"{type(e).__name__}: {e}") from e
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, Real):
        raise wrong(type(found).__name__)
    if not math.isfinite(found):
        raise wrong(str(found))
    return float(found)


def measure_metric(
    task: MetricTask,
    plans: Mapping[str, Plan | None],
    runner: Runner,
    *,
    state: SearchState | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """What the user's function finds of each plan (None: the float network), by name.

    *state*: measurements to resume from and add to; they are kept by the names that *plans* have.
    *raises* `DataError` for a function that fails or returns something else than a finite number.
    """
    jobs = {name: None if plan is None else plan.to_json() for name, plan in plans.items()}
    return run_jobs(task, jobs, runner, state=state or SearchState(None, ""), progress=progress)
