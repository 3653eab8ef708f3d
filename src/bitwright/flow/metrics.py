"""A user's own metric of plans, as a part of jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bitwright.flow.bench import Bench
from bitwright.flow.model_source import import_object
from bitwright.flow.progress import Watcher
from bitwright.flow.ranking import METRIC_SEARCH, open_runner, open_state
from bitwright.flow.settings import Settings
from bitwright.plan.plan import Plan
from bitwright.search.jobs import Serial
from bitwright.search.metric import MetricTask, measure_metric
from bitwright.search.sensitivity import Sensitivity


def measure_plans(
    bench: Bench, plans: Mapping[str, Plan | None], settings: Settings, folder: Path, watcher: Watcher
) -> dict[str, float]:
    """The metric `settings.evaluate` of each plan (None: float) by name, wherever the settings say, resuming what was interrupted."""
    spec = settings.evaluate
    assert spec is not None
    import_object(spec, "--evaluate")  # a wrong name is better said before any worker starts
    load = partial(import_object, spec, "--evaluate")
    task = MetricTask(bench.graph.without_onnx_model(), load, f"--evaluate {spec}")
    keys = {name: "float" if plan is None else plan.fingerprint for name, plan in plans.items()}
    state = open_state(bench, settings, folder, watcher, search=METRIC_SEARCH)
    watcher.stage("evaluating", len(plans))
    found = measure_metric(
        task,
        {keys[name]: plan for name, plan in plans.items()},
        open_runner(settings) or Serial(),
        state=state,
        progress=lambda done, total, name: watcher.advance(1),
    )
    return {name: found[key] for name, key in keys.items()}


def metrics_alone(
    bench: Bench, rows: Sequence[Sensitivity], settings: Settings, folder: Path, watcher: Watcher
) -> dict[str, float]:
    """The metric with each group alone at int8, by its best method; the float network's under the empty name."""
    activations = [n for n, e in bench.plan.values.items() if e.role == "activation"]
    plans: dict[str, Plan | None] = {"": None}
    for row in rows:
        solved = bench.solver.solve(bench.plan.with_methods(dict.fromkeys(activations, row.method)))
        others = [g for g in bench.plan.groups if g != row.name]
        plans[row.name] = solved.with_precision(others, "float", "only one operator is quantized")
    return measure_plans(bench, plans, settings, folder, watcher)
