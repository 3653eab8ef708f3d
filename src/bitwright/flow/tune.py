"""The main job: float -> int8 -> search -> mixed model -> export -> proof."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.flow.bench import Bench, open_bench
from bitwright.flow.choosing import choose_precisions, choose_thresholds, measured_int8, nothing_to_choose
from bitwright.flow.exports import for_exports, make_exports
from bitwright.flow.limits import check_search, cost_limit
from bitwright.flow.outputs import check_writable, write_search, write_tune
from bitwright.flow.progress import Silence, Watcher
from bitwright.flow.ranking import open_runner, open_state, rank, state_path
from bitwright.flow.result import Chosen, Stage, Tuned, integer_stage, with_accuracy
from bitwright.flow.settings import Settings
from bitwright.graph.graph import Graph
from bitwright.search.joint_precision import Goal
from bitwright.search.sensitivity import Sensitivity
from bitwright.search.true_runs import TrueRuns


class _Clock:
    """Seconds of each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        self.seconds["total"] = now - self._start


def tune(
    model: str | Path | nn.Module | Graph,
    data: object,
    *,
    output: str | Path,
    settings: Settings | None = None,
    watcher: Watcher | None = None,
    example_inputs: Any = None,
) -> Tuned:
    """Quantize *model*, find its sensitive operators, repair it, export it, prove it; write everything to *output*.

    *data*: samples to compare and measure on, and to calibrate on unless the settings name other `calibration_data`.

    A target that is missed is no error: the result says so (`reached`) and holds the best plan found. *raises* the
    errors of every stage; `ProofError` if ONNX Runtime computes something else than the simulation.
    """
    settings, watcher = for_exports(settings or Settings()), watcher or Silence()
    folder = check_writable(Path(output))
    clock = _Clock()
    bench = open_bench(model, data, settings, watcher, example_inputs=example_inputs)
    clock.lap("prepare")
    check_search(bench, settings)
    int8 = measured_int8(bench, watcher)
    clock.lap("int8")
    rows: tuple[Sensitivity, ...] = ()
    enough = int8.cosine >= settings.expected_cos
    if enough:
        search = nothing_to_choose(bench.plan, int8)
    else:
        rows, search = repair(bench, int8, settings, folder, watcher, clock.lap)
        write_search(folder, bench, rows, search.choice, int8.cosine)
    stages = {
        "float": Stage(None, 1.0),
        "int8": int8,
        "tuned": search.tuned,
        "mixed": Stage(search.choice.plan, search.choice.similarity),
    }
    if bench.dataset.labels is not None:
        stages = with_accuracy(bench, stages, watcher)
        clock.lap("accuracy")
    exports = make_exports(bench, search.choice.plan, settings, watcher, clock.lap)
    if exports.integer is not None:
        stages |= integer_stage(bench, exports, watcher)
        clock.lap("integer")
    result = Tuned(
        bench,
        stages,
        rows,
        search,
        exports,
        clock.seconds,
        settings.expected_cos,
    )
    write_tune(folder, result, watcher)
    if not enough:
        state_path(settings, folder, "sensitivity").unlink(missing_ok=True)
    return result


def repair(
    bench: Bench,
    int8: Stage,
    settings: Settings,
    folder: Path,
    watcher: Watcher,
    lap: Callable[[str], None] = lambda _: None,
) -> tuple[tuple[Sensitivity, ...], Chosen]:
    """Rank the operators, choose thresholds, then precisions until the target is met; at most a tenth of the groups become
    float unless the settings say otherwise. *lap*: called with the name of each part when it ends.
    """
    usual = max(1, len(bench.plan.groups) // 10)
    goal = Goal(settings.expected_cos, cost_limit(settings, usual))
    with open_state(bench, settings, folder, watcher, search="sensitivity") as state:
        runs = TrueRuns(bench.evaluator, runner=open_runner(settings), state=state)
        ranking = rank(bench, settings, state, folder, watcher)
        lap("sensitivity")
        tuned, kept = choose_thresholds(bench, runs, ranking, int8, settings, watcher)
        lap("thresholds")
        chosen = choose_precisions(bench, runs, ranking, tuned, goal, settings, watcher)
        lap("choice")
    return ranking.rows, replace(chosen, kept=kept)
